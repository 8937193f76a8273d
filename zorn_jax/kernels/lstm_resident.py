"""Programs of the LSTM kernel whose weights, h and c stay on the chip."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax.kernels.lstm_layout import Tile
from zorn_jax.kernels.lstm_program import Program, gates_of


class _Held(NamedTuple):
  """What a program loads and perturbs once, for all of its blocks of rows.

  Attributes:
    parts: For each tile of units, those that one product makes.
    weights: For each part, those of all sources.
    biases: For each part.
    right: For each source; empty without factors of R.
    left: For each part; None where there is no room for them.
  """

  parts: list[list[Tile]]
  weights: list[list[Any]]
  biases: list[list[Any]]
  right: list[Any]
  left: list[list[Any]] | None


def run(program: Program):
  """All blocks of rows of a program, one after another."""
  held = _hold(program)

  def block(number, _):
    _run_block(program.block_behind(number), held)
    return 0

  jax.lax.fori_loop(0, program.layout.config.blocks, block, 0)


def _hold(program):
  layout, (turn,) = program.layout, program.turns
  parts = [layout.parts(units) for units in layout.tiles]
  of_parts = lambda f: [[f(part) for part in some] for some in parts]
  loaded = lambda part: [program.weights(part, k)[0] for k in layout.sources]
  left = None
  if 0 < layout.factors <= 16 and layout.head <= 64:
    left = of_parts(lambda part: program.left_of(turn, part))
  return _Held(
    parts,
    of_parts(loaded),
    of_parts(lambda part: program.biases(turn, part)),
    [program.right_of(k) for k in layout.sources] if layout.mixes else [],
    left,
  )


def _run_block(program, held):
  layout, config, (turn,) = program.layout, program.layout.config, program.turns
  tiles, sources = layout.tiles, layout.sources
  # What costs the fewest registers, or conversions.
  carried = layout.dtype if config.warps_own_rows else jnp.float32

  def inputs(index, t, tokens):
    return [program.inputs(turn, t, part, tokens) for part in held.parts[index]]

  def mix(h, tokens):
    """What is multiplied by the left factors, [rows, factors]."""
    mixed = []
    if layout.mixes_tokens:
      mixed.append(program.coefficients_of(turn, tokens))
    if layout.mixes:
      mixed.append(sum(map(program.multiply, h, held.right)))
    # Rounded before they are added, which is exact, as one of both is zero: no
    # product begins with what has still to be loaded.
    return sum(x.astype(layout.dtype) for x in mixed) if mixed else None

  def sums(index, x, h, mixed, place):
    """Of a part of a tile."""
    part = held.parts[index][place]
    begun = program.begun(x[place], part, held.biases[index][place])
    products = list(map(program.multiply, h, held.weights[index][place]))
    if mixed is not None:
      if held.left:
        left = held.left[index][place]
      else:
        left = program.left_of(turn, part)
      products.append(program.multiply(mixed, left, 0))
    # Products begin with inputs, or do not wait for them.
    if config.prefetch:
      return sum(products, begun)
    return sum(products[1:], products[0]) + begun

  def step(t, carry):
    h, c, x, tokens = carry
    h = [tile.astype(layout.dtype) for tile in h]
    later = jnp.minimum(t + 1, layout.length - 1)
    tokens_later = program.tokens_at(turn, later)
    mixed = mix(h, tokens)
    new_h, new_c = [], []
    for index, units in enumerate(tiles):
      given = x
      if not config.prefetch:
        given = inputs(index, t, tokens)
      elif index + 1 < len(tiles):
        x = inputs(index + 1, t, tokens)
      else:
        x = inputs(0, later, tokens_later)
      of_parts = partial(sums, index, given, h, mixed)
      tile, kept = program.cell(gates_of(of_parts, held.parts[index]), c[index])
      program.store_output(turn, t, units, tile)
      new_h.append(tile.astype(carried))
      new_c.append(kept)
    for size in layout.filling:
      new_h.append(jnp.zeros((config.rows, size), carried))
    return _joined(new_h), new_c, x, tokens_later

  h = [program.load_state(program.h0, turn, source) for source in sources]
  h = [tile.astype(carried) for tile in h]
  c = [program.load_state(program.c0, turn, units) for units in tiles]
  tokens = program.tokens_at(turn, 0)
  x = inputs(0, 0, tokens) if config.prefetch else None
  h, c, *_ = jax.lax.fori_loop(0, layout.length, step, (h, c, x, tokens))
  for source, tile in zip(sources, h, strict=True):
    tile = tile.astype(layout.dtype).astype(jnp.float32)
    program.store_state(program.h, turn, source, tile)
  for units, tile in zip(tiles, c, strict=True):
    program.store_state(program.c, turn, units, tile)


def _joined(tiles):
  """Neighbours [rows, K] of one size are one tile, until none are."""
  joined = []
  for tile in tiles:
    joined.append(tile)
    while len(joined) > 1 and joined[-2].shape == joined[-1].shape:
      joined[-2:] = [_beside(*joined[-2:])]
  return joined


def _beside(a, b):
  """Two tiles [rows, K] as one; nothing moves but names of registers."""
  rows, size = a.shape
  return jnp.stack([a, b], 2).transpose(0, 2, 1).reshape(rows, 2 * size)
