"""The training loop: steps, validation, checkpoints, journal, metrics."""

import contextlib
import math
import pathlib
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from zorn_jax import (
  control,
  diagnostics,
  evaluate,
  journal,
  loggers,
  plots,
  probe_batch,
  processes,
  search,
)
from zorn_jax.checkpoint import CheckpointError, Checkpoints
from zorn_jax.data import Feed
from zorn_jax.lock import lock
from zorn_jax.replay import replay
from zorn_jax.step import Experiment, Programs, passes, programs, update
from zorn_jax.tasks import Split
from zorn_jax.workdir import (
  CHECKPOINTS_NAME,
  CONFIG_NAME,
  JOURNAL_NAME,
  check_text,
  claim,
  fingerprint,
  make,
  note_start,
)


@contextlib.contextmanager
def _stop_on_signal():
  """Yields a function that says whether the run is to stop after a step."""
  if processes.count() > 1:
    yield processes.stopping  # All of them after the same step.
    return
  received = []

  def receive(number, _):
    received.append(number)
    signal.signal(number, signal.SIG_DFL)  # A second one does not wait.

  handled = (signal.SIGTERM, signal.SIGINT)
  previous = {number: signal.signal(number, receive) for number in handled}
  try:
    yield lambda step: bool(received)
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def train(
  experiment: Experiment,
  workdir: pathlib.Path,
  config: dict[str, Any],
  logger_names=(),
  batching: probe_batch.Batching | None = None,
  start: dict[str, Any] | None = None,
) -> bool:
  """Trains until the last step, from where an earlier run in `workdir` ended.

  Args:
    experiment: What to train.
    workdir: Directory of the run; see :func:`claim`.
    config: Plain values that describe the run.
    logger_names: Loggers beside the file and the terminal.
    batching: How the experiment is made with fewer probes at once, where its
      memory does not suffice; None to take it as it is.
    start: Plain values about this process, noted in `workdir`.
  Returns:
    Whether the last step was reached; False after SIGTERM or SIGINT, when the
    state has been saved (an exploded one is not).
  Raises:
    ValueError: If the workdir cannot be used, another process trains in it, a
      logger is missing, or the memory does not suffice for one probe at once.
  """
  loggers.check(logger_names)
  if batching:
    noted = processes.share(probe_batch.read(workdir))
    choice = _choice(batching, noted)
    experiment = batching.rebuild(choice.size)
  parts = programs(experiment)
  # Mistakes that only show in the traced step must not claim the workdir.
  data = jax.eval_shape(lambda: experiment.task.data)
  passed = jax.eval_shape(partial(passes, experiment), parts.template, data)
  jax.eval_shape(partial(update, experiment), parts.template, *passed)
  made = experiment.task.splits
  splits = {name: made[name]() for name in ("valid", "train") if name in made}
  processes.agree({"the text of the task": experiment.task.fingerprint})
  first = processes.is_first()
  with contextlib.ExitStack() as stack, _stop_on_signal() as stopped:
    if first:
      make(workdir)
      stack.enter_context(lock(workdir))
      claim(workdir, config, experiment.task.fingerprint)
      if start:
        note_start(workdir, start)
    processes.barrier("claimed")
    if not (workdir / CONFIG_NAME).exists():
      raise ValueError(
        f"the workdir {str(workdir)!r} is not the one of the first process: it "
        f"has no {CONFIG_NAME}. Name a directory that all hosts share."
      )
    if batching:
      if first and choice.size not in (batching.wanted, noted):
        probe_batch.write(workdir, choice.size)
      query = probe_batch.Query(
        parts.query,
        choice,
        lambda size: programs(batching.rebuild(size)).query,
        partial(probe_batch.write, workdir),
      )
      parts = parts._replace(query=query)
    checkpoints = Checkpoints(
      workdir / CHECKPOINTS_NAME, every=experiment.checkpoint_every
    )
    stack.callback(checkpoints.close)
    _see_the_same(checkpoints)
    feed = Feed(experiment.task, experiment.layout.everywhere)
    stack.callback(feed.close)
    restored = checkpoints.restore(parts.template)
    state, saved, ranks = restored or (parts.init(), 0, {})
    step = saved
    processes.agree({"the step that is read": str(step)})
    diary = None
    if experiment.method.recall:
      identity = fingerprint(config, experiment.task.fingerprint)
      header = journal.Header(identity, *passed[0].shape)
      diary, records = _open_journal(
        experiment, workdir, header, step, checkpoints.steps()
      )
      if diary:
        stack.callback(diary.close)
      state = replay(parts, state, records, feed)
      step += len(records)
    if step:
      logging.info("resuming from step %d", step)
    logs = []
    if first:
      logs = loggers.make(logger_names, workdir, config, step, experiment.steps)
    for logger in logs:
      stack.callback(logger.close)
    seconds = loggers.last_seconds(workdir)
    run = _Run(
      experiment,
      parts,
      checkpoints,
      diary,
      logs,
      stopped,
      feed,
      {name: feed.put(split) for name, split in splits.items()},
      seconds,
    )
    step = _loop(run, state, step, saved, ranks)
  if first:
    plots.plot_losses(workdir)
  return step == experiment.steps


def _choice(batching, noted):
  """How many probes run at once, the same in all processes."""
  choice = probe_batch.choose_here(batching, noted)
  choice = choice._replace(size=processes.share(choice.size))
  probe_batch.check(choice)
  logging.info(
    "probe_batch=%d of %d probes on a device: about %s bytes of %s",
    choice.size,
    choice.most,
    f"{choice.peak_bytes(choice.size):,}",
    f"{choice.available:,}" if choice.available else "unknown",
  )
  return choice


def _open_journal(experiment, workdir, header, step, saved):
  """The journal, for the process that writes it, and the records to replay.

  A step whose line of metrics or whose checkpoint is missing was cut short: it
  is taken again.
  """
  path = workdir / JOURNAL_NAME
  diary, last = None, 0
  if processes.is_first():
    diary = journal.Journal(path, header)
    logged = {
      line["step"] for line in loggers.read_jsonl(workdir / loggers.JSONL_NAME)
    }
    last = diary.last_step
    for number in range(step + 1, diary.last_step + 1):
      due = partial(_due, experiment, number)
      has_line = due(experiment.log_every) or due(experiment.evaluate_every)
      if (has_line and number not in logged) or (
        due(experiment.checkpoint_every) and number not in saved
      ):
        last = number - 1
        break
    if last < step or diary.first_step > step + 1:
      logging.warning(
        "the journal has %s, which do not lead on from the checkpoint of step "
        "%d: it begins anew there, and only later steps can be replayed",
        f"the steps {diary.first_step} to {diary.last_step}"
        if diary.last_step
        else "no steps",
        step,
      )
      diary.close()
      path.unlink()
      diary, last = journal.Journal(path, header), step
    diary.rewind(last)
  last = processes.share(last)
  if last == step:
    return diary, []
  return diary, journal.read(path, header, after=step)[1]


def restore_params(
  experiment: Experiment, workdir: pathlib.Path, best: bool = False
) -> tuple[Any, int]:
  """The parameters of a run's newest or best checkpoint, and its step.

  Raises:
    ValueError: If there is no readable checkpoint, or the text of the
      experiment is not that of the run.
  """
  check_text(workdir, experiment.task.fingerprint)
  checkpoints = Checkpoints(workdir / CHECKPOINTS_NAME)
  template = programs(experiment).template.params
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
  parts: Programs
  checkpoints: Checkpoints
  journal: journal.Journal | None
  logs: list[loggers.Logger]
  stopped: Callable[[int], bool]
  feed: Feed
  splits: dict[str, Split]  # On which the loop evaluates.
  seconds: float  # Time that earlier processes spent on this run.


def _see_the_same(checkpoints):
  """Raises ValueError if a process lists other checkpoints than the first."""
  processes.agree({"the list of checkpoints": str(checkpoints.steps())})


def _loop(run, state, step, saved, ranks):
  """Trains from `step` on; returns the number of the last step.

  On disk is the state after step `saved`, ranked by `ranks`.
  """
  experiment, parts = run.experiment, run.parts
  score = evaluate.evaluator(experiment.model, experiment.task)
  rollbacks, asked = 0, 0
  meter = _Meter(experiment, state, step, run.seconds)
  if experiment.search and not step and not run.checkpoints.steps():
    state = _searched(run, state, step, {})
  while step < experiment.steps and not run.stopped(asked):
    asked += 1  # Unlike the step, it never goes back.
    if _wants_search(experiment, state, step):
      state = _searched(run, state, step, ranks if saved == step else {})
    data = run.feed.at(step)
    losses, scalars, aside = _passed(parts, state, data)
    state, step_metrics = parts.update(state, losses, aside)
    step += 1
    if run.journal:
      epsilon, scale = np.asarray(scalars)
      record = journal.Record(step, epsilon, scale, np.asarray(losses))
      run.journal.append(record)
    due = partial(_due, experiment, step)
    logging_now, saving = map(
      due, (experiment.log_every, experiment.checkpoint_every)
    )
    if (logging_now and bool(state.control.exploded)) or (
      saving and _explodes(run, state, step)
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
      if experiment.method.pairs:
        ratio = diagnostics.signal_to_noise(np.asarray(losses))
        values["signal_to_noise"] = float(ratio)
      values |= meter.read(state, step)
    if due(experiment.evaluate_every):
      with meter.paused(state):
        for split, held in run.splits.items():
          scores = score(state.params, held)
          values |= {f"{split}_{name}": x for name, x in scores.items()}
    if values:
      for logger in run.logs:
        logger.log(step, values)
    if saving:
      saved, rollbacks, ranks = step, 0, _rank_by(values)
      with meter.paused(state):
        _save(run, step, state, ranks)
  if saved != step and not bool(state.control.exploded):
    _save(run, step, state, {})
  return step


def _passed(parts, state, data):
  """Losses, scalars and what is beside them, before an update."""
  losses, scalars, aside = parts.query(state, data)
  if parts.recall:
    aside = parts.recall(state, data)
  return losses, scalars, aside


def _save(run, step, state, metrics):
  """Writes a checkpoint that the journal on the disk leads on from."""
  if run.journal:
    run.journal.sync()
  run.checkpoints.save(step, state, metrics)


def _explodes(run, state, step):
  """Whether the next step would."""
  attempt, _ = _attempt(run.parts, state, run.feed.at(step))
  return bool(attempt.control.exploded)


def _attempt(parts, state, data):
  """A step whose state can be used again."""
  losses, _, aside = _passed(parts, state, data)
  return parts.attempt(state, losses, aside)


def _roll_back(run, watched, step, rollbacks):
  """The newest regular checkpoint, or the start, with half the rate.

  All that is later is dropped, and the checkpoint is saved again with the new
  rate, of which no record of a step knows.
  """
  loss = float(watched.average)
  every = run.experiment.checkpoint_every
  _see_the_same(run.checkpoints)
  # One that a signal left is passed over, as if the signal had not come.
  steps = [step for step in run.checkpoints.steps() if step % every == 0]
  first_lesson = not watched.lesson or not watched.lesson.spent[1:].any()
  if math.isnan(loss) and not any(steps) and first_lesson and rollbacks == 1:
    raise ValueError(
      f"no loss with its gradient was finite until step {step}: the model "
      "gives none from its first batch on. Look at the model's initial scales "
      "and the data."
    )
  if rollbacks > run.experiment.watch.max_rollbacks:
    raise ValueError(
      f"the loss exploded before step {step} again, after {rollbacks - 1} "
      f"roll-backs in a row (its average was {loss:.4g}). Lower the learning "
      "rate, or look for what makes the losses jump."
    )
  state, back, metrics = None, 0, {}
  for candidate in reversed(steps):
    with contextlib.suppress(CheckpointError):
      restored = run.checkpoints.restore(run.parts.template, candidate)
      state, back, metrics = restored
      break
  if state is None:
    state = run.parts.init()
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
  run.checkpoints.forget(back)
  if run.journal:
    run.journal.rewind(max(back, run.journal.first_step - 1))
  # The checkpoint may lie on the way up: what comes is measured against itself.
  again = state.control._replace(scale=scale, average=jnp.float32(jnp.nan))
  state = state._replace(control=run.feed.put(again))
  run.checkpoints.save(back, state, metrics)
  return state, back


def _wants_search(experiment, state, step):
  """Whether the loss stands still and a search is to find another rate."""
  if not (experiment.search and experiment.search.on_plateau):
    return False
  if step % experiment.log_every:
    return False
  return float(state.control.plateau.scale) < 1


def _searched(run, state, step, ranks):
  """The state with the learning rate that the search likes best."""
  experiment, data = run.experiment, run.feed.at(step)
  fresh = control.init(experiment.watch)
  fresh = fresh._replace(lesson=state.control.lesson)

  def with_rate(rate):
    scale = jnp.float32(rate / experiment.peak_rate)
    chosen = fresh._replace(scale=scale)
    return state._replace(control=run.feed.put(chosen))

  def trial(rate):
    tried = with_rate(rate)
    for _ in range(experiment.search.steps):
      tried, _ = _attempt(run.parts, tried, data)
    # The new parameters, on the data and probes of the first step.
    _, values = _attempt(run.parts, state._replace(params=tried.params), data)
    return math.inf if values["dropped"] else float(values["loss"])

  rate = search.best_rate(experiment.search, trial)
  logging.info("the search found a peak learning rate of %.3g", rate)
  state = with_rate(rate)
  _save(run, step, state, ranks)  # No record of a step knows of it.
  return state


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
  rolled back or searched for counts in the time alone. Evaluations and
  checkpoints count in neither.
  """

  def __init__(self, experiment, state, step, seconds):
    self._experiment = experiment
    self._seconds = seconds
    self._last = (time.monotonic(), _tokens(experiment, state, step))

  def restart(self, state, step):
    """Counts from `step` on; the time of what was rolled back is kept."""
    now = time.monotonic()
    self._seconds += now - self._last[0]
    self._last = (now, _tokens(self._experiment, state, step))

  @contextlib.contextmanager
  def paused(self, state):
    """Leaves out the time of what is done with a state between two steps."""
    jax.block_until_ready(state)
    start = time.monotonic()
    yield
    since, tokens = self._last
    self._last = (since + time.monotonic() - start, tokens)

  def read(self, state, step):
    before, last_tokens = self._last
    tokens = _tokens(self._experiment, state, step)
    self._last = (time.monotonic(), tokens)
    elapsed = self._last[0] - before
    self._seconds += elapsed
    return {
      "forward_tokens": tokens,
      "seconds": self._seconds,
      "tokens_per_second": (tokens - last_tokens) / elapsed,
    }


def _tokens(experiment, state, step):
  """Forward tokens of the first `step` steps."""
  task, method = experiment.task, experiment.method
  spent = {task.max_length: step}
  if state.control.lesson and method.follows_length:
    lengths = experiment.watch.curriculum.lengths()
    spent = dict(zip(lengths, state.control.lesson.spent.tolist(), strict=True))
  batches = (n * task.tokens_per_batch(x) for x, n in spent.items())
  return method.passes_per_step * sum(batches)
