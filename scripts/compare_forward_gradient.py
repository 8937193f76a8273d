"""Exact directional derivatives against differences, at equal forward cost.

python scripts/compare_forward_gradient.py

For an LSTM of 9,124 parameters and a batch of the copy task: the slopes along
256 directions by `forward_gradient` (one `jax.jvp` each) and by
`central_difference` (one pair each, several epsilons), for parameters in
float32 and bfloat16 and for dense and rank-one signs, against the gradient by
back-propagation in float32 at the same parameters. Writes
benchmarks/results/compare_forward_gradient.json and
docs/compare_forward_gradient.md. About one minute on two cores.
"""

import json
import pathlib
import platform
import runpy
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import zorn_jax
from zorn_jax import build, metrics, tasks

ROOT = pathlib.Path(__file__).parent.parent
PROBES, SEEDS, ROUNDS = 256, 5, 9
EPSILONS = (1e-1, 1e-2, 1e-3, 1e-4)
DIRECTIONS = {
  "dense": zorn_jax.rademacher(),
  "rank one": zorn_jax.low_rank(),
}


def experiment_of(dtype):
  config = runpy.run_path(str(ROOT / "configs" / "copy.py"))["get_config"]()
  config.batch_size = 16
  config.model.dtype = dtype
  config.model.embedding_size = 16
  config.model.hidden_size = 32
  return build.experiment(config)


def measure(dtype, direction, epsilon):
  """Errors over seeds, and milliseconds of a query."""
  experiment = experiment_of(dtype)
  model, task = experiment.model, experiment.task
  wide = experiment_of("float32").model
  batch = tasks.first_batch(task, ())
  params = model.init(jax.random.key(0))
  num_chunks = task.num_chunks(task.max_length)
  split_of = lambda batch: tasks.Split((), batch, num_chunks)

  def loss_fn(params, batch):
    return metrics.mean_loss(model, task, params, split_of(batch))

  options = {"direction": DIRECTIONS[direction]}
  if epsilon is None:
    estimator = zorn_jax.forward_gradient(PROBES, **options)
  else:
    estimator = zorn_jax.central_difference(epsilon, PROBES, **options)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  gradient = jax.grad(
    lambda params: metrics.mean_loss(wide, task, params, split_of(batch))
  )(exact)
  slopes_of = zorn_jax.forward_gradient(PROBES, **options).update

  @jax.jit
  def query(key):
    return estimator.query(loss_fn, params, batch, (), key)

  @jax.jit
  def errors(losses, key):
    if epsilon is not None:
      slope = (losses[:, 0] - losses[:, 1]) / (2 * epsilon)
      losses = jnp.stack([slope, slope], 1)
    # In float32, so that only the slopes differ.
    estimate, _ = slopes_of(losses, exact, (), key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(PROBES))
    sample = options["direction"].sample
    zeros = jax.tree.map(jnp.zeros_like, exact)

    def true_slope(key):
      z = options["direction"].perturb(zeros, sample(key, exact), 1.0)
      z = zorn_jax.materialize(z)
      return sum(
        jnp.vdot(a, b)
        for a, b in zip(
          jax.tree.leaves(z), jax.tree.leaves(gradient), strict=True
        )
      )

    truth = jax.lax.map(true_slope, keys)
    slope_error = jnp.sqrt(
      jnp.mean((losses[:, 1] - truth) ** 2) / jnp.mean(truth**2)
    )
    square = lambda tree: sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))
    gap = jax.tree.map(jnp.subtract, estimate, gradient)
    return slope_error, square(gap) / square(gradient)

  values = []
  for seed in range(SEEDS):
    key = jax.random.key(100 + seed)
    values.append([float(x) for x in errors(query(key), key)])
  seconds = []
  for _ in range(ROUNDS):
    start = time.perf_counter()
    jax.block_until_ready(query(jax.random.key(0)))
    seconds.append(time.perf_counter() - start)
  slope, gradient_error = np.median(values, axis=0)
  spread = [float(np.min(values, 0)[0]), float(np.max(values, 0)[0])]
  return {
    "dtype": dtype,
    "direction": direction,
    "epsilon": epsilon,
    "slope_error": float(slope),
    "slope_error_spread": spread,
    "gradient_error": float(gradient_error),
    "ms": 1e3 * statistics.median(seconds),
  }


def main():
  rows = [
    measure(dtype, direction, epsilon)
    for dtype in ("float32", "bfloat16")
    for direction in DIRECTIONS
    for epsilon in (None, *EPSILONS)
  ]
  params = experiment_of("float32").model.init(jax.random.key(0))
  size = sum(x.size for x in jax.tree.leaves(params))
  record = {
    "command": "python scripts/compare_forward_gradient.py",
    "machine": f"{platform.processor() or platform.machine()}, CPU, 2 cores",
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "parameters": size,
    "rows": rows,
  }
  path = ROOT / "benchmarks" / "results" / "compare_forward_gradient.json"
  path.write_text(json.dumps(record) + "\n")
  page = ROOT / "docs" / "compare_forward_gradient.md"
  page.write_text(table(record))


def table(record):
  versions = record["versions"]
  law = (record["parameters"] - 1) / PROBES
  lines = [
    "# Exact directional derivatives against differences",
    "",
    f"Made by `{record['command']}` on {record['machine']}, Python "
    f"{versions['python']}, jax {versions['jax']}: an LSTM of "
    f"{record['parameters']:,} parameters, {PROBES} directions, median of "
    f"{SEEDS} seeds. The error of the slopes is relative to their root mean "
    "square (smallest to largest seed); that of the estimate is ‖ĝ−g‖²/‖g‖², "
    f"which is (d−1)/n = {law:.1f} on average for exact slopes. Time: one "
    f"query, median of {ROUNDS}.",
    "",
    "| parameters | directions | slopes by | error of the slopes | "
    "error of the estimate | ms |",
    "|---|---|---|---|---|---|",
  ]
  for row in record["rows"]:
    how = "jvp" if row["epsilon"] is None else f"ε = {row['epsilon']:g}"
    low, high = row["slope_error_spread"]
    lines.append(
      f"| {row['dtype']} | {row['direction']} | {how} "
      f"| {row['slope_error']:.2g} ({low:.2g} to {high:.2g}) "
      f"| {row['gradient_error']:.1f} | {row['ms']:.1f} |"
    )
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  main()
