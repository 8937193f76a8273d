"""A run that takes seconds, for the tests of the loop and the commands."""

import json
import pathlib
import subprocess
import sys

import ml_collections

ROOT = pathlib.Path(__file__).parent.parent
COPY = ROOT / "configs" / "copy.py"

# Overrides of configs/copy.py; seconds for a few hundred steps.
OVERRIDES = {
  "steps": 160,
  "batch_size": 2,
  "num_probes": 4,
  "log_every": 10,
  "evaluate_every": 20,
  "checkpoint_every": 20,
  "task.max_length": 3,
  "task.time_chunk": 7,
  "task.num_evaluation": 8,
  "model.embedding_size": 4,
  "model.hidden_size": 4,
}


def config(path=COPY, arg=None, **overrides) -> ml_collections.ConfigDict:
  """The config of a file for one device, with overrides; `__` is a dot."""
  scope = {}
  exec(compile(path.read_text(), str(path), "exec"), scope)
  result = scope["get_config"](*([] if arg is None else [arg]))
  result.mesh.probe = 1  # Of the eight devices that the tests have.
  if path == COPY:
    result.update_from_flattened_dict(OVERRIDES)
  result.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in overrides.items()}
  )
  return result


def command(name: str, *args: str) -> list[str]:
  return [sys.executable, "-m", f"zorn_jax.cli.{name}", *args]


def train_command(workdir, *args: str) -> list[str]:
  overrides = [f"--config.{name}={x}" for name, x in OVERRIDES.items()]
  return command(
    "train", f"--config={COPY}", f"--workdir={workdir}", *overrides, *args
  )


def run(*args: str) -> subprocess.CompletedProcess:
  return subprocess.run(args, cwd=ROOT, capture_output=True, text=True)


def evaluate(workdir) -> dict:
  done = run(*command("evaluate", f"--workdir={workdir}", "--json"))
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)
