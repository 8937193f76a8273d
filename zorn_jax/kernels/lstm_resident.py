"""Programs of the LSTM kernel whose weights, h and c stay on the chip.

The weights of the head are loaded and perturbed once, for several blocks of
rows.
"""

import jax
import jax.numpy as jnp

from zorn_jax.kernels.lstm_layout import joined
from zorn_jax.kernels.lstm_program import Program, gates_of


def run(program: Program):
  layout, config = program.layout, program.layout.config
  tiles, sources = layout.tiles, layout.sources
  (turn,) = program.turns
  # As few registers as can be, or conversions.
  carried = layout.dtype if config.alone else jnp.float32
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

      made, kept = program.cell(gates_of(sums, parts[index]), c[index])
      program.store_output(turn, t, units, made)
      new_h.append(made.astype(carried))
      new_c.append(kept)
    for size in layout.filling:
      new_h.append(jnp.zeros((config.rows, size), carried))
    new_h = joined(new_h, lambda tile: tile.shape[1], _beside)
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


def _beside(a, b):
  """Two tiles [rows, K] as one; nothing moves but names of registers."""
  rows, size = a.shape
  return jnp.stack([a, b], 2).transpose(0, 2, 1).reshape(rows, 2 * size)
