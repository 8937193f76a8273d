"""Throughput of the input side beside what training consumes.

python scripts/measure_input.py

For configs/shakespeare.py and configs/algorithmic.py:TASK: the time to draw and
cut all batches of a step, compiled alone, and the time of the whole step, in
turns. For the tokenizers: characters of Shakespeare per second, once. Writes
benchmarks/results/measure_input.json and docs/measure_input.md. About two
minutes on two cores.
"""

import json
import pathlib
import platform
import runpy
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp

from zorn_jax import build, methods, tasks
from zorn_jax.step import init_state, train_step
from zorn_jax.tasks import corpora

ROOT = pathlib.Path(__file__).parent.parent
ROUNDS, STEPS = 7, 5
CONFIGS = {"shakespeare": ("shakespeare.py", "recipe")} | {
  name: ("algorithmic.py", name) for name in tasks.ALGORITHMIC
}
TOKENIZERS = {"characters": 0, "bytes": 0, "gpt2": 0, "bpe": 4096}


def read_step(experiment, readout_batches, now, data):
  """Reads every token that a step reads, and sums them.

  As the step does, the batches of the exact readout are drawn again.
  """
  task = experiment.task
  counts = (experiment.num_probes, readout_batches)
  drawn = [methods.sample_batches(task, data, now, n) for n in counts]
  batches = jax.tree.map(lambda *x: jnp.concatenate(x), *drawn)

  def read(batch):
    def add(total, index):
      chunk = task.chunk(data, batch, index)
      counted = jnp.sum(chunk.targets * chunk.weights, dtype=jnp.float32)
      return total + jnp.sum(chunk.inputs) + counted, None

    chunks = jnp.arange(task.num_chunks(task.max_length))
    return jax.lax.scan(add, jnp.zeros(()), chunks)[0]

  return jax.vmap(read)(batches)


def seconds_of(function):
  """Of one call, the mean of a few."""
  start = time.perf_counter()
  for _ in range(STEPS):
    result = function()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / STEPS


def measure(path, argument):
  scope = runpy.run_path(str(ROOT / "configs" / path))
  config = scope["get_config"](argument)
  config.curriculum.enabled = False  # Sequences of full length.
  experiment = build.experiment(config)
  readout_batches = config.estimator.readout_batches
  state, data = init_state(experiment), jax.device_put(experiment.task.data)
  now = methods.Now(
    state.step,
    state.probe_key,
    state.data_key,
    experiment.epsilon,
    experiment.task.max_length,
  )
  step = jax.jit(partial(train_step, experiment))
  read = jax.jit(partial(read_step, experiment, readout_batches))
  calls = {"input": lambda: read(now, data), "step": lambda: step(state, data)}
  seconds = {name: [] for name in calls}
  for call in calls.values():
    jax.block_until_ready(call())
  for _ in range(ROUNDS):
    for name, call in calls.items():
      seconds[name].append(seconds_of(call))
  ratios = [
    whole / part
    for whole, part in zip(seconds["step"], seconds["input"], strict=True)
  ]
  return {
    "input_ms": 1e3 * statistics.median(seconds["input"]),
    "step_ms": 1e3 * statistics.median(seconds["step"]),
    "ratio": statistics.median(ratios),
    "ratio_spread": [min(ratios), max(ratios)],
  }


def tokenizing():
  """Million characters per second of each tokenizer."""
  texts = corpora.shakespeare().train
  size = sum(map(len, texts))
  speeds = {}
  for name, vocab_size in TOKENIZERS.items():
    tokenizer = tasks.make_tokenizer(name, texts, vocab_size)
    start = time.perf_counter()
    tokenizer.encode_all(texts)
    speeds[name] = size / 1e6 / (time.perf_counter() - start)
  return speeds


def main():
  record = {
    "command": "python scripts/measure_input.py",
    "machine": f"{platform.processor() or platform.machine()}, CPU, 2 cores",
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "steps": {name: measure(*where) for name, where in CONFIGS.items()},
    "million_characters_per_second": tokenizing(),
  }
  path = ROOT / "benchmarks" / "results" / "measure_input.json"
  path.write_text(json.dumps(record) + "\n")
  (ROOT / "docs" / "measure_input.md").write_text(table(record))


def table(record):
  versions = record["versions"]
  lines = [
    "# The input side",
    "",
    f"Made by `{record['command']}` on {record['machine']}, Python "
    f"{versions['python']}, jax {versions['jax']}. Drawing and cutting all "
    "batches that a step reads, those of the exact readout among them, beside "
    f"the whole step (which does it too); medians of {ROUNDS} rounds in turns. "
    "How many times faster the input side is: median (smallest to largest).",
    "",
    "| config | input, ms a step | whole step, ms | times faster |",
    "|---|---|---|---|",
  ]
  for name, row in record["steps"].items():
    low, high = row["ratio_spread"]
    lines.append(
      f"| {name} | {row['input_ms']:.2f} | {row['step_ms']:.1f} "
      f"| {row['ratio']:.0f} ({low:.0f} to {high:.0f}) |"
    )
  lines += [
    "",
    "Texts are tokenised once. Million characters a second, one run: "
    + ", ".join(
      f"{name} {speed:.1f}"
      for name, speed in record["million_characters_per_second"].items()
    )
    + ".",
  ]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  main()
