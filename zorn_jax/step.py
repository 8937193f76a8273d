"""One training step, as a pure function of the state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zorn_jax import metrics, types
from zorn_jax.estimators import Estimator
from zorn_jax.models import Model
from zorn_jax.tasks import Task
from zorn_jax.train_state import TrainState


class Experiment(NamedTuple):
  """All that a run is made of.

  Attributes:
    model: What is trained.
    task: What it is trained on.
    estimator: How its gradient is estimated.
    optimizer: What is done with the gradient.
    num_probes: Directions n per step.
    batch_per_probe: Whether every probe sees a batch of its own.
    seed: Root of every random number.
    steps: Steps of the whole run.
    evaluate_every: Steps between validations.
    checkpoint_every: Steps between checkpoints.
    log_every: Steps between lines of metrics.
  """

  model: Model
  task: Task
  estimator: Estimator
  optimizer: optax.GradientTransformation
  num_probes: int
  batch_per_probe: bool
  seed: int
  steps: int
  evaluate_every: int
  checkpoint_every: int
  log_every: int


def init_state(experiment: Experiment) -> TrainState:
  """The state before the first step."""
  init_key, probe_key, data_key = jax.random.split(
    jax.random.key(experiment.seed), 3
  )
  params = experiment.model.init(init_key)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=experiment.optimizer.init(params),
    estimator_state=experiment.estimator.init(params),
    probe_key=probe_key,
    data_key=data_key,
  )


def sample_batch(experiment: Experiment, data, key: types.Key) -> types.Batch:
  """The batch of one step, [n, ...] where every probe has its own.

  Batch i depends on `key` and i alone, not on the number of probes.
  """
  sample = lambda i: experiment.task.sample(data, jax.random.fold_in(key, i))
  if experiment.batch_per_probe:
    return jax.vmap(sample)(jnp.arange(experiment.num_probes))
  return sample(0)


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
    number of queries that were not finite.
  """
  model, task, estimator = (
    experiment.model,
    experiment.task,
    experiment.estimator,
  )
  probe_key = jax.random.fold_in(state.probe_key, state.step)
  data_key = jax.random.fold_in(state.data_key, state.step)
  batch = sample_batch(experiment, data, data_key)

  def loss_fn(params, batch):
    return metrics.mean_loss(model, task, data, params, batch)

  losses = estimator.query(
    loss_fn, state.params, batch, state.estimator_state, probe_key
  )
  grads, estimator_state = estimator.update(
    losses, state.params, state.estimator_state, probe_key
  )
  updates, opt_state = experiment.optimizer.update(
    grads, state.opt_state, state.params
  )
  finite = jnp.isfinite(losses)
  new_state = state._replace(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    estimator_state=estimator_state,
  )
  return new_state, {
    "loss": jnp.mean(losses, where=finite),
    "spread": jnp.std(losses, where=finite),
    "grad_norm": metrics.norm(grads),
    "dropped": jnp.sum(~finite),
  }
