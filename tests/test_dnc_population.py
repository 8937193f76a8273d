"""Perturbed members of a DNC's population against each of them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import directions, metrics, models, perturbed
from zorn_jax.models import dnc
from zorn_jax.tasks.types import Chunk

V, PROBES, BATCH, LENGTH = 11, 3, 2, 5
SCALES = (0.1, -0.1)
KEY = jax.eval_shape(lambda: jax.random.key(0))  # Nothing is drawn.


def build(controller="lstm", memory_init="random", **options):
  """A small model whose parameters are nowhere zero."""
  sizes = {
    "embedding_size": 3,
    "hidden_size": 6,
    "num_reads": 2,
    "memory_slots": 8,
    "slot_size": 4,
  } | options
  model = models.from_linen(
    dnc.DNC(V, controller=controller, memory_init=memory_init, **sizes)
  )
  rng = np.random.default_rng(0)

  def draw(x):
    return jnp.asarray(rng.normal(size=x.shape) / 2, x.dtype)

  return model, jax.tree.map(draw, jax.eval_shape(model.init, KEY))


def batch(probes=()):
  rng = np.random.default_rng(1)
  draw = lambda: rng.integers(V, size=(*probes, BATCH, LENGTH))
  return jnp.asarray(draw()), jnp.asarray(draw())


def score(model, params, tokens, targets, parts):
  """Losses and hits [B, T], and the state after the last of the parts."""
  carry = model.initial_carry(params, BATCH)
  found = []
  for part in parts:
    chunk = Chunk(tokens[:, part], targets[:, part], jnp.ones(()))
    carry, *values = metrics.score(model, params, carry, chunk)
    found.append(values)
  return *(jnp.concatenate(x, -1) for x in zip(*found, strict=True)), carry


def drawn(params, rank):
  """Directions of all probes as of `directions.low_rank`, not compiled."""
  rng = np.random.default_rng(5)

  def sign(*shape):
    return jnp.asarray(2 * rng.integers(2, size=shape) - 1, jnp.float32)

  def draw(x):
    if x.ndim < 2:
      return sign(PROBES, *x.shape)
    m, k = x.shape
    return directions.Factors(sign(PROBES, rank, m), sign(PROBES, rank, k))

  return jax.tree.map(draw, params)


def check(model, params, rank=1, own_data=False):
  """Compares pairs of probes in two chunks with formed parameters in one."""
  tokens, targets = batch((PROBES,) if own_data else ())
  perturb, z = directions.low_rank(rank).perturb, drawn(params, rank)

  def member(z, tokens, targets, scale):
    parts = (slice(0, 2), slice(2, None))
    return score(model, perturb(params, z, scale), tokens, targets, parts)

  data = 0 if own_data else None
  pair = jax.vmap(member, (None, None, None, 0))
  population = jax.jit(jax.vmap(pair, (0, data, data, None)))
  got = population(z, tokens, targets, jnp.asarray(SCALES))

  @jax.jit
  def alone(z, tokens, targets, scale):
    formed = perturbed.materialize(perturb(params, z, scale))
    return score(model, formed, tokens, targets, (slice(None),))

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
  for i in range(PROBES):
    zi = jax.tree.map(lambda x: x[i], z)  # noqa: B023
    row = (tokens[i], targets[i]) if own_data else (tokens, targets)
    for j, scale in enumerate(SCALES):
      losses, hits, carry = jax.tree.map(lambda x: x[i, j], got)  # noqa: B023
      expected = alone(zi, *row, scale)
      close(losses, expected[0])
      np.testing.assert_array_equal(hits, expected[1])
      jax.tree.map(close, carry, expected[2])


@pytest.mark.parametrize(
  ("controller", "memory_init", "rank", "own_data", "options"),
  [
    ("lstm", "random", 1, False, {}),
    ("lstm", "zeros", 2, True, {"num_reads": 3, "memory_slots": 5}),
    ("rnn", "random", 2, False, {"num_reads": 1, "slot_size": 0}),
    ("rnn", "zeros", 1, True, {"memory_slots": 1}),
  ],
)
def test_members_score_as_alone(
  controller, memory_init, rank, own_data, options
):
  model, params = build(controller, memory_init, **options)
  check(model, params, rank, own_data)


def test_a_population_shares_its_products():
  model, params = build()
  tokens, _ = batch()
  perturb, z = directions.low_rank(1).perturb, drawn(params, 1)

  def logits(z):
    carry = model.initial_carry(params, BATCH)
    return model.apply(perturb(params, z, 0.1), carry, tokens)[1]

  program = str(jax.make_jaxpr(jax.vmap(logits))(z))
  products = [x for x in program.splitlines() if "dot_general" in x]
  # With the matrices [C + H, 4 H], [H, 3 S + R S] and [H, 1], rows of all.
  for out in (24, 20, 1):
    assert any(f":f32[{PROBES},2,{out}] = " in x for x in products)
  # No member has a matrix of its own.
  for m, k in ((24, 17), (20, 6), (11, 14)):
    assert f"f32[{PROBES},{m},{k}]" not in program
    assert f"f32[{PROBES},{k},{m}]" not in program


def test_only_some_of_the_stacked_matrices_may_be_perturbed():
  model, params = build()
  tokens, targets = batch()
  z = jax.tree.map(lambda x: x[0], drawn(params, 1))
  moved = directions.low_rank(1).perturb(params, z, 0.1)
  for name in ("controller_weight_ih", "fc_erase_vector_weight"):
    moved[name] = params[name]
  whole = jax.jit(lambda x: score(model, x, tokens, targets, (slice(None),))[0])
  formed = perturbed.materialize(moved)
  np.testing.assert_allclose(whole(moved), whole(formed), rtol=0, atol=2e-5)
