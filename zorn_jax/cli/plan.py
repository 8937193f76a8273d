"""Prints what a run of a config will cost, without allocating anything.

python -m zorn_jax.cli.plan --config=configs/paper/lstm.py:large [--json]
"""

import json

from absl import flags
from ml_collections import config_flags

from zorn_jax import build
from zorn_jax.cli import _run
from zorn_jax.plan import plan

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv) -> int:
  del argv
  result = plan(build.experiment(_CONFIG.value))
  if _JSON.value:
    print(json.dumps(result))
    return 0
  for name, value in result.items():
    text = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    print(f"{name:26} {text}")
  return 0


def run() -> None:
  _run.run(main, "config")


if __name__ == "__main__":
  run()
