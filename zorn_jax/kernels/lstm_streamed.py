"""Programs of the LSTM kernel that read tiles of the weights at every token.

They come from the L2 cache. h and c lie in buffers of the program's own, of
which that of h is written and read between barriers. All members of a dense
direction are in one program, and share each tile and its signs.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

from zorn_jax.kernels.lstm_layout import Tile
from zorn_jax.kernels.lstm_program import Program, gates_of


def run(program: Program):
  """All tokens of a program's block of rows."""
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
    if not layout.interpret:  # All warps are here, and see what was stored.
      pltriton.debug_barrier()
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

      # Before the products, which hide what it waits for.
      sums = [[others(s, part) for part in parts] for s in range(len(turns))]
      c = [pltriton.load(kept(turn, units)) for turn in turns]
      sums = jax.lax.fori_loop(0, count(config.depth), add, sums)
      for s, turn in enumerate(turns):
        h, after = program.cell(gates_of(sums[s].__getitem__, parts), c[s])
        narrow = h.astype(layout.dtype)
        pltriton.store(buffered(turn, (t + 1) & 1, units), narrow)
        pltriton.store(kept(turn, units), after)
        program.store_output(turn, t, units, h)
        last = t == layout.length - 1
        rounded = narrow.astype(jnp.float32)
        program.store_state(program.h, turn, units, rounded, last)
        program.store_state(program.c, turn, units, after, last)
      return 0

    return jax.lax.fori_loop(0, count(config.units), tile_of_units, 0)

  jax.lax.fori_loop(0, count(config.depth), begin, 0)
  jax.lax.fori_loop(0, layout.length, step, 0)
