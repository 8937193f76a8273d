"""Learns ten random tokens by heart with a large model, and counts its memory.

python scripts/overfit_large.py [--size=smoke_large|smoke_7b] [--steps=6]
  [--probes=96] [--output=FILE]

Takes whole steps as training does, without checkpoints: those of smoke_7b would
be 14 GB each. Writes its file after every step.
"""

import json
import pathlib
import resource
import runpy
import sys
import time

import jax
from absl import app, flags

from zorn_jax import build, cores
from zorn_jax.bench import machine
from zorn_jax.step import programs

ROOT = pathlib.Path(__file__).parents[1]

_SIZE = flags.DEFINE_enum(
  "size", "smoke_large", ["smoke_large", "smoke_7b"], "Which model."
)
_STEPS = flags.DEFINE_integer("steps", 6, "Steps to take.")
_PROBES = flags.DEFINE_integer("probes", 96, "Probes of a step.")
_OUTPUT = flags.DEFINE_string(
  "output", None, "The file; benchmarks/results/overfit_SIZE.json unless given."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the run.")


def peak_rss():
  """Bytes of the process at its largest, Python and compiler included."""
  scale = 1 if sys.platform == "darwin" else 1024
  return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compiled_bytes(program, *args):
  """What a program needs beside and with its arguments."""
  memory = program.lower(*args).compile().memory_analysis()
  arguments = memory.argument_size_in_bytes
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return arguments + memory.temp_size_in_bytes + results


def main(argv):
  del argv
  cores.use()
  configs = runpy.run_path(str(ROOT / "configs" / "paper" / "lstm.py"))
  config = configs["get_config"](_SIZE.value)
  config.seed, config.num_probes = _SEED.value, _PROBES.value
  experiment = build.experiment(config)
  parts, data = programs(experiment), experiment.task.data
  losses, _, aside = jax.eval_shape(parts.query, parts.template, data)
  params = jax.tree.leaves(parts.template.params)
  report = {
    "machine": machine.describe() | {"command": " ".join(sys.argv)},
    "devices": experiment.layout.mesh.size,
    "size": _SIZE.value,
    "probes": _PROBES.value,
    "seed": _SEED.value,
    "parameters": sum(x.size for x in params),
    "parameter_bytes": sum(x.size * x.dtype.itemsize for x in params),
    "query_bytes": compiled_bytes(parts.query, parts.template, data),
    "update_bytes": compiled_bytes(parts.update, parts.template, losses, aside),
    "steps": [],
  }
  print(json.dumps(report), flush=True)
  name = f"overfit_{_SIZE.value}.json"
  path = pathlib.Path(_OUTPUT.value or ROOT / "benchmarks" / "results" / name)
  start = time.perf_counter()
  state = jax.block_until_ready(parts.init())
  report["init_seconds"] = time.perf_counter() - start
  for step in range(_STEPS.value):
    start, cpu = time.perf_counter(), time.process_time()
    losses, _, aside = jax.block_until_ready(parts.query(state, data))
    middle = time.perf_counter()
    state, values = jax.block_until_ready(parts.update(state, losses, aside))
    end = time.perf_counter()
    report["steps"].append(
      {
        "step": step,
        "loss": float(values["loss"]),
        "query_seconds": middle - start,
        "update_seconds": end - middle,
        "cpu_seconds": time.process_time() - cpu,
        "peak_rss_bytes": peak_rss(),
      }
    )
    print(report["steps"][-1], flush=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
