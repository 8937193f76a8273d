"""Smoothing, agreement, signal and noise, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import diagnostics, directions, estimators, materialize

SIZE = 12


def symmetric(seed=0):
  matrix = np.random.default_rng(seed).normal(size=(SIZE, SIZE))
  return np.float32(matrix + matrix.T)


def quadratic(params, batch):
  hessian, b = batch
  params = materialize(params)
  x = jnp.concatenate([params["a"].ravel(), params["b"]])
  return x @ hessian @ x / 2 + b @ x


def params_of(x):
  x = jnp.float32(x)
  return {"a": x[:8].reshape(2, 4), "b": x[8:]}


def case(seed=0):
  """Parameters, the batch of a quadratic, and its gradient there."""
  rng = np.random.default_rng(seed + 1)
  hessian = symmetric(seed)
  x, b = np.float32(rng.normal(size=(2, SIZE)))
  return params_of(x), (jnp.asarray(hessian), jnp.asarray(b)), hessian @ x + b


# The smoothed loss.


@pytest.mark.parametrize("kind", ["rademacher", "normal", "low_rank"])
def test_the_gap_of_a_quadratic_is_its_trace(kind):
  params, batch, _ = case()
  epsilon, trace = 0.3, np.trace(batch[0])
  gap = jax.jit(diagnostics.smoothing_gap, static_argnums=0, static_argnames=(
    "epsilon", "num_probes", "direction"))(
    quadratic, params, batch, jax.random.key(0), epsilon=epsilon,
    num_probes=20000, direction=getattr(directions, kind)(),
  )  # fmt: skip
  wanted = epsilon**2 / 2 * trace
  error = float(gap.standard_error)
  assert abs(gap.value - wanted) < 5 * error < abs(wanted)
  # The standard error is that of zᵀHz, known for signs and normal numbers.
  frobenius = np.sum(np.square(batch[0]))
  diagonal = np.sum(np.square(np.diag(batch[0])))
  power = {"rademacher": 2 * (frobenius - diagonal), "normal": 2 * frobenius}
  if kind in power:
    known = epsilon**2 / 2 * np.sqrt(power[kind] / 20000)
    assert error == pytest.approx(known, rel=0.05)


def test_signs_see_a_diagonal_without_spread():
  params = params_of(np.arange(SIZE))
  hessian = np.diag(np.arange(1.0, SIZE + 1))
  batch = jnp.float32(hessian), jnp.zeros(SIZE)
  key = jax.random.key(0)
  gap = diagnostics.smoothing_gap(
    quadratic, params, batch, key, epsilon=0.5, num_probes=4
  )
  assert gap.value == pytest.approx(0.125 * 78, rel=1e-5)
  assert gap.standard_error < 1e-4


def test_the_gap_is_that_of_the_loss_with_all_its_powers():
  # E f(εz) of cos: cos(ε)^d for signs, exp(-d ε²/2) for normal numbers.
  loss = lambda params, _: jnp.cos(jnp.sum(params))
  for kind, mean in (
    (directions.rademacher(), np.cos(0.5) ** 6),
    (directions.normal(), np.exp(-6 * 0.125)),
  ):
    gap = diagnostics.smoothing_gap(
      loss,
      jnp.zeros(6),
      (),
      jax.random.key(1),
      epsilon=0.5,
      num_probes=40000,
      direction=kind,
    )
    assert abs(gap.value - (mean - 1)) < 5 * gap.standard_error < 0.02


# Agreement with the exact gradient.


def linear(size, seed=0):
  gradient = np.random.default_rng(seed).normal(size=size)
  gradient = jnp.float32(gradient)
  return lambda params, _: gradient @ params, gradient


@pytest.mark.parametrize("num_probes", [8, 64])
def test_estimates_of_a_linear_loss_follow_the_law(num_probes):
  size = 500
  loss, _ = linear(size)
  estimator = estimators.central_difference(0.5, num_probes)
  keys = jax.random.split(jax.random.key(3), 400)
  compare = jax.jit(diagnostics.agreement, static_argnums=(0, 1))
  found = compare(estimator, loss, jnp.zeros(size), (), keys)
  law = diagnostics.expected_cosine(num_probes, size)
  # The law is of mean powers; a mean of roots of chi-squares is below it.
  wanted = law * (1 - 1 / (4 * num_probes))
  error = 5 * float(found.standard_error)
  assert abs(found.cosine - wanted) < error < 0.1 * law
  # ‖ĝ‖² is a chi-square of n over 400 estimates.
  bound = 5 * np.sqrt(2 / num_probes / 400)
  snr = num_probes / 499
  assert found.signal_to_noise == pytest.approx(snr, rel=bound)


def test_the_exact_gradient_is_the_one_of_back_propagation():
  params, batch, gradient = case()
  exact = lambda losses, params, state, key: (params_of(gradient), state)
  estimator = estimators.central_difference(0.1, 2)._replace(update=exact)
  keys = jax.random.split(jax.random.key(0), 2)
  found = diagnostics.agreement(estimator, quadratic, params, batch, keys)
  assert found.cosine == pytest.approx(1, abs=1e-6)
  assert found.signal_to_noise > 1e10
  twice = lambda *args: (params_of(-2 * gradient), ())
  found = diagnostics.agreement(
    estimator._replace(update=twice), quadratic, params, batch, keys
  )
  assert found.cosine == pytest.approx(-1, abs=1e-6)
  assert found.signal_to_noise == pytest.approx(1 / 9, rel=1e-5)


def test_the_cosine_is_that_of_all_leaves():
  a = {"x": jnp.array([3.0, 0.0]), "y": jnp.array([4.0], jnp.bfloat16)}
  b = {"x": jnp.array([1.0, 0.0]), "y": jnp.array([0.0], jnp.bfloat16)}
  found = diagnostics.cosine(a, b)
  assert found == pytest.approx(0.6) and found.dtype == jnp.float32


# Signal and noise, from losses.


def pairs(epsilon, num_probes, direction=None, seed=0):
  params, batch, gradient = case(seed)
  estimator = estimators.central_difference(
    epsilon, num_probes, direction=direction
  )
  query = jax.jit(estimator.query, static_argnums=0)
  losses = query(quadratic, params, batch, (), jax.random.key(5))
  return losses, np.asarray(batch[0]), gradient


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
def test_signal_to_noise_of_a_quadratic(epsilon):
  losses, hessian, gradient = pairs(epsilon, 20000)
  off_diagonal = np.sum(hessian**2) - np.sum(np.diag(hessian) ** 2)
  law = 2 * np.sum(gradient**2) / epsilon**2 / off_diagonal
  found = diagnostics.signal_to_noise(losses)
  assert found == pytest.approx(law, rel=0.06)
  normal, *_ = pairs(epsilon, 20000, directions.normal())
  law *= off_diagonal / np.sum(hessian**2)
  assert diagnostics.signal_to_noise(normal) == pytest.approx(law, rel=0.06)


def test_signal_to_noise_by_hand():
  losses = np.array([[3.0, 1.0], [2.0, 4.0], [7.0, 7.0]])
  # Half differences 1, -1, 0; means 2, 3, 7, whose variance is 7.
  assert diagnostics.signal_to_noise(losses) == pytest.approx(2 / 3 / 7)
  many = np.stack([losses, 2 * losses + 5])
  np.testing.assert_allclose(
    diagnostics.signal_to_noise(many), [2 / 21, 2 / 21], rtol=1e-6
  )
  spoiled = np.concatenate([losses, [[np.nan, 1.0], [1.0, np.inf]]])
  assert diagnostics.signal_to_noise(spoiled) == pytest.approx(2 / 21)
  # A large common part does not drown what is small.
  shifted = diagnostics.signal_to_noise(losses + 2.0**20)
  assert shifted == pytest.approx(2 / 21)


# The law and its inverse.


def test_the_law_by_hand():
  expected = diagnostics.expected_cosine
  assert expected(1, 3) == pytest.approx(0.5)
  assert expected(512, 10**9) == pytest.approx(7.155e-4, rel=1e-3)
  assert expected(4, 4, noise=2.0) == pytest.approx(0.5)
  assert expected(4, 4, noise=2.0, batch_per_probe=False) == pytest.approx(0.5)
  shared = expected(10**9, 4, noise=3.0, batch_per_probe=False)
  assert shared == pytest.approx(0.5)


@pytest.mark.parametrize("batch_per_probe", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_the_probes_needed_are_the_fewest(batch_per_probe, noise):
  for cosine in (0.01, 0.3, 0.6):
    options = {"noise": noise, "batch_per_probe": batch_per_probe}
    n = diagnostics.probes_needed(cosine, 24885, **options)
    assert diagnostics.expected_cosine(n, 24885, **options) >= cosine
    assert diagnostics.expected_cosine(n - 1, 24885, **options) < cosine
  assert (
    diagnostics.probes_needed(0.5, 3) == 1
  )  # Exactly, in spite of rounding.


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: diagnostics.probes_needed(1.0, 3), "got 1.0. Choose"),
    (lambda: diagnostics.probes_needed(0.5, 0), "size=0"),
    (lambda: diagnostics.probes_needed(0.5, 3, -1.0), "noise=-1.0"),
    (
      lambda: diagnostics.probes_needed(0.9, 3, 1.0, False),
      "stays below 0.707",
    ),
    (lambda: diagnostics.expected_cosine(0, 3), "got 0. Choose"),
    (lambda: diagnostics.signal_to_noise(np.ones((1, 2))), "got 1. Use"),
    (
      lambda: diagnostics.smoothing_gap(
        linear(2)[0],
        jnp.zeros(2),
        (),
        jax.random.key(0),
        epsilon=1.0,
        num_probes=1,
      ),
      "got 1. Use",
    ),
  ],
)
def test_mistakes_are_named_with_their_remedy(call, message):
  with pytest.raises(ValueError, match=message):
    call()
