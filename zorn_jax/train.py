"""The training loop: steps, validation, checkpoints, metrics."""

import contextlib
import json
import math
import os
import pathlib
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from zorn_jax import control, evaluate, loggers, plots, search
from zorn_jax.checkpoint import Checkpoints
from zorn_jax.data import Feed
from zorn_jax.step import Experiment, init_state, train_step
from zorn_jax.train_state import TrainState

CONFIG_NAME = "config.json"
CHECKPOINTS_NAME = "checkpoints"


def claim(workdir: pathlib.Path, config: dict[str, Any]) -> None:
  """Makes `workdir` the directory of the run with this config.

  Args:
    workdir: Made where it does not exist.
    config: Plain values, as they are written to `config.json`.
  Raises:
    ValueError: If the directory cannot be written or belongs to a run with
      another config.
  """
  config = json.loads(json.dumps(config))
  path = workdir / CONFIG_NAME
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not os.access(workdir, os.W_OK):
      raise PermissionError(13, "Permission denied")
    if not path.exists():
      scratch = path.with_suffix(".tmp")
      scratch.write_text(json.dumps(config, indent=2) + "\n")
      os.replace(scratch, path)
      return
  except OSError as error:
    raise ValueError(
      f"cannot write to the workdir {str(workdir)!r}: {error.strerror}. "
      "Name a writable directory with free space."
    ) from error
  found = json.loads(path.read_text())
  if found != config:
    raise ValueError(
      f"the workdir {str(workdir)!r} belongs to another config, which differs "
      f"in {', '.join(_differences(found, config))}. Use another workdir, or "
      "the same config to resume."
    )


def _differences(found, wanted, prefix=""):
  """Dotted names of the fields in which two configs differ."""
  names = []
  for key in sorted(found.keys() | wanted.keys()):
    a, b = found.get(key), wanted.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      names += _differences(a, b, f"{prefix}{key}.")
    elif a != b:
      names.append(f"{prefix}{key} ({a} there, {b} here)")
  return names


@contextlib.contextmanager
def _stop_on_signal():
  """Yields a function that says whether SIGTERM or SIGINT has come."""
  received = []
  handled = (signal.SIGTERM, signal.SIGINT)
  previous = {
    number: signal.signal(number, lambda number, _: received.append(number))
    for number in handled
  }
  try:
    yield lambda: bool(received)
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def train(
  experiment: Experiment,
  workdir: pathlib.Path,
  config: dict[str, Any],
  logger_names=(),
) -> bool:
  """Trains until the last step, from the newest checkpoint if there is one.

  Args:
    experiment: What to train.
    workdir: Directory of the run; see :func:`claim`.
    config: Plain values that describe the run.
    logger_names: Loggers beside the file and the terminal.
  Returns:
    Whether the last step was reached; False after SIGTERM or SIGINT, when the
    state has been saved (an exploded one is not).
  Raises:
    ValueError: If the workdir cannot be used or a logger is missing.
  """
  initial = partial(init_state, experiment)
  # Mistakes that only show in the traced step must not claim the workdir.
  jax.eval_shape(
    lambda: train_step(experiment, initial(), experiment.task.data)
  )
  claim(workdir, config)
  checkpoints = Checkpoints(workdir / CHECKPOINTS_NAME)
  restored = checkpoints.restore(jax.eval_shape(initial))
  if restored is None:
    state, first_step = jax.jit(initial)(), 0
  else:
    state, first_step, _ = restored
    logging.info("resuming from step %d", first_step)
  with (
    contextlib.ExitStack() as stack,
    _stop_on_signal() as stopped,
  ):
    stack.callback(checkpoints.close)
    logs = loggers.make(
      logger_names, workdir, config, first_step, experiment.steps
    )
    for logger in logs:
      stack.callback(logger.close)
    seconds = loggers.last_seconds(workdir)
    feed = Feed(experiment.task)
    stack.callback(feed.close)
    run = _Run(
      experiment, jax.jit(initial), checkpoints, logs, stopped, feed, seconds
    )
    step = _loop(run, state, first_step)
  plots.plot_losses(workdir)
  return step == experiment.steps


def restore_params(
  experiment: Experiment, workdir: pathlib.Path, best: bool = False
) -> tuple[Any, int]:
  """The parameters of a run's newest or best checkpoint, and its step.

  Raises:
    ValueError: If there is no readable checkpoint.
  """
  checkpoints = Checkpoints(workdir / CHECKPOINTS_NAME)
  template = jax.eval_shape(partial(init_state, experiment)).params
  restored = checkpoints.restore_params(template, "best" if best else None)
  if restored is None:
    raise ValueError(
      f"the run in {str(workdir)!r} has no checkpoint yet. Train until "
      "checkpoint_every steps are done."
    )
  params, step, _ = restored
  return params, step


class _Run(NamedTuple):
  """What the loop needs beside its state."""

  experiment: Experiment
  initial: Callable[[], TrainState]
  checkpoints: Checkpoints
  logs: list[loggers.Logger]
  stopped: Callable[[], bool]
  feed: Feed
  seconds: float  # Time that earlier processes spent on this run.


def _loop(run, state, step):
  """Trains from `step` on; returns the number of the last step."""
  experiment = run.experiment
  step_fn = partial(train_step, experiment)
  advance = jax.jit(step_fn, donate_argnums=0)
  attempt = jax.jit(step_fn)
  explodes = jax.jit(lambda *args: step_fn(*args)[0].control.exploded)
  score = evaluate.evaluator(experiment.model, experiment.task)
  valid = experiment.task.splits["valid"]()
  saved, rollbacks = step, 0
  meter = _Meter(experiment, state, step, run.seconds)
  if experiment.search and step == 0:
    state = _searched(experiment, attempt, state, run.feed.at(0))
  while step < experiment.steps and not run.stopped():
    state, step_metrics = advance(state, run.feed.at(step))
    step += 1
    due = partial(_due, experiment, step)
    logging_now, saving = map(
      due, (experiment.log_every, experiment.checkpoint_every)
    )
    if (logging_now and bool(state.control.exploded)) or (
      saving and bool(explodes(state, run.feed.at(step)))
    ):
      rollbacks += 1
      watched, state = state.control, None  # One copy at a time.
      state, step = _roll_back(run, watched, step, rollbacks)
      meter.restart(state, step)
      saved = step
      continue
    values = {}
    if logging_now:
      values |= {name: float(x) for name, x in step_metrics.items()}
      values |= meter.read(state, step)
      if step < experiment.steps and _wants_search(experiment, state):
        state = _searched(experiment, attempt, state, run.feed.at(step))
    if due(experiment.evaluate_every):
      scores = score(state.params, valid)
      values |= {f"valid_{name}": x for name, x in scores.items()}
    if values:
      for logger in run.logs:
        logger.log(step, values)
    if saving:
      run.checkpoints.save(step, state, _rank_by(values))
      saved, rollbacks = step, 0
  if saved != step and not bool(state.control.exploded):
    run.checkpoints.save(step, state, {})
  return step


def _roll_back(run, watched, step, rollbacks):
  """The newest regular checkpoint, or the start, with half the rate."""
  loss = float(watched.average)
  every = run.experiment.checkpoint_every
  # One that a signal left is passed over, as if the signal had not come.
  steps = [step for step in run.checkpoints.steps() if step % every == 0]
  if math.isnan(loss) and not steps:
    raise ValueError(
      f"no loss was finite until step {step}: the model gives none from its "
      "first batch on. Look at the model's initial scales and the data."
    )
  if rollbacks > run.experiment.watch.max_rollbacks:
    raise ValueError(
      f"the loss exploded before step {step} again, after {rollbacks - 1} "
      f"roll-backs in a row (its average was {loss:.4g}). Lower the learning "
      "rate, or look for what makes the losses jump."
    )
  if steps:
    template = jax.eval_shape(run.initial)
    state, back, _ = run.checkpoints.restore(template, steps[-1])
  else:
    state, back = run.initial(), 0
  # Half of what was in force, whatever the plateau was at the checkpoint.
  halved = control.scale(watched) / 2
  scale = halved / control.scale(state.control._replace(scale=jnp.float32(1)))
  logging.warning(
    "the loss exploded before step %d (its average was %.4g): going on from "
    "step %d with %.3g times the learning rate",
    step,
    loss,
    back,
    float(halved),
  )
  for logger in run.logs:
    logger.rewind(back)
  # The checkpoint may lie on the way up: what comes is measured against itself.
  again = state.control._replace(scale=scale, average=jnp.float32(jnp.nan))
  return state._replace(control=again), back


def _wants_search(experiment, state):
  """Whether the loss stands still and a search is to find another rate."""
  if not (experiment.search and experiment.search.on_plateau):
    return False
  return float(state.control.plateau.scale) < 1


def _searched(experiment, attempt, state, data):
  """The state with the learning rate that the search likes best."""
  fresh = control.init(experiment.watch)
  fresh = fresh._replace(lesson=state.control.lesson)

  def with_rate(rate):
    scale = jnp.float32(rate / experiment.peak_rate)
    return state._replace(control=fresh._replace(scale=scale))

  def trial(rate):
    tried = with_rate(rate)
    for _ in range(experiment.search.steps):
      tried, _ = attempt(tried, data)
    # The new parameters, on the data and probes of the first step.
    _, values = attempt(state._replace(params=tried.params), data)
    return math.inf if values["dropped"] else float(values["loss"])

  rate = search.best_rate(experiment.search, trial)
  logging.info("the search found a peak learning rate of %.3g", rate)
  return with_rate(rate)


def _due(experiment, step, every):
  """Whether something is done at this step; all is done at the last."""
  return step % every == 0 or step == experiment.steps


def _rank_by(values):
  """What decides which checkpoint is best; empty without a validation."""
  if "valid_loss" not in values:
    return {}
  return {"loss": values["valid_loss"]}


class _Meter:
  """Counts forward tokens and time.

  The tokens are those of the steps that the parameters are made of; what was
  rolled back or searched for counts in the time alone.
  """

  def __init__(self, experiment, state, step, seconds):
    tokens = experiment.task.tokens_per_batch
    self._tokens_per_step = experiment.method.passes_per_step * tokens
    self._seconds = seconds
    self._last = (time.monotonic(), _effort(state, step))

  def restart(self, state, step):
    """Counts from `step` on; the time of what was rolled back is kept."""
    now = time.monotonic()
    self._seconds += now - self._last[0]
    self._last = (now, _effort(state, step))

  def read(self, state, step):
    before, last_effort = self._last
    effort = _effort(state, step)
    self._last = (time.monotonic(), effort)
    elapsed = self._last[0] - before
    self._seconds += elapsed
    tokens = (effort - last_effort) * self._tokens_per_step
    return {
      "forward_tokens": effort * self._tokens_per_step,
      "seconds": self._seconds,
      "tokens_per_second": tokens / elapsed,
    }


def _effort(state, step):
  """Steps so far, those with shorter sequences counted for their share."""
  lesson = state.control.lesson
  return float(lesson.effort) if lesson else step
