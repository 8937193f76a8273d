"""One fixed batch of random tokens: nothing to learn, much to memorise."""

import sys

import jax
import jax.numpy as jnp

from zorn_jax.tasks.types import Chunk, Split, Task
from zorn_jax.tasks.vocabulary import Vocabulary

_FIRST_SYMBOL = 0x10000  # Code points from here on stand for the tokens.
_KEY = 0  # The batch is the same in every run.


def random_tokens(
  batch_size: int,
  vocab_size: int,
  seq_length: int,
  time_chunk: int,
  source_length: int = 1,
) -> Task:
  """Predicts the next of uniform random tokens, the same ones at every step.

  The model reads `source_length` tokens, from the last of which it predicts the
  first of `seq_length` others. With 100 of both and a vocabulary of 100 it is
  the batch that Figure 1 of the paper learns by heart.

  Args:
    batch_size: Sequences B.
    vocab_size: Different tokens V.
    seq_length: Predictions T in a sequence.
    time_chunk: Tokens C in a chunk.
    source_length: Tokens that are read before the first prediction, at least 1.
  Returns:
    A :class:`Task`, both of whose splits are the training batch.
  Raises:
    ValueError: If `source_length` is below 1, or `vocab_size` is below 1 or
      above 1048576.
  References: arXiv:2505.17852; its loss left out the first prediction.
  """
  if source_length < 1:
    raise ValueError(
      f"source_length must be at least 1, got {source_length}. The first "
      "prediction needs a token to be made from."
    )
  most = sys.maxunicode + 1 - _FIRST_SYMBOL
  if not 1 <= vocab_size <= most:
    raise ValueError(
      f"vocab_size must be 1 to {most}, got {vocab_size}. Every token is shown "
      "as a character of its own."
    )
  symbols = range(_FIRST_SYMBOL, _FIRST_SYMBOL + vocab_size)
  total = source_length + seq_length
  tokens = jax.random.randint(
    jax.random.key(_KEY), (batch_size, total), 0, vocab_size
  )
  num_chunks = -(-(total - 1) // time_chunk)

  def chunk(data, batch, index):
    del batch
    position = index * time_chunk + jnp.arange(time_chunk + 1)
    ids = jnp.take(data, position, axis=1, mode="clip")
    targets = position[1:]
    counted = (targets >= source_length) & (targets < total)
    weights = jnp.broadcast_to(
      counted[None].astype(jnp.float32), ids[:, 1:].shape
    )
    return Chunk(ids[:, :-1], ids[:, 1:], weights)

  split = lambda: Split(tokens, (), num_chunks)
  return Task(
    vocabulary=Vocabulary(tuple(map(chr, symbols))),
    data=tokens,
    sample=lambda data, draw: (),
    chunk=chunk,
    min_length=seq_length,
    max_length=seq_length,
    num_chunks=lambda length: num_chunks,
    tokens_per_batch=lambda length: batch_size * length,
    splits={"valid": split, "test": split},
  )
