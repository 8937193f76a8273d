"""Walks an array block by block, and changes it where it lies.

A block stays in the cache of the core that works on it, however many random
directions are added to it, and nothing else of the array's size is needed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Elements of a tile: half a megabyte in float32, so that a tile, what is added
# to it and the words of random bits share the two of a core's second cache. An
# accelerator runs all elements of a tile at once, and wants more of them.
_LARGEST_ON_CPU = 2**17
_LARGEST = 2**21
_GRAIN = 32  # Columns that share a word of random signs.


class Window(NamedTuple):
  """A block of an array.

  Attributes:
    starts: Its first index along every axis: integers, which may be traced.
    sizes: Its shape.
    aligned: Whether the last of `starts`, if it is traced, is known to be a
      multiple of 32.
  """

  starts: Sequence[Any]
  sizes: Sequence[int]
  aligned: bool = False


# (window, None for all) -> float32 values of its shape.
BlockFn = Callable[[Window | None], jax.Array]
# (values, blocks of some arrays) -> the new blocks.
StepFn = Callable[[jax.Array, list[jax.Array]], list[jax.Array]]


class _Cuts(NamedTuple):
  """How one axis is cut: block i begins at min(i stride, size - length)."""

  size: int
  length: int
  stride: int
  count: int

  def start(self, index):
    if self.count == 1:
      return 0
    return jnp.minimum(index * self.stride, self.size - self.length)

  def fresh(self, index):
    """Where the part of block `index` begins that no earlier block has."""
    before = self.start(index - 1) + self.length
    return jnp.where(index > 0, before - self.start(index), 0)

  @property
  def overlaps(self) -> bool:
    return self.count * self.length > self.size


def _cuts(size: int, most: int, grain: int = 1) -> _Cuts:
  """Blocks of about equal length, at most `most` where the grain allows it."""
  if size <= most:
    return _Cuts(size, size, size, 1)
  rest = size % grain  # All blocks have it, so that the last one is aligned.
  even = -(-size // -(-size // most))
  stride = -(-even // grain) * grain
  length = stride + rest
  if length >= size:
    return _Cuts(size, size, size, 1)
  return _Cuts(size, length, stride, -(-(size - rest) // stride))


def _grid(shape: Sequence[int], largest: int) -> list[_Cuts]:
  """The cuts of every axis: leading axes first, then rows, then columns."""
  *leading, rows, columns = (1, *shape) if len(shape) == 1 else shape
  # Blocks of a large matrix are about square: low-rank factors are then small.
  side = max(math.isqrt(largest), largest // columns)
  of_rows = _cuts(rows, side)
  of_columns = _cuts(columns, max(largest // of_rows.length, _GRAIN), _GRAIN)
  grid = [of_rows, of_columns]
  for size in reversed(leading):
    used = math.prod(cuts.length for cuts in grid)
    grid.insert(0, _cuts(size, max(largest // used, 1)))
  return grid[-len(shape) :]


def block(array: jax.Array, window: Window | None) -> jax.Array:
  """The block of an array, as float32."""
  if window is not None:
    array = jax.lax.dynamic_slice(array, window.starts, window.sizes)
  return array.astype(jnp.float32)


def largest() -> int:
  """Elements of a tile at most, on the default device."""
  on_cpu = jax.default_backend() == "cpu"
  return _LARGEST_ON_CPU if on_cpu else _LARGEST


def update(
  arrays: Sequence[jax.Array], block: BlockFn, step: StepFn
) -> tuple[list[jax.Array], jax.Array]:
  """Changes all elements of some arrays, a block of all of them at a time.

  XLA writes the new blocks over the old ones where the arrays are donated, or
  made before. A block that overlaps the one before it leaves what they share.

  Args:
    arrays: Arrays of one shape.
    block: Gives the values of a block.
    step: Makes the new blocks from them and the old ones, element by element.
  Returns:
    The new arrays, and the sum of the squares of all values.
  """
  shape = arrays[0].shape
  if math.prod(shape) <= largest():
    values = block(None)
    return step(values, list(arrays)), squares(values)
  grid = _grid(shape, largest())
  sizes = tuple(cuts.length for cuts in grid)
  count = math.prod(cuts.count for cuts in grid)

  def one(number, carry):
    arrays, total = carry
    indices, rest = [], number
    for cuts in reversed(grid):
      indices.insert(0, rest % cuts.count)
      rest = rest // cuts.count
    starts = [c.start(i) for c, i in zip(grid, indices, strict=True)]
    values = block(Window(starts, sizes, aligned=True))
    old = [jax.lax.dynamic_slice(x, starts, sizes) for x in arrays]
    if len(arrays) == 1:
      new = step(values, old)
    else:
      # Always true, but what a branch makes is there before it is used. XLA
      # would make it again for each array, from those that are changed already,
      # and copy them whole.
      new = jax.lax.cond(number < count, step, lambda _, old: old, values, old)
    fresh = _fresh(grid, indices, sizes)
    if fresh is not None:
      new = [jnp.where(fresh, *pair) for pair in zip(new, old, strict=True)]
      values = jnp.where(fresh, values, 0.0)
    arrays = [
      jax.lax.dynamic_update_slice(x, y, starts)
      for x, y in zip(arrays, new, strict=True)
    ]
    return arrays, total + squares(values)

  start = (list(arrays), jnp.zeros((), jnp.float32))
  return jax.lax.fori_loop(0, count, one, start)


def _fresh(grid, indices, sizes):
  """Which elements no earlier block has; None for all of them."""
  fresh = None
  for axis, (cuts, index) in enumerate(zip(grid, indices, strict=True)):
    if cuts.overlaps:
      places = jax.lax.broadcasted_iota(jnp.int32, sizes, axis)
      here = places >= cuts.fresh(index)
      fresh = here if fresh is None else fresh & here
  return fresh


def squares(values: jax.Array) -> jax.Array:
  """The sum of squares, over columns at last: XLA adds many at once."""
  squares = jnp.square(values)
  return jnp.sum(jnp.sum(squares, axis=tuple(range(values.ndim - 1))))
