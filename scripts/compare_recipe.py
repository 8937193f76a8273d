"""Forward tokens that the recipe and plain CD-RGE need for the same loss.

python scripts/compare_recipe.py [--workdir=runs/compare]

Trains configs/shakespeare.py:plain on a grid of learning rates and epsilons,
repeats its best pair and the recipe with three seeds, and writes
benchmarks/results/compare_recipe.json, docs/compare_recipe.md and .png.
Interrupted, it goes on where it stopped. About forty minutes on two cores.
"""

import argparse
import itertools
import json
import pathlib
import platform
import statistics
import subprocess
import sys

import jax
from matplotlib import figure

ROOT = pathlib.Path(__file__).parent.parent
RATES = (0.1, 0.3, 1.0, 3.0)
EPSILONS = (1e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
GRID = {"steps": 150, "evaluate_every": 50, "log_every": 10}
PLAIN = {"steps": 1330, "evaluate_every": 20, "log_every": 20}
# A quarter of the forward tokens.
RECIPE = {"steps": 995, "evaluate_every": 20, "log_every": 20}


def train(workdir, variant, **overrides):
  """Trains, or goes on, and returns [(forward tokens, seconds, loss)]."""
  overrides |= {"checkpoint_every": overrides["steps"]}
  command = [sys.executable, "-m", "zorn_jax.cli.train"]
  command += [f"--config=configs/shakespeare.py:{variant}"]
  command += [f"--workdir={workdir}"]
  command += [f"--config.{name}={x}" for name, x in overrides.items()]
  subprocess.run(command, cwd=ROOT, check=True)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return [
    (r["forward_tokens"], r["seconds"], r["valid_loss"])
    for r in records
    if "valid_loss" in r
  ]


def tokens_to_reach(curve, target):
  """Forward tokens at the first validation that is at most `target`."""
  return next((tokens for tokens, _, loss in curve if loss <= target), None)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--workdir", default="runs/compare", type=pathlib.Path)
  workdir = parser.parse_args().workdir.absolute()
  grid = {}
  for rate, epsilon in itertools.product(RATES, EPSILONS):
    curve = train(
      workdir / f"grid-{rate}-{epsilon}",
      "plain",
      learning_rate=rate,
      epsilon=epsilon,
      **GRID,
    )
    grid[rate, epsilon] = curve[-1][2]
  rate, epsilon = min(grid, key=grid.get)
  plain, recipe = [], []
  for seed in SEEDS:
    plain.append(
      train(
        workdir / f"plain-{seed}",
        "plain",
        learning_rate=rate,
        epsilon=epsilon,
        seed=seed,
        **PLAIN,
      )
    )
    recipe.append(
      train(workdir / f"recipe-{seed}", "recipe", seed=seed, **RECIPE)
    )
    write(grid, plain, recipe)


def write(grid, plain, recipe):
  """Writes the numbers, the table and the picture."""
  rows = []
  for seed, p, r in zip(SEEDS, plain, recipe, strict=False):
    target = min(loss for _, _, loss in p)
    before, after = tokens_to_reach(p, target), tokens_to_reach(r, target)
    ratio = before / after if after else 0.0  # Not reached.
    rows.append((seed, target, before, after, ratio, r[-1][2]))
  result = {
    "command": "python scripts/compare_recipe.py",
    "machine": f"{platform.processor() or platform.machine()}, CPU, 2 cores",
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "grid": [[*pair, loss] for pair, loss in grid.items()],
    "plain": plain,
    "recipe": recipe,
    "median_ratio": statistics.median(row[4] for row in rows),
  }
  results = ROOT / "benchmarks" / "results"
  results.mkdir(parents=True, exist_ok=True)
  text = json.dumps(result)
  (results / "compare_recipe.json").write_text(text + "\n")
  docs = ROOT / "docs"
  docs.mkdir(exist_ok=True)
  (docs / "compare_recipe.md").write_text(table(grid, rows, result))
  draw(plain, recipe, docs / "compare_recipe.png")


def table(grid, rows, result):
  lines = [
    "# The recipe against plain CD-RGE",
    "",
    f"Made by `{result['command']}` on {result['machine']}, Python "
    f"{result['versions']['python']}, jax {result['versions']['jax']}. One "
    "LSTM of 24,885 parameters on Shakespeare's characters, loss on the "
    "validation plays in nats per character. Plain is "
    "`configs/shakespeare.py:plain`: SGD, one batch for all probes, dense "
    f"signs. {len(rows)} of {len(SEEDS)} seeds done.",
    "",
    "![Validation loss against forward tokens](compare_recipe.png)",
    "",
    "| seed | best loss of plain | its tokens | the recipe's tokens to reach "
    "it | ratio | the recipe's last loss |",
    "|---|---|---|---|---|---|",
  ]
  for seed, target, before, after, ratio, last in rows:
    reached = f"{after / 1e6:.1f} M" if after else "not reached"
    lines.append(
      f"| {seed} | {target:.3f} | {before / 1e6:.1f} M | {reached} "
      f"| {ratio:.1f} | {last:.3f} |"
    )
  tokens = result["plain"][0][-1][0] * GRID["steps"] / PLAIN["steps"]
  lines += [
    "",
    f"The grid from which plain's pair was chosen, after {tokens / 1e6:.0f} M "
    "tokens (rows: learning rate; columns: epsilon):",
    "",
    "| | " + " | ".join(f"{e:g}" for e in EPSILONS) + " |",
    "|---" * (len(EPSILONS) + 1) + "|",
  ]
  for rate in RATES:
    cells = [f"{grid[rate, epsilon]:.3f}" for epsilon in EPSILONS]
    lines.append(f"| {rate:g} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def draw(plain, recipe, path):
  canvas = figure.Figure(figsize=(9, 4), layout="constrained")
  by_tokens, by_time = canvas.subplots(1, 2, sharey=True)
  for axes, column, scale in ((by_tokens, 0, 1e6), (by_time, 1, 1)):
    for name, curves, color in (
      ("plain CD-RGE", plain, "C0"),
      ("recipe", recipe, "C1"),
    ):
      for index, curve in enumerate(curves):
        axes.plot(
          [point[column] / scale for point in curve],
          [point[2] for point in curve],
          color=color,
          label=name if index == 0 else None,
        )
    axes.grid(alpha=0.3)
  by_tokens.set(xlabel="million forward tokens", ylabel="nats per character")
  by_time.set(xlabel="seconds of training")
  by_tokens.legend()
  canvas.savefig(path, dpi=150)


if __name__ == "__main__":
  main()
