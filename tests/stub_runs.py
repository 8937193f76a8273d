"""Runs of a stub in the place of cli.train, for the tests of sweeps."""

import sys
import time

from zorn_jax import sweep

# Stands for cli.train: a seed of 13 fails, one from 100 on runs until SIGTERM.
STUB = r"""
import json, os, pathlib, signal, sys, time
flags = dict(x.removeprefix("--").split("=", 1) for x in sys.argv[1:])
run = pathlib.Path(flags["workdir"])
seed, steps = int(flags["config.seed"]), int(flags["config.steps"])
event = lambda what: (run / "events").open("a").write(
  f"{what} {os.getpid()} {time.monotonic()}\n")
# The kernel may tell it twice.
end = lambda *_: (signal.signal(signal.SIGTERM, signal.SIG_IGN), event("stop"),
  time.sleep(0.3), event("end"), os._exit(0))
if seed >= 100:
  signal.signal(signal.SIGTERM, end)
(run / "place").write_text(json.dumps({
  "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
  "memory": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"),
  "cores": sorted(os.sched_getaffinity(0))}))
event("start")
print("the reason", file=sys.stderr)
if seed == 13:
  sys.exit(3)
time.sleep(60 if seed >= 100 else 0.2)
with (run / "metrics.jsonl").open("a") as file:
  for i in range(1, steps + 1):
    record = {"step": i, "valid_loss": seed / 10 + i / 100, "seconds": i / 2}
    file.write(json.dumps(record) + "\n")
(run / "checkpoints" / str(steps)).mkdir(parents=True)
event("end")
"""


def install(tmp_path, monkeypatch):
  """Puts the stub in the place of cli.train, and gives its path."""
  path = tmp_path / "stub.py"
  path.write_text(STUB)

  def command(run, directory):
    return [sys.executable, str(path), *run.args, f"--workdir={directory}"]

  monkeypatch.setattr(sweep, "train_command", command)
  return path


def make_runs(*seeds, steps=2):
  return [
    sweep.Run(
      f"seed={seed}",
      {"seed": seed},
      (f"--config.seed={seed}", f"--config.steps={steps}"),
      steps,
    )
    for seed in seeds
  ]


def events(directory):
  path = directory / "events"
  lines = path.read_text().splitlines() if path.exists() else []
  return [
    (what, int(pid), float(when)) for what, pid, when in map(str.split, lines)
  ]


def wait_for(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)
