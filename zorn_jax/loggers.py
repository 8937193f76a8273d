"""Where the numbers of a run go: file, terminal, TensorBoard, W&B."""

import importlib.util
import json
import os
import pathlib
import sys
import time
import uuid
from typing import Any, Protocol

from rich import progress

JSONL_NAME = "metrics.jsonl"


class Logger(Protocol):
  """Takes the metrics of a step; `close` ends it.

  After `rewind(step)` the steps that follow `step` are logged again.
  """

  def log(self, step: int, values: dict[str, float]) -> None: ...

  def rewind(self, step: int) -> None: ...

  def close(self) -> None: ...


class JsonlLogger:
  """One JSON object per line in `metrics.jsonl`.

  Lines of later steps than `first_step` are dropped at the start: a resumed
  run writes them again.
  """

  def __init__(self, workdir: pathlib.Path, first_step: int):
    self._path = workdir / JSONL_NAME
    self._file = self._kept(first_step)

  def _kept(self, step):
    kept = [line for line in read_jsonl(self._path) if line["step"] <= step]
    scratch = self._path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(scratch, self._path)
    return self._path.open("a", buffering=1)

  def log(self, step, values):
    self._file.write(json.dumps({"step": step, **values}) + "\n")

  def rewind(self, step):
    self._file.close()
    self._file = self._kept(step)

  def close(self):
    self._file.close()


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a metrics file; a torn last line is left out."""
  if not path.exists():
    return []
  records = []
  for line in path.read_text().splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records


def last_seconds(workdir: pathlib.Path) -> float:
  """Training time in the metrics of a run, in seconds; 0 for a new run."""
  records = read_jsonl(workdir / JSONL_NAME)
  return max((r["seconds"] for r in records if "seconds" in r), default=0.0)


class TerminalLogger:
  """A progress bar on a terminal, plain lines elsewhere."""

  def __init__(self, first_step: int, steps: int):
    self._steps = steps
    self._validation = float("nan")
    self._start = (time.monotonic(), first_step)
    self._bar = None
    if sys.stderr.isatty():
      self._bar = progress.Progress(
        progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        progress.BarColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeRemainingColumn(),
        console=_console(),
      )
      self._task = self._bar.add_task("", total=steps, completed=first_step)
      self._bar.start()

  def log(self, step, values):
    self._validation = values.get("valid_loss", self._validation)
    if "loss" not in values:
      return
    text = (
      f"loss {values['loss']:.4f} validation {self._validation:.4f} "
      f"{values['tokens_per_second'] / 1e3:.0f}k tokens/s"
    )
    if self._bar:
      self._bar.update(self._task, completed=step, description=text)
    else:
      print(f"step {step}/{self._steps} {text} ETA {self._eta(step):.0f}s")

  def rewind(self, step):
    self._start = (time.monotonic(), step)

  def _eta(self, step):
    start, first_step = self._start
    pace = (time.monotonic() - start) / max(step - first_step, 1)
    return pace * (self._steps - step)

  def close(self):
    if self._bar:
      self._bar.stop()


def _console():
  from rich import console

  return console.Console(stderr=True)


class TensorBoardLogger:
  """Event files through tensorboardX."""

  def __init__(self, workdir: pathlib.Path):
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

  def log(self, step, values):
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def rewind(self, step):
    """Leaves the curve, which goes back."""

  def close(self):
    self._writer.close()


class WandbLogger:
  """Weights & Biases; WANDB_MODE=offline needs no account."""

  def __init__(self, workdir: pathlib.Path, config: dict[str, Any]):
    import wandb

    # The same directory continues the same run, and another one of that name,
    # or one that was emptied, does not.
    path = workdir / "wandb_id.txt"
    if not path.exists():
      path.write_text(uuid.uuid4().hex)
    self._run = wandb.init(
      project="zorn_jax",
      name=workdir.resolve().name,
      id=path.read_text(),
      resume="allow",
      dir=str(workdir),
      config=config,
    )

  def log(self, step, values):
    self._run.log(values, step=step)

  def rewind(self, step):
    """W&B drops what comes for steps that it has seen."""

  def close(self):
    self._run.finish()


OPTIONAL = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # Of packages.


def make(
  names, workdir: pathlib.Path, config: dict[str, Any], first_step: int, steps
) -> list[Logger]:
  """The file and the terminal, and the optional loggers in `names`.

  Those have passed :func:`check`.
  """
  loggers: list[Logger] = []
  if "tensorboard" in names:
    loggers.append(TensorBoardLogger(workdir))
  if "wandb" in names:
    loggers.append(WandbLogger(workdir, config))
  loggers.append(JsonlLogger(workdir, first_step))
  loggers.append(TerminalLogger(first_step, steps))
  return loggers


def check(names) -> None:
  """Raises ValueError if a logger is unknown or its package not installed."""
  for name in names:
    if name not in OPTIONAL:
      raise ValueError(
        f"unknown logger {name!r}. Choose among {', '.join(OPTIONAL)}."
      )
    if importlib.util.find_spec(OPTIONAL[name]) is None:
      raise ValueError(
        f"the logger needs the package {OPTIONAL[name]}, which is not "
        "installed. Run: pip install 'zorn_jax[log]'."
      )
