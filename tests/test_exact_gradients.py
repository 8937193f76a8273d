"""Gradients that are exact: in forward mode, and of the readout."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from rows import close, quick

import zorn_jax
from zorn_jax import (
  build,
  directions,
  estimators,
  methods,
  metrics,
  perturbed,
  tasks,
)

# Forward mode.


@pytest.mark.parametrize("kind", ["rademacher", "normal", "low_rank"])
def test_forward_gradients_are_exact(kind):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(3, 2, 5)), rng.normal(size=(5, 4))
  direction, seen = getattr(directions, kind)(), []
  row = estimators.forward_gradient(
    3, direction=direction, batch_per_probe=True
  )

  def loss(params, batch):
    seen.append(isinstance(params["w"], perturbed.Perturbed))
    return jnp.sum(jnp.tanh(zorn_jax.matmul(batch, params["w"])) ** 2)

  params, key = {"w": jnp.float32(w)}, jax.random.key(0)

  @quick
  def step(batch):
    losses = row.query(loss, params, batch, (), key)
    update = lambda slopes: row.update(
      jnp.stack([slopes, slopes], 1), params, (), key
    )[0]["w"]
    return losses, update(losses[:, 1]), jax.vmap(update)(3 * jnp.eye(3))

  losses, grads, z = (np.asarray(y, np.float64) for y in step(jnp.float32(x)))
  assert set(seen) == {kind == "low_rank"}
  options = inspect.signature(estimators.forward_gradient).parameters
  assert "epsilon" not in options
  tanh = np.tanh(x @ w)
  gradients = x.swapaxes(1, 2) @ (2 * tanh * (1 - tanh**2))
  slopes = np.sum(gradients * z, (1, 2))
  np.testing.assert_allclose(losses[:, 0], np.sum(tanh**2, (1, 2)), rtol=1e-5)
  np.testing.assert_allclose(losses[:, 1], slopes, rtol=1e-4)
  close(grads, np.tensordot(slopes, z, 1) / 3)


# The exact readout.


@pytest.fixture(scope="module")
def copying():
  made = build.experiment(small.config(task__max_length=10, task__time_chunk=4))
  task, params = made.task, quick(made.model.init)(jax.random.key(0))
  assert task.num_chunks(task.max_length) == 6
  split = tasks.Split((), tasks.first_batch(task, ()), 6)
  return made.model, task, params, split


def test_the_readout_gradient_is_that_of_the_mean_loss(copying):
  model, task, params, split = copying
  readout = {name: params[name] for name in model.readout}
  assert readout and len(readout) < len(params)
  loss = lambda readout: metrics.mean_loss(model, task, params | readout, split)
  expected = quick(jax.grad(loss))(readout)
  grads = quick(
    lambda params: methods.readout_gradient(model, task, params, split)
  )(params)
  assert set(grads) == set(expected)
  for name, grad in expected.items():
    size = np.abs(grad).max()
    assert size > 1e-3
    np.testing.assert_allclose(grads[name], grad, rtol=1e-5, atol=1e-6 * size)


def test_the_readout_gradient_holds_one_chunk_of_time(copying):
  model, task, params, split = copying

  def temporary(gradient, chunks):
    longer = split._replace(num_chunks=chunks)
    program = jax.jit(lambda params: gradient(longer, params))
    compiled = program.lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  readout = lambda split, params: methods.readout_gradient(
    model, task, params, split
  )
  through_time = lambda split, params: jax.grad(
    lambda params: metrics.mean_loss(model, task, params, split)
  )(params)
  growth = lambda of: (temporary(of, 1100) - temporary(of, 100)) / 1000
  assert growth(readout) <= 4  # Bytes for each chunk: its number.
  assert growth(through_time) > 1000
