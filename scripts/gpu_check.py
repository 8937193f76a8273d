"""Measures the kernels and steps of training on a GPU; see gpu_check.sh.

python scripts/gpu_check.py FOLDER
"""

import json
import pathlib
import subprocess
import sys

from zorn_jax.bench import report

_QUERY = "name,driver_version,memory.total"


def main(folder: pathlib.Path) -> None:
  command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
  asked = subprocess.run(command, check=True, capture_output=True, text=True)
  device = asked.stdout.splitlines()[0]
  name = device.split(",")[0].replace(" ", "_").lower()
  result = {"command": "scripts/gpu_check.sh", "device": device}
  # In one process: steps take the configs that the kernels' suite found.
  for suite in ("kernels", "step"):
    result[suite] = report.measure(suite)
    path = folder / f"{name}.json"
    path.write_text(f"{json.dumps(result)}\n")
    print(report.as_text(result[suite]), flush=True)

  print(f"\n{device}")
  for suite in ("kernels", "step"):
    for title, rows in result[suite]["tables"].items():
      for row in rows:
        if "program" in row:
          print(f"{title:24} {_text(row)}")


def _text(row):
  words = [
    str(row[key])
    for key in ("case", "heads", "head", "members", "perturbation", "program")
    if key in row
  ]
  figures = [
    f"{key}={row[key]:.3g}"
    for key in ("ms", "update_ms", "ratio_to_xla", "ratio_to_none")
    if key in row
  ]
  if "share_of_peak" in row:
    figures.append(f"share_of_peak={row['share_of_peak']:.2f}")
  return " ".join([f"{' '.join(words):44}", *figures])


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
