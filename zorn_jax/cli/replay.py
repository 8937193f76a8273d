"""Rebuilds the parameters of a step from a run's journal, without training.

python -m zorn_jax.cli.replay --workdir=DIR [--step=N] [--verify] [--json]
  [--output=DIR]

It begins with the newest checkpoint up to the step, and with --verify at the
seed, to compare with every checkpoint on the way. --output makes another run
directory, with a checkpoint of that step, for zorn-evaluate and zorn-sample.
"""

import json
import pathlib
import shutil
import time

from absl import flags

from zorn_jax import build, journal, probe_batch
from zorn_jax.checkpoint import CheckpointError, Checkpoints
from zorn_jax.cli import _run
from zorn_jax.data import Feed
from zorn_jax.replay import replay
from zorn_jax.step import programs
from zorn_jax.train_state import digest
from zorn_jax.workdir import (
  CHECKPOINTS_NAME,
  CONFIG_NAME,
  JOURNAL_NAME,
  TEXT_NAME,
  fingerprint,
)

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_STEP = flags.DEFINE_integer(
  "step", None, "Step whose parameters are wanted; by default the last one."
)
_VERIFY = flags.DEFINE_bool(
  "verify", False, "Begins at the seed and compares with the checkpoints."
)
_OUTPUT = flags.DEFINE_string("output", None, "Run directory to be made.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv) -> int:
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  noted = probe_batch.read(workdir)
  experiment = build.load(workdir, noted)
  if not experiment.method.recall:
    raise ValueError(
      f"the run in {str(workdir)!r} has no journal: its steps cannot be "
      "rebuilt from losses alone. Name a run of another estimator than bptt "
      "and the streaming ones."
    )
  output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None
  if output and output.exists():
    raise ValueError(
      f"the output {str(output)!r} exists. Name a new directory."
    )
  config = json.loads((workdir / CONFIG_NAME).read_text())
  checkpoints = Checkpoints(workdir / CHECKPOINTS_NAME)
  header, records = journal.read(workdir / JOURNAL_NAME)
  identity = fingerprint(config, experiment.task.fingerprint)
  if header.fingerprint != identity:
    raise ValueError(
      f"the journal in {str(workdir)!r} is that of another config or text. "
      "Bring back the files of the run."
    )
  last = records[-1].step if records else 0
  wanted = _STEP.value
  if wanted is None:
    wanted = max([last, *checkpoints.steps()])
  saved = [step for step in checkpoints.steps() if step <= wanted]
  if wanted < 0 or wanted > max([last, *saved]):
    raise ValueError(
      f"the journal in {str(workdir)!r} ends with step {last}, got "
      f"--step={wanted}. Choose a step up to that."
    )
  parts = programs(experiment)
  if saved and not _VERIFY.value:
    restored = checkpoints.restore(parts.template, saved[-1])
    state, step, _ = restored
  else:
    state, step = parts.init(), 0
  records = [r for r in records if step < r.step <= wanted]
  if len(records) != wanted - step:
    first = records[0].step if records else last + 1
    raise ValueError(
      f"the journal in {str(workdir)!r} begins with step {first}, but step "
      f"{step + 1} is needed. Leave out --verify, or choose a later step."
    )
  feed = Feed(experiment.task, experiment.layout.everywhere)
  start, begun, compared = time.monotonic(), step, {}
  for stop in [*(saved if _VERIFY.value else []), wanted]:
    segment, records = records[: stop - step], records[stop - step :]
    state, step = replay(parts, state, segment, feed), stop
    if _VERIFY.value and stop in saved:
      compared[stop] = _compare(checkpoints, stop, state.params)
  result = {
    "step": step,
    "params_digest": digest(state.params),
    "replayed_steps": step - begun,
    "seconds": time.monotonic() - start,
    "checkpoints": compared,
  }
  feed.close()
  if output:
    output.mkdir(parents=True)
    for name in (CONFIG_NAME, TEXT_NAME):
      shutil.copy(workdir / name, output / name)
    if noted:
      probe_batch.write(output, noted)
    Checkpoints(output / CHECKPOINTS_NAME).save(step, state, {})
  if _JSON.value:
    print(json.dumps(result))
  else:
    for name, value in result.items():
      print(f"{name:16} {value}")
  return int(any(word != "equal" for word in compared.values()))


def _compare(checkpoints, step, params):
  """How a checkpoint compares with what it should hold, in a word."""
  try:
    found, _, _ = checkpoints.restore_params(params, step)
  except CheckpointError:
    return "damaged"
  return "equal" if digest(found) == digest(params) else "different"


def run() -> None:
  _run.run(main, "workdir")


if __name__ == "__main__":
  run()
