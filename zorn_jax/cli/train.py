"""Trains the model of a config, or resumes it.

python -m zorn_jax.cli.train --config=configs/shakespeare.py --workdir=DIR

The processes that SLURM, Open MPI or Kubernetes started together train as one.
Elsewhere the same command is given to each of them, with its number:

python -m zorn_jax.cli.train --config=configs/shakespeare.py --workdir=DIR \
  --coordinator=HOST:PORT --num_processes=2 --process_id=0
"""

import json
import pathlib
import platform
import sys
from importlib import metadata

import jax
from absl import flags, logging
from ml_collections import config_flags

from zorn_jax import build, mesh, processes
from zorn_jax.bench import machine
from zorn_jax.cli import _run
from zorn_jax.train import train

config_flags.DEFINE_config_file("config", None, "Config file.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run, which all of its processes share."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "HOST:PORT, where process 0 of several listens and the others can reach it.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "Processes that train together; 1 for a run of its own inside a cluster's "
  "job of several.",
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Number of this process, from 0."
)

_PACKAGES = ("zorn_jax", "flax", "ml_collections", "numpy", "optax")


def main(argv) -> int:
  del argv
  config = _run.config_of()
  workdir = pathlib.Path(_WORKDIR.value)
  with processes.started(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  ):
    processes.agree(_facts(config.to_dict(), workdir))
    if not processes.is_first() and not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.ERROR)  # The first says it for all.
    experiment = build.experiment(config)
    names = config.get("loggers", ())
    if processes.is_first() and jax.device_count() > 1:
      print(mesh.describe(experiment.layout), file=sys.stderr)
    batching = build.batching(config, experiment)
    start = machine.describe()
    start |= {"command": _run.command(), "commit": _run.commit()}
    train(experiment, workdir, config.to_dict(), names, batching, start)
  return 0


def _facts(config, workdir):
  """What has to be the same in all processes, as texts by name."""
  facts = {name: metadata.version(name) for name in _PACKAGES}
  facts["python"] = platform.python_version()
  facts["workdir"] = str(workdir.absolute())

  def flatten(value, name):
    if isinstance(value, dict) and value:
      for key, inner in value.items():
        flatten(inner, f"{name}.{key}")
    else:
      facts[name] = json.dumps(value)

  flatten(config, "config")
  return facts


def run() -> None:
  _run.run(main, "config", "workdir")


if __name__ == "__main__":
  run()
