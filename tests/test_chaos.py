"""A run killed at any moment goes on as if nothing had happened.

What a SIGKILL leaves behind is what lies on the disk at that moment. So the
directory of an undisturbed run is copied whenever something in it is about to
change, and each copy is trained to the end. scripts/chaos.py sends signals.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
import threading

import jax
import pytest
import small

from zorn_jax import build, evaluate, journal, loggers, train as train_module
from zorn_jax.checkpoint import Checkpoints
from zorn_jax.train import train

pytestmark = pytest.mark.optimized

TIMED = ("seconds", "tokens_per_second")


class Moments:
  """Copies of a directory, one for each state that it is in.

  Args:
    workdir: The directory.
    copies: Where the copies go, as 0, 1 and so on.
  """

  def __init__(self, workdir, copies):
    self._workdir, self._copies = workdir, copies
    self._seen = set()
    self._lock = threading.RLock()
    self._copying = False
    self.names: list[str] = []

  def take(self, name):
    """Copies the directory, unless it is as it was at another moment."""
    with self._lock:
      if self._copying or not self._workdir.exists():
        return
      self._copying = True
      try:
        state = self._state()
        if state not in self._seen:
          self._seen.add(state)
          shutil.copytree(self._workdir, self._copies / str(len(self.names)))
          self.names.append(name)
      finally:
        self._copying = False

  def _state(self):
    """All files; of a checkpoint that has no name yet only that it is there."""
    sha = hashlib.sha256()
    for path in sorted(self._workdir.rglob("*")):
      if "orbax-checkpoint-tmp" in str(path.parent):
        continue
      sha.update(str(path.relative_to(self._workdir)).encode())
      if path.is_file():
        sha.update(path.read_bytes())
    return sha.digest()

  def wrap(self, monkeypatch, owner, name):
    """Copies before and after each call of a method."""
    call = getattr(owner, name)

    def wrapped(*args, **kwargs):
      self.take(f"before {name}")
      result = call(*args, **kwargs)
      self.take(f"after {name}")
      return result

    monkeypatch.setattr(owner, name, wrapped)

  def hear(self, event, args):
    """An audit hook: copies before the system changes a name or a file."""
    if event == "open":
      path, _, flags = args
      if not flags & (os.O_WRONLY | os.O_RDWR):
        return
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
      path = args[0]
    elif event == "os.truncate":
      self.take(event)
      return
    else:
      return
    if isinstance(path, (str, os.PathLike)):
      if str(self._workdir) in str(path):
        self.take(f"{event} {pathlib.Path(path).name}")
    elif event in ("os.remove", "os.rmdir"):
      self.take(event)  # Relative to an open directory, in `rmtree`.


_heard: list[Moments] = []


@contextlib.contextmanager
def hearing(moments):
  """Audit hooks stay for good, so there is one, which listens at times."""
  if not hasattr(hearing, "installed"):
    hearing.installed = True
    sys.addaudithook(lambda event, args: _heard and _heard[0].hear(event, args))
  _heard.append(moments)
  try:
    yield
  finally:
    _heard.clear()


@pytest.fixture
def compiled_once(monkeypatch):
  """The runs of one experiment share their programs, and draw nothing."""
  memory = {}

  def remembered(module, name):
    make = getattr(module, name)

    def recall(*args):
      key = name, *map(id, args)
      if key not in memory:
        memory[key] = make(*args), args
      return memory[key][0]

    monkeypatch.setattr(module, name, recall)

  remembered(train_module, "programs")
  remembered(evaluate, "evaluator")
  eval_shape = jax.eval_shape

  def remembered_shape(fn, *args):
    if not isinstance(fn, functools.partial):
      return eval_shape(fn, *args)
    key = fn.func, *map(id, fn.args)
    if key not in memory:
      memory[key] = eval_shape(fn, *args), fn
    return memory[key][0]

  monkeypatch.setattr(jax, "eval_shape", remembered_shape)
  monkeypatch.setattr(train_module.plots, "plot_losses", lambda workdir: None)


NO_WARMUP = {"optimizer__warmup_steps": 0, "optimizer__schedule": "constant"}
RUNS = {
  "steps": {"optimizer__warmup_steps": 3},
  # Searches at the start and whenever the loss stands still.
  "searches": {
    "watch__patience": 1,
    "watch__threshold": 0.5,
    "search__enabled": True,
    "search__depth": 1,
    "search__on_plateau": True,
  }
  | NO_WARMUP,
  "roll-backs": {
    "learning_rate": 30.0,
    "estimator__adaptive": 0.9,
    "watch__explosion": 1.5,
    "watch__max_rollbacks": 12,
  }
  | NO_WARMUP,
}


def result(workdir):
  """What two runs are compared by."""
  lines = loggers.read_jsonl(workdir / "metrics.jsonl")
  checkpoints = workdir / "checkpoints"
  last = max(Checkpoints(checkpoints).steps())
  summary = json.loads((checkpoints / f"{last}/summary/metadata").read_text())
  return {
    "last": last,
    "state": summary["summary"]["digest"],
    "metrics": [
      {name: x for name, x in line.items() if name not in TIMED}
      for line in lines
    ],
    "journal": (workdir / "journal").read_bytes(),
    "checkpoints": set(os.listdir(checkpoints)),
  }


@pytest.mark.parametrize(
  ("name", "every"),
  [
    ("steps", 5),
    *[pytest.param(name, 1, marks=pytest.mark.slow) for name in RUNS],
  ],
)
def test_every_moment_is_survived(
  name, every, tmp_path, monkeypatch, compiled_once
):
  config = small.config(
    steps=14,
    log_every=3,
    evaluate_every=4,
    checkpoint_every=5,
    **RUNS[name],
  )
  experiment = build.experiment(config)
  workdir, copies = tmp_path / "run", tmp_path / "copies"
  moments = Moments(workdir, copies)
  with monkeypatch.context() as patch, hearing(moments):
    for owner, method in (
      (journal.Journal, "append"),
      (journal.Journal, "rewind"),
      (loggers.JsonlLogger, "log"),
      (loggers.JsonlLogger, "rewind"),
      (Checkpoints, "save"),
      (Checkpoints, "forget"),
    ):
      moments.wrap(patch, owner, method)
    assert train(experiment, workdir, config.to_dict())
  wanted = result(workdir)
  failed = []
  assert len(moments.names) > 35
  for index, moment in list(enumerate(moments.names))[::every]:
    copy = copies / str(index)
    try:
      assert train(experiment, copy, config.to_dict())
      found = result(copy)
    except Exception as error:
      failed.append((index, moment, repr(error)))
      continue
    # What is left of an outdated one goes with the next that is outdated.
    found["checkpoints"] &= wanted["checkpoints"]
    different = [key for key in wanted if wanted[key] != found[key]]
    if different:
      failed.append((index, moment, different))
  assert not failed, "\n".join(map(str, failed))
