"""Prints what a run of a config will cost, without allocating anything.

python -m zorn_jax.cli.plan --config=configs/paper/lstm.py:large [--devices=8]
  [--memory=80e9] [--json]

How many probes run at once, and the bytes for it, are for a device as those
that are here, or one with so much memory. --tune does allocate: it runs the
queries of a step with one probe at once, with two, four and so on as far as
they fit, and names the fastest for estimator.probe_batch.
"""

import json
import math

import jax
from absl import flags
from ml_collections import config_flags

from zorn_jax import build, cores, memory, probe_batch
from zorn_jax.cli import _run
from zorn_jax.plan import plan

config_flags.DEFINE_config_file("config", None, "Config file.")
_DEVICES = flags.DEFINE_integer(
  "devices",
  None,
  "Devices to plan for, which need not be there; those that there are, or "
  "config.mesh asks for, unless given.",
)
_MEMORY = flags.DEFINE_float(
  "memory",
  None,
  "Bytes that a device to plan for has; what is left on those here unless "
  "given.",
)
_TUNE = flags.DEFINE_bool(
  "tune", False, "Measure how many probes at once are fastest here."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv) -> int:
  del argv
  cores.use()
  config, devices = _run.config_of(), _DEVICES.value
  if devices is None:
    wanted = config.get("mesh", {})
    axes = (max(1, wanted.get(axis, 1)) for axis in ("probe", "data", "head"))
    devices = math.prod(axes)
    devices = devices if devices > jax.device_count() else 0
  elif devices < 1:
    raise ValueError(
      f"devices must be at least 1, got {devices}. Choose how many to plan for."
    )
  if _MEMORY.value is not None and not _MEMORY.value > 0:
    raise ValueError(
      f"memory must be positive, got {_MEMORY.value}. Give bytes, such as 80e9."
    )
  experiment = build.experiment(config, num_devices=devices)
  batching = build.batching(config, experiment)
  if _TUNE.value and (_DEVICES.value or _MEMORY.value or not batching):
    raise ValueError(
      "tune runs the queries of probes on the devices that are here. Leave out "
      "--devices and --memory, and choose an estimator that has probes."
    )
  chosen = {"available_bytes": _available(experiment)}
  if batching:
    choice = _choose(batching)
    experiment = batching.rebuild(choice.size)
    chosen |= {
      "probe_batch": choice.size,
      "peak_bytes_with_one_probe": choice.least_bytes,
    }
  result = plan(experiment) | chosen
  if _TUNE.value:
    here = build.batching(config, build.experiment(config))
    times = probe_batch.tune(here, choice)
    result["tuned"] = [
      {"probe_batch": k, "seconds": x, "peak_bytes": choice.peak_bytes(k)}
      for k, x in times.items()
    ]
  print(json.dumps(result) if _JSON.value else _text(result))
  return 0


def _choose(batching):
  if _MEMORY.value is None:
    return probe_batch.choose_here(batching)
  return probe_batch.choose(batching, int(_MEMORY.value))


def _available(experiment):
  if _MEMORY.value is not None:
    return int(_MEMORY.value)
  used = min(experiment.layout.mesh.size, jax.local_device_count())
  return memory.available(used)


def _text(result) -> str:
  """The figures one below the other, and tables."""
  axes, updates = result.pop("mesh"), result.pop("updates")
  tuned = result.pop("tuned", None)
  lines = [f"{name:26} {_figure(value)}" for name, value in result.items()]
  sizes = " x ".join(f"{size} {name}" for name, size in axes.items())
  lines.append(f"{'mesh':26} {sizes}")
  available = result["available_bytes"]
  if available and result["peak_bytes_estimate"] > available:
    lines.append("It does not fit: more bytes are needed than available.")
  lines += [
    "",
    "Of the update, seconds a step expected: transfers if one link joins all",
    "devices, arithmetic on one of them.",
  ]
  rows = [["update", "bytes", *_headers(updates["replicated"])]]
  for name, row in updates.items():
    times = [*row["transfer_seconds"].values()]
    times += row["arithmetic_seconds"].values()
    rows.append([name, f"{row['bytes']:,}", *(f"{x:.2g}" for x in times)])
  lines += _table(rows)
  if tuned:
    lines += ["", "Of the queries, seconds a step measured here:"]
    rows = [["probe_batch", "seconds", "peak bytes expected"]]
    for row in tuned:
      seconds = row["seconds"]
      time = "out of memory" if seconds is None else f"{seconds:.3g}"
      rows.append([f"{row['probe_batch']}", time, f"{row['peak_bytes']:,}"])
    lines += _table(rows)
    ran = [row for row in tuned if row["seconds"] is not None]
    if ran:
      best = min(ran, key=lambda row: row["seconds"])["probe_batch"]
      lines.append(f"The fastest: --config.estimator.probe_batch={best}")
  return "\n".join(lines)


def _figure(value):
  if value is None:
    return "unknown"
  return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _table(rows):
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])
    for first, *others in rows
  ]


def _headers(row):
  return [*row["transfer_seconds"], *row["arithmetic_seconds"]]


def run() -> None:
  _run.run(main, "config")


if __name__ == "__main__":
  run()
