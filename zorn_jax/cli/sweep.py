"""Trains a config at every point of a grid, and ranks the results.

python -m zorn_jax.cli.sweep --config=configs/shakespeare.py --workdir=DIR \\
  --grid=learning_rate=0.01,0.02,0.05 --grid=seed=0,1,2 --config.steps=500

The same command goes on where it was; more values may be added to the grids.
"""

import json
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from zorn_jax import sweep
from zorn_jax.cli import _grid, _run
from zorn_jax.lock import lock

config_flags.DEFINE_config_file("config", None, "Config file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep.")
_GRID = flags.DEFINE_multi_string(
  "grid", None, "A field of the config and its values; may be repeated."
)
_AT_ONCE = flags.DEFINE_integer(
  "at_once", None, "Runs at a time; by default one per GPU, or one.", 1
)
_LAUNCHER = flags.DEFINE_enum(
  "launcher", "local", ["local", "slurm"], "Where the runs run."
)
_PARTITION = flags.DEFINE_string("slurm_partition", None, "SLURM partition.")
_GPUS = flags.DEFINE_integer("slurm_gpus", 1, "GPUs of a run.", 0)
_MINUTES = flags.DEFINE_integer(
  "slurm_minutes", 60, "Time limit of a job; the rest is queued again.", 1
)
_WAIT = flags.DEFINE_bool("wait", True, "Wait for the jobs of SLURM.")
_RANK_BY = flags.DEFINE_enum(
  "rank_by",
  "valid_loss",
  ["valid_loss", "valid_accuracy", "valid_sequence_accuracy", "loss"],
  "The metric whose best value sorts the table.",
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv) -> int:
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  flag = flags.FLAGS["config"]
  path = config_flags.get_config_filename(flag)
  overrides = {
    field: _grid.text(value)
    for field, value in config_flags.get_override_values(flag).items()
  }
  base = _run.config_of().to_dict()
  grid = _grid.resolve(path, overrides, base, _GRID.value)
  runs = [_grid.run_at(path, overrides, base, x) for x in sweep.points(grid)]
  source = {"config": path, "overrides": overrides}
  workdir.mkdir(parents=True, exist_ok=True)
  with lock(workdir):
    every = sweep.claim(workdir, source, base, grid, runs)
    todo = [
      run
      for run in runs
      if not sweep.is_complete(workdir / run.name, run.steps)
    ]
    _say(f"{len(runs) - len(todo)} of {len(runs)} runs are complete")
    if _LAUNCHER.value == "local" or not todo:
      places = sweep.machine_slots(_AT_ONCE.value, len(todo))
      states, stopped = sweep.run_local(todo, workdir, places, _say)
    else:
      states, stopped = sweep.run_slurm(
        todo,
        workdir,
        _say,
        partition=_PARTITION.value,
        gpus=_GPUS.value,
        minutes=_MINUTES.value,
        at_once=_AT_ONCE.value,
        wait=_WAIT.value,
      )
    rows = sweep.results(every, workdir, states, _RANK_BY.value)
  if _JSON.value:
    print(json.dumps({"rank_by": _RANK_BY.value, "runs": rows}))
  else:
    print(sweep.table(rows))
  return _report(runs, workdir, rows, stopped)


def _report(runs, workdir, rows, stopped):
  """Says how the runs of this call ended; returns the exit status."""
  states = {row["name"]: row["state"] for row in rows}
  ended = {
    state: [run.name for run in runs if states[run.name] == state]
    for state in (sweep.COMPLETE, sweep.FAILED, sweep.STOPPED)
  }
  for name in ended[sweep.FAILED]:
    directory = workdir / name
    log = directory / sweep.LOG_NAME
    _say(f"{name} failed: {sweep.last_line(directory)} (see {log})")
  done = len(ended[sweep.COMPLETE])
  if done < len(runs):
    _say(
      f"{done} of {len(runs)} runs are complete; the same command goes on "
      "with the others"
    )
  interrupted = ended[sweep.STOPPED] and not stopped
  return int(bool(ended[sweep.FAILED] or interrupted))


def _say(text):
  print(text, file=sys.stderr, flush=True)


def run() -> None:
  _run.run(main, "config", "workdir", "grid")


if __name__ == "__main__":
  run()
