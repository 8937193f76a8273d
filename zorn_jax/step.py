"""One training step, as a pure function of the state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zorn_jax import control, metrics
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
    watch: What is done when the loss explodes or stands still.
    search: How the learning rate is searched for; None to take it as it is.
    num_probes: Directions n per step; 0 for BPTT.
    peak_rate: The learning rate that the schedule multiplies.
    epsilon: Smoothing radius; 0 for a method that has none.
    epsilon_schedule: (step) -> what the learning rate's schedule multiplies
      epsilon with, but never below 1e-2; None for an epsilon that stays.
    seed: Root of every random number.
    steps: Steps of the whole run.
    evaluate_every: Steps between validations.
    checkpoint_every: Steps between checkpoints.
    log_every: Steps between lines of metrics.
  """

  model: Model
  task: Task
  method: Method
  optimizer: optax.GradientTransformation
  watch: control.Watch
  search: Search | None
  num_probes: int
  peak_rate: float
  epsilon: float
  epsilon_schedule: Callable[[jax.Array], jax.Array] | None
  seed: int
  steps: int
  evaluate_every: int
  checkpoint_every: int
  log_every: int


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


def train_step(
  experiment: Experiment, state: TrainState, data: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Queries the losses, estimates the gradient and updates the parameters.

  Args:
    experiment: What is trained and how; static.
    state: The state before the step.
    data: `experiment.task.data`, on the device.
  Returns:
    The state after the step, and scalars: `loss`, the mean of the finite
    queries; `spread`, their standard deviation; `grad_norm`; `dropped`, the
    number of queries that were not finite; `scale`, what the learning rate was
    multiplied with; with a curriculum `length`, that of its sequences.
  """
  method = experiment.method
  scale = control.scale(state.control)
  epsilon = experiment.epsilon
  if experiment.epsilon_schedule:
    factor = scale * experiment.epsilon_schedule(state.step)
    # Below, differences of losses would be differences of roundings.
    epsilon = epsilon * jnp.maximum(factor, _SMALLEST_FACTOR)
  lesson = state.control.lesson
  now = Now(
    state.step,
    jax.random.fold_in(state.probe_key, state.step),
    state.data_key,
    epsilon,
    lesson.length if lesson else experiment.task.max_length,
  )
  queried, measured = method.query(state.params, state.method_state, data, now)
  grads, method_state = method.update(
    queried, measured, state.params, state.method_state, now
  )
  updates, opt_state = experiment.optimizer.update(
    _wide(grads), state.opt_state, _wide(state.params)
  )
  updates = jax.tree.map(lambda x: scale * x, updates)
  losses = queried[:, : method.num_losses]
  finite = jnp.isfinite(losses)
  loss, grad_norm = jnp.mean(losses, where=finite), metrics.norm(grads)
  new_state = state._replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    method_state=method_state,
    control=control.observe(experiment.watch, state.control, loss, grad_norm),
  )
  values = {
    "loss": loss,
    "spread": jnp.std(losses, where=finite),
    "grad_norm": grad_norm,
    "dropped": jnp.sum(~finite),
    "scale": scale,
  }
  return new_state, values | ({"length": lesson.length} if lesson else {})
