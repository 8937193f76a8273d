"""Scores of populations, which share products, against member after member."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import directions, models, perturbed
from zorn_jax.models import cells, inputs, population, readout, recurrent

CELLS = list(cells.CELLS)
BOTH = {"num_layers": 2, "layer_norm": True, "residual": True}
PROBES, BATCH, LENGTH = 3, 2, 4


def build(cell="lstm", vocab=11, **options):
  """A small model whose parameters are nowhere zero."""
  options = {
    "vocab_size": vocab,
    "embedding_size": 5,
    "hidden_size": 18,
    "num_heads": 3,
    "initial_state": "trainable",
  } | options
  model = models.from_linen(models.Recurrent(cell, **options))
  params = jax.jit(model.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  noisy = lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype)
  return model, jax.tree.map(noisy, params)


def batch(vocab, rows=BATCH, probes=None):
  shape = (rows, LENGTH) if probes is None else (probes, rows, LENGTH)
  rng = np.random.default_rng(1)
  return tuple(jnp.asarray(rng.integers(vocab, size=shape)) for _ in range(2))


def defer(params, key, scale):
  """The parameters plus dense signs, none of them formed."""

  def draw(key, shape, window):
    z = directions.signs(key, shape)
    return jax.lax.dynamic_slice(z, *window[:2])

  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  moved = [
    perturbed.Deferred(leaf, keys[i][None], jnp.asarray([scale]), draw)
    for i, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(treedef, moved)


def low_rank(rank=1):
  direction = directions.low_rank(rank)

  def move(params, key, scale):
    return direction.perturb(params, direction.sample(key, params), scale)

  return move


def losses(model, move, params, tokens, targets, own_data=False):
  """Losses and hits of PROBES antithetic pairs, [n, 2, B, T], and states."""

  def member(key, tokens, targets, scale):
    moved = move(params, key, scale)
    carry = model.initial_carry(moved, tokens.shape[0])
    for part in (slice(0, 1), slice(1, None)):
      carry, loss, hit = model.score(
        moved, carry, tokens[:, part], targets[:, part]
      )
      found.append((loss, hit))
    parts = [jnp.concatenate(x, -1) for x in zip(*found, strict=True)]
    found.clear()
    return *parts, carry

  found = []
  pair = jax.vmap(member, (None, None, None, 0))
  data = 0 if own_data else None
  every = jax.vmap(pair, (0, data, data, None))
  keys = jax.random.split(jax.random.key(5), PROBES)
  return jax.jit(every)(keys, tokens, targets, jnp.asarray([0.1, -0.1]))


def one_by_one(model, move, params, tokens, targets, own_data=False):
  """The same from whole logits of formed parameters, in a loop."""

  @jax.jit
  def member(key, scale, tokens, targets):
    moved = perturbed.materialize(move(params, key, scale))
    carry = model.initial_carry(moved, tokens.shape[0])
    carry, logits = model.apply(moved, carry, tokens)
    log_probs = jax.nn.log_softmax(logits)
    loss = -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    return loss, logits.argmax(-1) == targets, carry

  results = []
  for i, key in enumerate(jax.random.split(jax.random.key(5), PROBES)):
    for scale in (0.1, -0.1):
      data = (tokens[i], targets[i]) if own_data else (tokens, targets)
      results.append(member(key, scale, *data))
  stack = lambda *x: jnp.stack(x).reshape(PROBES, 2, *x[0].shape)
  return jax.tree.map(stack, *results)


def check(got, expected, atol=2e-5):
  np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=atol)
  assert (got[1] == expected[1]).mean() > 0.99
  for a, b in zip(got[2], expected[2], strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.fixture
def in_parts(monkeypatch):
  """Few bytes at once: one head, and rows of the readout, after another."""
  monkeypatch.setattr(recurrent, "_BLOCK_BYTES", 1)
  monkeypatch.setattr(readout, "_BLOCK_BYTES", 4 * 18 * 3)


@pytest.mark.parametrize("move", [low_rank(1), low_rank(2), defer])
@pytest.mark.parametrize("own_data", [False, True])
def test_members_score_as_alone(move, own_data):
  model, params = build()
  data = batch(11, probes=PROBES if own_data else None)
  got = losses(model, move, params, *data, own_data)
  check(got, one_by_one(model, move, params, *data, own_data))


@pytest.mark.parametrize("move", [low_rank(1), defer])
# Below the width, where logits are summed up head by head, and above.
@pytest.mark.parametrize(("vocab", "options"), [(11, {}), (23, BOTH)])
def test_members_score_as_alone_in_parts(move, vocab, options, in_parts):
  model, params = build(vocab=vocab, **options)
  data = batch(vocab)
  got = losses(model, move, params, *data)
  check(got, one_by_one(model, move, params, *data))


def signs(params, key, scale):
  direction = directions.rademacher(deferred=True)
  return direction.perturb(params, direction.sample(key, params), scale)


# Heads of whole words of signs and others, one at a time and all together.
@pytest.mark.parametrize(("head", "heads"), [(32, 1), (6, 1), (6, 3)])
def test_a_large_readout_is_formed_by_rows(head, heads, monkeypatch):
  if heads == 1:
    monkeypatch.setattr(recurrent, "_BLOCK_BYTES", 1)
  width = head * heads
  # Three rows at once for each of six members: the last block has two.
  monkeypatch.setattr(readout, "_CACHED_BYTES", 4 * width * 6 * 3)
  model, params = build(hidden_size=3 * head)
  data = batch(11)
  program = str(
    jax.make_jaxpr(lambda p: losses(model, signs, p, *data))(params)
  )
  assert f"f32[3,2,3,{width}]" in program
  assert f"f32[3,2,11,{width}]" not in program
  got = losses(model, signs, params, *data)
  check(got, one_by_one(model, signs, params, *data))


@pytest.mark.parametrize("cell", CELLS)
def test_members_of_every_cell_score_as_alone(cell):
  model, params = build(cell, **BOTH)
  data = batch(11)
  got = losses(model, low_rank(), params, *data)
  check(got, one_by_one(model, low_rank(), params, *data))


@pytest.mark.parametrize("own_data", [False, True])
def test_rows_without_a_table_score_as_alone(own_data, monkeypatch):
  monkeypatch.setattr(inputs, "MAX_TABLE_ROWS", 1)
  model, params = build()
  data = batch(11, probes=PROBES if own_data else None)
  got = losses(model, low_rank(), params, *data, own_data)
  check(got, one_by_one(model, low_rank(), params, *data, own_data))


@pytest.mark.parametrize("rows", [1, 9])  # Below and above the probes.
def test_the_largest_axis_lies_last(rows):
  layout = population.trail(rows, (2, PROBES))
  assert layout.shape[-1] == max(rows, PROBES)
  model, params = build()
  data = batch(11, rows)
  got = losses(model, low_rank(), params, *data)
  check(got, one_by_one(model, low_rank(), params, *data))


def test_place_and_restore_are_inverse():
  layout = population.trail(4, (2, 3))
  x = jnp.arange(3 * 2 * 5 * 4).reshape(3, 2, 5, 4)
  placed = layout.place(x, population.Axes({0, 1}), batch=1)
  assert placed.shape == (5, *layout.shape)
  np.testing.assert_array_equal(layout.restore(placed, batch=1), x)


def test_a_population_shares_its_products():
  model, params = build()
  tokens, targets = batch(11)
  move = low_rank()

  def score(key):
    carry = model.initial_carry(params, BATCH)
    moved = move(params, key, 0.1)
    return model.score(moved, carry, tokens, targets)[1]

  program = jax.make_jaxpr(jax.vmap(score))(
    jax.random.split(jax.random.key(0), 7)
  )
  # No product has an axis of seven batches: they are columns, or sums.
  assert "dot_general" in str(program)
  for line in str(program).splitlines():
    if "dot_general" in line:
      assert "[7," not in line.split("=")[0]


def test_members_with_weights_of_their_own_share_the_room(monkeypatch):
  """Where one would form all its three heads, six form one at a time."""
  model, params = build()
  monkeypatch.setattr(recurrent, "_BLOCK_BYTES", 4 * (3 * 4 * 6 * 6))
  program = jax.make_jaxpr(
    lambda params: losses(model, defer, params, *batch(11))
  )(params)
  formed = re.findall(r"f32\[3,2,4,(\d),6,6\]", str(program))
  assert set(formed) == {"1"}


@pytest.mark.parametrize("size", [1, 4, 10, 23])
def test_a_vocabulary_in_blocks_is_the_whole(size, monkeypatch):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  x, w, b = draw(4, 6, 2), draw(23, 6), draw(23, 1)
  targets = jnp.asarray(rng.integers(23, size=(4, 2)))
  layout = population.trail(2)
  monkeypatch.setattr(readout, "_BLOCK_BYTES", 4 * 8 * size)
  axes = population.Axes()
  loss, hit = readout.compare_blocks(layout, x, w, axes, b, targets)
  logits = np.einsum("vh,chb->cvb", w, x) + np.asarray(b)
  log_sum = np.log(np.exp(logits.astype(np.float64)).sum(1))
  at_target = np.take_along_axis(logits, np.asarray(targets)[:, None], 1)[:, 0]
  np.testing.assert_allclose(loss, log_sum - at_target, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(hit, logits.argmax(1) == targets)


def test_the_gradient_of_a_score_is_that_of_the_logits(monkeypatch):
  monkeypatch.setattr(readout, "_BLOCK_BYTES", 4 * 8 * 5)
  model, params = build(vocab=23)
  tokens, targets = batch(23)

  def score(params):
    carry = model.initial_carry(params, BATCH)
    return model.score(params, carry, tokens, targets)[1].mean()

  def whole(params):
    carry = model.initial_carry(params, BATCH)
    logits = jax.nn.log_softmax(model.apply(params, carry, tokens)[1])
    return -jnp.take_along_axis(logits, targets[..., None], -1).mean()

  got, expected = jax.grad(score)(params), jax.grad(whole)(params)
  for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_slopes_in_bfloat16_follow_those_in_float32():
  model, params = build(dtype=jnp.bfloat16)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  tokens, targets = batch(11)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  exact, _ = build()

  def slope(model, params, move):
    def loss(scale):
      moved = move(params, jax.random.key(3), scale)
      carry = model.initial_carry(moved, BATCH)
      return model.score(moved, carry, tokens, targets)[1].mean()

    return float((loss(1e-2) - loss(-1e-2)) / 2e-2)

  true = slope(exact, wide, low_rank())
  assert abs(slope(model, params, low_rank()) - true) < 0.1 * abs(true)
