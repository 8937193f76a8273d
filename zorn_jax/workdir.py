"""A run directory: whose it is, and where its parts lie."""

import contextlib
import hashlib
import json
import os
import pathlib
from typing import Any

CONFIG_NAME = "config.json"
CHECKPOINTS_NAME = "checkpoints"
JOURNAL_NAME = "journal"
TEXT_NAME = "text.sha256"
STARTS_NAME = "starts.jsonl"  # One line for every process that trained there.


def make(workdir: pathlib.Path) -> None:
  """Makes a directory where there is none.

  Raises:
    ValueError: If nothing can be written there.
  """
  with _writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    if not os.access(workdir, os.W_OK):
      raise PermissionError(13, "Permission denied")


@contextlib.contextmanager
def _writing(workdir):
  try:
    yield
  except OSError as error:
    raise ValueError(
      f"cannot write to the workdir {str(workdir)!r}: {error.strerror}. "
      "Name a writable directory with free space."
    ) from error


def claim(
  workdir: pathlib.Path, config: dict[str, Any], text: str = ""
) -> None:
  """Makes `workdir` the directory of the run with this config.

  Args:
    workdir: An existing directory, which this process has locked.
    config: Plain values, as they are written to `config.json`; "mesh" and
      "loggers" may change when a run is resumed.
    text: The fingerprint of the task, that of its text.
  Raises:
    ValueError: If the directory cannot be written or belongs to a run with
      another config or text.
  """
  config = json.loads(json.dumps(config))
  path = workdir / CONFIG_NAME
  if not path.exists():
    with _writing(workdir):
      write(workdir / TEXT_NAME, text)
      write(path, json.dumps(config, indent=2) + "\n")
    return
  found = json.loads(path.read_text())
  differences = _differences(_identity(found), _identity(config))
  if differences:
    raise ValueError(
      f"the workdir {str(workdir)!r} belongs to another config, which differs "
      f"in {', '.join(differences)}. Use another workdir, or the same config "
      "to resume."
    )
  check_text(workdir, text)


def check_text(workdir: pathlib.Path, text: str) -> None:
  """Raises ValueError if a run is on another text than that of this digest."""
  if (workdir / TEXT_NAME).read_text() != text:
    raise ValueError(
      f"the workdir {str(workdir)!r} belongs to a run on another text, or one "
      "cut into other tokens. Bring the files of task.source back, or use "
      "another workdir."
    )


def write(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all, for one process at a time."""
  scratch = path.with_suffix(".tmp")
  scratch.write_text(text)
  os.replace(scratch, path)


def note_start(workdir: pathlib.Path, facts: dict[str, Any]) -> None:
  """Adds a line about a process that begins to train in `workdir`."""
  with (workdir / STARTS_NAME).open("a") as file:
    file.write(json.dumps(facts) + "\n")


def fingerprint(config: dict[str, Any], text: str) -> str:
  """What a run is: 64 hexadecimal digits of its config and its text.

  Args:
    config: Plain values; "mesh" and "loggers" do not count.
    text: The fingerprint of the task.
  """
  identity = json.dumps([_identity(config), text], sort_keys=True)
  return hashlib.sha256(identity.encode()).hexdigest()


def _identity(config):
  """The config without what may change when a run is resumed."""
  return {
    name: value
    for name, value in config.items()
    if name not in ("mesh", "loggers")
  }


def _differences(found, wanted, prefix=""):
  """Dotted names of the fields in which two configs differ."""
  names = []
  for key in sorted(found.keys() | wanted.keys()):
    a, b = found.get(key), wanted.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      names += _differences(a, b, f"{prefix}{key}.")
    elif a != b:
      names.append(f"{prefix}{key} ({a} there, {b} here)")
  return names
