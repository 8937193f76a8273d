"""The smoothed loss beside the loss, and where estimates point, as runs end.

python scripts/measure_surrogate.py --workdir=DIR [--workdir=DIR ...]
  [--epsilons=0.01,0.1,0.2] [--probes=96]

For every directory of a run, on the text that it was trained on: the loss, how
far the smoothed loss lies above it, and the cosine between central differences
and the exact gradient, for directions of signs of rank one, beside the law for
dense ones. Writes benchmarks/results/measure_surrogate.json.
"""

import json
import pathlib
import sys

import jax
from absl import app, flags

from zorn_jax import build, diagnostics, directions, estimators, metrics
from zorn_jax.bench import machine
from zorn_jax.train import restore_params

RESULT = (
  pathlib.Path(__file__).parents[1]
  / "benchmarks/results/measure_surrogate.json"
)
_WORKDIR = flags.DEFINE_multi_string("workdir", None, "Directories of runs.")
_EPSILONS = flags.DEFINE_list("epsilons", ["0.01", "0.1", "0.2"], "Radii.")
_PROBES = flags.DEFINE_list("probes", ["96"], "Numbers of probes.")
_DIRECTIONS, _ESTIMATES = 512, 8


def rows_of(workdir):
  """What is measured where one run has ended."""
  experiment = build.load(workdir)
  params, step = restore_params(experiment, workdir)
  task = experiment.task
  split = task.splits["train"]()
  count = sum(x.size for x in jax.tree.leaves(params))

  def loss_fn(params, split_data):
    part = split._replace(data=split_data)
    return metrics.mean_loss(experiment.model, task, params, part)

  args = params, split.data
  loss = float(jax.jit(loss_fn)(*args))
  for epsilon in map(float, _EPSILONS.value):
    row = {"run": str(workdir), "step": step, "loss": loss, "epsilon": epsilon}
    gap = jax.jit(
      lambda *args, e=epsilon: diagnostics.smoothing_gap(
        loss_fn,
        *args,
        jax.random.key(0),
        epsilon=e,
        num_probes=_DIRECTIONS,
        direction=directions.low_rank(),
      )
    )(*args)
    row["gap"], row["gap_error"] = map(float, gap)
    for probes in map(int, _PROBES.value):
      estimator = estimators.central_difference(
        epsilon, probes, direction=directions.low_rank()
      )
      keys = jax.random.split(jax.random.key(1), _ESTIMATES)
      found = jax.jit(
        lambda *args, e=estimator, keys=keys: diagnostics.agreement(
          e, loss_fn, *args, keys
        )
      )(*args)
      row[f"cosine_{probes}"] = float(found.cosine)
      row[f"cosine_{probes}_error"] = float(found.standard_error)
      law = diagnostics.expected_cosine(probes, count, batch_per_probe=False)
      row[f"law_{probes}"] = law
    yield row


def main(argv):
  del argv
  facts = machine.describe()
  rows = []
  for workdir in map(pathlib.Path, _WORKDIR.value):
    for row in rows_of(workdir):
      print(row, flush=True)
      rows.append(row)
  content = {
    "machine": facts["device"],
    "versions": {name: facts[name] for name in ("python", "jax", "jaxlib")},
    "command": " ".join(["python", *sys.argv]),
    "rows": rows,
  }
  RESULT.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
  flags.mark_flag_as_required("workdir")
  app.run(main)
