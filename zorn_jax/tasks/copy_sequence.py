"""The copy task: repeat a string of letters after a separator."""

import jax
import jax.numpy as jnp

from zorn_jax.tasks import vocabulary as vocabularies
from zorn_jax.tasks.types import Chunk, Split, Task

_VALID_KEY, _TEST_KEY = 1, 2  # Split sets; training never uses these keys.


def copy(
  batch_size: int,
  max_length: int,
  time_chunk: int,
  num_evaluation: int = 512,
) -> Task:
  """Strings `s + " " + s`, where s has 2 to `max_length` lowercase letters.

  Sequences are padded with spaces to 2 max_length + 1 characters. The loss
  counts the copy, predicted from the separator on, and one closing space.
  The split "valid" has lengths of the training range, "test" has
  max_length + 1 to max_length + 50.

  Args:
    batch_size: Sequences B in a batch.
    max_length: Longest string of the training range, at least 2.
    time_chunk: Tokens C in a chunk.
    num_evaluation: Sequences in each split.
  Returns:
    A :class:`Task`.
  Raises:
    ValueError: If `max_length` is below 2.
  References: format of arXiv:2505.17852; its loss left out the first letter.
  """
  if max_length < 2:
    raise ValueError(
      f"max_length must be at least 2, got {max_length}. Strings have "
      "2 letters or more."
    )
  vocabulary = vocabularies.printable()
  first_letter, space = vocabulary.encode("a ").tolist()

  def sample_lengths(key, rows, shortest, longest):
    length_key, letter_key = jax.random.split(key)
    length = jax.random.randint(length_key, (rows, 1), shortest, longest + 1)
    letters = first_letter + jax.random.randint(
      letter_key, (rows, longest), 0, 26
    )
    position = jnp.arange(2 * longest + 1)[None]
    in_source = position < length
    in_copy = (position > length) & (position <= 2 * length)
    source = jnp.where(in_source, position, position - length - 1)
    source = jnp.clip(source, 0, longest - 1)
    letters = jnp.take_along_axis(letters, source, axis=1)
    tokens = jnp.where(in_source | in_copy, letters, space)
    weights = (position >= length) & (position <= 2 * length)
    return tokens, weights.astype(jnp.float32)

  def chunk(data, batch, index):
    del data
    tokens, weights = batch
    position = index * time_chunk + jnp.arange(time_chunk + 1)
    tokens = jnp.take(tokens, position, axis=1, mode="fill", fill_value=space)
    weights = jnp.take(
      weights, position[:-1], axis=1, mode="fill", fill_value=0
    )
    return Chunk(tokens[:, :-1], tokens[:, 1:], weights)

  def num_chunks(longest):
    return -(-(2 * longest + 1) // time_chunk)

  def split(seed, shortest, longest):
    key = jax.random.key(seed)
    batch = sample_lengths(key, num_evaluation, shortest, longest)
    return Split((), batch, num_chunks(longest))

  return Task(
    vocabulary=vocabulary,
    data=(),
    sample=lambda data, key: sample_lengths(key, batch_size, 2, max_length),
    chunk=chunk,
    num_chunks=num_chunks(max_length),
    tokens_per_batch=batch_size * (max_length + 1),
    splits={
      "valid": lambda: split(_VALID_KEY, 2, max_length),
      "test": lambda: split(_TEST_KEY, max_length + 1, max_length + 50),
    },
  )
