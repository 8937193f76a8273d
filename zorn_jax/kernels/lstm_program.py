"""What one program of the LSTM kernel does: a head and some rows, all T tokens.

No two programs ever wait for each other.

resident  The weights of the head are loaded and perturbed once, and stay in
          registers or shared memory; so do h and c.
streamed  Tiles of the weights come from the L2 cache at every step, and h and c
          lie in buffers of the program's own, of which that of h is written and
          read between barriers.
          All members of a dense direction are in one program, and share each
          tile and its signs.

Rows, units and inputs are padded to tiles by masks: padded weights and inputs
are zero, and keep padded h and c at zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from zorn_jax.kernels import threefry
from zorn_jax.kernels.arguments import GATES
from zorn_jax.kernels.lstm_configs import Config

BITS = 32  # Of a word of signs.
# What all that a gate sums up is multiplied by, which rounds nothing.
HALVES = (0.5, 0.5, 1.0, 0.5)
_I, _F, _Z, _O = range(GATES)


class Tile(NamedTuple):
  """Neighbouring units, or inputs, of a head; the last may not be there."""

  start: Any
  size: int

  @property
  def places(self):
    return self.start + jnp.arange(self.size)

  @property
  def columns(self):
    return self.places[None, :]


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
    return -(-self.batch // self.config.rows)

  @property
  def together(self):
    """Whether a program holds all members of a direction."""
    return self.dense and not self.config.resident

  @property
  def tiles(self):
    """Of a resident head: powers of two, the largest first."""
    start, tiles = 0, []
    while start < self.head:
      left = -(-(self.head - start) // BITS) * BITS
      size = min(self.config.units, 1 << (left.bit_length() - 1))
      tiles.append(Tile(start, size))
      start += size
    return tiles

  @property
  def padded(self):
    """Where the last tile ends."""
    if self.config.resident:
      last = self.tiles[-1]
      return last.start + last.size
    tile = max(self.config.units, self.config.depth)
    return -(-self.head // tile) * tile


def body(*refs, layout: Layout, names: tuple[str, ...]):
  program = Program(layout, dict(zip(names, refs, strict=True)))
  (_resident if layout.config.resident else _streamed)(program)


class Program:
  """One program: where its arrays lie, and how tiles of them are read."""

  def __init__(self, layout: Layout, refs: dict[str, Any]):
    self.layout = layout
    self.__dict__.update(refs)
    place, slow = pl.program_id(0), pl.program_id(1)
    fast, self.block = place // layout.blocks, place % layout.blocks
    by_head = layout.config.by_head
    self.head, group = (slow, fast) if by_head else (fast, slow)
    self.rows = self.block * layout.config.rows + jnp.arange(layout.config.rows)
    if layout.together:
      self.direction, self.turns = group, range(layout.scales)
    else:  # Which of a direction's members it is, the program alone knows.
      self.direction = group // layout.scales
      self.turns = (group % layout.scales,)

  def member(self, turn):
    return self.direction * self.layout.scales + turn

  def scale(self, turn):
    return self.scales[turn]

  def present(self, units: Tile):
    """Which rows and units of a tile are there; None if all are."""
    batch, head = self.layout.batch, self.layout.head
    rows = (
      (self.rows < batch)[:, None] if batch % self.layout.config.rows else None
    )
    columns = units.columns < head if self._overhangs(units) else None
    if rows is None or columns is None:
      return columns if rows is None else rows
    return rows & columns

  def _overhangs(self, units):
    head = self.layout.head
    if isinstance(units.start, int):
      return units.start + units.size > head
    return head % units.size > 0

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

  def inputs(self, turn, t, units, gate, tokens):
    """A token's tile of a gate, of the type it is stored in."""
    member = self.member(turn) if self.layout.own_x else 0
    place = (self.head, gate, units.columns)
    if self.layout.looked_up:
      return pltriton.load(self.x.at[(member, tokens, *place)])
    at = self.x.at[(member, self.rows[:, None], t, *place)]
    return _load(at, self.present(units))

  def biases(self, turn, units):
    """Of all gates; None where they are in the table."""
    if self.layout.looked_up:
      return None
    member = self.member(turn) if self.layout.own_bias else 0
    return [
      pltriton.load(self.b.at[member, gate, self.head, units.places])[None, :]
      for gate in range(GATES)
    ]

  def begun(self, x, gate, biases):
    """The sums of a gate before h has its part."""
    if biases is None:
      return x.astype(jnp.float32)
    return HALVES[gate] * x.astype(jnp.float32) + biases[gate]

  def weights(self, gate, units: Tile, source: Tile):
    """A tile [units, source] of R, for each member of the program."""
    rows, columns = units.places[:, None], source.columns
    tile = pltriton.load(self.r.at[gate, self.head, rows, columns])
    if not self.layout.dense:
      return [tile] * len(self.turns)
    tile = tile.astype(jnp.float32)
    z = self._signs(gate, rows, source)
    if self._overhangs(units) or self._overhangs(source):
      head = self.layout.head
      z = jnp.where((rows < head) & (columns < head), z, 0.0)
    return [
      (tile + HALVES[gate] * self.scale(turn) * z).astype(self.layout.dtype)
      for turn in self.turns
    ]

  def _signs(self, gate, rows, source):
    layout = self.layout
    stored = -(-layout.head // BITS)  # Words of a row of R.
    words = source.start // BITS + jnp.arange(source.size // BITS)
    words = words[None, :]
    if not layout.config.resident:
      at = self.drawn.at[self.direction, gate, self.head, rows, words]
      return threefry.unpack(pltriton.load(at))
    row = (gate * layout.heads + self.head) * layout.head + rows
    index = (row * stored + words).astype(jnp.uint32)
    key = self.drawn[self.direction, 0], self.drawn[self.direction, 1]
    return threefry.unpack(threefry.word(key, index))

  def left_of(self, turn, gate, units):
    """[factors, units]."""
    places = jnp.arange(self.layout.factors)[:, None]
    member = self.member(turn)
    return pltriton.load(
      self.left.at[member, gate, self.head, places, units.columns]
    )

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
    """h and c, of what makes a gate's sums; few of which are there at once.

    Those of i, f and o are halved: σ(x) = (1 + tanh(x / 2)) / 2.
    """
    fast = self.layout.dtype == jnp.bfloat16 and not self.layout.interpret
    # Its error is 2^-11, a quarter of what rounding h will add.
    tanh = pltriton.approx_tanh if fast else jnp.tanh
    scaled = _scaled_by_tanh if fast else lambda x, y: jnp.tanh(x) * y + y
    new = scaled(gate(_I), tanh(gate(_Z)))
    c = 0.5 * (scaled(gate(_F), c) + new)
    return 0.5 * scaled(gate(_O), tanh(c)), c


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


def _resident(program: Program):
  layout, config = program.layout, program.layout.config
  tiles = layout.tiles
  (turn,) = program.turns
  gates = range(GATES)
  weights = [
    [[program.weights(g, units, k)[0] for k in tiles] for g in gates]
    for units in tiles
  ]
  biases = [program.biases(turn, units) for units in tiles]
  right = [program.right_of(k) for k in tiles] if layout.mixes else None
  lefts = None
  if layout.factors and len(tiles) == 1:  # Of more there is no room.
    lefts = [program.left_of(turn, g, tiles[0]) for g in gates]

  def load(t):
    tokens = program.tokens_at(turn, t)
    x = [
      [program.inputs(turn, t, units, gate, tokens) for gate in gates]
      for units in tiles
    ]
    return x, tokens

  def step(t, carry):
    h, c, x, tokens = carry
    ahead = x, tokens
    if config.prefetch:
      ahead = load(jnp.minimum(t + 1, layout.length - 1))
    else:
      tokens = program.tokens_at(turn, t)
    h = [tile.astype(layout.dtype) for tile in h]
    mixed = None
    if layout.mixes_tokens:
      mixed = program.coefficients_of(turn, tokens)
    if layout.mixes:
      products = sum(map(program.multiply, h, right))
      mixed = products if mixed is None else products + mixed
    if mixed is not None:
      mixed = mixed.astype(layout.dtype)
    new_h, new_c = [], []
    for index, units in enumerate(tiles):

      def gate(g, index=index, units=units):
        if config.prefetch:
          given = x[index][g]
        else:
          given = program.inputs(turn, t, units, g, tokens)
        total = program.begun(given, g, biases[index])
        for k, tile in enumerate(h):
          total += program.multiply(tile, weights[index][g][k])
        if mixed is not None:
          left = lefts[g] if lefts else program.left_of(turn, g, units)
          total += program.multiply(mixed, left, 0)
        return total

      made, kept = program.cell(gate, c[index])
      program.store_output(turn, t, units, made)
      new_h.append(made)
      new_c.append(kept)
    return new_h, new_c, *ahead

  h, c = (
    [program.load_state(ref, turn, units) for units in tiles]
    for ref in (program.h0, program.c0)
  )
  carry = h, c, *(load(0) if config.prefetch else ([], None))
  h, c, *_ = jax.lax.fori_loop(0, layout.length, step, carry)
  for units, tile, kept in zip(tiles, h, c, strict=True):
    program.store_state(program.h, turn, units, tile)
    program.store_state(program.c, turn, units, kept)


def _streamed(program: Program):
  layout, config, turns = program.layout, program.layout.config, program.turns
  count = lambda size: -(-layout.head // size)
  units_at = lambda index: Tile(index * config.units, config.units)
  source_at = lambda index: Tile(index * config.depth, config.depth)
  rows = jnp.arange(config.rows)[:, None]

  def buffered(turn, which, tile):
    """Where the product finds h, in the buffer read at even or odd steps."""
    place = program.member(turn), program.head, program.block, which
    return program.buffer.at[(*place, rows, tile.columns)]

  def kept(turn, tile):
    """Where c is."""
    place = program.member(turn), program.head, program.block
    return program.cells.at[(*place, rows, tile.columns)]

  def begin(index, _):
    tile = source_at(index)
    for turn in turns:
      h = program.load_state(program.h0, turn, tile)
      c = program.load_state(program.c0, turn, tile)
      pltriton.store(buffered(turn, 0, tile), h.astype(layout.dtype))
      pltriton.store(buffered(turn, 1, tile), jnp.zeros(h.shape, layout.dtype))
      pltriton.store(kept(turn, tile), c)
    return 0

  def step(t, _):
    _wait(layout)
    tokens = [program.tokens_at(turn, t) for turn in turns]

    def mix(index, mixed):
      tile = source_at(index)
      right = program.right_of(tile)
      return [
        sums
        + program.multiply(pltriton.load(buffered(turn, t & 1, tile)), right)
        for turn, sums in zip(turns, mixed, strict=True)
      ]

    mixed = []
    if layout.mixes:
      zeros = jnp.zeros((config.rows, layout.factors), jnp.float32)
      nothing = [zeros for _ in turns]
      mixed = jax.lax.fori_loop(0, count(config.depth), mix, nothing)
    if layout.mixes_tokens:
      more = map(program.coefficients_of, turns, tokens)
      mixed = list(map(jnp.add, mixed, more)) if mixed else list(more)

    def tile_of_units(index, _):
      units = units_at(index)

      def add(index, sums):
        source = source_at(index)
        h = [pltriton.load(buffered(turn, t & 1, source)) for turn in turns]
        sums = [list(total) for total in sums]
        for g in range(GATES):
          weights = program.weights(g, units, source)
          for s in range(len(turns)):
            sums[s][g] += program.multiply(h[s], weights[s])
        return sums

      def others(s, g):
        """What has a part in a gate beside R h."""
        biases = program.biases(turns[s], units)
        given = program.inputs(turns[s], t, units, g, tokens[s])
        total = program.begun(given, g, biases)
        if mixed:
          left = program.left_of(turns[s], g, units)
          total += program.multiply(mixed[s], left, 0)
        return total

      members, gates = range(len(turns)), range(GATES)
      if config.prefetch:
        sums = [[others(s, g) for g in gates] for s in members]
        c = [pltriton.load(kept(turn, units)) for turn in turns]
      else:
        zeros = jnp.zeros((config.rows, config.units), jnp.float32)
        sums = [[zeros] * GATES for _ in turns]
      sums = jax.lax.fori_loop(0, count(config.depth), add, sums)
      for s, turn in enumerate(turns):
        if config.prefetch:
          gate, before = sums[s].__getitem__, c[s]
        else:
          gate = lambda g, s=s: sums[s][g] + others(s, g)
          before = pltriton.load(kept(turn, units))
        h, after = program.cell(gate, before)
        narrow = h.astype(layout.dtype)
        pltriton.store(buffered(turn, (t + 1) & 1, units), narrow)
        pltriton.store(kept(turn, units), after)
        program.store_output(turn, t, units, h)
        last = t == layout.length - 1
        program.store_state(program.h, turn, units, h, last)
        program.store_state(program.c, turn, units, after, last)
      return 0

    return jax.lax.fori_loop(0, count(config.units), tile_of_units, 0)

  jax.lax.fori_loop(0, count(config.depth), begin, 0)
  jax.lax.fori_loop(0, layout.length, step, 0)


def _wait(layout):
  """Until all warps of the program are here, and see what was stored."""
  if not layout.interpret:
    pltriton.debug_barrier()
