"""Short strings, exact answers: by losses alone in ten minutes, and by BPTT.

python scripts/solve_algorithmic.py [--variants=bptt] [--workdir=DIR]

Trains configs/algorithmic.py:TASK,VARIANT for every task and variant, two runs
at a time, each on a core of its own: `recipe` and `paper` for ten minutes,
`bptt` for a number of steps. Interrupted, it goes on with the runs that are not
complete. Writes benchmarks/results/solve_algorithmic.json, docs/algorithmic.md
and .png. About an hour and a quarter on two cores.
"""

import argparse
import ctypes
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from concurrent import futures

import jax
from matplotlib import figure

from zorn_jax import loggers

ROOT = pathlib.Path(__file__).parent.parent
TASKS = ("copy", "reverse", "sort", "repeat_copy", "add")
VARIANTS = {
  "bptt": "BPTT",
  "recipe": "recipe, forward passes only",
  "paper": "plain CD-RGE (the paper's)",
}
_PARENT_DEATH_SIGNAL = 1
SECONDS = 600  # Of training by forward passes, compilation included.


def command_of(task, variant, workdir):
  command = [sys.executable, "-m", "zorn_jax.cli.train"]
  command += [f"--config=configs/algorithmic.py:{task},{variant}"]
  command += [f"--workdir={workdir}"]
  return command


def train(task, variant, workdir, core):
  """Runs on one core until the end, or for ten minutes."""
  done = workdir / "done.json"
  if done.exists():
    return json.loads(done.read_text())
  before = loggers.last_seconds(workdir)  # Of a run that was interrupted.
  limit = None if variant == "bptt" else max(SECONDS - before, 0)
  start = time.monotonic() - before

  def pin():
    os.sched_setaffinity(0, {core})
    # Linux ends the run with its parent.
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)

  process = subprocess.Popen(
    command_of(task, variant, workdir), cwd=ROOT, preexec_fn=pin
  )
  try:
    process.wait(limit)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGTERM)
  if process.wait():
    raise RuntimeError(f"{task},{variant} failed")
  seconds = time.monotonic() - start
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  scores = {}
  for split in ("valid", "test"):
    command = [sys.executable, "-m", "zorn_jax.cli.evaluate", "--json"]
    command += [f"--workdir={workdir}", f"--split={split}", "--free_running"]
    result = subprocess.run(
      command, cwd=ROOT, check=True, capture_output=True, text=True
    )
    scores[split] = json.loads(result.stdout)
  done.write_text(
    json.dumps(
      {
        "task": task,
        "variant": variant,
        "seconds": seconds,
        "curve": [
          [r["seconds"], r["step"], r["forward_tokens"]]
          + [r["valid_accuracy"], r["valid_sequence_accuracy"]]
          for r in records
          if "valid_accuracy" in r and "seconds" in r
        ],
        **scores,
      }
    )
  )
  return json.loads(done.read_text())


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument(
    "--workdir", default="runs/algorithmic", type=pathlib.Path
  )
  parser.add_argument("--variants", default=",".join(VARIANTS))
  options = parser.parse_args()
  workdir = options.workdir.absolute()
  cores = sorted(os.sched_getaffinity(0))[:2]
  free = list(cores)

  def one(run):
    task, variant = run
    core = free.pop()  # There are no more workers than cores.
    try:
      return train(task, variant, workdir / f"{task}-{variant}", core)
    finally:
      free.append(core)

  variants = options.variants.split(",")
  runs = [(task, variant) for variant in variants for task in TASKS]
  with futures.ThreadPoolExecutor(len(cores)) as workers:
    results = list(workers.map(one, runs))
  record = {
    "command": "python scripts/solve_algorithmic.py "
    f"--variants={options.variants}",
    "machine": f"{platform.processor() or platform.machine()}, CPU, 2 cores",
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "seed": 0,
    "runs": results,
  }
  path = ROOT / "benchmarks" / "results" / "solve_algorithmic.json"
  path.write_text(json.dumps(record) + "\n")
  (ROOT / "docs" / "algorithmic.md").write_text(table(record))
  draw(record, ROOT / "docs" / "algorithmic.png")


def percent(x):
  return f"{100 * x:.1f}"


def table(record):
  versions = record["versions"]
  lines = [
    "# Short strings, exact answers",
    "",
    f"Made by `{record['command']}` on {record['machine']} (each run on one of "
    f"them), Python {versions['python']}, jax {versions['jax']}, seed "
    f"{record['seed']}; `configs/algorithmic.py`. Strings of 2 to 10 letters "
    "or terms; sums of digits; up to four repetitions. Accuracies in percent "
    "on 512 strings that training does not know of: of tokens, and of whole "
    "answers, both when the model reads the true answer as it goes, and of "
    "tokens when it reads its own (whole answers are then the same). Longer: "
    "strings of 11 to 60.",
  ]
  for variant, label in VARIANTS.items():
    rows = {r["task"]: r for r in record["runs"] if r["variant"] == variant}
    if not rows:
      continue
    lines += [
      "",
      f"## {label}",
      "",
      "| task | steps | minutes | M forward tokens | tokens right | answers "
      "right | best | tokens, own | longer: tokens | longer: answers |",
      "|---" * 10 + "|",
    ]
    for task in TASKS:
      row = rows[task]
      seconds, step, tokens, *_ = row["curve"][-1]
      valid, test = row["valid"], row["test"]
      values = [
        valid["accuracy"],
        valid["sequence_accuracy"],
        max(exact for *_, exact in row["curve"]),
        valid["free_running_accuracy"],
        test["accuracy"],
        test["sequence_accuracy"],
      ]
      cells = [str(step), f"{seconds / 60:.1f}", f"{tokens / 1e6:.0f}"]
      cells += map(percent, values)
      lines.append(f"| {task} | " + " | ".join(cells) + " |")
  lines += ["", "![Answers right against time](algorithmic.png)"]
  return "\n".join(lines) + "\n"


def draw(record, path):
  canvas = figure.Figure(figsize=(12, 3.2), layout="constrained")
  all_axes = canvas.subplots(1, len(TASKS), sharey=True)
  for axes, task in zip(all_axes, TASKS, strict=True):
    for run in record["runs"]:
      if run["task"] == task:
        axes.plot(
          [point[0] / 60 for point in run["curve"]],
          [100 * point[4] for point in run["curve"]],
          label=VARIANTS[run["variant"]],
        )
    axes.set(xlabel="minutes on one core", title=task)
    axes.grid(alpha=0.3)
  all_axes[0].set(ylabel="answers right, %")
  all_axes[0].legend(fontsize="x-small")
  canvas.savefig(path, dpi=150)


if __name__ == "__main__":
  main()
