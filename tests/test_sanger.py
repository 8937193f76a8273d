"""The subspaces of Sanger-SPSA: what they amplify, and what they learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import close, quick, stretched

from zorn_jax import estimators

MATRICES = {
  "stack": jnp.zeros((2, 4, 3)),
  "tall": jnp.zeros((5, 3)),
  "vector": jnp.zeros(3),
  "wide": jnp.zeros((3, 5)),
}


def upright(name, matrix):
  """With the smaller side, of three, first."""
  matrix = np.asarray(matrix, np.float64)
  return matrix if name == "wide" else matrix.swapaxes(-1, -2)


def sanger_rule(g, w, rate):
  """Sanger's rule, a column and its predecessors at a time."""
  covariance, new = g @ g.T / np.sum(g**2), w.copy()
  for i in range(w.shape[1]):
    for j in range(i + 1):
      new[:, i] -= rate * w[:, j] * (w[:, j] @ covariance @ w[:, i])
    new[:, i] += rate * covariance @ w[:, i]
    new[:, i] /= np.linalg.norm(new[:, i])
  return new


def test_sanger_amplifies_and_learns_as_numpy_does():
  row = estimators.sanger_spsa(
    0.5, 4, identity=0.25, warmup=5, rank=2, rate=0.3
  )
  central, update = estimators.central_difference(0.5, 4), quick(row.update)
  state, rng = row.init(MATRICES), np.random.default_rng(0)
  plain_update = quick(central.update)
  for step, weight in {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 200: 1.0}.items():
    losses, key = jnp.float32(rng.normal(size=(4, 2))), jax.random.key(step)
    state = state._replace(step=jnp.int32(step))
    grads, new = update(losses, MATRICES, state, key)
    plain, _ = plain_update(losses, MATRICES, (), key)
    np.testing.assert_array_equal(grads["vector"], plain["vector"])
    assert int(new.step) == step + 1
    for name in ("stack", "tall", "wide"):
      g, w = upright(name, plain[name]), np.float64(state.factors[name])
      amplified = 0.25 * g + weight * (w @ w.swapaxes(-1, -2) @ g)
      close(upright(name, grads[name]), amplified)
      learned = [
        sanger_rule(*pair, 0.3)
        for pair in zip(
          g.reshape(-1, 3, g.shape[-1]), w.reshape(-1, 3, 2), strict=True
        )
      ]
      close(new.factors[name], np.reshape(learned, w.shape))
      assert np.abs(learned - w).max() > 1e-2
      close(np.linalg.norm(new.factors[name], axis=-2), 1, rtol=1e-5)
    state = new


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_sanger_finds_the_dominant_directions_in_their_order(shape):
  rng = np.random.default_rng(0)
  left, right = (np.linalg.qr(rng.normal(size=(m, 4)))[0] for m in shape)
  gradient = jnp.float32(left * [8.0, 4.0, 0.5, 0.25] @ right.T)
  row, params = estimators.sanger_spsa(0.5, 256, rank=2), jnp.zeros(shape)
  loss = lambda params, _: jnp.sum(params * gradient)

  def step(state, key):
    losses = row.query(loss, params, (), state, key)
    return row.update(losses, params, state, key)[1], None

  keys = jax.random.split(jax.random.key(0), 300)
  first = row.init(params)
  last, _ = quick(lambda state: jax.lax.scan(step, state, keys))(first)
  truth = (left if shape[0] == 4 else right)[:, :2]
  before, after = (
    np.abs(np.sum(np.asarray(state.factors) * truth, 0))
    for state in (first, last)
  )
  assert before.max() < 0.9 < 0.95 < after.min()


def test_probes_within_are_stretched_and_keep_their_mean_square():
  params = MATRICES | {"wide": jnp.zeros((3, 40)), "tall": jnp.zeros((40, 3))}
  row = estimators.sanger_spsa(0.5, 1, rank=2, warmup=0, subspace_probes=True)
  state = row.init(params)
  update = quick(jax.vmap(row.update, (None, None, None, 0)))
  keys = jax.random.split(jax.random.key(1), 64)
  z, _ = update(jnp.eye(1, 2), params, state, keys)  # Slopes are one.
  assert set(np.unique(z["vector"])) == {-1.0, 1.0}
  for name in ("stack", "tall", "wide"):
    # W starts with orthonormal columns, and what is within counts twice.
    w, amplified = np.float64(state.factors[name]), upright(name, z[name])
    projector = w @ w.swapaxes(-1, -2)
    probes = amplified - projector @ amplified / 2
    signs = np.linalg.solve(stretched(w, 3), probes)
    close(np.abs(signs), 1)
    square = np.mean(probes**2, (-2, -1)).ravel()
    assert abs(square.mean() - 1) < 5 * square.std() / np.sqrt(square.size)


@pytest.mark.parametrize("shape", [(3, 9), (9, 3), (2, 3, 4)])
def test_a_rank_above_the_smaller_side_is_refused(shape):
  params = jax.ShapeDtypeStruct(shape, jnp.float32)
  init = lambda rank: jax.eval_shape(
    estimators.sanger_spsa(0.1, 1, rank=rank).init, params
  )
  assert init(3).factors.shape == (*shape[:-2], 3, 3)
  with pytest.raises(ValueError, match="got rank=4 and .* Choose at most 3"):
    init(4)
