"""How the LSTM kernel is cut up: tiles, warps, and what a program holds."""

from typing import NamedTuple

import jax.numpy as jnp

from zorn_jax.kernels.arguments import Arguments, Dense

FEW_ROWS = 16  # Of one tile.


class Config(NamedTuple):
  """How a kernel is cut up.

  Attributes:
    resident: Whether the weights stay on the chip.
    rows: Rows of the batch in a program, a power of two, at least 16.
    units: Outputs in a tile, a power of two, at least 32.
    depth: Inputs in a tile of streamed weights, a power of two, at least 32;
      resident ones have `units`.
    warps: Of 32 threads.
    stages: Tiles under way at once, of streamed weights.
    prefetch: Whether inputs are loaded early: a token ahead by resident
      programs, before the products of a tile by streamed ones.
    by_head: Whether all members of a head run before those of the next, which
      then find its weights and its table in the caches, or all heads of a
      member.
  """

  resident: bool
  rows: int
  units: int
  depth: int
  warps: int
  stages: int
  prefetch: bool
  by_head: bool = False


def programs(args: Arguments, config: Config) -> int:
  """How many programs a launch has."""
  members, batch, heads, _ = args.h.shape
  if isinstance(args.perturbation, Dense) and not config.resident:
    members //= len(args.perturbation.scales)
  return members * heads * -(-batch // config.rows)


def config_of(args: Arguments) -> Config:
  """The table: the config that is taken unless `tune` found another."""
  return candidates(args)[0]


def candidates(args: Arguments) -> list[Config]:
  """Configs that were the fastest, or nearly, on an H200; the likeliest first.

  They differ by width of heads, rows of a member and size of a weight.
  """
  _, batch, _, head = args.h.shape
  dense = isinstance(args.perturbation, Dense)
  return choose(head, batch, args.r.dtype, dense)


def choose(head: int, batch: int, dtype, dense: bool) -> list[Config]:
  """The configs of `candidates`.

  Args:
    head: Width D of a head.
    batch: Rows B of a member.
    dtype: Of the weights.
    dense: Whether the perturbation is, of which programs hold all members.
  """
  size = jnp.dtype(dtype).itemsize
  units = max(32, min(128, 1 << (head - 1).bit_length()))

  def resident(*rows_warps, early=False, orders=(False,)):
    return [
      Config(True, rows, units, units, warps, 1, early, by_head)
      for rows, warps in rows_warps
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
      return resident((16, first), (16, 12 - first), early=True)
    return streamed((16, 64, 64, 8, 2), (16, 128, 64, 8, 3))
  if head <= 64:
    return resident((64, 4), (32, 4), (32, 2), (64, 2), orders=both)
  if size == 4:
    tiles = [(64, 32, 32, 4, 2), (64, 32, 32, 8, 2), (64, 64, 32, 8, 2)]
    return streamed(*(tiles[1:] if dense else tiles))
  if dense:
    narrow, wide = (64, 32, 32, 4, 3), (64, 64, 64, 8, 2)
    first, second = (narrow, wide) if head <= 160 else (wide, narrow)
    return streamed(first, second, orders=both)
  deep = (64, 64, 64, 4, 2), (64, 64, 32, 4, 4), (128, 64, 32, 8, 3)
  if head <= 160:
    some = (64, 64, 32, 4, 3), (64, 32, 32, 4, 3), deep[1]
    return streamed(*some, orders=both)
  return streamed(*deep, orders=both)
