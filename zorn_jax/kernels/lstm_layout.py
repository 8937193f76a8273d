"""How the LSTM kernel cuts up a call: its heads, rows and gates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax.kernels.arguments import GATES
from zorn_jax.kernels.lstm_configs import WORD, Config

_NARROW = 8  # Units of the narrowest tile.
# What all that a gate sums up is multiplied by, which rounds nothing.
HALVES = (0.5, 0.5, 1.0, 0.5)
_WHOLE = HALVES.index(1.0)


class Tile(NamedTuple):
  """Neighbouring units, or inputs, of a head; the last may not be there.

  Of units it has sums: of its first gate for all units, of the next, and so on.
  """

  start: Any
  size: int
  made: range = range(GATES)

  @property
  def columns(self):
    return (self.start + jnp.arange(self.size))[None, :]

  @property
  def gates(self):
    """The gate of each sum, [sums]."""
    if len(self.made) == 1:
      return jnp.full(self.size, self.made.start)
    place = jnp.arange(len(self.made) * self.size)
    return self.made.start + jax.lax.div(place, self.size)

  @property
  def units(self):
    """The unit of each sum, [sums]."""
    place = jnp.arange(len(self.made) * self.size)
    if len(self.made) > 1:
      place = jax.lax.rem(place, self.size)
    return self.start + place

  @property
  def halves(self):
    """What each sum is multiplied by, [sums]."""
    return jnp.where(self.gates == _WHOLE, 1.0, 0.5)


class Layout(NamedTuple):
  """What is known of a call when it is compiled."""

  batch: int
  length: int
  heads: int
  head: int
  dtype: Any
  config: Config
  looked_up: bool  # Whether x is a table.
  own_x: bool  # Each member's, as are tokens and bias.
  own_tokens: bool
  own_bias: bool
  dense: bool  # Whether the perturbation is.
  scales: int
  mixes: bool  # Whether h has a part in factors, as have tokens.
  mixes_tokens: bool
  factors: int  # Of all gates, padded to what a product takes.
  keep: bool
  precision: Any
  interpret: bool

  @property
  def blocks(self):
    """Of rows."""
    return -(-self.batch // self.config.rows)

  @property
  def programs(self):
    """Of a head of a member, or of a direction's."""
    return self.blocks // self.config.blocks

  @property
  def together(self):
    """Whether a program holds all members of a direction."""
    return self.dense and not self.config.resident

  @property
  def tiles(self):
    """Of units of a resident head: powers of two, the largest first."""
    least = _NARROW if self.config.alone else WORD
    start, tiles = 0, []
    while start < self.head:
      left = -(-(self.head - start) // least) * least
      size = min(self.config.units, 1 << (left.bit_length() - 1))
      tiles.append(Tile(start, size))
      start += size
    return tiles

  @property
  def filling(self):
    """Sizes of tiles of zeros that h ends with, to be whole words."""
    last = self.tiles[-1]
    end, sizes = last.start + last.size, []
    while end % WORD:
      sizes.append(end & -end)
      end += sizes[-1]
    return sizes

  def parts(self, units: Tile) -> list[Tile]:
    """The gates that one product makes: all, if a warp can take them apart."""
    if self.config.alone:
      return [units]
    return [units._replace(made=range(g, g + 1)) for g in range(GATES)]

  @property
  def sources(self):
    """Tiles of inputs, of a resident head: few, for few products."""
    tiles = self.tiles
    for size in self.filling:
      tiles.append(Tile(tiles[-1].start + tiles[-1].size, size))
    join = lambda a, b: Tile(a.start, a.size + b.size)
    return joined(tiles, lambda tile: tile.size, join)

  @property
  def padded(self):
    """Where the last tile ends."""
    if self.config.resident:
      last = self.sources[-1]
      return last.start + last.size
    tile = max(self.config.units, self.config.depth)
    return -(-self.head // tile) * tile


def joined(tiles, size, join):
  """Neighbours of one size are one tile, as often as there are such."""
  joined = []
  for tile in tiles:
    joined.append(tile)
    while len(joined) > 1 and size(joined[-2]) == size(joined[-1]):
      joined[-2:] = [join(*joined[-2:])]
  return joined
