"""The training data of a step, on the device."""

from concurrent import futures

import jax

from zorn_jax import mesh
from zorn_jax.tasks import Task


class Feed:
  """Hands out the data of a step; the next part is read in the meantime.

  A task whose data fit on the device has one part. Others are refreshed every
  `task.refresh_every` steps, by a function of the part's number alone, so that
  a resumed run sees what an uninterrupted one saw.

  Args:
    task: The task.
    place: Where the data go; by default the first device.
  """

  def __init__(self, task: Task, place: jax.sharding.Sharding | None = None):
    self._task, self._place = task, place
    self._part, self._data = None, None
    self._reader = futures.ThreadPoolExecutor(1)
    self._coming: dict[int, futures.Future] = {}

  def at(self, step: int):
    """The data of the step after `step` steps."""
    every = self._task.refresh_every
    part = step // every if self._task.refresh else 0
    if part != self._part:
      self._data = None  # One part at a time on the device.
      self._data = self.put(self._read(part))
      self._part = part
    return self._data

  def put(self, tree):
    """The arrays of a tree where the data go; other leaves as they are."""

    put = lambda x: mesh.put(x, self._place) if hasattr(x, "shape") else x
    return jax.tree.map(put, tree)

  def close(self) -> None:
    """Stops reading."""
    self._reader.shutdown(cancel_futures=True)

  def _read(self, part):
    if not self._task.refresh:
      return self._task.data
    read = lambda part: self._reader.submit(self._task.refresh, part)
    present = self._coming.pop(part, None) or read(part)
    data = present.result()
    self._coming = {part + 1: read(part + 1)}
    return data
