"""What a program of the LSTM kernel has at hand: its tiles, and a cell.

A program is a head and some rows for all T tokens; no two ever wait for each
other. One product makes all gates of a tile of units, where they can be taken
apart in registers.

Rows, units and inputs are padded to tiles by masks: sums of units that are not
there are zero, and so is their h.
"""

import copy
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from zorn_jax.kernels import threefry
from zorn_jax.kernels.arguments import GATES
from zorn_jax.kernels.lstm_configs import WORD
from zorn_jax.kernels.lstm_layout import Layout, Tile

_I, _F, _Z, _O = range(GATES)


class Program:
  """One program: where its arrays lie, and how tiles of them are read."""

  def __init__(self, layout: Layout, refs: dict[str, Any]):
    self.layout = layout
    self.__dict__.update(refs)
    place, slow = pl.program_id(0), pl.program_id(1)
    each = layout.programs_of_head
    fast, number = place // each, place % each
    by_head = layout.config.by_head
    self.head, group = (slow, fast) if by_head else (fast, slow)
    if layout.together:
      self.direction, self.turns = group, range(layout.scales)
    else:  # Which of a direction's members it is, the program alone knows.
      self.direction = group // layout.scales
      self.turns = (group % layout.scales,)
    self._turn_to(number * layout.config.blocks)

  def _turn_to(self, block):
    rows = self.layout.config.rows
    self.block, self.rows = block, block * rows + jnp.arange(rows)

  def block_behind(self, number):
    """The program of a later block of rows."""
    program = copy.copy(self)
    program._turn_to(self.block + number)
    return program

  def member(self, turn):
    return self.direction * self.layout.scales + turn

  def scale(self, turn):
    return self.scales[turn]

  def present(self, tile: Tile, columns=None):
    """Which rows and columns are there, by default a tile's; None if all."""
    columns = tile.columns if columns is None else columns
    batch, head = self.layout.batch, self.layout.head
    rows = (
      (self.rows < batch)[:, None] if batch % self.layout.config.rows else None
    )
    columns = columns < head if self._overhangs(tile) else None
    if rows is None or columns is None:
      return columns if rows is None else rows
    return rows & columns

  def _overhangs(self, tile):
    head = self.layout.head
    if isinstance(tile.start, int):
      return tile.start + tile.size > head
    return head % tile.size > 0

  def _of_state(self, turn, units):
    return self.member(turn), self.rows[:, None], self.head, units.columns

  def load_state(self, ref, turn, units):
    """A tile [rows, units] of h or c."""
    return _load(ref.at[self._of_state(turn, units)], self.present(units))

  def store_state(self, ref, turn, units, value, when=None):
    at = ref.at[self._of_state(turn, units)]
    mask = self.present(units)
    if when is not None:
      mask = when if mask is None else mask & when
    pltriton.store(at, value, mask=mask)

  def store_output(self, turn, t, units, h):
    if not self.layout.keep:
      return
    place = (self.member(turn), self.rows[:, None], t, self.head, units.columns)
    h = h.astype(self.layout.dtype)
    pltriton.store(self.all_h.at[place], h, mask=self.present(units))

  def tokens_at(self, turn, t):
    """The tokens of all rows, [rows, 1]; None for inputs that have none."""
    if not self.layout.looked_up:
      return None
    member = self.member(turn) if self.layout.own_tokens else 0
    rows = self.rows[:, None]
    missing = self.layout.batch % self.layout.config.rows
    mask = rows < self.layout.batch if missing else None
    return _load(self.tokens.at[member, rows, t], mask)

  def inputs(self, turn, t, units, tokens):
    """A token's tile [rows, sums], of the type it is stored in."""
    member = self.member(turn) if self.layout.own_x else 0
    columns = units.unit_of_sum[None, :]
    place = (self.head, units.gate_of_sum[None, :], columns)
    if self.layout.looked_up:
      return pltriton.load(self.x.at[(member, tokens, *place)])
    at = self.x.at[(member, self.rows[:, None], t, *place)]
    return _load(at, self.present(units, columns))

  def biases(self, turn, units):
    """[1, sums]; None where they are in the table."""
    if self.layout.looked_up:
      return None
    member = self.member(turn) if self.layout.own_bias else 0
    at = self.b.at[member, units.gate_of_sum, self.head, units.unit_of_sum]
    return pltriton.load(at)[None, :]

  def begun(self, x, units, biases):
    """The sums before h has its part, [rows, sums]."""
    if biases is None:
      return x.astype(jnp.float32)
    return units.halves[None, :] * x.astype(jnp.float32) + biases

  def weights(self, units: Tile, source: Tile):
    """A tile [sums, source] of R, for each member of the program."""
    gates, rows = units.gate_of_sum[:, None], units.unit_of_sum[:, None]
    tile = pltriton.load(self.r.at[gates, self.head, rows, source.columns])
    if not self.layout.dense:
      return [tile] * len(self.turns)
    tile = tile.astype(jnp.float32)
    # Inputs that are not there are zero, whatever their weights are.
    halves = jnp.where(rows < self.layout.head, units.halves[:, None], 0.0)
    signs = self._signs(gates, rows, source)
    return [
      (tile + threefry.flipped(halves * self.scale(turn), signs)).astype(
        self.layout.dtype
      )
      for turn in self.turns
    ]

  def _signs(self, gates, rows, source):
    """A bit of each weight [sums, source], where a float32 has its sign."""
    layout = self.layout
    stored = -(-layout.head // WORD)  # Words of a row of R.
    words = source.start // WORD + jnp.arange(source.size // WORD)
    words = words[None, :]
    if not layout.config.resident:
      at = self.drawn.at[self.direction, gates, self.head, rows, words]
      return threefry.sign_bits(pltriton.load(at))
    row = (gates * layout.heads + self.head) * layout.head + rows
    index = (row * stored + words).astype(jnp.uint32)
    key = self.drawn[self.direction, 0], self.drawn[self.direction, 1]
    return threefry.sign_bits(threefry.word(key, index))

  def left_of(self, turn, units):
    """[factors, sums]."""
    places = jnp.arange(self.layout.factors)[:, None]
    gates, columns = units.gate_of_sum[None, :], units.unit_of_sum[None, :]
    at = self.left.at[self.member(turn), gates, self.head, places, columns]
    return pltriton.load(at)

  def right_of(self, source):
    """[factors, source]."""
    places = jnp.arange(self.layout.factors)[:, None]
    return pltriton.load(
      self.right.at[self.direction, self.head, places, source.columns]
    )

  def coefficients_of(self, turn, tokens):
    """What tokens have to do with the factors, [rows, factors]."""
    places = jnp.arange(self.layout.factors)[None, :]
    at = self.coefficients.at[self.member(turn), tokens, places]
    return pltriton.load(at)

  def multiply(self, a, b, axis=1):
    """a [rows, K] times b, whose K is at the axis; a of its type."""
    return jax.lax.dot_general(
      a.astype(self.layout.dtype),
      b,
      (((1,), (axis,)), ((), ())),
      precision=self.layout.precision,
      preferred_element_type=jnp.float32,
    )

  def cell(self, gate, c):
    """h and c of a tile, of what makes a gate's sums; few are there at once.

    Those of i, f and o are halved: σ(x) = (1 + tanh(x / 2)) / 2.
    """
    fast = self.layout.dtype == jnp.bfloat16 and not self.layout.interpret
    # Its error is 2^-11, a quarter of what rounding h will add.
    tanh = pltriton.approx_tanh if fast else jnp.tanh
    scaled = _scaled_by_tanh if fast else lambda x, y: jnp.tanh(x) * y + y
    new = scaled(gate(_I), tanh(gate(_Z)))
    c = 0.5 * (scaled(gate(_F), c) + new)
    return 0.5 * scaled(gate(_O), tanh(c)), c


def gates_of(sums, parts):
  """What makes a gate's sums, of what makes those of a part."""
  if len(parts) > 1:
    return sums
  return jnp.split(sums(0), GATES, axis=1).__getitem__


def _scaled_by_tanh(x, y):
  """(1 + tanh(x)) y in two instructions."""
  (scaled,) = pltriton.elementwise_inline_asm(
    "{ .reg .f32 t; tanh.approx.f32 t, $1; fma.rn.f32 $0, t, $2, $2; }",
    args=[x, y],
    constraints="=f,f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
  )
  return scaled


def _load(at, mask):
  if mask is None:
    return pltriton.load(at)
  return pltriton.load(at, mask=mask, other=0)
