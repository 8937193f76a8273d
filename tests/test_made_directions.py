"""Directions made of directions, and lengths of probes that are learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import SIZE, adaptive, close, flat, params_of, quick, scales

import zorn_jax
from zorn_jax import aggregators, directions, estimators, probe_map

BASE = directions.low_rank(2, "normal")  # The vector has a dense direction.
MIX = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
MADE = {  # And the directions [n, d] that they make of others.
  "l1": (
    directions.normalized(BASE, "l1"),
    lambda z: SIZE * z / np.abs(z).sum(1, keepdims=True),
  ),
  "l2": (
    directions.normalized(BASE),
    lambda z: z * np.sqrt(SIZE / np.sum(z**2, 1, keepdims=True)),
  ),
  "mapped": (
    directions.mapped(
      BASE, lambda z: {"matrix": MIX @ z["matrix"], "vector": z["vector"] / 2}
    ),
    lambda z: np.concatenate(
      [(MIX @ z[:, :12].reshape(-1, 4, 3)).reshape(-1, 12), z[:, 12:] / 2], 1
    ),
  ),
  "grouped": (directions.grouped(BASE, aggregators.mean(), 3), lambda z: z),
}


# Directions made of directions.


@pytest.mark.parametrize("name", MADE)
def test_a_combination_is_the_sum_of_the_samples(name):
  made, formula = MADE[name]
  params, keys = (
    params_of(np.zeros(SIZE)),
    jax.random.split(jax.random.key(0), 6),
  )
  coefficients = np.random.default_rng(1).normal(size=6)

  def samples(direction):
    one = lambda key: flat(
      direction.perturb(params, direction.sample(key, params), jnp.ones(()))
    )
    return jax.vmap(one)(keys)

  @quick
  def run(c):
    total = made.combine(keys, c, params, probe_map.sequential(4))
    return flat(total), samples(made), samples(BASE)

  total, z, base = run(jnp.float32(coefficients))
  close(z, formula(np.asarray(base, np.float64)))
  close(total, coefficients @ np.asarray(z, np.float64))


def test_a_contrary_group_is_dropped():
  signs, params = directions.rademacher(), jnp.zeros(32)
  gaf = directions.grouped(signs, aggregators.gaf(1.0), 3)
  keys = jax.random.split(jax.random.key(0))[np.array([0, 0, 0, 0, 1, 1])]
  z = np.asarray(quick(jax.vmap(lambda key: signs.sample(key, params)))(keys))
  # Groups of two: z, -z and what has a positive product with z.
  sign = np.sign(z[0] @ z[4])
  coefficients = jnp.float32(np.array([1, 1, -2, -1, sign, sign]) / 6)
  total = quick(gaf.combine)(keys, coefficients, params)
  np.testing.assert_allclose(total, (z[0] + sign * z[4]) / 2, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_directions_add_up(rank):
  direction, rng = directions.low_rank(rank, "normal"), np.random.default_rng(0)
  shapes = {"matrix": (4, 3), "stack": (2, 3, 4), "vector": (5,)}
  params = {name: jnp.float32(rng.normal(size=s)) for name, s in shapes.items()}

  @quick
  def run(params, x):
    z, u = (direction.sample(jax.random.key(i), params) for i in range(2))
    twice = direction.perturb(direction.perturb(params, z, 0.5), u, -2.0)
    assert twice["matrix"].left.shape == (2 * rank, 4)
    zeros = jax.tree.map(jnp.zeros_like, params)
    parts = [flat(direction.perturb(zeros, v, 1.0)) for v in (z, u)]
    return flat(twice), *parts, zorn_jax.matmul(x, twice["matrix"])

  x = rng.normal(size=(2, 4))
  total, z, u, product = run(params, jnp.float32(x))
  expected = np.asarray(flat(params)) + 0.5 * z - 2 * u
  close(total, expected)
  close(product, x @ np.float64(expected[:12]).reshape(4, 3))


# Longer probes.


def test_probes_are_longer_where_the_gradient_has_been_small():
  params = {"flat": jnp.zeros(8), "steep": jnp.zeros((4, 2))}
  loss = lambda params, _: (
    jnp.sum(params["steep"]) + 1e-2 * jnp.sum(params["flat"])
  )
  row = adaptive(0.5, 256)  # Many: their noise is the same in all entries.

  def lengths(state):  # All weight is on the first probe.
    losses = jnp.zeros((256, 2)).at[0, 0].set(256.0)
    grads, _ = row.update(losses, params, state, jax.random.key(0))
    return jnp.abs(flat(grads))

  def step(state, key):
    losses = row.query(loss, params, (), state, key)
    grads, new = row.update(losses, params, state, key)
    moments = flat(state.moment), flat(new.moment)
    return new, (lengths(state), flat(grads), *moments)

  keys, state = jax.random.split(jax.random.key(1), 10), row.init(params)
  state, history = quick(lambda s: jax.lax.scan(step, s, keys))(state)
  long, grads, before, after = (np.asarray(x, np.float64) for x in history)
  np.testing.assert_allclose(after, (before + grads**2) / 2, rtol=1e-5)
  np.testing.assert_array_equal(long[0], 1)
  for scale, moment in zip(long[1:], before[1:], strict=True):
    np.testing.assert_allclose(scale, scales(moment), rtol=1e-4)
  assert long[-1, :8].min() > 1.5 * long[-1, 8:].max()


def test_without_slopes_no_probe_gets_longer_and_inner_states_go_on():
  make = lambda direction: estimators.bandit_spsa(
    0.5, 2, capacity=9, direction=direction
  )
  row = estimators.adaptive(make, directions.rademacher(), 0.9)
  update, params, key = quick(row.update), jnp.zeros(5), jax.random.key(0)
  state = row.init(params)
  for _ in range(2):
    grads, state = update(jnp.ones((2, 2)), params, state, key)
    assert not grads.any()
  np.testing.assert_array_equal(
    np.abs(update(2 * jnp.eye(2)[::-1] * jnp.eye(2, 1), params, state, key)[0]),
    np.ones(5),
  )
  assert int(state.inner.step) == 2 and int(state.inner.counts.sum()) == 4


def test_what_overflows_is_not_learned():
  row = adaptive(0.5, 1)
  update, params, key = quick(row.update), jnp.zeros(5), jax.random.key(0)
  state = row.init(params)
  _, state = update(jnp.asarray([[2.0, 1.0]]), params, state, key)
  grads, after = update(jnp.asarray([[1e20, 0.0]]), params, state, key)
  assert np.all(np.isfinite(grads)) and np.abs(grads).min() > 2e19
  np.testing.assert_array_equal(after.moment, state.moment)


# Mistakes.


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_wrong_decay_of_the_moment_is_refused(decay):
  with pytest.raises(ValueError, match=f"0, 1.*got {decay}. Choose 0.99"):
    estimators.adaptive(lambda direction: None, BASE, decay)


def test_wrong_options_of_directions_are_refused():
  with pytest.raises(ValueError, match="unknown norm 'l3'. Choose l1 or l2"):
    directions.normalized(BASE, "l3")
  with pytest.raises(ValueError, match="groups must be positive, got 0. Choo"):
    directions.grouped(BASE, aggregators.mean(), 0)
  keys, grouped = jax.random.split(jax.random.key(0), 7), MADE["grouped"][0]
  with pytest.raises(ValueError, match="groups=3 and 7 probes. Choose a div"):
    grouped.combine(keys, jnp.ones(7), jnp.zeros(3))
