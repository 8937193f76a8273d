"""The spine of the estimators: where a probe is queried, what it says."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zorn_jax import directions, probe_map as probe_maps, types
from zorn_jax.estimators import shaping as shapings
from zorn_jax.estimators.types import Estimator, LossFn, UpdateFn

# (losses, state, key) -> (keys [n], coefficients [n], state).
TermsFn = Callable[..., tuple[types.Key, jax.Array, Any]]

# Folded into a probe's key for its second direction; no leaf has this index.
_SECOND = 2**32 - 1


class Probes(NamedTuple):
  """What an estimator does with the probes whose keys it is given.

  Attributes:
    query: (loss_fn, params, batch, keys [n]) -> losses [n, q].
    slopes: (losses [n, q]) -> estimated derivatives along the directions [n].
    weights: (losses [n, q]) -> coefficients of the directions [n].
    sums: (terms) -> an estimator's `update` and `blocks`; see :func:`sums`.
    queries_per_step: Number of forward passes that `query` runs.
    num_losses: As in :class:`Estimator`.
  """

  query: Callable[..., jax.Array]
  slopes: Callable[[jax.Array], jax.Array]
  weights: Callable[[jax.Array], jax.Array]
  sums: Callable[[TermsFn], tuple[UpdateFn, UpdateFn | None]]
  queries_per_step: int
  num_losses: int


def probes(
  epsilon: Any,
  num_probes: int,
  points: tuple[tuple[float, float], ...],
  slopes: Callable[[jax.Array], jax.Array],
  *,
  clean: bool,
  direction: directions.Direction | None,
  probe_map: probe_maps.ProbeMap | None,
  shaping: str,
  batch_per_probe: bool,
) -> Probes:
  """Queries the loss at θ + ε (a z + b u) for every point (a, b).

  Args:
    epsilon: Smoothing radius; a positive number, or a traced scalar.
    num_probes: Directions n per step.
    points: Multiples (a, b) of the probe's direction z and of its second
      direction u, which is drawn only where some b is not zero.
    slopes: (losses [n, q]) -> derivatives along z [n].
    clean: Whether the loss at θ comes first.
    direction: Distribution of z and u; dense signs unless given.
    probe_map: How many probes run at once; all of them unless given.
    shaping: Name of a function of the slopes.
    batch_per_probe: Whether probe i sees batch[i] alone.
  Returns:
    :class:`Probes`.
  Raises:
    ValueError: If `epsilon` or `num_probes` is not positive, or `shaping` is
      unknown.
  """
  check(epsilon, num_probes, shaping)
  direction = direction or directions.rademacher()
  probe_map = probe_map or probe_maps.sequential()
  second = any(b for _, b in points)

  def query(loss_fn, params, batch, keys):
    loss_fn = scalar(loss_fn)

    def probe_losses(key, batch):
      z = direction.sample(key, params)
      if second:
        u = direction.sample(jax.random.fold_in(key, _SECOND), params)

      def at(point):
        a, b = epsilon * point
        theta = direction.perturb(params, z, a)
        if second:
          theta = direction.perturb(theta, u, b)
        return loss_fn(theta, batch)

      return jax.vmap(at)(jnp.asarray(points, jnp.float32))

    if batch_per_probe:
      check_batch(batch, num_probes)
      losses = probe_map.map(lambda x: probe_losses(*x), (keys, batch))
      if clean:
        first = probe_map.map(lambda x: loss_fn(params, x[1]), (keys, batch))
    else:
      losses = probe_map.map(lambda key: probe_losses(key, batch), keys)
      if clean:
        first = jnp.full(num_probes, loss_fn(params, batch))
    return jnp.column_stack([first, losses]) if clean else losses

  queries = num_probes * len(points)
  if clean:
    queries += num_probes if batch_per_probe else 1
  return Probes(
    query,
    slopes,
    lambda losses: shapings.coefficients(slopes(losses), shaping),
    partial(sums, direction, probe_map),
    queries,
    len(points) + clean,
  )


def sums(
  direction: directions.Direction,
  probe_map: probe_maps.ProbeMap,
  terms: TermsFn,
) -> tuple[UpdateFn, UpdateFn | None]:
  """`update` and `blocks` of an estimate that is a sum of directions.

  Args:
    direction: Distribution of the directions.
    probe_map: How many probes run at once.
    terms: (losses, state, key) -> (keys [n], coefficients [n], state).
  """

  def with_sum(add_up):
    def update(losses, params, state, key):
      losses = jnp.asarray(losses, jnp.float32)  # NumPy rounds otherwise.
      keys, weights, state = terms(losses, state, key)
      return add_up(keys, weights, params, probe_map), state

    return update

  blocks = with_sum(direction.blocks) if direction.blocks else None
  return with_sum(direction.combine), blocks


def fresh(probes: Probes, num_probes: int) -> Estimator:
  """The stateless estimator that draws every probe anew in every step."""

  def query(loss_fn, params, batch, state, key):
    del state
    return probes.query(loss_fn, params, batch, probe_keys(key, num_probes))

  def terms(losses, state, key):
    return probe_keys(key, num_probes), probes.weights(losses), state

  update, blocks = probes.sums(terms)
  return Estimator(
    lambda params: (),
    query,
    update,
    probes.queries_per_step,
    probes.num_losses,
    blocks,
  )


def probe_keys(key: types.Key, num_probes: int) -> types.Key:
  """One key per probe [n]; probe i has the same key whatever n is.

  Raises:
    ValueError: If the key is not a typed one of threefry.
  """
  directions.check_key(key)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_probes))


def check(epsilon, num_probes: int, shaping: str) -> None:
  """Raises ValueError for what no estimator takes; a traced ε passes."""
  if not isinstance(epsilon, jax.Array):
    with np.errstate(over="ignore"):
      narrow = np.float32(epsilon)
    if not 0 < narrow < np.inf:
      fact = "finite in float32" if epsilon > 0 else "positive"
      raise ValueError(
        f"epsilon must be {fact}, got {epsilon}. Choose for example 1e-2."
      )
  if num_probes < 1:
    raise ValueError(
      f"num_probes must be at least 1, got {num_probes}. Choose for example 96."
    )
  shapings.check(shaping)


def scalar(loss_fn: LossFn) -> LossFn:
  """`loss_fn`, checked to return a scalar, as float32."""
  return lambda params, batch: as_scalar(loss_fn(params, batch))


def as_scalar(loss) -> jax.Array:
  """A loss as float32, checked to be a scalar."""
  loss = jnp.asarray(loss)
  if loss.shape:
    raise ValueError(
      f"loss_fn must return a scalar, got shape {loss.shape}. "
      "Take the mean of the losses of the batch."
    )
  return loss.astype(jnp.float32)


def check_batch(batch, num_probes: int) -> None:
  """Raises ValueError unless every leaf of `batch` is [n, ...]."""
  sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
  if not sizes <= {(num_probes,)}:
    raise ValueError(
      "with a batch for each probe every leaf has a leading axis of "
      f"{num_probes=}, got leading axes {sorted(sizes)}. Stack one batch for "
      "each probe; without batch_per_probe all see the same."
    )
