"""Text written by a model."""

from functools import partial

import jax
import jax.numpy as jnp

from zorn_jax import types
from zorn_jax.models import Model


@partial(jax.jit, static_argnums=(0, 3))
def sample(
  model: Model,
  params: types.Params,
  prompt: jax.Array,
  length: int,
  temperature: jax.Array,
  key: types.Key,
) -> jax.Array:
  """Continues a prompt, one token after the other.

  Args:
    model: The model.
    params: Its parameters.
    prompt: Token ids [P], at least one.
    length: Number of tokens to write.
    temperature: Divides the logits; 0 takes the likeliest token.
    key: Key of the draws.
  Returns:
    The new token ids, int32 [length].
  """
  carry, logits = model.apply(
    params, model.initial_carry(params, 1), prompt[None]
  )

  def step(state, key):
    carry, logits = state
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    drawn = jax.random.categorical(key, scaled)
    token = jnp.where(temperature > 0, drawn, logits.argmax())
    carry, logits = model.apply(params, carry, token[None, None])
    return (carry, logits[0, -1]), token

  keys = jax.random.split(key, length)
  return jax.lax.scan(step, (carry, logits[0, -1]), keys)[1]
