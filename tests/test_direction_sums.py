"""What directions are added to, their sums, and parts of both."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import KINDS, probe_keys, programs, signs, tree

from zorn_jax import aggregators, directions, perturbed, tiles

DEFERRED = {
  "rademacher": directions.rademacher(deferred=True),
  "normal": directions.normal(deferred=True),
  "uniform": directions.uniform(deferred=True),
  "sparse": directions.sparse(0.3, deferred=True),
}
ROOT_3 = 3.0**0.5
REFERENCE = {
  "rademacher": directions.signs,
  "normal": jax.random.normal,
  "uniform": lambda key, shape: jax.random.uniform(
    key, shape, minval=-ROOT_3, maxval=ROOT_3
  ),
  "sparse": lambda key, shape: jnp.where(
    jax.random.bernoulli(jax.random.fold_in(key, 1), 0.3, shape),
    directions.signs(jax.random.fold_in(key, 0), shape)
    * (math.ceil(0.3 * 2**23) / 2**23) ** -0.5,
    0.0,
  ),
}


def drawn(kind, keys):
  """Directions for `tree` as float32 arrays."""
  draw, move, _ = programs(kind)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree())
  return move(zeros, draw(keys, tree()), 1.0)


def draw_of(kind):
  leaf = jnp.zeros(1)
  return DEFERRED[kind].perturb(leaf, jax.random.key(0), 1.0).draw


def part(whole, starts, sizes):
  ends = [start + size for start, size in zip(starts, sizes, strict=True)]
  return whole[tuple(map(slice, starts, ends))]


def words_drawn(fn, *args):
  """How many random words a program draws."""
  return sum(
    equation.outvars[0].aval.size
    for equation in jax.make_jaxpr(fn)(*args).eqns
    if equation.primitive.name == "threefry2x32"
  )


# Perturbing and summing.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, -0.125, 0.3])
def test_perturb_adds_and_leaves_params_alone(kind, scale):
  params, before = tree(), jax.tree.map(np.array, tree())
  draw, move, _ = programs(kind)
  moved = move(params, draw(probe_keys(2), params), scale)
  jax.tree.map(np.testing.assert_array_equal, params, before)

  def check(moved, param, z):
    assert moved.dtype == param.dtype and moved.shape == (7, *param.shape)
    change = scale * np.asarray(z, np.float64)
    old = np.asarray(param, np.float64)[None]
    # One rounding to the leaf's type, and a few to float32 on the way.
    bound = float(jnp.finfo(moved.dtype).eps) / 2 * np.abs(old + change)
    bound += 4 * 2.0**-24 * (np.abs(old) + np.abs(change))
    assert np.all(np.abs(np.asarray(moved, np.float64) - old - change) <= bound)

  jax.tree.map(check, moved, params, drawn(kind, probe_keys(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_combine_is_the_sum_of_what_sample_draws(kind):
  params = tree()
  weights = np.array([0.5, -1.25, 0.0, 3.0, -0.1, 0.7, 2.0], np.float32)
  _, _, combine = programs(kind)
  total = combine(probe_keys(6), jnp.asarray(weights), params)

  def check(total, param, z):
    assert total.dtype == param.dtype and total.shape == param.shape
    z = np.asarray(z, np.float64)
    terms = np.array([w * zi for w, zi in zip(weights, z, strict=True)])
    # A rounding for every sum and product, and one to the leaf's type.
    bound = float(jnp.finfo(total.dtype).eps) / 2 * np.abs(terms.sum(0))
    bound += 16 * 2.0**-24 * np.abs(terms).sum(0)
    # The factors of a rank have summands larger than their sum.
    bound += 16 * 2.0**-24 * np.abs(weights).sum()
    assert np.all(np.abs(np.asarray(total, np.float64) - terms.sum(0)) <= bound)

  jax.tree.map(check, total, params, drawn(kind, probe_keys(6)))


# Parts of a direction and of a sum.


@pytest.mark.parametrize(
  ("kind", "shape", "sizes"),
  [
    ("rademacher", (70,), (40,)),
    *((kind, (3, 5, 133), (2, 1, 37)) for kind in DEFERRED),
  ],
)
def test_a_window_is_that_part_of_the_whole(kind, shape, sizes):
  key, draw = jax.random.key(17), draw_of(kind)
  whole = jax.jit(REFERENCE[kind], static_argnums=1)(key, shape)
  np.testing.assert_array_equal(jax.jit(lambda: draw(key, shape))(), whole)
  window = jax.jit(lambda starts: draw(key, shape, (starts, sizes)))
  room = [size - taken for size, taken in zip(shape, sizes, strict=True)]
  rng = np.random.default_rng(0)
  corners = [tuple(rng.integers(0, most + 1) for most in room) for _ in "1234"]
  for starts in [(0,) * len(shape), tuple(room), *corners]:
    expected = part(whole, starts, sizes)
    np.testing.assert_array_equal(window(starts), expected)


@pytest.mark.parametrize("columns", [32, 64, 70])
@pytest.mark.parametrize("start", [0, 7, 32, 64, 69])
def test_windows_of_signs_draw_the_words_that_they_need(start, columns):
  key, shape = jax.random.key(3), (4, 200)
  whole = signs(key, shape)
  expected = part(whole, (1, start), (2, columns))
  static = lambda: directions.signs(key, shape, ((1, start), (2, columns)))
  np.testing.assert_array_equal(static(), expected)
  words = -(-columns // 32)
  assert words_drawn(static) == 2 * words * (1 + (start % 32 > 0))
  traced = lambda x, aligned: directions.signs(
    key, shape, tiles.Window((1, x), (2, columns), aligned)
  )
  np.testing.assert_array_equal(traced(jnp.asarray(start), False), expected)
  for aligned in (False, True):
    drawn = words_drawn(lambda x, how=aligned: traced(x, how), start)
    assert drawn == 2 * words * (1 + (not aligned))
  if start % 32 == 0:
    np.testing.assert_array_equal(traced(jnp.asarray(start), True), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_parts_of_the_sum(kind):
  params, direction = tree(), KINDS[kind]
  weights = np.array([0.5, -1.25, 0.0, 3.0, -0.1, 0.7], np.float32)
  keys = probe_keys(6)[: len(weights)]
  windows = {
    "half": ((1, 2), (2, 3)),
    "heads": ((1, 0, 1), (1, 2, 2)),
    "vector": ((1,), (2,)),
  }

  @jax.jit
  def blocks(keys, starts):
    made = direction.blocks(keys, jnp.asarray(weights), params)
    window = lambda name: (starts[name], windows[name][1])
    return {name: made[name](window(name)) for name in params}

  sums = blocks(keys, {name: starts for name, (starts, _) in windows.items()})
  for name, z in drawn(kind, probe_keys(6)).items():
    z = np.asarray(z, np.float64)[: len(weights)]
    expected = part(np.tensordot(weights, z, 1), *windows[name])
    assert sums[name].dtype == jnp.float32
    assert sums[name].shape == expected.shape
    bound = 16 * 2.0**-24 * np.abs(weights).sum() * np.abs(z).max()
    assert np.abs(sums[name] - expected).max() < bound


def test_blocks_of_normalized_directions_are_normalized():
  direction = directions.normalized(directions.normal())
  params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}

  @jax.jit
  def sums(keys, weights):
    blocks = direction.blocks(keys, weights, params)
    blocks = jax.tree.map(lambda block: block(None), blocks)
    return blocks, direction.combine(keys, weights, params)

  blocks, whole = sums(probe_keys(1, 4), jnp.array([1.0, -2.0, 0.5, 3.0]))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  jax.tree.map(close, blocks, whole)


def test_blocks_of_huge_leaves_have_counters_of_two_words():
  shape, starts, sizes = (50260, 131072), (50000, 131000), (3, 40)
  high, low = directions._counters(shape, starts, sizes)
  index = (starts[0] + np.arange(3))[:, None] * shape[1]
  index = index + starts[1] + np.arange(40)
  assert index.min() > 2**32
  np.testing.assert_array_equal(high, index >> 32)
  np.testing.assert_array_equal(low, index % 2**32)


def test_sums_that_are_not_in_parts_have_no_blocks():
  plain = directions.rademacher()
  for made in (
    directions.mapped(plain, lambda z: z),
    directions.grouped(plain, aggregators.gaf(1.0), 2),
    directions.normalized(directions.mapped(plain, lambda z: z)),
  ):
    assert made.blocks is None


# Deferred parameters.


@pytest.mark.parametrize("kind", ["rademacher", "sparse"])
def test_deferred_parameters_are_those_that_are_formed(kind):
  params, plain, deferred = tree(), KINDS[kind], DEFERRED[kind]
  first, second = probe_keys(2, 2)

  @jax.jit
  def moved(scales):
    results = []
    for direction in (plain, deferred):
      leaves = params
      for key, scale in zip((first, second), scales, strict=True):
        z = direction.sample(key, params)
        leaves = direction.perturb(leaves, z, scale)
        formed = lambda x: jnp.asarray(x) if perturbed.is_deferred(x) else x
        results.append(
          jax.tree.map(formed, leaves, is_leaf=perturbed.is_deferred)
        )
    return results

  once, twice, deferred_once, deferred_twice = moved(jnp.array([0.3, -0.2]))
  jax.tree.map(np.testing.assert_array_equal, deferred_once, once)

  def check(got, plain):
    # Rounded once, and not at every step of some units.
    got, plain, eps = *map(np.float32, (got, plain)), jnp.finfo(got.dtype).eps
    assert np.abs(got - plain).max() <= eps * np.abs(plain).max()

  jax.tree.map(check, deferred_twice, twice)


def test_deferred_parameters_share_what_is_not_perturbed():
  direction, params = directions.rademacher(deferred=True), tree()
  first, second = probe_keys(2, 2)
  leaves = direction.perturb(params, direction.sample(first, params), 0.3)
  leaves = direction.perturb(leaves, direction.sample(second, params), -0.2)
  leaf = leaves["vector"]
  assert leaf.value is params["vector"] and leaf.keys.shape == (2,)
  np.testing.assert_array_equal(leaf.scales, np.float32([0.3, -0.2]))


def test_what_needs_arrays_refuses_deferred_directions():
  deferred = directions.normal(deferred=True)
  for made in (
    directions.normalized(deferred),
    directions.mapped(deferred, lambda z: z),
  ):
    with pytest.raises(ValueError, match="deferred direction is never formed"):
      made.sample(jax.random.key(0), tree())
