"""The peers of the benchmark: they compute what zorn_jax computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zorn_jax import models
from zorn_jax.bench import jax_peer

V, B, T = 11, 3, 5
EPSILON, RATE, PROBES = 0.01, 0.1, 4

MODULES = {
  "lstm": models.Recurrent(
    "lstm", V, 6, 8, 2, initial_state="trainable", forget_bias=0.5
  ),
  "lstm_one_head": models.Recurrent(
    "lstm", V, 6, 4, 1, initial_state="trainable"
  ),
  "lstm_large_vocabulary": models.Recurrent("lstm", 2 * B * T, 6, 8, 2),
  "dnc": models.DNC(V, 5, 6, 2, 4, 3),
  "dnc_rnn": models.DNC(V, 5, 6, 1, 4, controller="rnn"),
  "dnc_zeros": models.DNC(V, 5, 6, 2, 4, 3, "rnn", "zeros"),
}


@pytest.fixture(scope="module")
def peer():
  pytest.importorskip("torch")
  from zorn_jax.bench import torch_peer

  return torch_peer


@pytest.fixture(scope="module")
def es():
  pytest.importorskip("evosax")
  from zorn_jax.bench import evosax_peer

  with jax.numpy_rank_promotion("allow"):  # evosax adds [P] to [2n, P].
    yield evosax_peer


@functools.cache
def problem(name):
  """Parameters, what the torch loss is made of, and loss and gradient."""
  model = models.from_linen(MODULES[name])
  batch = 1 if "one" in name else B  # Where views may alias parameters.
  rng = np.random.default_rng(1)
  # Biases, initial states and scales of norms are not what they start at.
  params = jax.tree.map(
    lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32),
    jax.jit(model.init)(jax.random.key(0)),
  )
  tokens = rng.integers(0, MODULES[name].vocab_size, (batch, T + 1))
  weights = rng.uniform(0, 2, (batch, T)).astype(np.float32)
  inputs, targets = tokens[:, :-1], tokens[:, 1:]

  @jax.value_and_grad
  def loss_fn(params):
    carry = model.initial_carry(params, batch)
    _, logits = model.apply(params, carry, jnp.asarray(inputs))
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.asarray(targets)
    )
    return jnp.sum(losses * weights) / jnp.sum(weights)

  arrays = jax.tree.map(np.asarray, params)
  data = (inputs, targets, weights)
  if "dnc" in name:
    memory = model.initial_carry(params, 1).memory[0]
    data = (*data, np.asarray(memory), MODULES[name].memory_slots)
  return arrays, data, jax.jit(loss_fn)(params)


def torch_loss(peer, name):
  """The torch loss of (named parameters), and the parameters."""
  arrays, data, _ = problem(name)
  build = peer.dnc if "dnc" in name else peer.lstm
  return build(arrays, *data), peer.parameters(arrays)


@pytest.mark.parametrize("name", MODULES)
def test_torch_has_the_models_loss_and_gradient(peer, name):
  import torch

  arrays, _, (expected, grads) = problem(name)
  expected = pytest.approx(float(expected), rel=1e-5)
  loss, params = torch_loss(peer, name)
  before = params.flat.clone()
  with torch.inference_mode():  # Where the loss uses its memory again.
    assert float(loss(params.named)) == expected
  assert torch.equal(params.flat, before)
  assert float(peer.bptt_step(loss, params, 1.0)) == expected
  for key, grad in grads.items():
    step = arrays[key] - params.named[key].numpy()
    np.testing.assert_allclose(step, grad, atol=3e-6, err_msg=key)


@pytest.mark.parametrize("name", ["lstm", "dnc"])
def test_torch_restores_what_it_perturbs(peer, name):
  loss, params = torch_loss(peer, name)
  before = params.flat.numpy().copy()
  peer.central_difference_step(loss, params, PROBES, EPSILON, 0.0, 3)
  # Three sums a probe, each of which rounds by half a unit.
  bound = 1.5 * PROBES * np.spacing(np.abs(before) + 2 * np.float32(EPSILON))
  assert np.all(np.abs(params.flat.numpy() - before) <= bound)


@pytest.mark.parametrize("name", ["lstm", "dnc"])
def test_torch_adds_directions_by_their_coefficients(peer, name):
  import torch

  loss, params = torch_loss(peer, name)
  before = params.flat.numpy().copy()
  losses = peer.central_difference_step(
    loss, params, PROBES, EPSILON, RATE, 3
  ).numpy()
  draw = peer.directions(len(before))
  z = np.stack([draw(3 * PROBES + i).numpy().copy() for i in range(PROBES)])
  coefficients = (losses[:, 0] - losses[:, 1]) / (2 * EPSILON)
  step = RATE * coefficients.astype(np.float64) @ z / PROBES
  assert np.abs(step).max() > 1e-3
  np.testing.assert_allclose(params.flat.numpy() - before, -step, atol=2e-6)
  for sign, column in ((1, 0), (-1, 1)):
    for row, value in zip(z, losses[:, column], strict=True):
      params.flat.copy_(torch.from_numpy(before + sign * EPSILON * row))
      assert float(loss(params.named)) == pytest.approx(value, rel=1e-5)


def test_torch_signs_are_balanced_and_independent(peer):
  count, rows = 1001, 64  # Not a multiple of a word.
  draw = peer.directions(count)
  z = np.stack([draw(seed).numpy().copy() for seed in range(rows)])
  assert z.shape == (rows, count) and set(np.unique(z)) == {-1.0, 1.0}
  assert abs(z.mean()) < 5 / np.sqrt(z.size)
  # Each place within a word, and pairs of neighbours, seeds and words.
  for place in range(64):
    part = z[:, place::64]
    assert abs(part.mean()) < 5 / np.sqrt(part.size), place
  for other in (np.roll(z, 1, 0), *(np.roll(z, k, 1) for k in (1, 32, 64))):
    assert abs(np.mean(z * other)) < 5 / np.sqrt(z.size)
  np.testing.assert_array_equal(draw(5).numpy(), z[5])


def test_torch_leaves_the_global_generator(peer):
  import torch

  before = torch.get_rng_state()
  peer.directions(100)(7)
  assert torch.equal(torch.get_rng_state(), before)


TARGET = {"a": np.linspace(-1, 1, 6), "b": np.ones((2, 3))}


def quadratic(params, batch):
  terms = jax.tree.map(
    lambda x, y: jnp.sum((x - jnp.asarray(y, x.dtype)) ** 2), params, TARGET
  )
  return batch * (terms["a"] + terms["b"])


def zeros():
  return jax.tree.map(lambda x: jnp.zeros(x.shape), TARGET)


def descend(step, state):
  """The mean loss in the first and the last of 60 steps, and the state."""
  batch, losses = jnp.float32(0.5), []
  for index in range(60):
    state, values = step(state, batch, jax.random.key(index))
    losses.append(float(jnp.mean(values)))
  assert step._cache_size() == 1
  return losses[0], losses[-1], state


def test_dense_vmap_step_descends():
  params = zeros()
  step, state = jax_peer.dense_vmap_step(quadratic, params, 8, 0.01, 0.3, 4)
  first, last, state = descend(step, state)
  assert last < 1e-3 * first
  np.testing.assert_allclose(state["a"], TARGET["a"], atol=0.03)
  assert not params["a"].is_deleted()


def test_dense_vmap_step_is_the_estimate_whatever_its_batches():
  def run(batch_size):
    step, state = jax_peer.dense_vmap_step(
      quadratic, zeros(), 8, 0.01, 0.1, batch_size
    )
    return step(state, jnp.float32(0.5), jax.random.key(0))

  params, losses = run(2)
  assert losses.shape == (8, 2)
  pairs = zip(
    jax.tree.leaves((params, losses)), jax.tree.leaves(run(8)), strict=True
  )
  for x, y in pairs:
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  # Of many probes, the step is that of the gradient, here x - target.
  step, state = jax_peer.dense_vmap_step(
    quadratic, zeros(), 4096, 0.01, 1.0, 512
  )
  params, _ = step(state, jnp.float32(0.5), jax.random.key(0))
  norm = np.sqrt(sum(np.sum(x**2) for x in TARGET.values()))
  np.testing.assert_allclose(
    params["a"], TARGET["a"], atol=5 * norm / np.sqrt(4096)
  )
  with pytest.raises(ValueError, match="batch_size must divide num_probes"):
    run(3)


def test_open_es_descends(es):
  step, state = es.open_es_step(quadratic, zeros(), 16, 0.01, 0.3)
  before = np.asarray(state.mean)
  first, last, state = descend(step, state)
  assert last < 0.01 * first and before.shape == (12,)
  np.testing.assert_allclose(state.mean[:6], TARGET["a"], atol=0.05)
  with pytest.raises(ValueError, match="population_size must be even"):
    es.open_es_step(quadratic, zeros(), 15, 0.01, 0.3)


def test_open_es_has_antithetic_pairs(es):
  linear = lambda params, batch: jnp.sum(params["a"]) * batch
  step, state = es.open_es_step(linear, zeros(), 16, 0.01, 0.0)
  _, losses = step(state, jnp.float32(1), jax.random.key(2))
  np.testing.assert_allclose(losses[:8], -losses[8:], rtol=1e-5)
  assert np.std(losses[:8]) > 1e-3
