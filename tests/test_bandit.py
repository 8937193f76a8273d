"""The reservoir of bandit-SPSA against its rules, in Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import EPSILON, close, quick

from zorn_jax import directions, estimators

WIDE = 64  # Parameters; no two probes have the same signs.


@functools.cache
def bandit(temperature, exploit=(0.2, 0.9)):
  """State, and programs: directions [n, d] of a step, update, those held."""
  estimator = estimators.bandit_spsa(
    EPSILON,
    6,
    capacity=10,
    temperature=temperature,
    decay=0.9,
    exploit=exploit,
    ramp=(15.0, 4.0),
  )
  params, signs = jnp.zeros(WIDE), directions.rademacher()
  linear = lambda params, slope: params @ slope

  def probes(state, key):
    at = lambda axis: estimator.query(linear, params, axis, state, key)
    return jax.vmap(at)(jnp.eye(WIDE))[..., 0].T / EPSILON

  def held(state):
    return jax.vmap(lambda key: signs.sample(key, params))(state.keys)

  def update(losses, state, key):
    return estimator.update(losses, params, state, key)

  return estimator.init(params), quick(probes), quick(update), quick(held)


def pairs(slopes):
  """Losses with these slopes."""
  return np.float32(np.stack([slopes, -slopes], 1) * EPSILON)


@pytest.mark.parametrize("temperature", [1.0, 1e-4])
def test_the_reservoir_follows_its_rules(temperature):
  """Here probes are known by their directions: {direction: (value, count)}."""
  state, probes, update, held = bandit(temperature)
  model, evicted, rng = {}, 0, np.random.default_rng(0)
  for step in range(40):
    key = jax.random.fold_in(jax.random.key(3), step)
    z = np.asarray(probes(state, key))
    names = [row.tobytes() for row in z]
    old = [name in model for name in names]
    share = 0.2 + 0.7 / (1 + np.exp(-(step - 15) / 4))
    assert sum(old) == min(round(share * 6), len(model))
    assert len(set(names)) == 6  # Drawn without replacement.
    if temperature < 1 and any(old):
      # The steepest come back: the noise is of the order of the temperature.
      chosen = min(model[name][0] for name in names if name in model)
      rest = [value for name, (value, _) in model.items() if name not in names]
      assert chosen > max([0, *rest]) - 2e-3 * max(model.values())[0]

    slopes = z @ np.logspace(0, -3, WIDE) * rng.uniform(0.5, 2)
    losses = pairs(slopes)
    if step % 5 == 4:
      losses[step % 6, 0] = (np.nan, np.inf, -np.inf)[step % 3]
    finite = np.isfinite(losses).all(1)
    grads, state = update(losses, state, key)
    close(grads, slopes[finite] @ z[finite] / finite.sum())

    rewards = np.where(finite, np.abs(slopes), 0)
    queried = {
      name: ((model[name][0] + r) / 2, model[name][1] + 1) if is_old else (r, 1)
      for name, r, is_old in zip(names, rewards, old, strict=True)
    }
    decayed = {name: (0.9 * value, c) for name, (value, c) in model.items()}
    pool = sorted((decayed | queried).items(), key=lambda x: -x[1][0])
    evicted, model = evicted + len(pool[10:]), dict(pool[:10])
    counts, keys = np.asarray(state.counts), np.asarray(held(state))
    free = counts == 0
    assert counts.shape == (10,) and not state.values[free].any()
    seen = [row.tobytes() for row in keys[~free]]
    assert sorted(seen) == sorted(model)
    np.testing.assert_array_equal(
      counts[~free], [model[name][1] for name in seen]
    )
    close(state.values[~free], [model[name][0] for name in seen])
  assert evicted > 20 and counts.max() > 3 and int(state.step) == 40


def test_an_empty_reservoir_gives_the_central_difference():
  state, probes, update, _ = bandit(1.0)
  key, slopes = jax.random.key(4), np.array([1, -2, 0.5, 4, -1, 8])
  grads, _ = update(pairs(slopes), state, key)
  np.testing.assert_allclose(grads, slopes @ probes(state, key) / 6, rtol=1e-5)
  central = estimators.central_difference(EPSILON, 6)
  args = pairs(slopes), jnp.zeros(WIDE), (), jax.random.split(key)[1]
  np.testing.assert_array_equal(grads, quick(central.update)(*args)[0])


@pytest.mark.parametrize("temperature", [0.5, 1e6])
def test_known_probes_are_drawn_as_their_values_say(temperature):
  state, probes, _, held = bandit(temperature, exploit=(1.0, 1.0))
  values = np.array([0.0, 2.0, 4.0, 8.0, 5.0, 7.0, 1.0])
  state = state._replace(
    keys=jax.random.split(jax.random.key(9), 10),
    values=jnp.zeros(10).at[:7].set(jnp.float32(values)),
    counts=jnp.zeros(10, jnp.int32).at[:7].set(1),
  )
  keys = jax.random.split(jax.random.key(5), 512)
  drawn = np.asarray(jax.vmap(probes, (None, 0))(state, keys))
  same = drawn @ np.asarray(held(state)).T == WIDE  # [draws, n, capacity]
  assert same[..., :7].sum() == same.sum() == 512 * 6
  frequency = same[:, 0, :7].mean(0)  # The first of six is a single draw.

  def distance(temperature):
    share = np.exp(values / 8 / temperature)
    share /= share.sum()
    return np.abs(frequency - share) / np.sqrt(share * (1 - share) / 512)

  other = 0.5 if temperature > 1 else 1e6
  assert distance(temperature).max() < 5 < distance(other).max()


@pytest.mark.parametrize("loss", [0.0, np.inf])
def test_a_reservoir_without_a_slope_is_drawn_from_all_the_same(loss):
  state, probes, update, _ = bandit(1e-4)
  for step in range(12):
    key, state = jax.random.key(step), state._replace(step=jnp.int32(99))
    grads, state = update(np.full((6, 2), loss, np.float32), state, key)
    assert not grads.any() and not state.values.any()
  assert state.counts.sum() > 40 and np.isfinite(probes(state, key)).all()
