"""One training step: losses, and what they do to the state."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zorn_jax import control, in_place, metrics
from zorn_jax.mesh import Layout
from zorn_jax.methods import Method, Now
from zorn_jax.models import Model
from zorn_jax.search import Search
from zorn_jax.tasks import Task
from zorn_jax.train_state import TrainState


class Experiment(NamedTuple):
  """All that a run is made of.

  Attributes:
    model: What is trained.
    task: What it is trained on.
    method: Where its gradient comes from.
    optimizer: What is done with the gradient.
    elementwise: Whether it treats every parameter alone.
    watch: What is done when the loss explodes or stands still.
    search: How the learning rate is searched for; None to take it as it is.
    num_probes: Directions n per step; 0 for BPTT.
    peak_rate: The learning rate that the schedule multiplies.
    rate_schedule: (step) -> that factor.
    epsilon: Smoothing radius; 0 for a method that has none.
    epsilon_follows: Whether epsilon follows the learning rate, but never below
      a hundredth of what it is.
    seed: Root of every random number.
    steps: Steps of the whole run.
    evaluate_every: Steps between validations.
    checkpoint_every: Steps between checkpoints.
    log_every: Steps between lines of metrics.
    layout: Which devices do what.
  """

  model: Model
  task: Task
  method: Method
  optimizer: optax.GradientTransformation
  elementwise: bool
  watch: control.Watch
  search: Search | None
  num_probes: int
  peak_rate: float
  rate_schedule: Callable[[jax.Array], jax.Array]
  epsilon: float
  epsilon_follows: bool
  seed: int
  steps: int
  evaluate_every: int
  checkpoint_every: int
  log_every: int
  layout: Layout


_SMALLEST_FACTOR = 1e-2  # Of an epsilon that follows the learning rate.


def _wide(tree):
  """In float32: moments in bfloat16 would not decay."""
  return optax.tree.cast(tree, jnp.float32)


def init_state(experiment: Experiment) -> TrainState:
  """The state before the first step."""
  init_key, probe_key, data_key = jax.random.split(
    jax.random.key(experiment.seed), 3
  )
  params = experiment.model.init(init_key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=experiment.optimizer.init(_wide(params)),
    method_state=experiment.method.init(params),
    control=control.init(experiment.watch),
    probe_key=probe_key,
    data_key=data_key,
  )


def now(experiment: Experiment, state: TrainState) -> Now:
  """What the step after `state` has of its own."""
  epsilon = experiment.epsilon
  if experiment.epsilon_follows:
    factor = control.scale(state.control) * experiment.rate_schedule(state.step)
    # Below, differences of losses would be differences of roundings.
    epsilon = epsilon * jnp.maximum(factor, _SMALLEST_FACTOR)
  lesson = state.control.lesson
  return Now(
    state.step,
    jax.random.fold_in(state.probe_key, state.step),
    state.data_key,
    epsilon,
    lesson.length if lesson else experiment.task.max_length,
  )


def query(
  experiment: Experiment, state: TrainState, data: Any
) -> tuple[jax.Array, Any]:
  """The passes through the model: losses [n, q], and what is left beside.

  Args:
    experiment: What is trained and how; static.
    state: The state before the step.
    data: `experiment.task.data`, on the device.
  """
  return experiment.method.query(
    state.params, state.method_state, data, now(experiment, state)
  )


def recall(experiment: Experiment, state: TrainState, data: Any) -> Any:
  """What is left beside the losses, without queries; see `Method.recall`."""
  this = now(experiment, state)
  return experiment.method.recall(state.params, data, this)


def passes(
  experiment: Experiment, state: TrainState, data: Any
) -> tuple[jax.Array, Any]:
  """All that a step computes before its update: losses, and what is beside."""
  losses, aside = query(experiment, state, data)
  if experiment.method.recall:
    aside = recall(experiment, state, data)
  return losses, aside


def update(
  experiment: Experiment, state: TrainState, losses: jax.Array, aside: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Estimates the gradient from the losses and updates the parameters.

  Args:
    experiment: What is trained and how; static.
    state: The state before the step.
    losses: [n, q], as `query` has them.
    aside: What `query` left, or the method recalls.
  Returns:
    The state after the step, and scalars: `loss`, the mean of the finite
    queries; `spread`, their standard deviation; `grad_norm`; `dropped`, the
    number of queries that were not finite; `epsilon`; `rate`, the learning
    rate; `scale`, what it was multiplied with; with a curriculum `length`, that
    of its sequences.
  """
  method, scale = experiment.method, control.scale(state.control)
  this = now(experiment, state)
  inputs = losses, aside, state.params, state.method_state, this
  if _in_blocks(experiment) and experiment.elementwise:
    blocks, method_state = method.blocks(*inputs)
    params, opt_state, grad_norm = in_place.apply(
      experiment.optimizer, blocks, state.params, state.opt_state, scale
    )
  else:
    grads, method_state = _gradient(experiment, inputs)
    updates, opt_state = experiment.optimizer.update(
      _wide(grads), state.opt_state, _wide(state.params)
    )
    updates = jax.tree.map(lambda x: scale * x, updates)
    params = optax.apply_updates(state.params, updates)
    grad_norm = metrics.norm(grads)
  queried = losses[:, : method.num_losses]
  finite = jnp.isfinite(queried)
  silent = (queried == 0) & method.in_parts
  loss = jnp.mean(queried, where=finite & ~silent)
  loss = jnp.where(silent.all(), 0.0, loss)
  new_state = state._replace(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    method_state=method_state,
    control=control.observe(
      experiment.watch, state.control, loss, grad_norm, silent.all()
    ),
  )
  values = {
    "loss": loss,
    "spread": jnp.std(queried, where=finite & ~silent),
    "grad_norm": grad_norm,
    "dropped": jnp.sum(~finite),
    "epsilon": jnp.float32(this.epsilon),
    "rate": scale * experiment.peak_rate * experiment.rate_schedule(state.step),
    "scale": scale,
  }
  lesson = state.control.lesson
  return new_state, values | ({"length": lesson.length} if lesson else {})


def _in_blocks(experiment) -> bool:
  """Whether a device forms the gradient block by block."""
  layout = experiment.layout
  whole = layout.update == "replicated" and layout.mesh.shape["head"] == 1
  return whole and experiment.method.blocks is not None


def _gradient(experiment, inputs):
  """The gradient as a tree of arrays, and the new state of the method."""
  layout, method = experiment.layout, experiment.method
  if _in_blocks(experiment):
    blocks, method_state = method.blocks(*inputs)
    return in_place.gradient(blocks, inputs[2]), method_state
  grads, method_state = method.update(*inputs)
  if layout.update == "sharded":
    placed = layout.place(grads, experiment.model.specs)
    slices = layout.slices(grads, placed)
    grads = jax.lax.with_sharding_constraint(grads, slices)
  return grads, method_state


def train_step(
  experiment: Experiment, state: TrainState, data: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
  """A whole step: :func:`passes`, then :func:`update`."""
  return update(experiment, state, *passes(experiment, state, data))


class Programs(NamedTuple):
  """A step compiled in parts, which every use of it shares.

  A run that is resumed or replayed runs the same `update` as the one that is
  not interrupted, so that it rounds in the same way.

  Attributes:
    init: () -> the first state.
    query: (state, data) -> (losses, scalars, aside), by the queries. The
      scalars are epsilon and what the learning rate is multiplied with.
    recall: (state, data) -> aside, without them; None if there is none.
    update: (state, losses, aside) -> (state, values). Uses up its state.
    attempt: The same, but the state can be used again.
    template: Shapes and places of the state.
  """

  init: Callable[[], TrainState]
  query: Callable[..., Any]
  recall: Callable[..., Any] | None
  update: Callable[..., Any]
  attempt: Callable[..., Any]
  template: TrainState


def programs(experiment: Experiment) -> Programs:
  """Compiles nothing yet: each part when it is first called."""
  layout, method = experiment.layout, experiment.method
  template = _template(experiment)
  places = jax.tree.map(lambda leaf: leaf.sharding, template)
  # The states that streaming methods carry stay with their probes.
  after = places._replace(method_state=None) if method.in_parts else places

  def ask(state, data):
    losses, aside = query(experiment, state, data)
    scalars = now(experiment, state).epsilon, control.scale(state.control)
    return losses, jnp.stack([jnp.float32(x) for x in scalars]), aside

  everywhere = layout.everywhere
  updated = (after, everywhere)
  step = partial(update, experiment)
  compiled = partial(jax.jit, compiler_options=_compiler_options(template))
  return Programs(
    init=compiled(partial(init_state, experiment), out_shardings=places),
    query=compiled(ask, out_shardings=(everywhere, everywhere, None)),
    recall=compiled(partial(recall, experiment), out_shardings=everywhere)
    if method.recall
    else None,
    update=compiled(step, donate_argnums=0, out_shardings=updated),
    attempt=compiled(step, out_shardings=updated),
    template=template,
  )


def _compiler_options(template):
  """Options of XLA for programs over these parameters."""
  narrow = any(
    x.dtype == jnp.bfloat16 for x in jax.tree.leaves(template.params)
  )
  if not narrow or jax.default_backend() != "cpu":
    return None
  # This pass makes a copy in float32 of every array of which a block is read or
  # written: memory of three times the parameters, and hours for large ones.
  return {"xla_disable_hlo_passes": "float-normalization-bf16"}


def _template(experiment):
  """The state's shapes, with where each leaf lives."""
  layout = experiment.layout
  state = jax.eval_shape(partial(init_state, experiment))
  placed = layout.place(state.params, experiment.model.specs)
  slices = layout.slices(state.params, placed)
  if layout.update == "sharded" and layout.mesh.size > 1 and slices == placed:
    raise ValueError(
      f"{layout.mesh.size} devices can cut no parameter evenly for a sharded "
      "update. Set mesh.updates to replicated, or choose sizes that they can."
    )
  places = jax.tree.map(lambda leaf: layout.everywhere, state)
  opt_state = optax.tree.map_params(
    experiment.optimizer,
    lambda leaf, sharding: sharding,
    state.opt_state,
    slices,
    transform_non_params=lambda leaf: layout.everywhere,
  )
  places = places._replace(params=placed, opt_state=opt_state)
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    state,
    places,
  )
