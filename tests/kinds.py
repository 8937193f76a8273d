"""Directions of every kind, and parameters to draw them for."""

import functools

import jax
import jax.numpy as jnp

from zorn_jax import directions, perturbed
from zorn_jax.estimators import stencil

KINDS = {
  "rademacher": directions.rademacher(),
  "normal": directions.normal(),
  "uniform": directions.uniform(),
  "sparse": directions.sparse(0.3),
  "sparse_uniform": directions.sparse(0.6, "uniform"),
  "low_rank_1": directions.low_rank(),
  "low_rank_2_normal": directions.low_rank(2, "normal"),
}

signs = jax.jit(directions.signs, static_argnums=1)


def tree(seed=0):
  """Parameters with all that a direction treats apart."""
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    "half": jax.random.normal(keys[0], (3, 5), jnp.bfloat16),
    "heads": jax.random.normal(keys[1], (2, 2, 3)),
    "vector": jax.random.normal(keys[2], (3,)),
  }


def probe_keys(seed, count=7):
  return stencil.probe_keys(jax.random.key(seed), count)


@functools.cache
def programs(kind):
  """Draw, move and combine, each compiled once for all tests of a kind.

  Apart they compile in half of the time: XLA copies the generator of random
  bits into everything that reads them.
  """
  direction = KINDS[kind]

  def draw(keys, params):
    return jax.vmap(lambda key: direction.sample(key, params))(keys)

  def move(params, z, scale):
    one = lambda z: perturbed.materialize(direction.perturb(params, z, scale))
    return jax.vmap(one)(z)

  return jax.jit(draw), jax.jit(move), jax.jit(direction.combine)
