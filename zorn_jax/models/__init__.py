"""Recurrent language models that stream over chunks of time."""

import flax.linen as nn
import jax.numpy as jnp

from zorn_jax.models import lstm as _lstm
from zorn_jax.models.types import Model


def from_linen(module: nn.Module) -> Model:
  """Wraps a Linen module with `initial_carry` and `__call__(carry, tokens)`.

  Its class may name its last layer in `READOUT`, its matrices in `DECAYED`.
  """

  def init(key):
    def first_token(module):
      return module(module.initial_carry(1), jnp.zeros((1, 1), jnp.int32))

    return module.init(key, method=first_token)["params"]

  def initial_carry(params, batch_size):
    return module.apply({"params": params}, batch_size, method="initial_carry")

  def apply(params, carry, tokens):
    return module.apply({"params": params}, carry, tokens)

  return Model(
    init,
    initial_carry,
    apply,
    getattr(module, "READOUT", ()),
    getattr(module, "DECAYED", ()),
  )


def lstm(**options) -> Model:
  """The LSTM whose options :class:`zorn_jax.models.lstm.LSTM` lists."""
  return from_linen(_lstm.LSTM(**options))


MODULES = {"lstm": _lstm.LSTM}

__all__ = ["MODULES", "Model", "from_linen", "lstm"]
