"""Gradient agreement filtering (GAF) against plain averaging, noisy labels.

python scripts/compare_gaf.py [--steps=800] [--root=.]

A GRU classifies short sequences; a quarter of the training and validation
labels is wrong, and none in the control. Both methods see the same
micro-batches in the same order. Writes benchmarks/results/compare_gaf.json,
docs/compare_gaf.md and .png below the root. About three minutes on two busy
cores.
"""

import argparse
import functools
import json
import pathlib
import platform
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import figure

from zorn_jax import aggregators

ROOT = pathlib.Path(__file__).parent.parent
SEEDS = (0, 1, 2)
NOISES = (0.25, 0.0)  # Shares of labels that are flipped.
# Ten settings for each: plain averaging has no threshold, but a finer grid.
RATES = tuple(round(0.08 * 2 ** (-i / 2), 4) for i in reversed(range(10)))
THRESHOLDS = (0.95, 0.9)
PLAIN = "plain"
METHODS = {PLAIN: (aggregators.mean(), RATES)} | {
  f"GAF {x:g}": (aggregators.gaf(x), RATES[1::2]) for x in THRESHOLDS
}
CLASSES, LENGTH, PATTERN, FEATURES, HIDDEN = 10, 10, 4, 6, 32
TRAIN, VALID, TEST = 1000, 500, 2000
MICRO_BATCHES, PER_CLASS = 4, 2
EVERY = 50  # Steps from one evaluation to the next.
MOMENTUM = 0.9


class Data(NamedTuple):
  """Sequences [n, T, features] and labels [n]; those of the test are clean."""

  train_x: np.ndarray
  train_y: np.ndarray
  valid_x: np.ndarray
  valid_y: np.ndarray
  test_x: np.ndarray
  test_y: np.ndarray


class Run(NamedTuple):
  """Accuracies at each evaluation, and the share of steps without update."""

  valid: jax.Array
  test: jax.Array
  train: jax.Array
  skipped: jax.Array


def make_data(seed, noise):
  """A class is a pattern that begins anywhere in a sequence of normal noise."""
  rng = np.random.default_rng([seed, 0])
  flips = np.random.default_rng([seed, 1])
  patterns = 1.5 * rng.normal(size=(CLASSES, PATTERN, FEATURES))

  def draw(size, share):
    labels = np.arange(size) % CLASSES
    x = rng.normal(size=(size, LENGTH, FEATURES))
    starts = rng.integers(0, LENGTH - PATTERN + 1, size)
    for row, start, label in zip(x, starts, labels, strict=True):
      row[start : start + PATTERN] += patterns[label]
    wrong = (labels + flips.integers(1, CLASSES, size)) % CLASSES
    y = np.where(flips.random(size) < share, wrong, labels)
    return x.astype(np.float32), y.astype(np.int32)

  return Data(*draw(TRAIN, noise), *draw(VALID, noise), *draw(TEST, 0.0))


def make_order(seed, labels, steps):
  """Indices [steps, micro-batches, examples], balanced in the given labels."""
  rng = np.random.default_rng([seed, 2])
  shape = (steps, MICRO_BATCHES, PER_CLASS)
  members = (np.flatnonzero(labels == c) for c in range(CLASSES))
  return np.concatenate([rng.choice(m, shape) for m in members], axis=-1)


def initialize(key):
  w, u, out = jax.random.split(key, 3)
  normal = lambda k, m, n: jax.random.normal(k, (m, n)) * m**-0.5
  return {
    "w": normal(w, FEATURES, 3 * HIDDEN),
    "u": normal(u, HIDDEN, 3 * HIDDEN),
    "b": jnp.zeros(3 * HIDDEN),
    "out": normal(out, HIDDEN, CLASSES),
    "bias": jnp.zeros(CLASSES),
  }


def logits_of(params, x):
  """A GRU and a readout of its last state."""

  def cell(h, inputs):
    wz, wr, wn = jnp.split(inputs @ params["w"] + params["b"], 3, axis=-1)
    uz, ur, un = jnp.split(h @ params["u"], 3, axis=-1)
    z = jax.nn.sigmoid(wz + uz)
    new = jnp.tanh(wn + jax.nn.sigmoid(wr + ur) * un)
    return z * h + (1 - z) * new, None

  start = jnp.zeros((x.shape[0], HIDDEN))
  h, _ = jax.lax.scan(cell, start, jnp.swapaxes(x, 0, 1))
  return h @ params["out"] + params["bias"]


def loss_fn(params, x, y):
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits_of(params, x), y
  )
  return jnp.mean(losses)


@functools.partial(jax.jit, static_argnums=0)
def train(aggregator, rates, keys, data, order):
  """Trains every rate with every seed; accuracies [rate, seed, evaluation]."""

  def one(rate, key, data, order):
    optimizer = optax.sgd(rate, MOMENTUM, nesterov=True)
    params = initialize(key)

    def step(carry, batches):
      params, state = carry
      micro = lambda i: jax.grad(loss_fn)(
        params, data.train_x[i], data.train_y[i]
      )
      grads = aggregator(micro, batches)
      skip = optax.tree.norm(grads) == 0
      updates, after = optimizer.update(grads, state, params)
      after = (optax.apply_updates(params, updates), after)
      # A skipped step leaves the momentum alone, too.
      keep = lambda new, old: jnp.where(skip, old, new)
      return jax.tree.map(keep, after, carry), skip

    def evaluated(carry, batches):
      carry, skips = jax.lax.scan(step, carry, batches)
      hits = lambda x, y: jnp.mean(jnp.argmax(logits_of(carry[0], x), -1) == y)
      return carry, Run(
        hits(data.valid_x, data.valid_y),
        hits(data.test_x, data.test_y),
        hits(data.train_x, data.train_y),
        jnp.mean(skips),
      )

    blocks = order.reshape(-1, EVERY, *order.shape[1:])
    return jax.lax.scan(evaluated, (params, optimizer.init(params)), blocks)[1]

  seeds = jax.vmap(one, (None, 0, 0, 0))
  return jax.vmap(seeds, (0, None, None, None))(rates, keys, data, order)


def run_all(noise, steps):
  """A Run of arrays [rate, seed, evaluation] for each method."""
  each = [make_data(seed, noise) for seed in SEEDS]
  data = jax.tree.map(lambda *x: np.stack(x), *each)
  orders = [
    make_order(seed, one.train_y, steps)
    for seed, one in zip(SEEDS, each, strict=True)
  ]
  keys = jnp.stack([jax.random.key(seed) for seed in SEEDS])
  runs = {}
  for name, (aggregator, rates) in METHODS.items():
    run = train(aggregator, jnp.array(rates), keys, data, np.stack(orders))
    runs[name] = jax.tree.map(lambda x: np.asarray(x, np.float64), run)
    print(f"{noise:.0%} flipped, {name}: done", flush=True)
  return runs


def choose(runs, names, at_end):
  """The (name, rate index) with the best mean validation over the seeds."""

  def score(pair):
    valid = runs[pair[0]].valid[pair[1]]
    return np.mean(valid[:, -1] if at_end else np.max(valid, -1))

  pairs = [(name, r) for name in names for r in range(len(METHODS[name][1]))]
  return max(pairs, key=score)


def accuracies(run, rate, at_end):
  """Test accuracies of the seeds, at the end or where validation is best."""
  test, valid = run.test[rate], run.valid[rate]
  last = np.full(len(test), test.shape[1] - 1)
  points = last if at_end else np.argmax(valid, axis=-1)
  return np.take_along_axis(test, points[:, None], axis=-1)[:, 0]


def compare(runs, noise):
  """Rows: each method with what the validation set chose for it."""
  rows = []
  for at_end in (True, False):
    for names in ([PLAIN], [name for name in METHODS if name != PLAIN]):
      name, rate = choose(runs, names, at_end)
      found = accuracies(runs[name], rate, at_end)
      rows.append(
        {
          "flipped": noise,
          "point": "end" if at_end else "best validation",
          "method": name,
          "rate": METHODS[name][1][rate],
          "accuracies": found.tolist(),
          "median": float(np.median(found)),
          "spread": float(np.ptp(found)),
          "train": float(np.median(runs[name].train[rate, :, -1])),
          "skipped": float(np.mean(runs[name].skipped[rate])),
        }
      )
  return rows


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--steps", default=800, type=int)
  parser.add_argument("--root", default=ROOT, type=pathlib.Path)
  args = parser.parse_args()
  if args.steps < EVERY or args.steps % EVERY:
    parser.error(f"--steps must be a multiple of {EVERY}, got {args.steps}.")
  runs = {noise: run_all(noise, args.steps) for noise in NOISES}
  rows = [row for noise in NOISES for row in compare(runs[noise], noise)]
  write(runs, rows, args.steps, args.root)


def write(runs, rows, steps, root):
  """Writes the numbers, the tables and the picture."""
  command = "python scripts/compare_gaf.py"
  result = {
    "command": command if steps == 800 else f"{command} --steps={steps}",
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "seeds": SEEDS,
    "steps": steps,
    "chosen": rows,
    "rates": {name: rates for name, (_, rates) in METHODS.items()},
    "curves": {
      f"{noise:.0%} flipped": {
        name: {
          field: np.round(values, 4).tolist()
          for field, values in run._asdict().items()
        }
        for name, run in by_method.items()
      }
      for noise, by_method in runs.items()
    },
  }
  results, docs = root / "benchmarks" / "results", root / "docs"
  results.mkdir(parents=True, exist_ok=True)
  docs.mkdir(parents=True, exist_ok=True)
  (results / "compare_gaf.json").write_text(json.dumps(result) + "\n")
  (docs / "compare_gaf.md").write_text(page(runs, result))
  draw(runs, rows, docs / "compare_gaf.png")


def page(runs, result):
  rows, steps = result["chosen"], result["steps"]
  versions = result["versions"]
  lines = [
    "# GAF against plain averaging on noisy labels",
    "",
    f"Made by `{result['command']}` with Python {versions['python']}, jax "
    f"{versions['jax']}, seeds {', '.join(map(str, SEEDS))}; one seed is one "
    "data set, one order of the data and one initial net.",
    "",
    f"A GRU of {HIDDEN} units reads {LENGTH} vectors of normal noise, in which "
    f"one of {CLASSES} patterns of length {PATTERN} begins anywhere: "
    f"{TRAIN:,} sequences for training, {VALID} for validation, {TEST:,} for "
    "the test. Labels of the training and the validation set are flipped to "
    "another class, so nothing is tuned on clean labels; those of the test "
    f"are clean. Each of {steps} steps of SGD (Nesterov momentum {MOMENTUM}) "
    f"has {MICRO_BATCHES} micro-batches with {PER_CLASS} examples of each "
    "(observed) class. Both methods see the same micro-batches in the same "
    "order; GAF leaves out the update where nothing agrees.",
    "",
    "Each method has ten settings: plain averaging ten learning rates from "
    f"{RATES[0]:g} to {RATES[-1]:g}, GAF every second of them with thresholds "
    f"{' and '.join(f'{x:g}' for x in THRESHOLDS)}. The setting is the one "
    "with the best mean accuracy of the three seeds on the validation set, at "
    "the end or at each seed's best of all evaluations. Accuracies are those "
    "on clean test labels, in percent; spread is the largest minus the "
    "smallest.",
    "",
    "| flipped | at | method | rate | seeds | median | spread | training set "
    "at the end | steps skipped |",
    "|---" * 9 + "|",
  ]
  for row in rows:
    seeds = " ".join(f"{100 * x:.1f}" for x in row["accuracies"])
    lines.append(
      f"| {row['flipped']:.0%} | {row['point']} | {row['method']} "
      f"| {row['rate']:g} | {seeds} | {100 * row['median']:.1f} "
      f"| {100 * row['spread']:.1f} | {100 * row['train']:.1f} "
      f"| {row['skipped']:.0%} |"
    )
  lines += [
    "",
    "What GAF gains, in points, seed by seed:",
    "",
    "| flipped | at | seeds | median | difference of the medians |",
    "|---|---|---|---|---|",
  ]
  for plain, gaf in zip(rows[::2], rows[1::2], strict=True):
    pairs = zip(gaf["accuracies"], plain["accuracies"], strict=True)
    gain = [100 * (after - before) for after, before in pairs]
    seeds = " ".join(f"{x:+.1f}" for x in gain)
    lines.append(
      f"| {gaf['flipped']:.0%} | {gaf['point']} | {seeds} "
      f"| {statistics.median(gain):+.1f} "
      f"| {100 * (gaf['median'] - plain['median']):+.1f} |"
    )
  lines += [
    "",
    "![Accuracy against steps and learning rate](compare_gaf.png)",
    "",
    "Median test accuracy at the end for every setting, in percent:",
    "",
  ]
  for noise in NOISES:
    lines += [
      f"| {noise:.0%} flipped | " + " | ".join(f"{r:g}" for r in RATES) + " |",
      "|---" * (len(RATES) + 1) + "|",
    ]
    for name, (_, rates) in METHODS.items():
      medians = 100 * np.median(runs[noise][name].test[:, :, -1], axis=1)
      found = dict(zip(rates, medians, strict=True))
      cells = (f"{found[r]:.1f}" if r in found else "" for r in RATES)
      lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
  return "\n".join([*lines, NOTES])


# Hand-written, of the committed run.
NOTES = """\
## Reading

With both methods tuned, GAF gains about one point on noisy labels: less than
the seeds differ, and not the two points or more that were expected. Without
noise it changes nothing.

What it does is to forgive a learning rate that is too large. With a quarter of
the labels flipped, plain averaging loses 11 points from rate 0.0141 to 0.04; a
threshold of 0.9 wins back 8 of them and skips 43 % of the steps there. A
smaller rate, or stopping at the best validation, does the same for plain
averaging. Whoever compares both at one rate that was tuned without noise will
see the large gains.

This says nothing about large nets on images, where the published gains are.

## Other setups

Tried before this one was chosen, on seeds 10 to 12, each with a common grid of
four to seven rates for both and three to five thresholds for GAF; median
accuracies in percent, plain / GAF. Nets are an MLP with two hidden layers of
128 on ten classes of Gaussian clusters (20 features, 1,000 points), unless it
says otherwise; m is the number of micro-batches. The GRU was kept because this
package trains recurrent nets; it also favours GAF more than the others do.

| setup | at the end | at the best validation |
|---|---|---|
| m = 4, 2 of each class | 90.0 / 89.9 | 90.8 / 90.4 |
| m = 2, 1 of each class | 90.0 / 90.0 | 90.2 / 89.8 |
| m = 10, 1 of each class | 90.2 / 89.9 | 90.4 / 90.9 |
| m = 40, 1 example | 87.9 / 87.9 | 89.6 / 89.7 |
| m = 16, 4 examples, not balanced | 88.0 / 87.8 | 89.6 / 89.2 |
| m = 4, 32 examples, not balanced | 89.2 / 89.8 | 90.3 / 89.8 |
| 80 clusters, 2,000 points | 75.4 / 75.5 | 75.4 / 76.0 |
| 200 features | 76.3 / 76.2 | 76.4 / 77.5 |
| Adam | 89.8 / 90.0 | 90.4 / 90.6 |
| GRU of 48 units, length 12, 1,000 steps | 75.6 / 75.7 | 76.2 / 78.2 |
| the same, 2,000 steps | 74.9 / 75.7 | 75.4 / 77.0 |
| GRU of 32 units, length 10, 800 steps | 78.2 / 79.3 | 78.4 / 79.6 |
"""


def draw(runs, rows, path):
  canvas = figure.Figure(figsize=(9, 4), layout="constrained")
  by_step, by_rate = canvas.subplots(1, 2, sharey=True)
  noisy = runs[NOISES[0]]
  for row, color in zip(rows[:2], ("C0", "C1"), strict=True):
    name = row["method"]
    rate = METHODS[name][1].index(row["rate"])
    curves = noisy[name].test[rate]
    steps = EVERY * np.arange(1, curves.shape[1] + 1)
    for index, curve in enumerate(curves):
      label = f"{name}, rate {row['rate']:g}" if index == 0 else None
      by_step.plot(steps, 100 * curve, color=color, label=label)
  for name, (_, rates) in METHODS.items():
    final = 100 * np.median(noisy[name].test[:, :, -1], axis=1)
    by_rate.plot(rates, final, marker="o", label=name)
  by_step.set(
    xlabel="step", ylabel="accuracy on clean labels, %", title="as chosen"
  )
  by_rate.set(xlabel="learning rate", xscale="log", title="at the end, median")
  for axes in (by_step, by_rate):
    axes.grid(alpha=0.3)
    axes.legend()
  canvas.savefig(path, dpi=150)


if __name__ == "__main__":
  main()
