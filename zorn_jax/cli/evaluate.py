"""Evaluates the newest or the best checkpoint of a run.

python -m zorn_jax.cli.evaluate --workdir=DIR [--free_running] [--json]
"""

import json
import pathlib

from absl import flags

from zorn_jax import build, evaluate
from zorn_jax.cli import _run
from zorn_jax.train import restore_params
from zorn_jax.train_state import digest

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_SPLIT = flags.DEFINE_enum(
  "split",
  "test",
  ["train", "valid", "test"],
  "What to read; train of texts alone, as much as valid has.",
)
_BEST = flags.DEFINE_bool("best", False, "The best checkpoint, not the newest.")
_FREE_RUNNING = flags.DEFINE_bool(
  "free_running", False, "Also lets the model read its own answers."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv) -> int:
  del argv
  workdir = pathlib.Path(_WORKDIR.value)
  experiment = build.load(workdir)
  model, task = experiment.model, experiment.task
  params, step = restore_params(experiment, workdir, best=_BEST.value)
  if _SPLIT.value not in task.splits:
    raise ValueError(
      f"the task has no split {_SPLIT.value!r}: it draws its training data. "
      f"Choose one of {', '.join(task.splits)}."
    )
  split = task.splits[_SPLIT.value]()
  free = {}
  if _FREE_RUNNING.value:  # First, because it may be refused.
    scores = evaluate.free_runner(model, task)(params, split)
    free = {
      f"free_running_{name}": scores[name]
      for name in ("accuracy", "sequence_accuracy")
    }
  result = {
    "step": step,
    "split": _SPLIT.value,
    **evaluate.evaluator(model, task)(params, split),
    **free,
    "params_digest": digest(params),
  }
  if _JSON.value:
    print(json.dumps(result))
    return 0
  width = max(map(len, result)) + 1
  for name, value in result.items():
    text = f"{value:.4f}" if isinstance(value, float) else value
    print(f"{name:{width}} {text}")
  return 0


def run() -> None:
  _run.run(main, "workdir")


if __name__ == "__main__":
  run()
