"""Evaluates the newest or the best checkpoint of a run.

python -m zorn_jax.cli.evaluate --workdir=DIR [--json]
"""

import json
import pathlib

from absl import flags

from zorn_jax import build, evaluate
from zorn_jax.cli import _run
from zorn_jax.train import restore_params
from zorn_jax.train_state import digest

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_SPLIT = flags.DEFINE_enum("split", "test", ["valid", "test"], "What to read.")
_BEST = flags.DEFINE_bool("best", False, "The best checkpoint, not the newest.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv) -> int:
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  experiment = build.load(workdir)
  params, step = restore_params(experiment, workdir, best=_BEST.value)
  split = experiment.task.splits[_SPLIT.value]()
  result = {
    "step": step,
    "split": _SPLIT.value,
    **evaluate.evaluator(experiment.model, experiment.task)(params, split),
    "params_digest": digest(params),
  }
  if _JSON.value:
    print(json.dumps(result))
    return 0
  for name, value in result.items():
    text = f"{value:.4f}" if isinstance(value, float) else value
    print(f"{name:18} {text}")
  return 0


def run() -> None:
  _run.run(main, "workdir")


if __name__ == "__main__":
  run()
