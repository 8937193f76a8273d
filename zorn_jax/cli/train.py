"""Trains the model of a config, or resumes it.

python -m zorn_jax.cli.train --config=configs/shakespeare.py --workdir=DIR
"""

import pathlib

from absl import flags
from ml_collections import config_flags

from zorn_jax import build, loggers
from zorn_jax.cli import _run
from zorn_jax.train import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")


def main(argv) -> int:
  del argv
  config = _CONFIG.value
  loggers.check(config.loggers)
  workdir = pathlib.Path(_WORKDIR.value)
  experiment = build.experiment(config)
  train(experiment, workdir, config.to_dict(), config.loggers)
  return 0


def run() -> None:
  _run.run(main, "config", "workdir")


if __name__ == "__main__":
  run()
