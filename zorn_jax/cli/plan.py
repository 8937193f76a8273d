"""Prints what a run of a config will cost, without allocating anything.

python -m zorn_jax.cli.plan --config=configs/paper/lstm.py:large [--devices=8]
  [--json]
"""

import json
import math

import jax
from absl import flags
from ml_collections import config_flags

from zorn_jax import build
from zorn_jax.cli import _run
from zorn_jax.plan import plan

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.")
_DEVICES = flags.DEFINE_integer(
  "devices",
  None,
  "Devices to plan for, which need not be there; those that there are, or "
  "config.mesh asks for, unless given.",
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv) -> int:
  del argv
  config, devices = _CONFIG.value, _DEVICES.value
  if devices is None:
    wanted = (max(1, config.mesh[axis]) for axis in ("probe", "data", "head"))
    devices = max(jax.device_count(), math.prod(wanted))
  if devices < 1:
    raise ValueError(
      f"devices must be at least 1, got {devices}. Choose how many to plan for."
    )
  result = plan(build.experiment(config, num_devices=devices))
  print(json.dumps(result) if _JSON.value else _text(result))
  return 0


def _text(result) -> str:
  """The figures one below the other, and a table of the updates."""
  mesh, updates = result.pop("mesh"), result.pop("updates")
  lines = []
  for name, value in result.items():
    text = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    lines.append(f"{name:26} {text}")
  sizes = " x ".join(f"{size} {name}" for name, size in mesh.items())
  lines += [
    f"{'mesh':26} {sizes}",
    "",
    "Of the update, seconds a step expected: transfers if one link joins all",
    "devices, arithmetic on one of them.",
  ]
  rows = [["update", "bytes", *_headers(updates["replicated"])]]
  for name, row in updates.items():
    times = [*row["transfer_seconds"].values()]
    times += row["arithmetic_seconds"].values()
    rows.append([name, f"{row['bytes']:,}", *(f"{x:.2g}" for x in times)])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for first, *others in rows:
    cells = map(str.rjust, others, widths[1:])
    lines.append("  ".join([first.ljust(widths[0]), *cells]))
  return "\n".join(lines)


def _headers(row):
  return [*row["transfer_seconds"], *row["arithmetic_seconds"]]


def run() -> None:
  _run.run(main, "config")


if __name__ == "__main__":
  run()
