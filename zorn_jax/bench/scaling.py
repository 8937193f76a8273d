"""How the time of the queries grows with models, lengths, probes and rows."""

from functools import partial
from typing import Any

from zorn_jax.bench import cases, timing

# Batches and probes with which each size takes a second or so; large has those
# of medium, with which its time per operation is compared.
_MODELS = {
  "tiny": (64, 96),
  "small": (16, 96),
  "medium": (16, 8),
  "large": (16, 8),
}
_PROBE_BATCH = 4
_BASE = {"length": 64, "probes": 8, "batch": 32}
_GRIDS = {
  "length": (32, 64, 128, 256),
  "probes": (4, 8, 16, 32),
  "batch": (32, 64, 128, 256),
}
_QUICK = {
  "length": (8, 16, 24, 32),
  "probes": (4, 8, 12, 16),
  "batch": (2, 4, 6, 8),
}
_CHUNK = 32


def run(
  peak: dict[str, Any], quick: bool = False
) -> dict[str, list[dict[str, Any]]]:
  """Tables of times by size, and of fitted exponents.

  Args:
    peak: As :func:`timing.gemm_peak` has it, in float32.
    quick: Small cases, one repeat.
  """
  repeats = 1 if quick else 5
  sizes = {"tiny": (2, 2)} if quick else _MODELS
  models = [
    _of_model(name, *numbers, peak["flops_per_second"], repeats)
    for name, numbers in sizes.items()
  ]
  size = "tiny" if quick else "small"
  exponents = [
    _fitted(size, variable, values, 8 if quick else _CHUNK, repeats)
    for variable, values in (_QUICK if quick else _GRIDS).items()
  ]
  return {"models": models, "exponents": exponents}


def _of_model(name, batch, probes, peak, repeats):
  case = cases.lstm(name, batch, probes)
  size = min(_PROBE_BATCH, probes)
  make = partial(cases.zero_order, case, probe_batch=size)
  query = cases.Step(make(devices=0)).query
  seconds = timing.measure({name: query}, min(repeats, 3))[name]
  flops = cases.query_flops(make(devices=1))
  return {
    "case": case.name,
    "parameters": cases.num_parameters(case),
    "batch": batch,
    "probes": probes,
    "query_gflop": flops / 1e9,
    **timing.spread("query_ms", 1e3 * seconds),
    **timing.spread("ps_per_flop", 1e12 * seconds / flops),
    **timing.spread("share_of_peak", flops / seconds / peak),
  }


def _fitted(size, variable, values, chunk, repeats):
  """Times at several values of one variable, all taking turns."""
  runs = {}
  for value in values:
    given = _BASE | {variable: value}
    case = cases.lstm(
      size, given["batch"], given["probes"], given["length"], chunk
    )
    experiment = cases.zero_order(case, probe_batch=_PROBE_BATCH)
    runs[value] = cases.Step(experiment).query
  seconds = timing.measure(runs, repeats)
  return {
    "case": case.name,
    **_BASE,
    variable: "varied",
    "values": list(values),
    "ms": [1e3 * float(sorted(x)[len(x) // 2]) for x in seconds.values()],
    "exponent": timing.exponent(values, list(seconds.values())),
    "target": "1.00 +- 0.05",
  }
