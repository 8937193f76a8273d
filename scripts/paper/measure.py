"""Measures the time and the memory of a step of a config, a row of a file.

python scripts/paper/measure.py --output=FILE --case="LSTM tiny" \\
  --program=CD-RGE --config=configs/paper/lstm.py:tiny

A row that is in the file is not measured again. Memory is what the compiled
programs need; --steps=0 measures nothing else.
"""

import json
import os
import pathlib
import statistics
import sys
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from zorn_jax import build, cores
from zorn_jax.bench import machine, memory
from zorn_jax.step import programs

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.")
_OUTPUT = flags.DEFINE_string("output", None, "The file of rows.")
_CASE = flags.DEFINE_string("case", None, "Name of what is trained.")
_PROGRAM = flags.DEFINE_string("program", None, "Name of the method.")
_STEPS = flags.DEFINE_integer("steps", 2, "Steps to time, after another.", 0)


def seconds_of(experiment, count):
  """Of each step, the first of which is compiled and left out."""
  parts, data = programs(experiment), experiment.task.data
  state, seconds = jax.block_until_ready(parts.init()), []
  for _ in range(1 + count):
    start = time.perf_counter()
    losses, _, aside = parts.query(state, data)
    if parts.recall:
      aside = parts.recall(state, data)
    state, _ = jax.block_until_ready(parts.update(state, losses, aside))
    seconds.append(time.perf_counter() - start)
  return seconds[1:]


def measured(experiment):
  """Megabytes, and seconds where they are wanted and can be had."""
  parts = programs(experiment)
  params = memory.num_bytes(parts.template.params)
  data = memory.num_bytes(jax.eval_shape(lambda: experiment.task.data))
  queries, update = (
    of(experiment) for of in (memory.query_bytes, memory.update_bytes)
  )
  peak = max(queries, update)
  row = {
    "parameters": sum(x.size for x in jax.tree.leaves(parts.template.params)),
    "parameter_mb": params / 1e6,
    "peak_mb": peak / 1e6,
    "overhead_mb": (peak - params - data) / 1e6,
    "ms": None,
  }
  if not _STEPS.value:
    return row
  try:
    times = [1e3 * x for x in seconds_of(experiment, _STEPS.value)]
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return row | {"note": "does not fit"}
  row["ms"] = statistics.median(times)
  return row | {"ms_quartiles": [min(times), max(times)]}


def main(argv):
  del argv
  cores.use()
  path = pathlib.Path(_OUTPUT.value)
  facts = machine.describe() | {"command": " ".join(["python", *sys.argv])}
  content = {"suite": "paper", "machine": facts, "tables": {"steps": []}}
  if path.exists():
    content = json.loads(path.read_text())
  rows = content["tables"]["steps"]
  experiment = build.experiment(_CONFIG.value)
  row = {
    "case": _CASE.value,
    "program": _PROGRAM.value,
    "probes": experiment.num_probes,
    "batch": _CONFIG.value.batch_size,
    "devices": experiment.layout.mesh.size,
  }
  if any(row.items() <= other.items() for other in rows):
    return
  row |= measured(experiment)
  print(row, flush=True)
  rows.append(row)
  scratch = path.with_suffix(".tmp")
  scratch.write_text(json.dumps(content, indent=2) + "\n")
  os.replace(scratch, path)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "output", "case", "program"])
  app.run(main)
