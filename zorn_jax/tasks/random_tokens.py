"""One fixed batch of random tokens: nothing to learn, much to memorise."""

import jax
import jax.numpy as jnp

from zorn_jax.tasks.types import Chunk, Split, Task
from zorn_jax.tasks.vocabulary import Vocabulary

_FIRST_SYMBOL = 0x10000  # Code points from here on stand for the tokens.
_KEY = 0  # The batch is the same in every run.


def random_tokens(
  batch_size: int, vocab_size: int, seq_length: int, time_chunk: int
) -> Task:
  """Predicts the next of uniform random tokens, the same ones at every step.

  Args:
    batch_size: Sequences B.
    vocab_size: Different tokens V.
    seq_length: Predictions T in a sequence.
    time_chunk: Tokens C in a chunk.
  Returns:
    A :class:`Task`, both of whose splits are the training batch.
  """
  symbols = range(_FIRST_SYMBOL, _FIRST_SYMBOL + vocab_size)
  tokens = jax.random.randint(
    jax.random.key(_KEY), (batch_size, seq_length + 1), 0, vocab_size
  )
  num_chunks = -(-seq_length // time_chunk)

  def chunk(data, batch, index):
    del batch
    position = index * time_chunk + jnp.arange(time_chunk + 1)
    ids = jnp.take(data, position, axis=1, mode="clip")
    counted = (position[:-1] < seq_length).astype("float32")
    weights = jnp.broadcast_to(counted[None], ids[:, 1:].shape)
    return Chunk(ids[:, :-1], ids[:, 1:], weights)

  split = lambda: Split(tokens, (), num_chunks)
  return Task(
    vocabulary=Vocabulary(tuple(map(chr, symbols))),
    data=tokens,
    sample=lambda data, key: (),
    chunk=chunk,
    num_chunks=num_chunks,
    tokens_per_batch=batch_size * seq_length,
    splits={"valid": split, "test": split},
  )
