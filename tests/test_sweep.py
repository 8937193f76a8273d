"""Sweeps: their directory, places, interruption and results."""

import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import small
from stub_runs import STUB, events, install, make_runs, wait_for

from zorn_jax import sweep
from zorn_jax.lock import lock

SBATCH = small.ROOT / "scripts" / "slurm.sbatch"
# The command, with the stub in the place of cli.train.
DRIVER = """
import sys
from zorn_jax import sweep
from zorn_jax.cli import sweep as cli
sweep.train_command = lambda run, directory: [
  sys.executable, STUB, *run.args, f"--workdir={directory}"]
cli.run()
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
  return install(tmp_path, monkeypatch)


def start_command(tmp_path, *args):
  """Starts `cli.sweep` with the stub, from a process that can be signalled."""
  stub = tmp_path / "stub.py"
  stub.write_text(STUB)
  return subprocess.Popen(
    [
      *(sys.executable, "-c", DRIVER.replace("STUB", repr(str(stub)))),
      *(f"--config={small.COPY}", f"--workdir={tmp_path / 'sweep'}"),
      *("--config.steps=2", *args),
    ],
    cwd=small.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def run_command(tmp_path, *args):
  process = start_command(tmp_path, *args)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def alive(pid):
  """Whether a process runs; a zombie does not."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except FileNotFoundError:
    return False
  return stat.rpartition(")")[2].split()[0] != "Z"


# The directory.


def test_only_values_may_be_added(tmp_path):
  config = {"seed": 0, "steps": 2, "task": {"name": "copy", "sizes": (1, 2)}}

  def claim(config, *seeds):
    grid = {"seed": seeds}
    return sweep.claim(
      tmp_path, {"config": "c"}, config, grid, make_runs(*seeds)
    )

  assert [run.name for run in claim(config, 0)] == ["seed=0"]
  assert [run.name for run in claim(config, 0)] == ["seed=0"]
  # What the grid overrides may differ, and the mesh, as in a single run.
  other = config | {"seed": 7, "mesh": {"probe": 2}}
  assert [run.name for run in claim(other, 2, 0)] == [
    "seed=0",
    "seed=2",
  ]
  record = (tmp_path / sweep.SWEEP_NAME).read_text()
  assert json.loads(record)["grid"] == {"seed": [0, 2]}
  task = {"name": "sort", "sizes": (1, 2)}
  with pytest.raises(ValueError, match=r"task.name \(copy there, sort here\)"):
    claim(config | {"task": task}, 0)
  with pytest.raises(ValueError, match="seed there, steps here"):
    sweep.claim(tmp_path, {}, config, {"steps": [2]}, [])
  assert (tmp_path / sweep.SWEEP_NAME).read_text() == record


def test_the_directory_of_a_run_is_refused(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="that of a single run"):
    sweep.claim(tmp_path, {}, {}, {"seed": [0]}, [])


# Places.


@pytest.mark.parametrize(
  ("environ", "files", "gpus"),
  [
    ({}, ["nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm"], ["0", "1"]),
    ({}, ["null"], []),
    ({"CUDA_VISIBLE_DEVICES": "2, 5"}, ["nvidia0"], ["2", "5"]),
    ({"CUDA_VISIBLE_DEVICES": "MIG-a"}, [], ["MIG-a"]),
    ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], []),
    ({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, ["nvidia0"], ["1"]),
    ({"JAX_PLATFORMS": "cpu"}, ["nvidia0"], []),
    ({"JAX_PLATFORMS": "cuda,cpu"}, ["nvidia0"], ["0"]),
  ],
)
def test_gpus_are_found(environ, files, gpus, tmp_path, monkeypatch):
  monkeypatch.setattr(sweep.shutil, "which", lambda name: None)
  for name in files:
    (tmp_path / name).touch()
  assert sweep.visible_gpus(environ, tmp_path) == gpus


def test_gpus_are_asked_of_the_driver(tmp_path, monkeypatch):
  program = tmp_path / "nvidia-smi"
  program.write_text(
    "#!/bin/sh\necho 'GPU 0: A'\necho '  MIG 1'\necho 'GPU 1: B'"
  )
  program.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
  assert sweep.visible_gpus({}, tmp_path) == ["0", "1"]


def test_gpus_go_round_and_their_memory_is_shared(monkeypatch):
  memory = "XLA_PYTHON_CLIENT_MEM_FRACTION"
  monkeypatch.delenv(memory, raising=False)
  places = sweep.slots(2, ["4", "5"], range(8))
  assert [place.environ for place in places] == [
    {"CUDA_VISIBLE_DEVICES": "4"},
    {"CUDA_VISIBLE_DEVICES": "5"},
  ]
  places = sweep.slots(5, ["4", "5"], range(8))
  gpus = [place.environ["CUDA_VISIBLE_DEVICES"] for place in places]
  assert gpus == ["4", "5", "4", "5", "4"]
  assert {place.environ[memory] for place in places} == {"0.30"}
  assert not any(place.cores for place in places)
  monkeypatch.setenv(memory, "0.1")
  assert all(memory not in x.environ for x in sweep.slots(5, ["4"], []))


def test_cores_are_shared_out():
  places = sweep.slots(3, [], [0, 1, 2, 5, 6, 7, 9])
  shares = [place.cores for place in places]
  assert sorted(sum(shares, ())) == [0, 1, 2, 5, 6, 7, 9]
  assert {len(share) for share in shares} == {2, 3}
  assert [x.cores for x in sweep.slots(3, [], [4, 5])] == [(4,), (4,), (5,)]
  assert [x.cores for x in sweep.slots(1, [], [4, 5])] == [()]


@pytest.mark.parametrize(
  ("at_once", "num_runs", "gpus", "expected"),
  [
    (None, 9, ["0", "1"], 2),
    (None, 1, ["0", "1"], 1),
    (None, 9, [], 1),
    (3, 9, [], 3),
    (3, 9, ["0"], 3),
    (3, 2, [], 2),
  ],
)
def test_as_many_at_once_as_fit(at_once, num_runs, gpus, expected, monkeypatch):
  monkeypatch.setattr(sweep, "visible_gpus", lambda: gpus)
  assert len(sweep.machine_slots(at_once, num_runs)) == expected


# Running.


def test_runs_share_the_places(stub, tmp_path, monkeypatch):
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  core = min(os.sched_getaffinity(0))
  places = [
    sweep.Slot({"CUDA_VISIBLE_DEVICES": "7"}, (), "GPU 7"),
    sweep.Slot({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2"}, (core,), ""),
  ]
  said = []
  runs = make_runs(0, 1, 2, 3, 4)
  states, stopped = sweep.run_local(runs, tmp_path, places, said.append)
  assert states == {run.name: sweep.COMPLETE for run in runs}
  assert not stopped
  found = [json.loads((tmp_path / r.name / "place").read_text()) for r in runs]
  everywhere = sorted(os.sched_getaffinity(0))
  first = {"gpu": "7", "memory": None, "cores": everywhere}
  second = {"gpu": None, "memory": "0.2", "cores": [core]}
  assert found[:2] == [first, second]
  assert all(place in (first, second) for place in found)
  # At every start, at most one other run is under way; and there was one.
  spans = [[x[2] for x in events(tmp_path / run.name)] for run in runs]
  others = [
    sum(a < start < b for a, b in spans if a != start) for start, _ in spans
  ]
  assert max(others) == 1
  assert sum("started (GPU 7, log" in line for line in said) >= 1
  assert sum("complete at step 2" in line for line in said) == 5


def test_a_run_is_told_from_its_log(stub, tmp_path):
  said = []
  run, missing = make_runs(13, 14)
  assert sweep.last_line(tmp_path / missing.name) == "it has written nothing"
  for _ in range(2):  # The log of the first time is kept.
    places = [sweep.Slot({}, (), "")]
    states, _ = sweep.run_local([run], tmp_path, places, said.append)
  assert states == {"seed=13": sweep.FAILED}
  assert said[-1] == "seed=13: failed (exit status 3): the reason"
  log = (tmp_path / "seed=13" / sweep.LOG_NAME).read_text().splitlines()
  assert [line[0] for line in log] == ["$", "t"] * 2
  assert "--config.seed=13" in log[0]
  with (tmp_path / "seed=13" / sweep.LOG_NAME).open("a") as file:
    file.write("$ killed before it could say anything\n")
  assert sweep.last_line(tmp_path / "seed=13") == "it has written nothing"


def test_failures_are_reported_and_resumed(tmp_path):
  grid = "--grid=seed=3,13,1"
  status, out, err = run_command(tmp_path, grid, "--at_once=3")
  assert status == 1
  assert "\nseed=13 failed: the reason" in err
  assert "2 of 3 runs are complete" in err
  rows = [re.split(r" *\| *", x)[1:-1] for x in out.splitlines()]
  assert rows[0] == [
    *("seed", "step", "valid_loss best", "valid_loss last"),
    *("seconds", "state"),
  ]
  assert rows[2:] == [
    ["1", "2", "0.1100", "0.1200", "1.0", "complete"],
    ["3", "2", "0.3100", "0.3200", "1.0", "complete"],
    ["13", "0", "", "", "", "failed"],
  ]
  results = tmp_path / "sweep" / "results"
  assert results.with_suffix(".md").read_text() == out
  # Other values join; what is complete is left alone, as is what failed.
  status, out, err = run_command(tmp_path, "--grid=seed=1,0", "--json")
  assert status == 0
  assert json.loads(out) == json.loads(results.with_suffix(".json").read_text())
  states = {
    row["values"]["seed"]: row["state"] for row in json.loads(out)["runs"]
  }
  assert states == {0: "complete", 1: "complete", 3: "complete", 13: "failed"}
  assert len(events(tmp_path / "sweep" / "seed=1")) == 2
  assert len(events(tmp_path / "sweep" / "seed=13")) == 1
  status, _, err = run_command(tmp_path, grid, "--config.batch_size=77")
  assert status == 1
  assert re.match(r"error: .* batch_size \(\d+ there, 77 here\)", err)
  assert "\n" not in err.strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_waited_for(tmp_path, number):
  process = start_command(tmp_path, "--grid=seed=0,100,101,102", "--at_once=2")
  running = [tmp_path / "sweep" / f"seed={seed}" for seed in (100, 101)]
  wait_for(lambda: all(map(events, running)))
  os.killpg(process.pid, number)  # As a terminal does.
  out, err = process.communicate(timeout=30)
  ended = time.monotonic()
  assert process.returncode == 0, err
  for directory in running:
    what, pids, when = zip(*events(directory), strict=True)
    assert what == ("start", "stop", "end")
    assert when[-1] < ended and not alive(pids[0])
  assert not (tmp_path / "sweep" / "seed=102").exists()
  assert "1 of 4 runs are complete" in err
  assert [x.split("|")[-2].strip() for x in out.splitlines()[2:]] == [
    *("complete", "stopped", "stopped", "stopped")
  ]


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_no_run_outlives_a_killed_sweep_or_meets_another(tmp_path):
  directory = tmp_path / "sweep" / "seed=100"
  process = start_command(tmp_path, "--grid=seed=100")
  wait_for(lambda: events(directory))
  process.kill()
  process.communicate()
  wait_for(lambda: len(events(directory)) == 2)  # It is about to save.
  runs, states = make_runs(100), []
  # A new process waits until the old one has saved and ended.
  again = sweep.start(
    [sys.executable, str(tmp_path / "stub.py"), *runs[0].args]
    + [f"--workdir={directory}"],
    directory,
    sweep.Slot({}, (), ""),
  )
  wait_for(lambda: len(events(directory)) == 4)
  states = events(directory)
  assert [x[0] for x in states] == ["start", "stop", "end", "start"]
  assert not alive(states[0][1])
  again.terminate()
  assert again.wait() == 0


def test_two_sweeps_in_one_directory_are_refused(tmp_path):
  workdir = tmp_path / "sweep"
  workdir.mkdir()
  with lock(workdir):
    status, _, err = run_command(tmp_path, "--grid=seed=0")
  assert status == 1 and f"pid {os.getpid()}" in err
  assert not (workdir / sweep.SWEEP_NAME).exists()


# Results.


def test_results_are_ranked(tmp_path):
  runs = make_runs(0, 1, 2, 3)
  metrics = {
    0: [
      {"valid_loss": math.nan, "valid_accuracy": 0.1},
      {"valid_loss": 2.0},
      {"valid_loss": math.nan},
    ],
    1: [{"loss": 1.0, "seconds": 3.0}],
    2: [{"valid_loss": 1.0, "valid_accuracy": 0.6}, {"valid_loss": 4.0}],
    3: [{"valid_loss": 3.0, "valid_accuracy": 0.9}],
  }
  for run in runs:
    directory = tmp_path / run.name
    directory.mkdir()
    records = [
      json.dumps({"step": i + 1, **record}) + "\n"
      for i, record in enumerate(metrics[run.values["seed"]])
    ]
    (directory / "metrics.jsonl").write_text("".join(records) + '{"step": 9')
  (tmp_path / "seed=3" / "checkpoints" / "2").mkdir(parents=True)

  def seeds(rows):
    return [row["values"]["seed"] for row in rows]

  rows = sweep.results(runs, tmp_path, {"seed=1": "failed"}, "valid_loss")
  assert seeds(rows) == [2, 0, 3, 1]
  assert [row["valid_loss_best"] for row in rows] == [1.0, 2.0, 3.0, None]
  assert [row["valid_loss_last"] for row in rows] == [4.0, None, 3.0, None]
  states = ["stopped", "stopped", "complete", "failed"]
  assert [row["state"] for row in rows] == states
  assert rows[3]["step"] == 1 and rows[3]["seconds"] == 3.0
  json.loads(
    (tmp_path / "results.json").read_text(), parse_constant=pytest.fail
  )
  # Without news, a failure stays one; accuracies rank from the top.
  rows = sweep.results(runs, tmp_path, {}, "valid_accuracy")
  assert seeds(rows) == [3, 2, 0, 1]
  assert rows[3]["state"] == "failed"
  header = sweep.table(rows).splitlines()[0]
  assert "valid_loss best" in header and "valid_accuracy last" in header


# With cli.train itself.


def check_finished_by_shell(directory):
  """The shell finds the last step in a real run, as the scripts do."""
  (line,) = [x for x in SBATCH.read_text().splitlines() if "steps=" in x]
  script = f'{line}; test -d "$workdir/checkpoints/$steps" -a -n "$steps"'
  subprocess.run(
    ["bash", "-c", script], env={"workdir": str(directory), **os.environ}
  ).check_returncode()


@pytest.mark.slow
def test_two_real_runs(tmp_path, monkeypatch):
  cache = tmp_path / "cache"
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  workdir = tmp_path / "sweep"
  overrides = small.OVERRIDES | {
    "steps": 4,
    "log_every": 2,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "optimizer.warmup_steps": 0,
  }
  command = small.command(
    "sweep",
    f"--config={small.COPY}",
    f"--workdir={workdir}",
    *(f"--config.{name}={x}" for name, x in overrides.items()),
    *("--grid=seed=0,1", "--json"),
  )
  done = small.run(*command)
  assert done.returncode == 0, done.stderr
  rows = json.loads(done.stdout)["runs"]
  assert sorted(row["name"] for row in rows) == ["seed=0", "seed=1"]
  for row in rows:
    assert row["state"] == "complete" and row["step"] == 4
    scores = small.evaluate(workdir / row["name"])
    assert scores["step"] == 4
    check_finished_by_shell(workdir / row["name"])
  again = small.run(*command)
  assert again.returncode == 0 and json.loads(again.stdout)["runs"] == rows
  assert "2 of 2 runs are complete" in again.stderr
