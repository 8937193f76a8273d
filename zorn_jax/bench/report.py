"""Runs a suite, and writes what it found for people and for programs."""

from typing import Any

import jax

from zorn_jax.bench import (
  kernels,
  lstm_kernel,
  machine,
  memory,
  scaling,
  step,
  timing,
)

SUITES = ("step", "memory", "scaling", "kernels")


def measure(
  suite: str, peers: bool = False, quick: bool = False
) -> dict[str, Any]:
  """Runs a suite.

  Args:
    suite: One of `SUITES`.
    peers: Whether the peers that are installed run as well; of "step" alone.
    quick: Small cases, once each.
  Returns:
    What JSON can hold: `suite`, `quick`, `machine`, the `peaks` of matrix
    products, `tables` of rows, and the peers that were `skipped`.
  Raises:
    ValueError: If the suite has no peers.
  """
  if peers and suite != "step":
    raise ValueError(
      f"the suite {suite} has no peers. Leave out --peers, or choose step."
    )
  result = {"suite": suite, "quick": quick, "machine": machine.describe()}
  if suite == "memory":
    return result | {"tables": memory.run(quick)}
  on_gpu = jax.default_backend() == "gpu"
  both = on_gpu and suite in ("kernels", "step")
  peaks = {
    name: timing.gemm_peak(_peak_sizes(on_gpu, quick), name, repeats=5)
    for name in (("float32", "bfloat16") if both else ("float32",))
  }
  result["peaks"] = peaks
  if suite == "kernels":
    tables = kernels.run(peaks, quick)
    if on_gpu or quick:  # A CPU has no LSTM kernel to compare with XLA.
      tables |= lstm_kernel.run(quick)
    return result | {"tables": tables}
  if suite == "scaling":
    return result | {"tables": scaling.run(peaks["float32"], quick)}
  tables = step.run(peaks, peers, quick)
  missing = [x for x in machine.PEERS if peers and not machine.installed(x)]
  return result | {"tables": tables, "skipped": missing}


def _peak_sizes(on_gpu, quick):
  if quick:
    return (128, 256)
  return (4096, 8192, 16384) if on_gpu else (1024, 2048, 4096)


def as_text(result: dict[str, Any]) -> str:
  """What a person reads: the machine, and tables with aligned columns."""
  lines = [f"{name:14} {value}" for name, value in result["machine"].items()]
  for peak in result.get("peaks", {}).values():
    rate = peak["flops_per_second"] / 1e9
    lines.append(f"{'peak':14} {rate:.4g} GFLOP/s in {peak['dtype']}")
  for title, rows in result["tables"].items():
    lines += ["", title, *_table(rows)]
  for peer in result.get("skipped", ()):
    lines.append(f"skipped: {peer} is not installed")
  return "\n".join(lines)


def _table(rows):
  names = dict.fromkeys(name for row in rows for name in row)
  names = [x for x in names if not x.endswith("_quartiles") and x != "tried_ms"]
  cells = [names]
  for row in rows:
    cells.append([_cell(row, name) for name in names])
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _cell(row, name):
  if name not in row:
    return "-"
  text = _figure(row[name])
  quartiles = row.get(f"{name}_quartiles")
  if quartiles:
    text += f" [{', '.join(map(_figure, quartiles))}]"
  return text


def _figure(value):
  if isinstance(value, list):
    return ", ".join(map(_figure, value))
  return f"{value:.4g}" if isinstance(value, float) else str(value)
