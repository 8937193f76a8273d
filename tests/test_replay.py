"""The journal rebuilds a run, whatever changed its state on the way."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import pytest
import small

from zorn_jax import build, journal, probe_batch, train as train_module
from zorn_jax.checkpoint import Checkpoints
from zorn_jax.data import Feed
from zorn_jax.lock import lock
from zorn_jax.replay import replay
from zorn_jax.step import programs
from zorn_jax.train import restore_params, train
from zorn_jax.train_state import digest
from zorn_jax.workdir import fingerprint

pytestmark = pytest.mark.optimized


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
  monkeypatch.setattr(train_module.plots, "plot_losses", lambda workdir: None)


def run(config, workdir):
  return train(build.experiment(config), workdir, config.to_dict())


def metrics_of(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def saved_digest(workdir, step=None):
  """Digest of the parameters in a checkpoint, the newest unless given."""
  init = build.load(workdir).model.init
  template = jax.eval_shape(init, jax.random.key(0))
  checkpoints = Checkpoints(workdir / "checkpoints")
  return digest(checkpoints.restore_params(template, step)[0])


# From the seed.

SGD = {
  "name": "sgd",
  "momentum": 0.9,
  "weight_decay": 0.01,
  "schedule": "cosine",
  "warmup_steps": 3,
}
EXACT = {"estimator__readout": "exact", "estimator__readout_batches": 3}
NO_WARMUP = {
  "optimizer__warmup_steps": 0,
  "optimizer__schedule": "constant",
}
EXPLODING = {
  "learning_rate": 3.0,
  "watch__explosion": 1.5,
  "watch__max_rollbacks": 12,
} | NO_WARMUP
PLATEAU = {"watch__patience": 1, "watch__threshold": 0.5}
SEARCH = {"search__enabled": True, "search__depth": 3} | NO_WARMUP
CURRICULUM = {
  "curriculum__enabled": True,
  "curriculum__start": 2,
  "curriculum__maximum": 3,
  "curriculum__threshold": 100.0,
  "curriculum__patience": 7,
}
FOLLOWING = {"epsilon_schedule": "learning_rate"}


def estimator(name, **options):
  return {
    "estimator": {
      "name": name,
      "batch_per_probe": True,
      "probe_batch": 0,
      "direction": {"name": "rademacher"},
    }
    | options
  }


def scales(records):
  return len({float(record.scale) for record in records})


def epsilons(records):
  return len({float(record.epsilon) for record in records})


# What is changed of the small config, and what shows that it acted.
ROWS = {
  "sgd, plateau": ({"optimizer": SGD} | PLATEAU, lambda r: scales(r) > 1),
  "spsa1_5, following, plateau": (
    estimator("spsa1_5", exponent=0.1, floor=1.0) | FOLLOWING | PLATEAU,
    lambda r: epsilons(r) > 10 and scales(r) > 1,
  ),
  "exact, curriculum": (EXACT | CURRICULUM, lambda r: scales(r) == 1),
  "exact, curriculum, roll-back": (
    EXACT | CURRICULUM | EXPLODING | {"learning_rate": 30.0},
    lambda r: r[0].scale < 1,
  ),
  "adaptive, roll-back": (
    EXPLODING | {"estimator__adaptive": 0.9, "learning_rate": 30.0},
    lambda r: scales(r) > 1,
  ),
  "search on a plateau": (
    SEARCH | PLATEAU | {"search__on_plateau": True, "search__high": 10.0},
    lambda r: scales(r) > 1 and r[0].scale != 1,
  ),
  "bandit, roll-back, plateau": (
    estimator("bandit_spsa", capacity=16, ramp=(5.0, 5.0))
    | EXPLODING
    | PLATEAU,
    lambda r: scales(r) > 2,
  ),
}


def row_config(overrides):
  overrides = dict(overrides)
  parts = {k: overrides.pop(k) for k in ("estimator",) if k in overrides}
  parts |= {k: overrides.pop(k) for k in ("optimizer",) if k in overrides}
  config = small.config(
    steps=24, log_every=3, evaluate_every=24, checkpoint_every=6, **overrides
  )
  for name, value in parts.items():
    config[name] = value
  return config


def nothing(*args):
  raise AssertionError("a replay runs no model")


class NoData:
  def at(self, step):
    return None


SLOW = ("exact, curriculum", "bandit, roll-back, plateau")


@pytest.mark.parametrize(
  "row",
  [
    pytest.param(row, marks=pytest.mark.slow if row in SLOW else ())
    for row in ROWS
  ],
)
def test_a_replay_from_the_seed_is_the_run(row, tmp_path):
  overrides, acted = ROWS[row]
  config = row_config(overrides)
  assert run(config, tmp_path)
  experiment = build.experiment(config)
  method = experiment.method._replace(query=nothing)
  feed = Feed(experiment.task)
  if "exact" not in row:
    feed = NoData()
    model = experiment.model._replace(apply=nothing)
    experiment = experiment._replace(model=model)
  parts = programs(experiment._replace(method=method))
  _, records = journal.read(tmp_path / "journal")
  assert [record.step for record in records] == list(range(1, 25))
  assert acted(records)
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  state, step = parts.init(), 0
  for stop in checkpoints.steps():
    state = replay(parts, state, records[step:stop], feed)
    step = stop
    assert digest(state.params) == saved_digest(tmp_path, stop), stop
  assert step == 24
  if state.control.lesson:
    assert int(state.control.lesson.length) == 3


# The command.

# Every line of its input is a command line; absl lets a process define flags
# once.
SERVER = """
import contextlib, io, json, sys
from absl import flags
from absl.testing import flagsaver
from zorn_jax.cli import replay

flags.FLAGS(["replay"])
for line in sys.stdin:
  output, result = io.StringIO(), {}
  with flagsaver.flagsaver(), contextlib.redirect_stdout(output):
    try:
      flags.FLAGS(["replay", *json.loads(line)])
      result["status"] = replay.main([])
    except ValueError as error:
      result["error"] = str(error)
  result["output"] = output.getvalue()
  print(json.dumps(result), flush=True)
"""


class Command:
  """`zorn-replay`, started once for many command lines."""

  def __init__(self, cache):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if cache:
      environment["JAX_COMPILATION_CACHE_DIR"] = cache
      environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    self._process = subprocess.Popen(
      [sys.executable, "-c", SERVER],
      cwd=small.ROOT,
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def __call__(self, workdir, *args):
    line = json.dumps([f"--workdir={workdir}", "--json", *args])
    self._process.stdin.write(line + "\n")
    self._process.stdin.flush()
    result = json.loads(self._process.stdout.readline())
    if "error" in result:
      assert "\n" not in result["error"] and not result["output"]
      return result["error"]
    return json.loads(result["output"]) | {"status": result["status"]}

  def close(self):
    self._process.communicate()


@pytest.fixture(scope="module")
def command():
  command = Command(jax.config.jax_compilation_cache_dir)
  yield command
  command.close()


CONFIG = small.config(
  steps=23,
  num_probes=16,
  log_every=3,
  evaluate_every=4,
  checkpoint_every=5,
  estimator__probe_batch=2,  # The same on every number of devices.
)
CONFIG.optimizer.warmup_steps = 3


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """A run with the checkpoints 20 and 23, and the best one."""
  workdir = tmp_path_factory.mktemp("run") / "run"
  assert run(CONFIG, workdir)
  return workdir


@pytest.fixture
def workdir(original, tmp_path):
  return shutil.copytree(original, tmp_path / "run")


def rebuilt(workdir):
  """The digests of the parameters before the first and after every step."""
  experiment = build.experiment(CONFIG)
  parts = programs(experiment)
  state = parts.init()
  digests = [digest(state.params)]
  for record in journal.read(workdir / "journal")[1]:
    state = replay(parts, state, [record], NoData())
    digests.append(digest(state.params))
  return digests


def test_any_step_can_be_asked_for(workdir, command):
  digests = rebuilt(workdir)
  # The warm-up begins with a rate of zero.
  assert len(digests) == 24 and len(set(digests[1:])) == 23
  last = saved_digest(workdir, 23)
  assert digests[23] == last
  for step, replayed in ((0, 0), (1, 1), (19, 19), (20, 0), (22, 2), (23, 0)):
    result = command(workdir, f"--step={step}")
    assert result["params_digest"] == digests[step], step
    assert result["step"] == step and result["status"] == 0
    assert result["replayed_steps"] <= replayed
  assert command(workdir)["params_digest"] == last
  assert command(workdir)["step"] == 23
  beyond = command(workdir, "--step=24")
  assert "ends with step 23, got --step=24. Choose a step" in beyond
  assert "got --step=-1. Choose" in command(workdir, "--step=-1")


def test_verify_begins_at_the_seed_and_compares(workdir, command):
  checkpoints = Checkpoints(workdir / "checkpoints")
  result = command(workdir, "--verify")
  assert result["replayed_steps"] == 23 and result["status"] == 0
  steps = [str(step) for step in checkpoints.steps()]
  assert result["checkpoints"] == dict.fromkeys(steps, "equal")
  # Whole, but with the parameters of another step.
  experiment = build.experiment(CONFIG)
  template = programs(experiment).template
  state, _, metrics = checkpoints.restore(template, 23)
  checkpoints.save(20, state, metrics)
  different = {"20": "different"}
  result = command(workdir, "--verify")
  assert result["checkpoints"] == dict.fromkeys(steps, "equal") | different
  assert result["status"] == 1
  tamper(workdir / "checkpoints/23/summary/metadata")
  result = command(workdir, "--verify")
  damaged = {"23": "damaged"}
  assert result["checkpoints"] == (
    dict.fromkeys(steps, "equal") | different | damaged
  )
  assert result["status"] == 1


def tamper(path):
  """Another digest of the parameters, under a checksum that fits."""
  record = json.loads(path.read_text())
  record["summary"]["params_digest"] = "0" * 64
  text = json.dumps(record["summary"], sort_keys=True)
  record["checksum"] = hashlib.sha256(text.encode()).hexdigest()
  path.write_text(json.dumps(record))


def test_the_output_is_a_run_of_that_step(workdir, tmp_path, command):
  output = tmp_path / "new" / "output"
  probe_batch.write(workdir, 2)
  result = command(workdir, "--step=17", f"--output={output}")
  assert probe_batch.read(output) == 2
  experiment = build.load(output)
  params, step = restore_params(experiment, output)
  assert step == 17 and digest(params) == result["params_digest"]
  assert "exists. Name a new directory" in command(
    workdir, f"--output={output}"
  )
  # It can be trained on, in the steps of the run.
  assert run(CONFIG, output)
  assert saved_digest(output) == saved_digest(workdir)


def test_what_has_no_journal_says_so(workdir, tmp_path, command):
  for name in ("bptt", "noise_reuse_es"):
    config = small.config(steps=30, task__time_chunk=1)
    config.num_probes, config.epsilon = 0, 0.0
    config.estimator = {"name": "bptt"}
    if name == "noise_reuse_es":
      config.num_probes, config.epsilon = 4, 0.01
      config.estimator = {
        "name": name,
        "unrolls": 7,
        "shaping": "std",
        "probe_batch": 0,
        "direction": {"name": "rademacher"},
      }
    other = tmp_path / name
    other.mkdir()
    text = json.dumps(config.to_dict())
    (other / "config.json").write_text(text)
    assert build.experiment(config).method.recall is None
    assert "has no journal: its steps cannot be rebuilt" in command(other)
  assert "there is no run in" in command(tmp_path)


def rewrite(path, change):
  path.write_bytes(change(path.read_bytes()))


def flipped(data, place):
  return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


SIZE = 16 + 16 * 2 * 4  # Bytes of a record.


def test_a_torn_end_is_dropped_and_a_damaged_record_named(workdir, command):
  digests = rebuilt(workdir)
  path = workdir / "journal"
  rewrite(path, lambda data: data[:-5])
  for place in Checkpoints(workdir / "checkpoints").steps():
    shutil.rmtree(workdir / "checkpoints" / str(place))
  result = command(workdir)
  assert (result["step"], result["params_digest"]) == (22, digests[22])
  rewrite(path, lambda data: flipped(data, 52 + 7 * SIZE + 20))
  assert "record 8 of the journal" in command(workdir)
  assert "that of step 8, is damaged" in command(workdir)
  with pytest.raises(ValueError, match="that of step 8, is damaged"):
    run(CONFIG, workdir)


def test_files_of_another_run_are_refused(workdir, tmp_path, command):
  path = workdir / "config.json"
  text = path.read_text()
  path.write_text(text.replace('"seed": 0', '"seed": 1'))
  assert "is that of another config or text" in command(workdir)
  path.write_text(text)
  other = json.loads(text) | {"seed": 1}
  header = journal.Header(fingerprint(other, ""), 16, 2)
  (workdir / "journal").unlink()
  journal.Journal(workdir / "journal", header).close()
  with pytest.raises(ValueError, match="belongs to another run, which differs"):
    run(CONFIG, workdir)
  assert "is that of another config or text" in command(workdir)
  (workdir / "text.sha256").write_text("0" * 64)
  with pytest.raises(ValueError, match="belongs to a run on another text"):
    run(CONFIG, workdir)


# Resuming.


class Killed(BaseException):
  """Ends a run without its knowing."""


def run_until(monkeypatch, step, action, config, workdir):
  """Trains, and acts when the record of a step has been written."""
  append = journal.Journal.append

  def wrapped(self, record):
    append(self, record)
    if record.step == step:
      action()

  with monkeypatch.context() as patch:
    patch.setattr(journal.Journal, "append", wrapped)
    return run(config, workdir)


def kill():
  raise Killed


def test_a_run_goes_on_with_other_devices(original, tmp_path, monkeypatch):
  config = CONFIG.copy_and_resolve_references()
  with pytest.raises(Killed):
    run_until(monkeypatch, 8, kill, config, tmp_path)
  config.mesh.probe = 8
  assert run(config, tmp_path)
  assert saved_digest(tmp_path) == saved_digest(original)
  for name in ("journal", "metrics.jsonl"):
    assert lines_of(tmp_path, name) == lines_of(original, name)


def lines_of(workdir, name):
  if name == "journal":
    return (workdir / name).read_bytes()
  timed = ("seconds", "tokens_per_second")
  lines = metrics_of(workdir)
  return [{k: x for k, x in line.items() if k not in timed} for line in lines]


def test_sigterm_finishes_the_step_and_saves(original, tmp_path, monkeypatch):
  stop = lambda: os.kill(os.getpid(), signal.SIGTERM)
  assert not run_until(monkeypatch, 12, stop, CONFIG, tmp_path)
  checkpoints = Checkpoints(tmp_path / "checkpoints")
  assert checkpoints.steps()[-1] == 12
  _, records = journal.read(tmp_path / "journal")
  assert records[-1].step == 12
  assert run(CONFIG, tmp_path)
  assert saved_digest(tmp_path) == saved_digest(original)
  assert lines_of(tmp_path, "journal") == lines_of(original, "journal")


def cut(workdir, count):
  rewrite(workdir / "journal", lambda data: data[: 52 + count * SIZE])


@pytest.mark.parametrize(
  ("change", "fact"),
  [
    (lambda workdir: (workdir / "journal").unlink(), "no steps"),
    (lambda workdir: cut(workdir, 17), "the steps 1 to 17"),
  ],
)
def test_a_journal_that_lacks_steps_begins_anew(
  workdir, command, caplog, change, fact
):
  wanted = saved_digest(workdir)
  shutil.rmtree(workdir / "checkpoints/23")
  change(workdir)
  assert run(CONFIG, workdir)
  (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
  assert fact in record.getMessage()
  assert "the checkpoint of step 20: it begins anew" in record.getMessage()
  assert saved_digest(workdir) == wanted
  _, records = journal.read(workdir / "journal")
  assert [record.step for record in records] == [21, 22, 23]
  result = command(workdir, "--step=22")
  assert result["step"] == 22 and result["status"] == 0
  assert "begins with step 21, but step 1 is needed. Leave out --verify" in (
    command(workdir, "--verify")
  )


def test_a_second_trainer_is_refused(workdir):
  with lock(workdir):
    with pytest.raises(ValueError, match=rf"\(pid {os.getpid()} on .*trains"):
      run(CONFIG, workdir)
