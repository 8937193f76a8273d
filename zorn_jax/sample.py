"""Text written by a model."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zorn_jax import types
from zorn_jax.models import Model


class Decoding(NamedTuple):
  """How the next token is chosen, as plain numbers.

  Attributes:
    temperature: Divides the logits; 0 takes the likeliest token.
    top_k: Leaves only the k likeliest tokens; 0 for all of them.
    top_p: Then leaves only the smallest set of likeliest tokens whose
      probability, among those left, reaches p; 1 for all of them.
  References: arXiv:1805.04833, top-k; arXiv:1904.09751, top-p.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


class Prompts(NamedTuple):
  """Prompts of different lengths that end together.

  Attributes:
    tokens: Token ids [B, P], each row's at its end; those before are not read.
    lengths: Tokens of each row, 1 to P, int32 [B].
  """

  tokens: jax.Array
  lengths: jax.Array


def check(decoding: Decoding) -> None:
  """Refuses what is no way to choose a token.

  Raises:
    ValueError: If a value is out of its range.
  """
  if not decoding.temperature >= 0:
    raise ValueError(
      f"temperature must not be negative, got {decoding.temperature}. Choose "
      "0 for the likeliest tokens."
    )
  if decoding.top_k < 0:
    raise ValueError(
      f"top_k must not be negative, got {decoding.top_k}. Choose 0 for all "
      "tokens."
    )
  if not 0 < decoding.top_p <= 1:
    raise ValueError(
      f"top_p must be above 0 and at most 1, got {decoding.top_p}. Choose 1 "
      "for all tokens."
    )


def align(prompts: Sequence[np.ndarray]) -> Prompts:
  """Puts prompts, token ids of any lengths, side by side.

  Raises:
    ValueError: If there is no prompt, or one is empty.
  """
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  if not all(lengths):
    raise ValueError("the prompt is empty. Give at least one token.")
  if not len(lengths):
    raise ValueError("there is no prompt. Give at least one.")
  tokens = np.zeros((len(lengths), lengths.max()), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[-len(prompt) :] = prompt
  return Prompts(jnp.asarray(tokens), jnp.asarray(lengths))


@partial(jax.jit, static_argnums=(0, 3, 4, 6))
def sample(
  model: Model,
  params: types.Params,
  prompts: Prompts,
  decoding: Decoding,
  length: int,
  key: types.Key,
  num_samples: int = 1,
) -> jax.Array:
  """Continues each prompt, one token after the other.

  Each prompt is read once, and each row runs as a batch of one.

  Args:
    model: The model.
    params: Its parameters.
    prompts: B prompts; see :func:`align`.
    decoding: How tokens are chosen; each way is compiled anew.
    length: Number of tokens to write.
    key: Key of the draws.
    num_samples: Continuations S of each prompt.
  Returns:
    The new token ids, int32 [B, S, length].
  Raises:
    ValueError: If a value of `decoding` is out of its range.
  Guarantees: the random numbers of a token depend only on `key`, the row of its
    prompt, the number of its sample and its position; padding changes nothing.
    Other rows change logits only by the rounding of matrix products, which may
    depend on the number of rows, and so a token only where two nearly tie.
  """
  check(decoding)

  def continue_row(row, tokens, size):
    carry, logits = _read(model, params, tokens, size)
    row_key = jax.random.fold_in(key, row)
    write = lambda number: _write(
      model,
      params,
      decoding,
      carry,
      logits,
      length,
      jax.random.fold_in(row_key, number),
    )
    return jax.vmap(write)(jnp.arange(num_samples))

  rows = jnp.arange(len(prompts.lengths))
  return jax.vmap(continue_row)(rows, prompts.tokens, prompts.lengths)


def _read(model, params, tokens, size):
  """The state and the logits [1, 1, V] after the last `size` of tokens [P]."""
  start = len(tokens) - size

  def step(carry, x):
    position, token = x
    after, _ = model.apply(params, carry, token[None, None])
    of_prompt = position >= start
    keep = lambda new, old: jnp.where(of_prompt, new, old)
    return jax.tree.map(keep, after, carry), None

  # The last token is every prompt's, and its logits alone are wanted.
  carry = model.initial_carry(params, 1)
  others = (jnp.arange(len(tokens) - 1), tokens[:-1])
  carry, _ = jax.lax.scan(step, carry, others)
  return model.apply(params, carry, tokens[None, -1:])


def _write(model, params, decoding, carry, logits, length, key):
  """The tokens [length] that follow a state and its logits [1, 1, V]."""

  def step(state, position):
    carry, logits = state
    draw_key = jax.random.fold_in(key, position)
    token = _choose(decoding, logits[0, -1], draw_key)
    carry, logits = model.apply(params, carry, token[None, None])
    return (carry, logits), token

  return jax.lax.scan(step, (carry, logits), jnp.arange(length))[1]


def _choose(decoding, logits, key):
  """A token by its logits [V]."""
  if decoding.temperature == 0:
    return logits.argmax()
  logits = logits / decoding.temperature
  if decoding.top_k or decoding.top_p < 1:
    logits = _truncate(decoding, logits)
  return jax.random.categorical(key, logits)


def _truncate(decoding, logits):
  """The logits [V], minus infinity for the tokens that are left out."""
  size = min(decoding.top_k, len(logits)) or len(logits)
  ranked, tokens = jax.lax.top_k(logits, size)
  if decoding.top_p < 1:
    # A token is left out if those before it reach p; the first never is.
    before = jnp.cumsum(jax.nn.softmax(ranked))[:-1]
    others = jnp.where(before >= decoding.top_p, -jnp.inf, ranked[1:])
    ranked = ranked.at[1:].set(others)
  return jnp.full_like(logits, -jnp.inf).at[tokens].set(ranked)
