"""The score of a population by the kernel, against that by XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import directions, kernels, models
from zorn_jax.models import fused

BATCH, LENGTH, VOCAB = 3, 5, 7
DIRECTIONS = {
  "dense": directions.rademacher(deferred=True),
  "rank 1": directions.low_rank(),
  "rank 3": directions.low_rank(3, "normal"),
}

FAST = {"xla_backend_optimization_level": 0}
CASES = [(name, "probes of signs") for name in DIRECTIONS]
CASES += [("dense", "probes one by one"), ("rank 1", "one"), ("dense", "one")]
CASES += [("dense", "rows of probes")]


def scores(implementation, direction, maps, dtype=jnp.float32):
  """Losses, hits and states of probes and signs, mapped in some order."""
  model = models.from_linen(
    models.Recurrent(
      "lstm",
      VOCAB,
      6,
      40,
      2,
      initial_state="trainable",
      dtype=dtype,
      implementation=implementation,
    )
  )
  params = jax.jit(model.init)(jax.random.key(0))
  tokens, targets = jax.random.randint(
    jax.random.key(1), (2, 3, BATCH, LENGTH), 0, VOCAB
  )

  def score(key, scale, index):
    z = direction.sample(key, params)
    moved = direction.perturb(params, z, scale)
    carry = model.initial_carry(moved, BATCH)
    carry, *first = model.score(moved, carry, tokens[index], targets[0])
    carry, *second = model.score(moved, carry, tokens[0], targets[index])
    return carry, first, second

  keys = jax.random.split(jax.random.key(2), 3)
  scales = jnp.asarray([0.1, -0.2])
  index = jnp.arange(3)
  both = jax.vmap(score, (None, 0, None))
  if maps == "probes of signs":
    run, args = jax.vmap(both, (0, None, 0)), (keys, scales, index)
  elif maps == "rows of probes":  # Three by three: not the keys' own axis.
    every = jax.vmap(jax.vmap(both, (None, None, 0)), (0, None, None))
    run, args = every, (keys, scales, index)
  elif maps == "probes one by one":
    every = lambda x: both(x[0], scales, x[1])
    run, args = lambda x: jax.lax.map(every, x), ((keys, index),)
  else:
    run, args = score, (keys[1], scales[1], index[1])
  # Most of the time would go into making it fast.
  return jax.jit(run).lower(*args).compile(FAST)(*args)


@pytest.fixture
def twin(monkeypatch):
  """The kernel's twin in its place, which any device runs."""
  calls = []

  def lstm(*args, implementation, **options):
    assert implementation == "triton"
    calls.append(options)
    return kernels.lstm(*args, implementation="xla", **options)

  monkeypatch.setattr(fused, "kernels", Stub(lstm))
  return calls


class Stub:
  """The module of kernels with another `lstm`."""

  def __init__(self, lstm):
    self.lstm = lstm

  def __getattr__(self, name):
    return getattr(kernels, name)


@pytest.mark.parametrize("direction, maps", CASES)
def test_equals_xla(direction, maps, twin):
  wanted = scores("xla", DIRECTIONS[direction], maps)
  assert not twin
  found = scores("triton", DIRECTIONS[direction], maps)
  assert twin
  for got, want in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, 0, 3e-6)


def test_other_populations_are_refused_or_left_to_xla():
  normal = directions.normal(deferred=True)
  with pytest.raises(ValueError, match="dense directions of signs"):
    scores("triton", normal, "one")
  a, b = (scores(x, normal, "one") for x in (None, "xla"))
  for got, want in zip(*map(jax.tree.leaves, (a, b)), strict=True):
    np.testing.assert_array_equal(got, want)
