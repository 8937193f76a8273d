"""Checkpoints on disk: complete, verified and the best one kept.

A checkpoint is a directory named after its step, renamed into place when it is
complete. It holds the leaves of a :class:`zorn_jax.train_state.TrainState`
under their names in the tree, and a summary: the metrics, what each leaf is,
and digests, with which everything read is compared before it is handed out.
Reading never writes, so that a run can be evaluated while it trains.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from zorn_jax import mesh, train_state, types

Which = int | Literal["best"] | None
Restored = tuple[Any, int, dict[str, float]]

# A checkpoint whose step is just being saved anew lies under this suffix.
_REPLACED = ".replaced"


class CheckpointError(ValueError):
  """A checkpoint cannot be written, read or fitted to its template."""


class Checkpoints:
  """The checkpoints of one run directory.

  Args:
    directory: Where they lie; made by the first `save`.
    keep: How many of the latest to keep, at least 1. The best one, of the
      lowest finite metric "loss", is kept besides.
    every: So is the latest whose step is a multiple of it.
  Raises:
    CheckpointError: If `keep` is not positive.
  Guarantees: a process killed at any moment leaves every other checkpoint as
    it was, and the one being written either complete or invisible.
  """

  def __init__(
    self, directory: str | os.PathLike[str], keep: int = 2, every: int = 1
  ):
    if keep < 1:
      raise CheckpointError(
        f"keep must be positive, got {keep}. Keep at least 1 checkpoint."
      )
    self._directory = pathlib.Path(directory).absolute()
    self._keep, self._every = keep, every
    self._manager: ocp.CheckpointManager | None = None

  def steps(self) -> list[int]:
    """Lists the steps on disk, oldest first, without verifying them."""
    if not self._directory.is_dir():
      return []
    names = (p.name.removesuffix(_REPLACED) for p in self._directory.iterdir())
    return sorted({int(name) for name in names if name.isdecimal()})

  def save(
    self, step: int, state: train_state.TrainState, metrics: dict[str, float]
  ) -> None:
    """Writes a checkpoint, complete on return, and removes outdated ones.

    Args:
      step: Its name; an existing checkpoint of that step is replaced.
      state: What to save. On several hosts all leaves are global arrays.
      metrics: Scalars to save with it; "loss" decides which one is the best.
    Raises:
      CheckpointError: If it cannot be written; the earlier ones are intact.
    """
    leaves = _named_leaves(state)
    params = list(_part(leaves, ".params").values())
    summary = {
      "metrics": {name: float(value) for name, value in metrics.items()},
      "leaves": _describe(leaves),
      "digest": train_state.digest(list(leaves.values())),
      "params_digest": train_state.digest(params),
    }
    items = ocp.args.Composite(
      # Orbax refuses arrays without entries; restoring makes them anew.
      state=ocp.args.PyTreeSave(
        {name: _data(x) for name, x in leaves.items() if x.size}
      ),
      summary=ocp.args.JsonSave(
        {"summary": summary, "checksum": _checksum(summary)}
      ),
    )
    try:
      with _quiet():
        manager = self._open()
        _on_first_process(lambda: self._set_aside(step))
        manager.reload()
        manager.save(step, args=items, force=True)
        _on_first_process(self._mend)
    except Exception as error:
      self.close()  # The next save starts with a clean directory.
      raise CheckpointError(
        f"the checkpoint of step {step} cannot be written to "
        f"{self._directory} ({_reason(error)}). Check that there is space and "
        "permission to write; earlier checkpoints are intact."
      ) from error

  def restore(self, template: Any, step: Which = None) -> Restored | None:
    """Reads the newest intact checkpoint, or the one asked for.

    Damaged checkpoints are reported as warnings, and left where they are.

    Args:
      template: A tree like the saved state, of arrays or ShapeDtypeStructs.
        Leaves go to the devices of the template's; those without a sharding,
        or not committed to theirs, are free to move, as new arrays are.
      step: None for the newest, "best" for the lowest loss, or a step.
    Returns:
      The state, its step and its metrics; None if there are no checkpoints.
    Raises:
      CheckpointError: If no checkpoint is intact, or not the step asked for,
        or if names, shapes or dtypes differ from the template's.
    """
    return self._read_first(template, "", "digest", step)

  def restore_best(self, template: Any) -> Restored | None:
    """Reads the intact checkpoint of the lowest loss; see `restore`."""
    return self.restore(template, "best")

  def restore_params(
    self, template: types.Params, step: Which = None
  ) -> Restored | None:
    """Reads only the parameters; otherwise like `restore`."""
    return self._read_first(template, ".params", "params_digest", step)

  def forget(self, after: int) -> None:
    """Removes the checkpoints of later steps, on all hosts together."""

    def remove():
      self._mend()  # Else what was set aside would come back.
      for step in self.steps():
        if step > after:
          shutil.rmtree(self._item(step, ""))

    self.close()  # It remembers what there is.
    _on_first_process(remove)

  def close(self) -> None:
    """Releases what writing holds; a later `save` takes it again."""
    if self._manager is not None:
      with _quiet():
        self._manager.close()
      self._manager = None

  def _open(self) -> ocp.CheckpointManager:
    """The orbax manager; opening it clears what a killed save left behind."""
    if self._manager is None:
      self._directory.mkdir(parents=True, exist_ok=True)
      _on_first_process(self._mend)
      self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
          enable_async_checkpointing=False,
          cleanup_tmp_directories=True,
          num_deletion_threads=1,
          preservation_policy=_Preservation(self, self._keep, self._every),
        ),
      )
    return self._manager

  def _set_aside(self, step):
    """Makes room for a step without losing what is there."""
    place = self._directory / str(step)
    if place.exists():
      place.rename(place.with_suffix(_REPLACED))

  def _mend(self):
    """Finishes a replacement, or undoes one that was cut short."""
    for aside in self._directory.glob(f"*{_REPLACED}"):
      place = aside.with_suffix("")
      if place.exists():
        shutil.rmtree(aside)
      else:
        aside.rename(place)

  def _item(self, step, name):
    """Where an item of a checkpoint lies."""
    place = self._directory / str(step)
    if not place.exists():
      place = place.with_suffix(_REPLACED)
    return place / name

  def _summary(self, step):
    """The verified summary of a step."""
    record = ocp.JsonCheckpointHandler().restore(self._item(step, "summary"))
    if _checksum(record["summary"]) != record["checksum"]:
      raise ValueError("its summary does not have the checksum it was given")
    return record["summary"]

  def _losses(self):
    """The finite losses, best first, and the steps that cannot be read."""
    losses, unreadable = {}, []
    for step in reversed(self.steps()):
      try:
        loss = self._summary(step)["metrics"].get("loss", math.nan)
        if math.isfinite(loss):
          losses[step] = loss
      except Exception:
        unreadable.append(step)
    return sorted(losses, key=losses.__getitem__), unreadable

  def _candidates(self, which):
    """The steps to try, in order."""
    steps = self.steps()
    if which is None:
      return steps[::-1]
    if which == "best":
      best_first, unreadable = self._losses()
      if steps and not best_first + unreadable:
        raise CheckpointError(
          f"no checkpoint in {self._directory} has a finite loss, so none of "
          f"the steps {steps} is the best. Ask for the newest, or for a step."
        )
      # Trying unreadable ones reports them: one of them may be the best.
      return unreadable + best_first
    if which not in steps:
      raise CheckpointError(
        f"there is no checkpoint of step {which} in {self._directory}. "
        f"Choose one of the steps {steps}."
      )
    return [which]

  def _read_first(self, template, part, digest_name, which):
    """Reads the first intact candidate."""
    candidates, reasons = self._candidates(which), []
    for step in candidates:
      try:
        with _quiet():
          return self._read(step, template, part, digest_name)
      except CheckpointError:
        raise
      except Exception as error:
        reasons.append(f"step {step}: {_reason(error)}")
        if len(candidates) > 1:
          logging.warning(
            "The checkpoint of step %d in %s is damaged (%s) and skipped.",
            step,
            self._directory,
            _reason(error),
          )
    if not candidates:
      return None
    raise CheckpointError(
      f"no checkpoint that was tried in {self._directory} is intact "
      f"({'; '.join(reasons)}). Bring its files back from a copy, ask for "
      "another step, or start in an empty directory."
    )

  def _read(self, step, template, part, digest_name):
    """Reads and verifies the leaves of one step whose names begin so."""
    summary = self._summary(step)
    stored = _part(summary["leaves"], part)
    wanted = _named_leaves(template, part)
    self._check_fit(step, stored, _describe(wanted))
    place = self._item(step, "state")
    leaves = {name: _read_leaf(place, name, x) for name, x in wanted.items()}
    digest = train_state.digest(list(leaves.values()))
    if _describe(leaves) != stored or digest != summary[digest_name]:
      raise ValueError("its arrays are not those that were saved")
    tree = jax.tree.unflatten(jax.tree.structure(template), leaves.values())
    return tree, step, summary["metrics"]

  def _check_fit(self, step, stored, wanted):
    """Compares names, shapes and dtypes."""
    for name in {**wanted, **stored}:
      there, here = stored.get(name, "absent"), wanted.get(name, "absent")
      if there != here:
        raise CheckpointError(
          f"the checkpoint of step {step} in {self._directory} does not fit: "
          f"{name} is {there} in it, and {here} in what is to be restored. "
          "Use the configuration it was written with, or another directory."
        )


class _Preservation:
  """Tells orbax which checkpoints stay: the latest ones and the best.

  Orbax's own BestN cannot: metrics without a `best_fn` are not written, and
  with one a damaged metrics file prevents the manager from opening.
  """

  def __init__(self, checkpoints, keep, every):
    self._checkpoints = checkpoints
    self._keep, self._every = keep, every

  def should_preserve(self, checkpoints, *, context):
    del context
    steps = [info.step for info in checkpoints]  # The one just saved is last.
    best_first, _ = self._checkpoints._losses()
    regular = [step for step in steps if step % self._every == 0]
    kept = steps[-self._keep :] + best_first[:1] + regular[-1:]
    return [step in kept for step in steps]


def _named_leaves(tree, prefix=""):
  """The leaves by name, in tree order; no two leaves share a name."""
  return {
    prefix + jax.tree_util.keystr(path): x
    if hasattr(x, "sharding")
    else jnp.asarray(x)
    for path, x in jax.tree.leaves_with_path(tree)
  }


def _part(named, prefix):
  """Those whose name begins with `prefix`."""
  return {k: x for k, x in named.items() if k.startswith(prefix)}


def _describe(leaves):
  """Dtype and shape of each leaf, as text."""
  return {k: f"{x.dtype}{list(x.shape)}" for k, x in leaves.items()}


def _is_key(leaf):
  """Whether it is an array of typed keys."""
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf):
  """The plain array that stands for a leaf: for keys their key data."""
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _read_leaf(directory, name, template):
  """Reads one leaf and puts it where the template is."""
  empty = jnp.zeros((0,), template.dtype)
  if template.size:
    # Read together, or as device arrays, the siblings of a damaged leaf would
    # finish after orbax has closed their event loop, with tracebacks.
    leaf = ocp.PyTreeCheckpointHandler().restore(
      directory,
      args=ocp.args.PyTreeRestore(
        {name: 0},
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
        partial_restore=True,
      ),
    )[name]
  else:
    leaf = np.asarray(_data(empty.reshape(template.shape)))
  if template.sharding and getattr(template, "committed", True):
    leaf = mesh.put(leaf, template.sharding)
  else:
    leaf = jnp.asarray(leaf)
  if _is_key(template):
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(empty))
  return leaf


def _checksum(summary):
  """SHA-256 of a summary."""
  text = json.dumps(summary, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _reason(error):
  """An error in one line; the ends of long ones tell what and why."""
  text = f"{type(error).__name__}: {error}".partition(" [tensorstore_spec")[0]
  text = " ".join(text.split())
  return text if len(text) <= 240 else f"{text[:120]} ... {text[-120:]}"


def _on_first_process(action: Callable[[], Any]):
  """Does something once on all hosts together."""
  if jax.process_index() == 0:
    action()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("zorn_jax.checkpoint")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides what orbax logs: whatever matters comes as an exception."""

  def not_orbax(record):
    return f"{os.sep}orbax{os.sep}" not in record.pathname

  logger = logging.get_absl_logger()
  logger.addFilter(not_orbax)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", DeprecationWarning)
      yield
  finally:
    logger.removeFilter(not_orbax)
