"""What one program of the LSTM kernel does: a head and some rows, all T tokens.

No two programs ever wait for each other. One product makes all gates of a tile
of units, where they can be taken apart in registers.

resident  The weights of the head are loaded and perturbed once, for several
          blocks of rows, and stay in registers or shared memory; so do h and c.
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
ROWS_OF_WARP = 16  # At least; fewer warps are side by side then.
NARROW = 8  # Units of the narrowest tile.
# What all that a gate sums up is multiplied by, which rounds nothing.
HALVES = (0.5, 0.5, 1.0, 0.5)
_I, _F, _Z, _O = range(GATES)


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
    return jnp.where(self.gates == _Z, 1.0, 0.5)


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
    least = NARROW if self.alone else BITS
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
    while end % BITS:
      sizes.append(end & -end)
      end += sizes[-1]
    return sizes

  @property
  def alone(self):
    """Whether a warp has rows of its own, and so all gates of a unit."""
    return self.config.rows >= ROWS_OF_WARP * self.config.warps

  def parts(self, units: Tile) -> list[Tile]:
    """The gates that one product makes: all, if a warp can take them apart."""
    if self.alone:
      return [units]
    return [units._replace(made=range(g, g + 1)) for g in range(GATES)]

  @property
  def sources(self):
    """Tiles of inputs, of a resident head: few, for few products."""
    tiles = self.tiles
    for size in self.filling:
      tiles.append(Tile(tiles[-1].start + tiles[-1].size, size))
    join = lambda a, b: Tile(a.start, a.size + b.size)
    return _joined(tiles, lambda tile: tile.size, join)

  @property
  def padded(self):
    """Where the last tile ends."""
    if self.config.resident:
      last = self.sources[-1]
      return last.start + last.size
    tile = max(self.config.units, self.config.depth)
    return -(-self.head // tile) * tile


def _joined(tiles, size, join):
  """Neighbours of one size are one tile, as often as there are such."""
  joined = []
  for tile in tiles:
    joined.append(tile)
    while len(joined) > 1 and size(joined[-2]) == size(joined[-1]):
      joined[-2:] = [join(*joined[-2:])]
  return joined


def body(*refs, layout: Layout, names: tuple[str, ...]):
  program = Program(layout, dict(zip(names, refs, strict=True)))
  (_resident if layout.config.resident else _streamed)(program)


class Program:
  """One program: where its arrays lie, and how tiles of them are read."""

  def __init__(self, layout: Layout, refs: dict[str, Any]):
    self.layout = layout
    self.__dict__.update(refs)
    place, slow = pl.program_id(0), pl.program_id(1)
    fast, number = place // layout.programs, place % layout.programs
    by_head = layout.config.by_head
    self.head, group = (slow, fast) if by_head else (fast, slow)
    if layout.together:
      self.direction, self.turns = group, range(layout.scales)
    else:  # Which of a direction's members it is, the program alone knows.
      self.direction = group // layout.scales
      self.turns = (group % layout.scales,)
    self.take(number * layout.config.blocks)

  def take(self, block):
    """Turns to a block of rows."""
    self.block = block
    self.rows = block * self.layout.config.rows + jnp.arange(
      self.layout.config.rows
    )

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
    columns = units.units[None, :]
    place = (self.head, units.gates[None, :], columns)
    if self.layout.looked_up:
      return pltriton.load(self.x.at[(member, tokens, *place)])
    at = self.x.at[(member, self.rows[:, None], t, *place)]
    return _load(at, self.present(units, columns))

  def biases(self, turn, units):
    """[1, sums]; None where they are in the table."""
    if self.layout.looked_up:
      return None
    member = self.member(turn) if self.layout.own_bias else 0
    at = self.b.at[member, units.gates, self.head, units.units]
    return pltriton.load(at)[None, :]

  def begun(self, x, units, biases):
    """The sums before h has its part, [rows, sums]."""
    if biases is None:
      return x.astype(jnp.float32)
    return units.halves[None, :] * x.astype(jnp.float32) + biases

  def weights(self, units: Tile, source: Tile):
    """A tile [sums, source] of R, for each member of the program."""
    gates, rows = units.gates[:, None], units.units[:, None]
    tile = pltriton.load(self.r.at[gates, self.head, rows, source.columns])
    if not self.layout.dense:
      return [tile] * len(self.turns)
    tile = tile.astype(jnp.float32)
    # Inputs that are not there are zero, whatever their weights are.
    halves = jnp.where(rows < self.layout.head, units.halves[:, None], 0.0)
    signs = self._signs(gates, rows, source)
    return [
      (tile + threefry.signed(halves * self.scale(turn), signs)).astype(
        self.layout.dtype
      )
      for turn in self.turns
    ]

  def _signs(self, gates, rows, source):
    """A bit of each weight [sums, source], where a float32 has its sign."""
    layout = self.layout
    stored = -(-layout.head // BITS)  # Words of a row of R.
    words = source.start // BITS + jnp.arange(source.size // BITS)
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
    gates, columns = units.gates[None, :], units.units[None, :]
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


def _gates(sums, parts):
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


def _beside(a, b):
  """Two tiles [rows, K] as one; nothing moves but names of registers."""
  rows, size = a.shape
  return jnp.stack([a, b], 2).transpose(0, 2, 1).reshape(rows, 2 * size)


def _resident(program: Program):
  layout, config = program.layout, program.layout.config
  tiles, sources = layout.tiles, layout.sources
  (turn,) = program.turns
  # As few registers as can be, or conversions.
  carried = layout.dtype if layout.alone else jnp.float32
  parts = [layout.parts(units) for units in tiles]
  of_parts = lambda f: [[f(part) for part in some] for some in parts]
  weights = of_parts(
    lambda part: [program.weights(part, source)[0] for source in sources]
  )
  biases = of_parts(lambda part: program.biases(turn, part))
  right = None
  if layout.mixes:
    right = [program.right_of(source) for source in sources]
  left = None
  # Of more there is no room.
  if 0 < layout.factors <= 16 and layout.head <= 64:
    left = of_parts(lambda part: program.left_of(turn, part))

  def inputs(index, t, tokens):
    return [program.inputs(turn, t, part, tokens) for part in parts[index]]

  def mix(h, tokens):
    """What is multiplied by the left factors, [rows, factors]."""
    mixed = []
    if layout.mixes_tokens:
      mixed.append(program.coefficients_of(turn, tokens))
    if layout.mixes:
      mixed.append(sum(map(program.multiply, h, right)))
    # Rounded before they are added, which is exact, as one of both is zero: no
    # product begins with what has still to be loaded.
    return sum(x.astype(layout.dtype) for x in mixed) if mixed else None

  def step(t, carry):
    h, c, x, tokens = carry
    h = [tile.astype(layout.dtype) for tile in h]
    later = jnp.minimum(t + 1, layout.length - 1)
    then = program.tokens_at(turn, later)
    mixed = mix(h, tokens)
    new_h, new_c = [], []
    for index, units in enumerate(tiles):
      given = x
      if not config.prefetch:
        given = inputs(index, t, tokens)
      elif index + 1 < len(tiles):
        x = inputs(index + 1, t, tokens)
      else:
        x = inputs(0, later, then)

      def sums(place, index=index, given=given):
        part = parts[index][place]
        begun = program.begun(given[place], part, biases[index][place])
        products = list(map(program.multiply, h, weights[index][place]))
        if mixed is not None:
          factors = left[index][place] if left else program.left_of(turn, part)
          products.append(program.multiply(mixed, factors, 0))
        # Products begin with inputs, or do not wait for them.
        if config.prefetch:
          return sum(products, begun)
        return sum(products[1:], products[0]) + begun

      made, kept = program.cell(_gates(sums, parts[index]), c[index])
      program.store_output(turn, t, units, made)
      new_h.append(made.astype(carried))
      new_c.append(kept)
    for size in layout.filling:
      new_h.append(jnp.zeros((config.rows, size), carried))
    new_h = _joined(new_h, lambda tile: tile.shape[1], _beside)
    return new_h, new_c, x, then

  def block(index, _):
    program.take(first + index)
    h = [program.load_state(program.h0, turn, source) for source in sources]
    h = [tile.astype(carried) for tile in h]
    c = [program.load_state(program.c0, turn, units) for units in tiles]
    tokens = program.tokens_at(turn, 0)
    x = inputs(0, 0, tokens) if config.prefetch else None
    carry = h, c, x, tokens
    h, c, *_ = jax.lax.fori_loop(0, layout.length, step, carry)
    for source, tile in zip(sources, h, strict=True):
      tile = tile.astype(jnp.float32)
      program.store_state(program.h, turn, source, tile)
    for units, tile in zip(tiles, c, strict=True):
      program.store_state(program.c, turn, units, tile)
    return 0

  first = program.block
  jax.lax.fori_loop(0, config.blocks, block, 0)


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
      parts = layout.parts(units)

      def add(index, sums):
        source = source_at(index)
        h = [pltriton.load(buffered(turn, t & 1, source)) for turn in turns]
        sums = [list(totals) for totals in sums]
        for place, part in enumerate(parts):
          weights = program.weights(part, source)
          for s in range(len(turns)):
            sums[s][place] += program.multiply(h[s], weights[s])
        return sums

      def others(s, part):
        """What has a part in the sums beside R h."""
        biases = program.biases(turns[s], part)
        given = program.inputs(turns[s], t, part, tokens[s])
        total = program.begun(given, part, biases)
        if mixed:
          left = program.left_of(turns[s], part)
          total += program.multiply(mixed[s], left, 0)
        return total

      def zeros(_, part):
        shape = config.rows, len(part.made) * part.size
        return jnp.zeros(shape, jnp.float32)

      begin = others if config.prefetch else zeros
      sums = [[begin(s, part) for part in parts] for s in range(len(turns))]
      if config.prefetch:
        c = [pltriton.load(kept(turn, units)) for turn in turns]
      sums = jax.lax.fori_loop(0, count(config.depth), add, sums)
      for s, turn in enumerate(turns):
        whole, before = sums[s].__getitem__, c[s] if config.prefetch else None
        if not config.prefetch:
          whole = lambda at, s=s: sums[s][at] + others(s, parts[at])
          before = pltriton.load(kept(turn, units))
        h, after = program.cell(_gates(whole, parts), before)
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
