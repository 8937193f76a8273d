"""The losses that the DNC of the authors' log begins with, by seed.

python scripts/measure_starts.py [--seeds=60]

The mean loss of the one batch of configs/paper/dnc.py, scale 8, without a
perturbation and before the first step. Writes
benchmarks/results/measure_starts.json.
"""

import json
import pathlib
import statistics
import sys

import jax
from absl import app, flags

from zorn_jax import build, metrics
from zorn_jax.bench import machine
from zorn_jax.step import init_state

ROOT = pathlib.Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/measure_starts.json"
_SEEDS = flags.DEFINE_integer("seeds", 60, "How many, from 0 on.")


def main(argv):
  del argv
  scope = {}
  exec((ROOT / "configs/paper/dnc.py").read_text(), scope)
  config = scope["get_config"]("scale=8")
  experiment = build.experiment(config, one_device=True)
  model, task = experiment.model, experiment.task

  @jax.jit
  def start(seed):
    params = init_state(experiment._replace(seed=seed)).params
    return metrics.mean_loss(model, task, params, task.splits["valid"]())

  losses = [float(start(seed)) for seed in range(_SEEDS.value)]
  facts = machine.describe()
  content = {
    "machine": facts["device"],
    "versions": {name: facts[name] for name in ("python", "jax", "jaxlib")},
    "command": " ".join(["python", *sys.argv]),
    "mean": statistics.mean(losses),
    "deviation": statistics.stdev(losses),
    "losses": losses,
  }
  print(json.dumps(content, indent=2))
  RESULT.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
