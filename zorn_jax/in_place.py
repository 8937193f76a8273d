"""Updates parameters block by block, with no gradient of their size."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from zorn_jax import tiles, types
from zorn_jax.estimators import Estimator, StreamingEstimator


def apply(
  optimizer: optax.GradientTransformation,
  blocks: types.PyTree,
  params: types.Params,
  opt_state: Any,
  scale: Any = 1.0,
) -> tuple[types.Params, Any, jax.Array]:
  """What `optimizer.update` and `optax.apply_updates` do, in blocks.

  Args:
    optimizer: Treats every element of the parameters alone, and in the same
      way wherever it is in its leaf.
    blocks: The gradient as a tree of functions, one for each leaf, (window) ->
      a float32 block of it.
    params: The parameters.
    opt_state: State of the optimiser.
    scale: What its updates are multiplied with.
  Returns:
    The new parameters, the new state, and the Euclidean norm of the gradient.
    The optimiser works in float32; what it returns is rounded once, to the
    types of the parameters and of its state.
  Raises:
    ValueError: If a part of the state belongs to a parameter but has not its
      shape.
  """
  leaves, treedef = jax.tree.flatten(params)
  if not leaves:
    _, opt_state = optimizer.update(params, opt_state, params)
    return params, opt_state, jnp.zeros(())
  values, state_treedef = jax.tree.flatten(opt_state)
  owners = _owners(optimizer, opt_state, treedef)
  for value, owner in zip(values, owners, strict=True):
    if owner >= 0 and value.shape != leaves[owner].shape:
      raise ValueError(
        "an update in blocks needs an optimiser that treats every element "
        f"alone, got a state of shape {value.shape} for a parameter of shape "
        f"{leaves[owner].shape}. Choose another one, or use its update."
      )

  def step(grads, old, own):
    """New leaves and new states by their places, of some leaves alone."""
    tree = lambda given: treedef.unflatten(
      [given.get(index) for index in range(len(leaves))]
    )
    parts = [
      value if owner < 0 else own.get(place)
      for place, (value, owner) in enumerate(zip(values, owners, strict=True))
    ]
    wide = {
      index: x.astype(jnp.promote_types(x.dtype, jnp.float32))
      for index, x in old.items()
    }
    updates, after = optimizer.update(
      tree(grads), state_treedef.unflatten(parts), tree(wide)
    )
    updates = dict(zip(sorted(old), jax.tree.leaves(updates), strict=True))
    new = {
      i: optax.apply_updates(x, scale * updates[i]) for i, x in old.items()
    }
    kept = [i for i, owner in enumerate(owners) if owner < 0 or i in own]
    after = dict(zip(kept, jax.tree.leaves(after), strict=True))
    return new, {i: x.astype(values[i].dtype) for i, x in after.items()}

  def own(index):
    return {i: values[i] for i, owner in enumerate(owners) if owner == index}

  blocks = treedef.flatten_up_to(blocks)
  small, large = [], []
  for index, leaf in enumerate(leaves):
    (small if leaf.size <= tiles.largest() else large).append(index)
  # All in one step, as of one tree: XLA then rounds what they share as it does
  # there, on any number of devices.
  grads = {index: blocks[index](None) for index in small}
  total = sum(map(tiles.squares, grads.values()), jnp.zeros(()))
  old = {index: leaves[index] for index in small}
  states = {i: x for index in small for i, x in own(index).items()}
  if not small:  # Counters advance with a leaf of no elements.
    grads = old = {0: jnp.zeros(0)}
    states = {i: jnp.zeros(0, x.dtype) for i, x in own(0).items()}
  moved, states = step(grads, old, states)

  for index in large:
    places = list(own(index))

    def move(grads, old, index=index, places=places):
      param, *moments = old
      moments = dict(zip(places, moments, strict=True))
      new, after = step({index: grads}, {index: param}, moments)
      return [new[index], *(after[place] for place in places)]

    arrays = [leaves[index], *own(index).values()]
    (moved[index], *new), squares = tiles.update(arrays, blocks[index], move)
    states |= dict(zip(places, new, strict=True))
    total += squares

  params = treedef.unflatten([moved[i] for i in range(len(leaves))])
  opt_state = state_treedef.unflatten([states[i] for i in range(len(values))])
  return params, opt_state, jnp.sqrt(total)


def gradient(blocks: types.PyTree, params: types.Params) -> types.Grads:
  """The gradient whose blocks are given, as float32 arrays."""

  def form(param, block):
    zeros = jnp.zeros(param.shape, jnp.float32)
    (whole,), _ = tiles.update([zeros], block, lambda values, old: [values])
    return whole

  return jax.tree.map(form, params, blocks)


def _owners(optimizer, opt_state, treedef):
  """For each leaf of the state the index of its parameter; -1 for others."""
  masked = lambda x: isinstance(x, optax.MaskedNode)
  try:
    owners = optax.tree.map_params(
      optimizer,
      lambda x, index: x if masked(x) else index,
      opt_state,
      treedef.unflatten(range(treedef.num_leaves)),
      transform_non_params=lambda x: -1,
      is_leaf=masked,
    )
  except TypeError as error:
    raise ValueError(
      "an update in blocks needs an optimiser that tells whose its states are, "
      f"got {error}. Give optax.multi_transform its labels as a tree, not as a "
      "function."
    ) from error
  return jax.tree.leaves(owners)


def update_in_place(
  estimator: Estimator | StreamingEstimator,
  optimizer: optax.GradientTransformation,
  losses: jax.Array,
  params: types.Params,
  opt_state: Any,
  state: Any,
  key: types.Key,
) -> tuple[types.Params, Any, Any]:
  """Estimates a gradient and takes a step with it, block by block.

  The gradient, of the size of the parameters, is never there. Compile it with
  `params` and `opt_state` donated, so that they are changed where they lie:
  SGD then needs no memory beside the parameters, momentum and Adam none beside
  them and their own one or two averages::

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, losses, key):
      params, opt_state, _ = zorn_jax.update_in_place(
        estimator, optimizer, losses, params, opt_state, (), key
      )
      return params, opt_state

  Args:
    estimator: One whose gradient is a sum of its directions: not with
      :func:`zorn_jax.adaptive`, :func:`zorn_jax.mapped`,
      :func:`zorn_jax.grouped` or :func:`zorn_jax.sanger_spsa`.
    optimizer: Treats every element of the parameters alone, such as
      `optax.sgd`, `optax.adam`, `optax.adamw` and chains of them, with
      schedules and masks. One that clips by the norm, normalises, or adds
      noise does not.
    losses: [n, q], as `estimator.query` has them.
    params: The parameters.
    opt_state: State of the optimiser.
    state: State of the estimator.
    key: The key that `query` had.
  Returns:
    The new parameters, the new state of the optimiser, and that of the
    estimator: those of `estimator.update`, `optimizer.update` and
    `optax.apply_updates` up to rounding. The gradient is float32.
  Raises:
    ValueError: If the estimator has no gradient in blocks, or the optimiser
      is seen to treat elements together.
  """
  if estimator.blocks is None:
    raise ValueError(
      "the gradient of this estimator cannot be had in blocks: its directions "
      "are mapped or grouped, or it works on the whole gradient. Use "
      "estimator.update and optimizer.update."
    )
  blocks, state = estimator.blocks(losses, params, state, key)
  params, opt_state, _ = apply(optimizer, blocks, params, opt_state)
  return params, opt_state, state
