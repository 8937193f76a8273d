"""Many runs of one config: a grid of values, one run directory for each.

Every run is a process of its own that does what a user could start by hand,
and everything that is known about it is read from its directory. So a sweep
that ends, in whatever way, goes on where it was when it is started again.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from zorn_jax.loggers import JSONL_NAME, read_jsonl
from zorn_jax.workdir import CHECKPOINTS_NAME, CONFIG_NAME, write

SWEEP_NAME = "sweep.json"
RESULTS_NAME = "results"
LOG_NAME = "log.txt"

COMPLETE, FAILED, STOPPED, QUEUED = "complete", "failed", "stopped", "queued"
States = dict[str, str]


class Run(NamedTuple):
  """One point of the grid.

  Attributes:
    name: Of its directory, under the sweep's.
    values: The values of the grid's fields.
    args: Flags of `cli.train`, without the workdir.
    steps: The last step.
  """

  name: str
  values: dict[str, Any]
  args: tuple[str, ...]
  steps: int


def parse_grid(text: str) -> tuple[str, list[str]]:
  """The field and the values of `field=value,value`.

  Commas within brackets belong to a value: `loggers=(),('wandb',)`.

  Raises:
    ValueError: If there is no field or no value.
  """
  field, equals, rest = text.partition("=")
  if not (field and equals):
    raise ValueError(
      f"a grid is a field and its values, got {text!r}. Write it like "
      "--grid=learning_rate=0.01,0.02."
    )
  values, depth = [""], 0
  for char in rest:
    depth += (char in "([{") - (char in ")]}")
    if char == "," and depth == 0:
      values.append("")
    else:
      values[-1] += char
  return field, values


def points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
  """Every combination of the values, the last field changing fastest."""
  return [
    dict(zip(grid, values, strict=True))
    for values in itertools.product(*grid.values())
  ]


def name_of(values: Mapping[str, Any]) -> str:
  """The directory of a point; different points have different names."""
  exact = ",".join(f"{field}={value}" for field, value in values.items())
  name = re.sub(r"[^\w.,=+-]", "_", exact, flags=re.ASCII)
  if name == exact and len(name) <= 200:
    return name
  return f"{name[:190]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def train_command(run: Run, directory: pathlib.Path) -> list[str]:
  """The command that trains a run, or resumes it."""
  command = [sys.executable, "-m", "zorn_jax.cli.train"]
  return [*command, *run.args, f"--workdir={directory}"]


def is_complete(directory: pathlib.Path, steps: int) -> bool:
  """Whether a run has saved its last step."""
  return (directory / CHECKPOINTS_NAME / str(steps)).is_dir()


def claim(
  workdir: pathlib.Path,
  source: Mapping[str, Any],
  config: Mapping[str, Any],
  grid: Mapping[str, Sequence[Any]],
  runs: Sequence[Run],
) -> list[Run]:
  """Makes `workdir` the directory of this sweep, or extends the one there.

  Args:
    workdir: An existing directory.
    source: Where the config came from; written for the reader only.
    config: All its fields; those of the grid and the mesh do not count.
    grid: The values of each field.
    runs: The points.
  Returns:
    All runs of the directory; those of other calls come without `args`.
  Raises:
    ValueError: If it belongs to a run, or to another sweep.
  """
  if (workdir / CONFIG_NAME).exists():
    raise ValueError(
      f"the workdir {str(workdir)!r} is that of a single run. Use another one "
      "for a sweep."
    )
  fixed = {
    name: value
    for name, value in _flat(config).items()
    # A run, too, may be resumed on another mesh.
    if name not in grid and name.split(".")[0] != "mesh"
  }
  fixed = json.loads(json.dumps(fixed))
  path = workdir / SWEEP_NAME
  found = json.loads(path.read_text()) if path.exists() else {}
  if found:
    there, here = sorted(found["grid"]), sorted(grid)
    differences = [
      f"{name} ({found['fixed'].get(name)} there, {fixed.get(name)} here)"
      for name in sorted(found["fixed"].keys() | fixed.keys())
      if found["fixed"].get(name) != fixed.get(name)
    ]
    if there != here:
      fields = f"{', '.join(there)} there, {', '.join(here)} here"
      differences = [f"the fields of the grid ({fields})"]
    if differences:
      raise ValueError(
        f"the workdir {str(workdir)!r} belongs to another sweep, which differs "
        f"in {', '.join(differences)}. Use another workdir, or the same config "
        "and fields to go on; only values may be added."
      )
  known = {
    name: Run(name, run["values"], (), run["steps"])
    for name, run in found.get("runs", {}).items()
  }
  known |= {run.name: run for run in runs}
  values = {field: [] for field in grid}
  for run, field in itertools.product(known.values(), grid):
    if run.values[field] not in values[field]:
      values[field].append(run.values[field])
  record = {
    **source,
    "grid": values,
    "fixed": fixed,
    "runs": {
      run.name: {"values": run.values, "steps": run.steps}
      for run in known.values()
    },
  }
  write(path, json.dumps(record, indent=2) + "\n")
  return list(known.values())


def _flat(tree, prefix=""):
  """Dotted names and their values."""
  flat = {}
  for key, value in tree.items():
    inner = isinstance(value, Mapping) and value
    name = f"{prefix}{key}"
    flat |= _flat(value, f"{name}.") if inner else {name: value}
  return flat


def visible_gpus(
  environ: Mapping[str, str] = os.environ, devices="/dev"
) -> list[str]:
  """The GPUs as CUDA_VISIBLE_DEVICES names them, found without using them.

  Args:
    environ: The environment; JAX_PLATFORMS may rule GPUs out.
    devices: The folder of device files.
  """
  platforms = environ.get("JAX_PLATFORMS")
  if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
    return []
  listed = environ.get("CUDA_VISIBLE_DEVICES")
  if listed is not None:
    names = [name.strip() for name in listed.split(",")]
    # CUDA, too, ignores what follows the first name that it does not know.
    return list(itertools.takewhile(lambda x: x not in ("", "-1"), names))
  files = [p.name for p in pathlib.Path(devices).glob("nvidia*")]
  count = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in files)
  if not count and shutil.which("nvidia-smi"):
    command = ["nvidia-smi", "--list-gpus"]
    done = subprocess.run(command, capture_output=True, text=True)
    count = sum(x.startswith("GPU ") for x in done.stdout.splitlines())
  return [str(index) for index in range(count)]


class Slot(NamedTuple):
  """Where one of the runs at once runs.

  Attributes:
    environ: Additions to the environment.
    cores: Of the CPU; empty for all of them.
    label: Its name for the user, perhaps empty.
  """

  environ: dict[str, str]
  cores: tuple[int, ...]
  label: str


def slots(
  at_once: int, gpus: Sequence[str], cores: Sequence[int]
) -> list[Slot]:
  """Shares out a machine: the GPUs in turn or, without any, the cores.

  Runs that share a GPU are given equal parts of 90% of its memory, unless
  XLA_PYTHON_CLIENT_MEM_FRACTION is set.
  """
  if gpus:
    sharing = -(-at_once // len(gpus))
    memory = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    extra = {}
    if sharing > 1 and memory not in os.environ:
      extra = {memory: f"{math.floor(90 / sharing) / 100:.2f}"}
    turns = itertools.islice(itertools.cycle(gpus), at_once)
    return [
      Slot({"CUDA_VISIBLE_DEVICES": gpu, **extra}, (), f"GPU {gpu}")
      for gpu in turns
    ]
  if at_once == 1 or not cores:
    return [Slot({}, (), "")] * at_once
  n = len(cores)
  # Consecutive cores; one for each where there are fewer than runs.
  shares = [
    cores[i * n // at_once : (i + 1) * n // at_once] or [cores[i % n]]
    for i in range(at_once)
  ]
  return [
    Slot({}, tuple(share), f"cores {', '.join(map(str, share))}")
    for share in shares
  ]


def machine_slots(at_once: int | None, num_runs: int) -> list[Slot]:
  """:func:`slots` of this machine, at most one per run.

  Args:
    at_once: How many, at least 1; None for one per GPU, or one without any.
    num_runs: How many runs there are.
  """
  gpus = visible_gpus()
  at_once = min(at_once or len(gpus) or 1, max(num_runs, 1))
  cores = []
  if hasattr(os, "sched_getaffinity"):  # Linux.
    cores = sorted(os.sched_getaffinity(0))
  return slots(at_once, gpus, cores)


# Replaces itself by the run's command. On Linux the kernel sends it SIGTERM
# when its parent is gone, so that it saves; elsewhere it goes on to its end.
# The log is locked for as long as anything writes to it: what is left of an
# earlier sweep saves first. SIGUSR2 is meant for submitit alone.
_START = """
import ctypes, fcntl, os, signal, sys
parent, cores, *command = sys.argv[1:]
if sys.platform == "linux":
  ctypes.CDLL(None).prctl(1, signal.SIGTERM)
  if os.getppid() != int(parent):
    sys.exit(1)
  if cores:
    os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
try:
  fcntl.flock(1, fcntl.LOCK_EX)
except OSError:
  pass
os.execvp(command[0], command)
"""


def start(
  command: Sequence[str], directory: pathlib.Path, slot: Slot, cwd=None
) -> subprocess.Popen:
  """Starts a run whose output goes to `log.txt` in its directory.

  Guarantees: on Linux it does not outlive the calling thread.
  """
  directory.mkdir(parents=True, exist_ok=True)
  with (directory / LOG_NAME).open("a") as log:
    log.write(f"$ {shlex.join(command)}\n")
    log.flush()
    parent, cores = str(os.getpid()), ",".join(map(str, slot.cores))
    return subprocess.Popen(
      [sys.executable, "-c", _START, parent, cores, *command],
      cwd=cwd,
      env=os.environ | {"PYTHONUNBUFFERED": "1"} | slot.environ,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # Ctrl-C reaches it through this process.
    )


def last_line(directory: pathlib.Path) -> str:
  """The last line that a run has written since it was last started."""
  path = directory / LOG_NAME
  if not path.exists():
    return "it has written nothing"
  with path.open("rb") as log:
    log.seek(max(0, path.stat().st_size - 10_000))
    lines = log.read().decode(errors="replace").splitlines()
  lines = [line.strip() for line in lines if line.strip()]
  if not lines or lines[-1].startswith("$ "):
    return "it has written nothing"
  return lines[-1]


def _state(run, directory, status, stopping):
  """The state of a run whose process ended with an exit status."""
  if status == 0:
    return COMPLETE if is_complete(directory, run.steps) else STOPPED
  return STOPPED if stopping and status == -signal.SIGTERM else FAILED


@contextlib.contextmanager
def _until_signal() -> Iterator[Callable[[], bool]]:
  """Yields a function that says whether SIGTERM or SIGINT has come."""
  received = []
  handled = (signal.SIGTERM, signal.SIGINT)
  previous = [
    signal.signal(number, lambda number, _: received.append(number))
    for number in handled
  ]
  try:
    yield lambda: bool(received)
  finally:
    for number, handler in zip(handled, previous, strict=True):
      signal.signal(number, handler)


def run_local(
  runs: Sequence[Run],
  workdir: pathlib.Path,
  places: Sequence[Slot],
  say: Callable[[str], None],
) -> tuple[States, bool]:
  """Trains runs on this machine, one in each place at a time.

  SIGTERM and SIGINT are passed on as SIGTERM; the runs save before this
  returns. Call it from the main thread.

  Args:
    runs: Those that are not complete.
    workdir: Of the sweep.
    places: See :func:`machine_slots`.
    say: Takes a line for the user.
  Returns:
    The states of the runs that were started, and whether a signal came.
  """
  waiting, free = collections.deque(runs), list(places)
  active: dict[str, tuple[Run, subprocess.Popen, Slot]] = {}
  states: States = {}
  told = set()
  with _until_signal() as stopping, contextlib.ExitStack() as stack:
    while active or (waiting and not stopping()):
      while waiting and free and not stopping():
        run, slot = waiting.popleft(), free.pop(0)
        directory = workdir / run.name
        child = start(train_command(run, directory), directory, slot)
        stack.callback(_end, child)  # Should anything fail here.
        active[run.name] = run, child, slot
        where = f"{slot.label}, " if slot.label else ""
        say(f"{run.name}: started ({where}log {directory / LOG_NAME})")
      if stopping():
        for name in active.keys() - told:
          told.add(name)
          active[name][1].terminate()
      for run, child, slot in list(active.values()):
        status = child.poll()
        if status is None:
          continue
        del active[run.name]
        free.append(slot)
        directory = workdir / run.name
        state = states[run.name] = _state(run, directory, status, stopping())
        say(f"{run.name}: {state}{_detail(state, directory, status)}")
      time.sleep(0.05)
    return states, stopping()


def _end(child):
  """Ends a process that may have ended."""
  child.terminate()
  child.wait()


def _detail(state, directory, status):
  """What to say beside the state of a run that ended."""
  if state != FAILED:
    return f" at step {progress(directory)['step']}"
  if status < 0:
    how = f"killed by {signal.Signals(-status).name}"
  else:
    how = f"exit status {status}"
  return f" ({how}): {last_line(directory)}"


class _Job:
  """What a node of the cluster does; submitit calls it."""

  def __init__(self, command, directory, cwd):
    self._arguments = command, directory, cwd

  def __call__(self) -> int:
    command, directory, cwd = self._arguments
    self._child = start(command, directory, Slot({}, (), ""), cwd)
    while self._child.poll() is None:
      time.sleep(0.5)
    return self._child.returncode

  def checkpoint(self):
    """Saves before the time limit; the job is then put in the queue again."""
    import submitit

    self._child.terminate()
    with contextlib.suppress(ChildProcessError):  # It has ended before.
      # Popen.wait could wait for a lock that __call__, interrupted, holds.
      os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
    return submitit.helpers.DelayedSubmission(_Job(*self._arguments))


def run_slurm(
  runs: Sequence[Run],
  workdir: pathlib.Path,
  say: Callable[[str], None],
  *,
  partition: str | None = None,
  gpus: int = 1,
  minutes: int = 60,
  at_once: int | None = None,
  wait: bool = True,
  cluster: str = "slurm",
) -> tuple[States, bool]:
  """Trains runs as one array job; jobs of earlier calls are waited for.

  Runs that reach the time limit save, and go on in the queue. After SIGTERM or
  SIGINT the jobs are left to themselves.

  Args:
    runs: Those that are not complete.
    workdir: Of the sweep, on a file system that all nodes share.
    say: Takes a line for the user.
    partition: Of the cluster; None for its default.
    gpus: For each run.
    minutes: Time limit of a job.
    at_once: Most jobs that run at once; None leaves it to the cluster.
    wait: Whether to return only when all have ended.
    cluster: Of submitit: "slurm", or "local" for processes on this machine.
  Returns:
    The states of the runs, and whether a signal came.
  Raises:
    ValueError: If submitit or SLURM is missing.
  """
  try:
    import submitit
  except ImportError as error:
    raise ValueError(
      "the launcher slurm needs the package submitit, which is not installed. "
      'Run: pip install "zorn_jax[sweep]".'
    ) from error
  if cluster == "slurm" and not shutil.which("sbatch"):
    raise ValueError(
      "the launcher slurm needs sbatch, which this machine does not have. Run "
      "it where jobs are submitted, or choose --launcher=local."
    )
  folder = workdir.absolute() / "slurm"
  path = folder / "jobs.json"
  ids = json.loads(path.read_text()) if path.exists() else {}
  jobs = {}
  if cluster == "slurm":
    earlier = {
      run.name: submitit.SlurmJob(folder=folder, job_id=ids[run.name])
      for run in runs
      if run.name in ids
    }
    jobs = {name: job for name, job in earlier.items() if not job.done()}
    for name, job in jobs.items():
      say(f"{name}: is job {job.job_id} of an earlier call")
  new = [run for run in runs if run.name not in jobs]
  if new:
    executor = submitit.AutoExecutor(
      folder=folder, cluster=cluster, slurm_max_num_timeout=1000
    )
    executor.update_parameters(
      name="zorn_sweep",
      timeout_min=minutes,
      nodes=1,
      tasks_per_node=1,
      gpus_per_node=gpus,
      slurm_partition=partition,
      slurm_array_parallelism=at_once,
      slurm_signal_delay_s=120,
    )
    root = workdir.absolute()
    calls = [
      _Job(train_command(run, root / run.name), root / run.name, os.getcwd())
      for run in new
    ]
    submitted = executor.submit_array(calls)
    for run, job in zip(new, submitted, strict=True):
      jobs[run.name] = job
      say(f"{run.name}: submitted as job {job.job_id}")
    folder.mkdir(exist_ok=True)
    write(path, json.dumps(ids | {k: job.job_id for k, job in jobs.items()}))
  return _await(runs, workdir, jobs, say, wait)


def _await(runs, workdir, jobs, say, wait):
  """Waits for jobs of the cluster; see `run_slurm`."""
  pending = {run.name: run for run in runs}
  states = dict.fromkeys(pending, QUEUED)
  with _until_signal() as stopping:
    while wait and pending and not stopping():
      for name, run in list(pending.items()):
        if not jobs[name].done():
          continue
        del pending[name]
        directory = workdir / name
        try:
          status = jobs[name].result()
        except Exception:  # The job died; what it did is in its directory.
          status = 0 if is_complete(directory, run.steps) else 1
        states[name] = _state(run, directory, status, False)
        say(f"{name}: {states[name]}{_detail(states[name], directory, status)}")
      time.sleep(0.5)
    if pending and stopping():
      say(
        f"no longer waiting for {len(pending)} jobs, which go on; scancel ends "
        "them, the same command waits for them."
      )
    return states, stopping()


def progress(
  directory: pathlib.Path, names: Sequence[str] = ()
) -> dict[str, Any]:
  """What the metrics of a run say: last step, seconds, best and last values.

  Args:
    directory: Of the run.
    names: Metrics; of accuracies the best is the highest, else the lowest.
  Returns:
    `step`, `seconds`, and `NAME_best` and `NAME_last` of every name; None for
    what there is no finite number for.
  """
  records = read_jsonl(directory / JSONL_NAME)
  known = [record["seconds"] for record in records if "seconds" in record]
  result = {
    "step": records[-1]["step"] if records else 0,
    "seconds": max(known, default=None),
  }
  for name in names:
    values = [record[name] for record in records if name in record]
    finite = [value for value in values if math.isfinite(value)]
    best = max if _higher_is_better(name) else min
    result[f"{name}_best"] = best(finite, default=None)
    # Only the very last one: an earlier number would hide what became of it.
    result[f"{name}_last"] = (
      values[-1] if values and math.isfinite(values[-1]) else None
    )
  return result


def _higher_is_better(name):
  return name.endswith("accuracy")


def results(
  runs: Sequence[Run], workdir: pathlib.Path, states: States, rank_by: str
) -> list[dict[str, Any]]:
  """One row per run, the best value of `rank_by` first; written as well.

  Writes `results.json` and `results.md` in `workdir`.

  Args:
    runs: All runs of the sweep.
    workdir: Of the sweep.
    states: Those that are known; the others are as the directories say, and
      as the results of before.
    rank_by: Name of a metric.
  """
  path = workdir / f"{RESULTS_NAME}.json"
  before = {}
  if path.exists():
    rows = json.loads(path.read_text())["runs"]
    before = {row["name"]: row["state"] for row in rows}
  names = list(dict.fromkeys(["valid_loss", rank_by]))
  rows = []
  for run in runs:
    directory = workdir / run.name
    state = states.get(run.name)
    if state is None and is_complete(directory, run.steps):
      state = COMPLETE
    if state is None:
      earlier = before.get(run.name)
      state = STOPPED if earlier in (None, COMPLETE) else earlier
    row = {"name": run.name, "values": run.values, "state": state}
    rows.append(row | progress(directory, names))
  sign = -1 if _higher_is_better(rank_by) else 1

  def rank(row):
    value = row[f"{rank_by}_best"]
    return (value is None, sign * value if value is not None else 0)

  rows.sort(key=rank)
  write(path, json.dumps({"rank_by": rank_by, "runs": rows}, indent=2) + "\n")
  write(workdir / f"{RESULTS_NAME}.md", table(rows) + "\n")
  return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The rows of :func:`results` as a Markdown table."""
  if not rows:
    return ""
  metrics = [key for key in rows[0] if key.endswith(("_best", "_last"))]
  columns = [*rows[0]["values"], "step", *metrics, "seconds", "state"]
  cells = [[name.replace("_best", " best") for name in columns]]
  cells[0] = [name.replace("_last", " last") for name in cells[0]]
  for row in rows:
    flat = {**row, **row["values"]}
    cells.append([_cell(name, flat[name]) for name in columns])
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  cells.insert(1, ["-" * width for width in widths])
  return "\n".join(
    "| "
    + " | ".join(x.ljust(width) for x, width in zip(line, widths, strict=True))
    + " |"
    for line in cells
  )


def _cell(name, value):
  """The text of a cell."""
  if value is None:
    return ""
  if name == "seconds":
    return f"{value:.1f}"
  if name.endswith(("_best", "_last")):
    return f"{value:.4f}"
  return str(value).replace("|", r"\|")
