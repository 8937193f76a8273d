"""Sweeps: grids, places, interruption, results; the files for clusters."""

import json
import math
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import small
import yaml

from zorn_jax import sweep
from zorn_jax.cli import _grid, _run
from zorn_jax.lock import lock

# ml_collections loads configs in a way that Python deprecates.
old_loader = pytest.mark.filterwarnings("ignore:the load_module:")

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


def alive(pid):
  """Whether a process runs; a zombie does not."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except FileNotFoundError:
    return False
  return stat.rpartition(")")[2].split()[0] != "Z"


# Grids.


@pytest.mark.parametrize(
  ("text", "field", "values"),
  [
    ("seed=0,1", "seed", ["0", "1"]),
    ("task.cache=", "task.cache", [""]),
    ("task.source=a=b", "task.source", ["a=b"]),
    ("loggers=(),('a','b')", "loggers", ["()", "('a','b')"]),
  ],
)
def test_grid_is_parsed(text, field, values):
  assert sweep.parse_grid(text) == (field, values)


def test_points_are_the_product():
  grid = {"a": [1, 2], "b": ["x"], "c": [3, 4]}
  assert sweep.points(grid) == [
    {"a": a, "b": "x", "c": c} for a in (1, 2) for c in (3, 4)
  ]


def test_names_are_those_of_files_and_differ():
  plain = {"learning_rate": 1e-5, "estimator.direction.rank": 2}
  name = "learning_rate=1e-05,estimator.direction.rank=2"
  assert sweep.name_of(plain) == name
  values = ["/a b", "_a_b", "/a_b", "../x", "ü", "x" * 250, "x" * 251, "\n"]
  names = [sweep.name_of({"task.source": value}) for value in values]
  assert len(set(names)) == len(values)
  for name in names:
    assert re.fullmatch(r"[A-Za-z0-9_.,=+-]{1,255}", name)


def grid_of(*texts, overrides=None):
  overrides = overrides or {}
  base = small.config().to_dict()
  return _grid.resolve(str(small.COPY), overrides, base, texts)


@old_loader
def test_values_have_the_types_of_their_fields():
  grid = grid_of(
    "learning_rate=1,2e-2",
    "estimator.direction.rank=1,2",
    "loggers=(),('wandb','tensorboard')",
    "search.enabled=true,false",
  )
  assert grid == {
    "learning_rate": [1.0, 0.02],
    "estimator.direction.rank": [1, 2],
    "loggers": [(), ("wandb", "tensorboard")],
    "search.enabled": [True, False],
  }
  assert type(grid["learning_rate"][0]) is float
  # The children read the text of each value as the same value.
  for field, values in grid.items():
    again = f"{field}={','.join(map(_grid.text, values))}"
    assert grid_of(again) == {field: values}


@old_loader
@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (["lerning_rate=1"], "no field 'lerning_rate'.*mean learning_rate\\?"),
    (["rank=1"], "mean estimator.direction.rank\\?"),
    (["xyzzy=1"], "no field 'xyzzy'.*Look into the config"),
    (["model=1"], "group of them. Did you mean model.dtype or"),
    (["seed=0,many"], "seed takes values of type int, got 'many'"),
    (["seed=0,1.5"], "seed takes values of type int, got '1.5'"),
    (["seed=1,"], "seed takes values of type int, got ''"),
    (["learning_rate=1e-2,3,0.01"], "learning_rate has the value 0.01 twice"),
    (["seed=1", "seed=2"], "seed is in two grids"),
    (["steps=1"], "steps is in a grid and in --config.steps"),
    (["seed"], "a grid is a field and its values, got 'seed'"),
  ],
)
def test_wrong_grids_are_refused(texts, message):
  with pytest.raises(ValueError, match=message) as refusal:
    grid_of(*texts, overrides={"steps": "4"})
  assert "\n" not in str(refusal.value)


@old_loader
def test_fields_that_stand_for_one_value_are_refused():
  path = f"{small.ROOT / 'configs' / 'paper' / 'lstm.py'}:tiny"
  base = small.config(small.ROOT / "configs" / "paper" / "lstm.py").to_dict()
  resolve = lambda overrides, *texts: _grid.resolve(
    path, overrides, base, texts
  )
  given = "learning_rate=0.1,0.2"
  assert resolve({}, given)["learning_rate"] == [0.1, 0.2]
  for overrides, texts in (
    ({}, (given, "epsilon=0.1")),
    ({"epsilon": "0.01"}, (given,)),
    ({"learning_rate": "0.01"}, ("epsilon=0.1",)),
  ):
    with pytest.raises(ValueError, match="they stand for one value. Give one"):
      resolve(overrides, *texts)
  config = _run.config_of(_grid._flags(path, {"epsilon": "0.3"}))
  assert config.learning_rate == config.epsilon == 0.3


@old_loader
def test_none_is_a_value_of_a_field_that_may_lack_one():
  changes = {"model.implementation": "None"}
  config = _run.config_of(_grid._flags(str(small.COPY), changes))
  assert config.model.implementation is None
  grid = grid_of("model.implementation=None,xla")
  assert grid == {"model.implementation": [None, "xla"]}


@old_loader
def test_what_is_no_config_is_refused(tmp_path):
  path = tmp_path / "config.py"
  path.write_text("def get_config():\n  return {'seed': 0}\n")
  with pytest.raises(ValueError, match="returns a dict. Return an ml_coll"):
    _run.config_of(_grid._flags(str(path), {}))


def test_the_command_is_that_of_a_single_run(tmp_path):
  base = small.config().to_dict()
  run = _grid.run_at("c.py:x", {"steps": "9"}, base, {"seed": 3, "loggers": ()})
  assert run.name == sweep.name_of(run.values)
  assert run.steps == base["steps"]
  assert sweep.train_command(run, tmp_path / "d") == [
    *(sys.executable, "-m", "zorn_jax.cli.train", "--config=c.py:x"),
    *("--config.steps=9", "--config.seed=3", "--config.loggers=()"),
    f"--workdir={tmp_path / 'd'}",
  ]
  assert _grid.run_at("c.py", {}, base, {"steps": 7}).steps == 7


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


# SLURM.


class FakeJob:
  def __init__(self, folder, job_id, call=None):
    self.folder, self.job_id, self.call = folder, job_id, call

  def done(self):
    return self.call is not None or self.job_id in FAKE["done"]

  def result(self):
    return self.call()


class FakeExecutor:
  def __init__(self, folder, **kwargs):
    FAKE["constructed"] = {"folder": folder, **kwargs}

  def update_parameters(self, **kwargs):
    FAKE["parameters"] = kwargs

  def submit_array(self, calls):
    FAKE["arrays"].append(len(calls))
    calls = pickle.loads(pickle.dumps(calls))  # As they travel to a node.
    folder = FAKE["constructed"]["folder"]
    return [FakeJob(folder, f"77_{i}", call) for i, call in enumerate(calls)]


FAKE = {}


@pytest.fixture
def fake_submitit(monkeypatch):
  FAKE.clear()
  FAKE.update(arrays=[], done=set())
  module = types.SimpleNamespace(
    AutoExecutor=FakeExecutor,
    SlurmJob=FakeJob,
    helpers=types.SimpleNamespace(DelayedSubmission=lambda call: call),
  )
  monkeypatch.setitem(sys.modules, "submitit", module)
  monkeypatch.setattr(sweep.shutil, "which", lambda name: f"/bin/{name}")


def test_slurm_gets_one_array(stub, tmp_path, fake_submitit):
  said = []
  runs = make_runs(0, 13)
  states, stopped = sweep.run_slurm(
    runs, tmp_path, said.append, partition="gpu", gpus=2, minutes=9, at_once=5
  )
  assert FAKE["constructed"]["cluster"] == "slurm"
  assert FAKE["arrays"] == [2]
  assert FAKE["parameters"] == {
    "name": "zorn_sweep",
    "timeout_min": 9,
    "nodes": 1,
    "tasks_per_node": 1,
    "gpus_per_node": 2,
    "slurm_partition": "gpu",
    "slurm_array_parallelism": 5,
    "slurm_signal_delay_s": 120,
  }
  assert states == {"seed=0": "complete", "seed=13": "failed"}
  assert not stopped
  assert said[-1].endswith("failed (exit status 3): the reason")
  # Only what an earlier call has not left in the queue is submitted.
  states, _ = sweep.run_slurm(
    make_runs(13, 0, 1), tmp_path, said.append, wait=False
  )
  assert FAKE["arrays"] == [2, 1]
  assert set(states.values()) == {"queued"}
  FAKE["done"] = {"77_1"}  # The job of seed 13.
  sweep.run_slurm(make_runs(0, 13), tmp_path, said.append, wait=False)
  assert FAKE["arrays"] == [2, 1, 1]


def test_a_job_saves_before_it_is_queued_again(stub, tmp_path, fake_submitit):
  (run,) = make_runs(100)
  directory = tmp_path / run.name
  job = sweep._Job(sweep.train_command(run, directory), directory, os.getcwd())
  status = []
  thread = threading.Thread(target=lambda: status.append(job()))
  thread.start()
  wait_for(lambda: events(directory))
  again = job.checkpoint()
  assert [x[0] for x in events(directory)] == ["start", "stop", "end"]
  thread.join()
  assert status == [0]
  assert pickle.loads(pickle.dumps(again))._arguments == job._arguments


def test_slurm_needs_its_programs(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace())
  monkeypatch.setattr(sweep.shutil, "which", lambda name: None)
  with pytest.raises(ValueError, match="needs sbatch"):
    sweep.run_slurm([], tmp_path, print)
  monkeypatch.setitem(sys.modules, "submitit", None)
  with pytest.raises(ValueError, match=r'pip install "zorn_jax\[sweep\]"'):
    sweep.run_slurm([], tmp_path, print)


def test_submitit_runs_the_jobs(stub, tmp_path):
  pytest.importorskip("submitit")
  runs = make_runs(0, 13)
  states, _ = sweep.run_slurm(runs, tmp_path, print, gpus=0, cluster="local")
  assert states == {"seed=0": "complete", "seed=13": "failed"}


# With cli.train itself.


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


# The files for clusters.

SBATCH = small.ROOT / "scripts" / "slurm.sbatch"
KUBERNETES = small.ROOT / "scripts" / "kubernetes.yaml"
TRAIN = r"""#!/bin/bash
echo "$@" > "$0.args"
for flag; do
  [[ $flag != --workdir=* ]] || workdir=${flag#*=}
done
mkdir -p "$workdir/checkpoints/$SAVED"
printf '{\n  "steps": 30,\n  "search": {\n    "steps": 1\n  }\n}\n' \
  > "$workdir/config.json"
if [[ -n $PAUSE ]]; then
  trap 'sleep 0.3; touch "$0.saved"; exit 0' TERM
  touch "$0.ready"
  sleep 9 > /dev/null 2>&1 &
  wait
fi
exit "$STATUS"
"""


def check_finished_by_shell(directory):
  """The shell finds the last step in a real run, as the scripts do."""
  (line,) = [x for x in SBATCH.read_text().splitlines() if "steps=" in x]
  script = f'{line}; test -d "$workdir/checkpoints/$steps" -a -n "$steps"'
  subprocess.run(
    ["bash", "-c", script], env={"workdir": str(directory), **os.environ}
  ).check_returncode()


def fake_program(tmp_path, name, text):
  path = tmp_path / "bin" / name
  path.parent.mkdir(exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


def shell_environ(tmp_path, **extra):
  path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
  extra = {"PAUSE": "", "STATUS": "0", "SAVED": "30"} | extra
  return os.environ | {"PATH": path, "SLURM_JOB_ID": "5"} | extra


@pytest.mark.parametrize(
  ("saved", "status", "state", "requeued"),
  [
    ("30", "0", "RUNNING", False),  # All is done.
    ("20", "0", "RUNNING", True),  # The limit was near.
    ("20", "1", "RUNNING", False),  # The training failed.
    ("20", "0", "COMPLETING", False),  # The user has cancelled it.
  ],
)
def test_slurm_script(tmp_path, saved, status, state, requeued):
  fake_program(tmp_path, "srun", '#!/bin/bash\nkill $PPID\nexec "${@:3}"')
  fake_program(tmp_path, "python", TRAIN)
  fake_program(tmp_path, "squeue", f"#!/bin/bash\necho {state}")
  fake_program(tmp_path, "scontrol", '#!/bin/bash\necho "$@" > "$0.args"')
  args = ["c.py", str(tmp_path / "run"), "--config.name=a b"]
  done = subprocess.run(
    ["bash", SBATCH, *args],
    env=shell_environ(tmp_path, SAVED=saved, STATUS=status),
    capture_output=True,
    text=True,
  )
  assert done.returncode == int(status), done.stderr
  assert (tmp_path / "bin" / "python.args").read_text().strip() == (
    f"-m zorn_jax.cli.train --config=c.py --workdir={args[1]} --config.name=a b"
  )
  called = tmp_path / "bin" / "scontrol.args"
  assert called.exists() == requeued
  assert not requeued or called.read_text() == "requeue 5\n"


def test_slurm_script_asks_for_a_task_per_gpu():
  text = SBATCH.read_text()
  subprocess.run(["bash", "-n", SBATCH], check=True)
  options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
  assert options["ntasks-per-node"] == options["gpus-per-node"]
  assert options["signal"] == "TERM@120"
  assert options["open-mode"] == "append"
  assert "requeue" in options and int(options["nodes"]) > 1
  # Options end where the commands begin.
  assert text.rindex("#SBATCH") < text.index("set -euo")
  done = subprocess.run(["bash", SBATCH], capture_output=True, text=True)
  assert done.returncode == 1 and "name a config" in done.stderr


def kubernetes():
  documents = list(yaml.safe_load_all(KUBERNETES.read_text()))
  named = {document["kind"]: document for document in documents}
  assert len(named) == len(documents)
  return named


def test_kubernetes_job_is_one_that_jax_detects():
  objects = kubernetes()
  job, service = objects["Job"], objects["Service"]
  spec = job["spec"]
  pod = spec["template"]["spec"]
  assert spec["completionMode"] == "Indexed"
  assert spec["completions"] == spec["parallelism"] > 1
  assert job["metadata"]["labels"]  # JAX looks into them.
  assert (
    service["spec"]["clusterIP"] == "None" or not service["spec"]["clusterIP"]
  )
  assert service["spec"]["publishNotReadyAddresses"]
  assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
  assert pod["subdomain"] == service["metadata"]["name"]
  # What jax's cluster detection calls, and no more.
  allowed = {
    (group, resource, verb)
    for rule in objects["Role"]["rules"]
    for group in rule["apiGroups"]
    for resource in rule["resources"]
    for verb in rule["verbs"]
  }
  assert allowed == {("", "pods", "list"), ("batch", "jobs", "get")}
  binding = objects["RoleBinding"]
  account = objects["ServiceAccount"]["metadata"]["name"]
  assert binding["roleRef"]["name"] == objects["Role"]["metadata"]["name"]
  assert [x["name"] for x in binding["subjects"]] == [account]
  assert pod["serviceAccountName"] == account


def test_kubernetes_job_keeps_its_run():
  objects = kubernetes()
  spec = objects["Job"]["spec"]
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  assert pod["terminationGracePeriodSeconds"] == 120
  assert pod["restartPolicy"] == "Never"  # As a failure policy demands.
  (rule,) = spec["podFailurePolicy"]["rules"]
  assert rule["action"] == "Ignore"
  assert rule["onPodConditions"] == [{"type": "DisruptionTarget"}]
  assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1
  claim = objects["PersistentVolumeClaim"]
  assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
  volumes = {v["name"]: v for v in pod["volumes"]}
  mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
  claimed = volumes["runs"]["persistentVolumeClaim"]["claimName"]
  assert claimed == claim["metadata"]["name"]
  environ = {x["name"]: x["value"] for x in container["env"]}
  assert environ["WORKDIR"].startswith(f"{mounts['runs']}/")
  assert (small.ROOT / environ["CONFIG"]).exists()


@pytest.mark.parametrize(
  ("saved", "status", "expected"), [("30", 0, 0), ("20", 0, 1), ("20", 4, 4)]
)
def test_kubernetes_pod_succeeds_after_the_last_step(
  tmp_path, saved, status, expected
):
  process = start_pod(tmp_path, SAVED=saved, STATUS=str(status))
  process.communicate()
  assert process.returncode == expected
  assert (tmp_path / "bin" / "python.args").read_text().strip() == (
    f"-m zorn_jax.cli.train --config=c.py --workdir={tmp_path / 'run'} "
    "--config.seed=1"
  )


def test_kubernetes_pod_passes_sigterm_on(tmp_path):
  process = start_pod(tmp_path, SAVED="20", PAUSE="yes")
  wait_for((tmp_path / "bin" / "python.ready").exists)
  begun = time.monotonic()
  process.terminate()
  process.communicate()
  assert process.returncode == 1 and time.monotonic() - begun < 5
  assert (tmp_path / "bin" / "python.saved").exists()


def start_pod(tmp_path, **extra):
  (container,) = kubernetes()["Job"]["spec"]["template"]["spec"]["containers"]
  fake_program(tmp_path, "python", TRAIN)
  environ = {"CONFIG": "c.py", "WORKDIR": str(tmp_path / "run")}
  return subprocess.Popen(
    [*container["command"], "--config.seed=1"],
    env=shell_environ(tmp_path, **environ, **extra),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
