"""How many probes run at once: what fits, and less where it did not."""

import itertools
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import logging

from zorn_jax import cores, memory, plan, processes
from zorn_jax.data import Feed
from zorn_jax.step import Experiment, programs

NAME = "probe_batch"  # Of the file in a run directory.

_SHARE = 0.8  # Of what is left: an estimate is not exact.
# Larger batches leave a CPU's caches: on one core the queries of
# configs/copy.py took 1.8 times as long in batches of 40 MB as of 5 MB. But
# products with weights that low-rank probes share want a few of them: those of
# an LSTM of a million took half as long with 4 probes at once as with 1.
_CACHE = 4_000_000  # Bytes per core.
_FEW = 4
_REMEDY = (
  "Choose a smaller batch_size or task.time_chunk, model.dtype=bfloat16, or "
  "mesh.head for a model of several heads on several devices."
)


class Batching(NamedTuple):
  """How many probes run at once in an experiment, and how to change it.

  Attributes:
    wanted: Probes at once on a device; 0 to choose what fits.
    most: Probes that a device has.
    devices: Devices of this process in use.
    rebuild: (probes at once, 1 or more) -> the experiment with them.
  """

  wanted: int
  most: int
  devices: int
  rebuild: Callable[[int], Experiment]


class Choice(NamedTuple):
  """Probes at once, and the memory model that they come from.

  The need is a maximum of affine functions of the probes at once: it is taken
  with one and with all of them, and in between from the chord, which is not
  below it.

  Attributes:
    size: Probes at once on a device.
    fitting: The most that fit.
    most: Probes that a device has.
    one: What is needed with one at once.
    all: Bytes of the queries with all at once, beside state and data.
    available: Bytes that are left on a device; None if that is not known.
  """

  size: int
  fitting: int
  most: int
  one: plan.Memory
  all: int
  available: int | None

  @property
  def least_bytes(self) -> int:
    """Expected bytes on a device with one probe at once."""
    return self.peak_bytes(1)

  def peak_bytes(self, size: int) -> int:
    """Expected bytes on a device with `size` probes at once."""
    return _peak(size, self.most, self.one, self.all)


def _peak(size, most, one, all_):
  share = (min(size, most) - 1) / max(1, most - 1)
  query = one.query + share * (all_ - one.query)
  return one._replace(query=math.ceil(query)).peak


def choose(
  batching: Batching,
  available: int | None = None,
  cores: int = 0,
  noted: int = 0,
) -> Choice:
  """The most probes at once whose estimated need fits, in equal batches.

  Args:
    batching: What to choose for; what it wants is taken as it is.
    available: Bytes that a device has; None if that is not known.
    cores: Of a CPU, whose caches are to hold a batch; 0 for another device.
    noted: What the run had before, which is taken as it is; 0 for nothing.
  Returns:
    A :class:`Choice`: one probe at once if nothing fits, and all of them if
    what is available is not known and there are no caches to mind.
  """
  most = batching.most
  one = plan.memory(batching.rebuild(1))
  all_ = plan.query_bytes(batching.rebuild(most))
  room = math.inf if available is None else _SHARE * available
  fits = lambda size: _peak(size, most, one, all_) <= room

  fitting = next((k for k in range(most, 0, -1) if fits(k)), 1)
  size = fitting
  if cores:
    each = max(1, (all_ - one.query) // max(1, most - 1))
    size = min(size, max(_FEW, cores * _CACHE // each))
  size = noted or batching.wanted or math.ceil(most / math.ceil(most / size))
  return Choice(size, fitting, most, one, all_, available)


def choose_here(batching: Batching, noted: int = 0) -> Choice:
  """The same for the devices of this process."""
  each = 0
  if jax.default_backend() == "cpu":
    each = max(1, cores.count() // batching.devices)
  return choose(batching, memory.available(batching.devices), each, noted)


def check(choice: Choice) -> None:
  """Says what does not fit, as far as that is known, before it is allocated.

  Raises:
    ValueError: If one probe at once needs more than there is.
  """
  if choice.available is None:
    return
  if choice.least_bytes > choice.available:
    raise ValueError(
      f"a step needs about {choice.least_bytes:,} bytes on a device even with "
      f"one probe at once, but {choice.available:,} are available. {_REMEDY}"
    )
  need = choice.peak_bytes(choice.size)
  if need > choice.available:
    logging.warning(
      "a step with probe_batch=%d needs about %s bytes on a device, but %s are "
      "available: it may end for lack of memory. %d would fit",
      choice.size,
      f"{need:,}",
      f"{choice.available:,}",
      choice.fitting,
    )


def read(workdir: pathlib.Path) -> int:
  """What a run has noted; 0 if nothing.

  Raises:
    ValueError: If the file holds no positive number.
  """
  path = workdir / NAME
  try:
    text = path.read_text().strip()
  except (FileNotFoundError, NotADirectoryError):
    return 0
  if not text.isdecimal() or not int(text):
    raise ValueError(
      f"{str(path)!r} must hold how many probes run at once, got {text!r}. "
      "Write a positive number there."
    )
  return int(text)


def write(workdir: pathlib.Path, size: int) -> None:
  """Notes how many probes a run has at once, for when it is resumed."""
  # Where memory runs out, several processes may do so.
  scratch = workdir / f"{NAME}.{jax.process_index()}.tmp"
  scratch.write_text(f"{size}\n")
  os.replace(scratch, workdir / NAME)


class Query:
  """The query program; where memory runs out, with half the probes at once.

  Args:
    query: The program, which does not use up what it is given.
    choice: The probes at once in it, and the memory model.
    rebuild: (probes at once) -> the program with them.
    note: Called with every new number before it is tried.
  """

  def __init__(
    self,
    query: Callable[..., Any],
    choice: Choice,
    rebuild: Callable[[int], Callable[..., Any]],
    note: Callable[[int], None],
  ):
    self._query, self._choice = query, choice
    self._size = min(choice.size, choice.most)
    self._rebuild, self._note = rebuild, note

  def __call__(self, state: Any, data: Any) -> Any:
    """The results of the program, when they are there.

    Raises:
      ValueError: If one probe at once is too much, or if there are several
        processes: the others may not have run out of memory and wait, so that
        this one ends after it has noted what to go on with.
    """
    while True:
      try:
        # XLA may say it late, when an update has used the state up.
        return jax.block_until_ready(self._query(state, data))
      except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
          raise
        fact = str(error).strip().splitlines()[0]
      self._halve(fact)

  def _halve(self, fact):
    size, choice = self._size // 2, self._choice
    known = f"{choice.available:,}" if choice.available else "unknown"
    if not size:
      raise ValueError(
        "the memory of a device does not suffice for one probe at once "
        f"({fact}): a step needs about {choice.least_bytes:,} bytes, and those "
        f"available at the start were {known}. {_REMEDY}"
      )
    self._note(size)
    if processes.count() > 1:
      raise ValueError(
        f"a device ran out of memory with probe_batch={self._size} ({fact}). "
        f"The run has noted {size}: start all processes again with the same "
        "command."
      )
    logging.warning(
      "out of memory with probe_batch=%d (%s): going on with %d. Losses may "
      "differ in their last bits",
      self._size,
      fact,
      size,
    )
    self._query, self._size = self._rebuild(size), size


def out_of_memory(error: Exception) -> bool:
  """Whether XLA said so, when it compiled or ran a program."""
  text = str(error)
  return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def tune(
  batching: Batching, choice: Choice, repeats: int = 5
) -> dict[int, float | None]:
  """Seconds of the queries of a step, by probes at once.

  Args:
    batching: What is tried: the powers of two that fit, the most that fit, and
      what was chosen.
    choice: For the devices that are here.
    repeats: Runs after the first, of which the median counts.
  Returns:
    Seconds of the first step's queries on its data; None where the memory did
    not suffice.
  """
  powers = itertools.takewhile(
    lambda k: k <= choice.fitting, (2**i for i in itertools.count())
  )
  chosen = min(choice.size, choice.most)
  times = {}
  experiment = batching.rebuild(1)
  state = programs(experiment).init()
  feed = Feed(experiment.task, experiment.layout.everywhere)
  data = feed.at(0)
  for size in sorted({*powers, choice.fitting, chosen}):
    query = programs(batching.rebuild(size)).query
    try:
      times[size] = _seconds(query, state, data, repeats)
    except jax.errors.JaxRuntimeError as error:
      if not out_of_memory(error):
        raise
      times[size] = None
  feed.close()
  return times


def _seconds(query, state, data, repeats):
  jax.block_until_ready(query(state, data))
  found = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(query(state, data))
    found.append(time.perf_counter() - start)
  return statistics.median(found)
