"""Kills a run again and again, and compares it with one left in peace.

python scripts/chaos.py [--devices=1] [--kills=30] [--seed=0]

A small run (copying two letters or three, Adam, a checkpoint every 20 steps) is
started by `zorn_jax.cli.train`, ended by a SIGKILL at a random moment, and
started again with the same command, until it is done. The moments are drawn
from four kinds in turn:

  start  while it restores, replays its journal, traces and compiles; every
         other one without JAX's cache of compiled programs
  step   at a random step, up to a few milliseconds after its record
  save   while a checkpoint is being written
  full   the disk is full from a random step on; the process says so in one
         sentence and ends, unless it is killed before

A full disk is played by the kernel's limit on the size of files, set to zero
from outside while the process runs: every write to a file then fails, with
"File too large" instead of "No space left on device".

The processes are forked from one that has imported everything and has not
used JAX yet: what is saved is the time of the imports. A step is lost when the
journal had its record and the next process takes it again: at most the last.
Adds to benchmarks/results/chaos.json, and fails where something differs.
About five minutes on one core.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import platform
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "chaos.json"
KINDS = ("start", "step", "save", "full")
STEPS, CHECKPOINT_EVERY, PROBES = 1200, 20, 8
OVERRIDES = {
  "steps": STEPS,
  "batch_size": 2,
  "num_probes": PROBES,
  "log_every": 10,
  "evaluate_every": 20,
  "checkpoint_every": CHECKPOINT_EVERY,
  "task.max_length": 3,
  "task.time_chunk": 7,
  "task.num_evaluation": 8,
  "model.embedding_size": 4,
  "model.hidden_size": 4,
}
TIMED = ("seconds", "tokens_per_second")
PATIENCE = 300  # Seconds until a process is taken for hung.
RECORD = 16 + PROBES * 2 * 4  # Bytes of the journal per step,
HEADER = 52  # and before the first.


class Attempt:
  """A forked process that trains in a workdir."""

  def __init__(self, workdir, cold=False):
    self._begun = time.monotonic()
    # A pipe, which a full disk does not close.
    self._output, end = os.pipe()
    self.pid = os.fork()
    if not self.pid:
      _train(workdir, end, cold)
    os.close(end)
    self.status, self.text = None, ""

  def alive(self):
    if self.status is None:
      self._end(os.waitpid(self.pid, os.WNOHANG))
    if self.status is None and time.monotonic() > self._begun + PATIENCE:
      self.kill()
      raise SystemExit(f"a process hung: {self.text[-2000:]}")
    return self.status is None

  def wait_while(self, condition):
    """Returns whether it lives, once the condition is false."""
    while self.alive() and condition():
      time.sleep(2e-4)
    return self.status is None

  def kill(self):
    if self.status is None:
      os.kill(self.pid, signal.SIGKILL)
      self._end(os.waitpid(self.pid, 0))

  def _end(self, ended):
    pid, status = ended
    if pid:
      self.status = os.waitstatus_to_exitcode(status)
      with open(self._output, errors="replace") as file:
        self.text = file.read()

  def resumed(self):
    """The step from which it went on; None if it did not come so far."""
    found = re.search(r"resuming from step (\d+)", self.text)
    return int(found[1]) if found else None


def _train(workdir, output, cold):
  """What the child does; does not return."""
  import jax

  from zorn_jax.cli import train

  status = 3
  try:
    os.dup2(output, 1)
    os.dup2(output, 2)
    jax.config.update("jax_enable_compilation_cache", not cold)
    overrides = [f"--config.{name}={x}" for name, x in OVERRIDES.items()]
    command = [f"--config={ROOT / 'configs' / 'copy.py'}", "--verbosity=0"]
    sys.argv = ["train", *command, f"--workdir={workdir}", *overrides]
    train.run()
  except SystemExit as end:
    status = end.code or 0
  except BaseException:
    traceback.print_exc()
  finally:
    os._exit(status)


def steps_recorded(workdir):
  """Whole records in the journal."""
  path = workdir / "journal"
  size = path.stat().st_size if path.exists() else HEADER
  return max(size - HEADER, 0) // RECORD


def saving(workdir):
  """Whether a checkpoint is being written."""
  with contextlib.suppress(FileNotFoundError):
    names = os.listdir(workdir / "checkpoints")
    return not all(name.isdecimal() for name in names)
  return False


def strike(kind, attempt, workdir, draw, target, start_time):
  """Ends the attempt in the way of its kind, unless it is done before."""
  if kind == "start":
    end = time.monotonic() + draw.uniform(0, start_time)
    attempt.wait_while(lambda: time.monotonic() < end)
  elif attempt.wait_while(lambda: steps_recorded(workdir) < target):
    if kind == "step":
      time.sleep(draw.uniform(0, 0.02))
    elif kind == "save":
      attempt.wait_while(lambda: not saving(workdir))
      time.sleep(draw.choice([0, draw.uniform(0, 0.2)]))
    elif kind == "full":
      limit = (0, resource.RLIM_INFINITY)
      resource.prlimit(attempt.pid, resource.RLIMIT_FSIZE, limit)
      end = time.monotonic() + draw.choice([draw.uniform(0, 0.1), PATIENCE])
      attempt.wait_while(lambda: time.monotonic() < end)
  attempt.kill()


def chaos(workdir, kills, draw, start_times):
  """Starts the run until it is done; returns what became of each attempt."""
  attempts, killed, recorded = [], 0, 0
  print("  n kind   how it ended  resumed from  recorded  lost  left behind")
  while not attempts or attempts[-1]["status"]:
    kind = KINDS[len(attempts) % len(KINDS)] if killed < kills else "done"
    cold = kind == "start" and len(attempts) % (2 * len(KINDS)) == 0
    # The kills are spread over the run.
    low = steps_recorded(workdir) + 1
    high = STEPS * (killed + 1) // (kills + 1)
    target = draw.randint(low, max(low, high))
    attempt = Attempt(workdir, cold)
    if kind == "done":
      attempt.wait_while(lambda: True)
    else:
      strike(kind, attempt, workdir, draw, target, start_times[not cold])
    after, resumed = steps_recorded(workdir), attempt.resumed()
    if resumed is None and after > recorded:
      resumed = 0
    lost = 0 if resumed is None else recorded - resumed
    # Who was killed early may have cut the journal, but not trained.
    recorded = max(recorded, after) if resumed is None else after
    killed += attempt.status == -signal.SIGKILL
    if attempt.status not in (0, -signal.SIGKILL):
      check_sentence(kind, attempt)
    left = ["a torn record"] if torn(workdir) else []
    left += ["part of a checkpoint"] if saving(workdir) else []
    attempts.append(
      {
        "kind": kind + ", cold" * cold,
        "status": attempt.status,
        "resumed_from": resumed,
        "recorded": after,
        "lost": lost,
        "left": left,
      }
    )
    ends = {-signal.SIGKILL: "killed", 0: "done", 1: "by itself"}
    print(
      f"{len(attempts):3} {attempts[-1]['kind']:12} "
      f"{ends[attempt.status]:10} {'-' if resumed is None else resumed:>5} "
      f"{after:5} {lost:3}  {' and '.join(left)}",
      flush=True,
    )
  return attempts


def check_sentence(kind, attempt):
  """A process without space on the disk says so in one sentence."""
  errors = re.findall(r"^error: .*$", attempt.text, re.MULTILINE)
  if attempt.status != 1 or len(errors) != 1 or "Traceback" in attempt.text:
    raise SystemExit(f"a {kind!r} ended with {attempt.text[-4000:]}")
  print(f"      {errors[0]}")


def torn(workdir):
  """Whether the journal ends within a record."""
  path = workdir / "journal"
  return path.exists() and (path.stat().st_size - HEADER) % RECORD != 0


def trained(workdir):
  """What two runs are compared by."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  metrics = [json.loads(line) for line in lines]
  place = workdir / "checkpoints" / str(STEPS) / "summary" / "metadata"
  summary = json.loads(place.read_text())["summary"]
  return {
    "params": summary["params_digest"],
    "state": summary["digest"],
    "metrics": [
      {k: v for k, v in line.items() if k not in TIMED} for line in metrics
    ],
    "journal": (workdir / "journal").read_bytes(),
    "checkpoints": sorted(os.listdir(workdir / "checkpoints")),
  }


def undisturbed(workdir):
  """Trains; returns the seconds until the first step was recorded."""
  begun = time.monotonic()
  attempt = Attempt(workdir)
  attempt.wait_while(lambda: not steps_recorded(workdir))
  start_time = time.monotonic() - begun
  attempt.wait_while(lambda: True)
  if attempt.status:
    raise SystemExit(attempt.text)
  seconds = time.monotonic() - begun
  print(f"{workdir.name}: first step after {start_time:.1f} of {seconds:.1f} s")
  return start_time


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--devices", type=int, default=1)
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    # Read when JAX is imported, and when it is first used.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XLA_FLAGS"] = (
      f"--xla_force_host_platform_device_count={arguments.devices}"
    )
    sys.path.insert(0, str(ROOT))
    import jax  # noqa: F401

    import zorn_jax.cli.train  # noqa: F401

    # The first of them fills the cache.
    start_times = [undisturbed(folder / name) for name in ("cold", "peace")]
    draw = random.Random(arguments.seed)
    attempts = chaos(folder / "chaos", arguments.kills, draw, start_times)
    wanted, found = trained(folder / "peace"), trained(folder / "chaos")
  same = {name: wanted[name] == found[name] for name in wanted}
  killed = sum(x["status"] == -signal.SIGKILL for x in attempts)
  most = max(x["lost"] for x in attempts)
  result = {
    "kills": killed,
    "attempts": len(attempts),
    "kinds": collections.Counter(x["kind"] for x in attempts),
    "most_steps_lost": most,
    "equal": same,
    "params_digest": found["params"],
    "steps": STEPS,
    "seed": arguments.seed,
    "jax": jax.__version__,
    "processor": platform.machine(),
    "each": attempts,
  }
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  results[f"{arguments.devices} devices"] = result
  RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
  print(f"{killed} kills, at most {most} step lost by each, equal: {same}")
  return int(not all(same.values()) or most > 1)


if __name__ == "__main__":
  sys.exit(main())
