"""How the LSTM kernel cuts up a call: its heads, rows and gates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax.kernels.arguments import GATES
from zorn_jax.kernels.lstm_configs import NARROW, WORD, Config

# What all that a gate sums up is multiplied by, which rounds nothing.
HALVES = (0.5, 0.5, 1.0, 0.5)


class Tile(NamedTuple):
  """Neighbouring units, or inputs, of a head; the last may not be there.

  Of units it has sums: of its first gate for all units, of the next, and so on.
  """

  start: Any
  size: int
  of_gates: range = range(GATES)

  @property
  def columns(self):
    return (self.start + jnp.arange(self.size))[None, :]

  @property
  def gate_of_sum(self):
    """[sums]."""
    if len(self.of_gates) == 1:
      return jnp.full(self.size, self.of_gates.start)
    place = jnp.arange(len(self.of_gates) * self.size)
    return self.of_gates.start + jax.lax.div(place, self.size)

  @property
  def unit_of_sum(self):
    """[sums]."""
    place = jnp.arange(len(self.of_gates) * self.size)
    if len(self.of_gates) > 1:
      place = jax.lax.rem(place, self.size)
    return self.start + place

  @property
  def halves(self):
    """What each sum is multiplied by, [sums]."""
    whole = HALVES.index(1.0)
    return jnp.where(self.gate_of_sum == whole, 1.0, 0.5)


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
  def programs_of_head(self):
    """Of a member, or of those of a direction."""
    return self.blocks // self.config.blocks

  @property
  def together(self):
    """Whether a program holds all members of a direction."""
    return self.dense and not self.config.resident

  @property
  def tiles(self):
    """Of units of a resident head: powers of two, the largest first."""
    least = NARROW if self.config.warps_own_rows else WORD
    start, tiles = 0, []
    while start < self.head:
      left = -(-(self.head - start) // least) * least
      size = min(self.config.units, 1 << (left.bit_length() - 1))
      tiles.append(Tile(start, size))
      start += size
    return tiles

  @property
  def filling(self):
    """Sizes of the tiles of zeros that end h, so that sources are words."""
    last = self.tiles[-1]
    end, sizes = last.start + last.size, []
    while end % WORD:
      sizes.append(end & -end)
      end += sizes[-1]
    return sizes

  def parts(self, units: Tile) -> list[Tile]:
    """What one product makes: all gates, if a warp can take them apart."""
    if self.config.warps_own_rows:
      return [units]
    return [units._replace(of_gates=range(g, g + 1)) for g in range(GATES)]

  @property
  def sources(self):
    """Tiles of inputs of a resident head: as few and wide as can be."""
    start, tiles = 0, []
    while start < self.padded:
      size = 1 << ((self.padded - start).bit_length() - 1)
      tiles.append(Tile(start, size))
      start += size
    return tiles

  @property
  def padded(self):
    """Where the last tile ends."""
    tile = WORD
    if not self.config.resident:
      tile = max(self.config.units, self.config.depth)
    return -(-self.head // tile) * tile
