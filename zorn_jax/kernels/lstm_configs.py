"""How the LSTM kernel is cut up: tiles, warps, and what a program holds."""

from typing import NamedTuple

import jax.numpy as jnp

from zorn_jax.kernels.arguments import Arguments, Dense

NARROW = 8  # Units of the narrowest tile.
_ROWS_OF_WARP = 16  # A product's, at least.
WORD = 32  # Signs in a word, of neighbouring inputs.
FEW_ROWS = 16  # Of one tile.
BLOCKS = 8  # Of rows, to a program of a GPU that is full.
MANY_PROGRAMS = 2048  # Some four at a time on each multiprocessor, four times.


class Config(NamedTuple):
  """How a kernel is cut up.

  Attributes:
    resident: Whether the weights stay on the chip.
    rows: Rows of the batch in a program, a power of two, at least 16.
    units: Outputs in a tile, a power of two, at least 16; 8 where warps have
      rows of their own.
    depth: Inputs in a tile of streamed weights, a power of two, at least 32.
    warps: Of 32 threads.
    stages: Tiles under way at once, of streamed weights.
    prefetch: Whether inputs are loaded a tile ahead, or with what needs them,
      where weights are resident.
    by_head: Whether all members of a head run before those of the next, which
      then find its weights and its table in the caches, or all heads of a
      member.
    blocks: Blocks of rows that a program takes one after another, at most, so
      that it loads and perturbs resident weights once for them.
  """

  resident: bool
  rows: int
  units: int
  depth: int
  warps: int
  stages: int
  prefetch: bool
  by_head: bool = False
  blocks: int = 1

  @property
  def warps_own_rows(self) -> bool:
    """Whether products give each warp rows of its own, so all gates of a unit;
    if not, warps share rows, and have other columns."""
    return self.rows >= _ROWS_OF_WARP * self.warps


def programs(args: Arguments, config: Config) -> int:
  """How many programs a launch has, of a block of rows each."""
  members, batch, heads, _ = args.h.shape
  if isinstance(args.perturbation, Dense) and not config.resident:
    members //= len(args.perturbation.scales)
  return members * heads * -(-batch // config.rows)


def fitted(args: Arguments, config: Config) -> Config:
  """With as many blocks to a program as leave enough programs for a GPU."""
  blocks = -(-args.h.shape[1] // config.rows)
  most = min(config.blocks, programs(args, config) // MANY_PROGRAMS, blocks)
  if not config.resident:
    most = 1
  divisors = (d for d in range(1, max(1, most) + 1) if blocks % d == 0)
  return config._replace(blocks=max(divisors))


def config_of(args: Arguments) -> Config:
  """The table: the config that is taken unless `tune` found another."""
  return candidates(args)[0]


def candidates(args: Arguments) -> list[Config]:
  """Configs worth a try, the likeliest first, by what `choose` depends on.

  For few rows: the fastest on an H200. Streamed: the fastest, or nearly, before
  one product made all gates. Resident for more rows: what compiles for an H200
  to the fewest instructions and barriers with the most programs at once
  (docs/kernels.md).
  """
  _, batch, _, head = args.h.shape
  dense = isinstance(args.perturbation, Dense)
  given = args.tokens is None
  return choose(head, batch, args.r.dtype, dense, args.padded_factors, given)


def choose(
  head: int,
  batch: int,
  dtype,
  dense: bool,
  factors: int = 16,
  given: bool = False,
) -> list[Config]:
  """The configs of `candidates`.

  Args:
    head: Width D of a head.
    batch: Rows B of a member.
    dtype: Of the weights.
    dense: Whether the perturbation is.
    factors: Number of factors, padded, of all gates and of the table.
    given: Whether inputs are given, or else looked up.
  """
  size = jnp.dtype(dtype).itemsize
  units = max(32, min(128, 1 << (head - 1).bit_length()))

  def resident(*tiles, early, orders=(False,), blocks=1):
    return [  # Of rows, units, warps.
      Config(True, rows, units, WORD, warps, 1, prefetch, by_head, blocks)
      for rows, units, warps in tiles
      for prefetch in early
      for by_head in orders
    ]

  def streamed(*tiles, orders=(False,)):  # Rows, units, depth, warps, stages.
    return [
      Config(False, *tile, True, by_head)
      for tile in tiles
      for by_head in orders
    ]

  both = (False, True)

  if batch <= FEW_ROWS:
    # Nothing but a token's head start hides the latency of its inputs.
    if head <= 256 // size:
      first = 4 if units == 64 else 8
      tiles = (16, units, first), (16, units, 12 - first)
      return resident(*tiles, early=(True,))
    return streamed((16, 64, 64, 8, 2), (16, 128, 64, 8, 3))
  # Where there are registers for a tile more, it is loaded ahead.
  early = (True, False) if size == 2 and head <= 128 else (False, True)
  if head <= 64:
    # Narrow tiles leave registers for three programs on a multiprocessor; a
    # second block of rows takes some.
    blocks = BLOCKS if dense else 1
    others = (64, 32, 4), (64, 8, 4), (32, units, 4), (32, units, 2)
    return [
      *resident((64, 16, 4), early=early, orders=both, blocks=blocks),
      *resident(*others, early=early[:1], blocks=blocks),
    ]
  if size == 4:
    tiles = (64, 32, 32, 4, 2), (64, 32, 32, 8, 2), (64, 64, 32, 8, 2)
    return streamed(*(tiles[1:] if dense else tiles))
  held = []
  # All that shared memory takes.
  widest = 128 if given and factors else 152
  if head <= widest and factors <= 16:
    held = [
      *resident((64, 32, 4), early=early, orders=both, blocks=BLOCKS),
      *resident((64, 16, 4), early=(True,), blocks=BLOCKS),
    ]
  if dense:
    narrow, wide = (64, 32, 32, 4, 3), (64, 64, 64, 8, 2)
    first, second = (narrow, wide) if head <= 160 else (wide, narrow)
    return held + streamed(first, second, orders=both)
  deep = (64, 64, 64, 4, 2), (128, 64, 64, 8, 3), (64, 64, 32, 4, 4)
  if head <= 160:
    return held + streamed((64, 64, 32, 4, 3), deep[0], orders=both)
  return streamed(*deep, orders=both)
