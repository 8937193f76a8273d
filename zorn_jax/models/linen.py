"""A Flax Linen module as a model."""

import flax.linen as nn
import jax.numpy as jnp

from zorn_jax import types
from zorn_jax.models.types import Model


def variables(module: nn.Module, key: types.Key):
  """The first variables of a module, by their collections."""

  def first_token(module):
    return module(module.initial_carry(1), jnp.zeros((1, 1), jnp.int32))

  return module.init(key, method=first_token)


def from_linen(module: nn.Module) -> Model:
  """Wraps a Linen module with `initial_carry` and `__call__(carry, tokens)`.

  Its attributes `READOUT` and `DECAYED`, where it has them, name its last layer
  and its matrices; so does `score` compare with targets, and `DEFERRED` says
  that it forms parameters itself.
  """

  def initial_carry(params, batch_size):
    return module.apply({"params": params}, batch_size, method="initial_carry")

  def apply(params, carry, tokens):
    return module.apply({"params": params}, carry, tokens)

  def score(params, carry, tokens, targets):
    return module.apply(
      {"params": params}, carry, tokens, targets, method="score"
    )

  return Model(
    lambda key: variables(module, key)["params"],
    initial_carry,
    apply,
    getattr(module, "READOUT", ()),
    getattr(module, "DECAYED", ()),
    score=score if hasattr(module, "score") else None,
    deferred=getattr(module, "DEFERRED", False),
  )
