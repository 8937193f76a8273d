"""Tasks whose answer an algorithm finds: copy, reverse, sort, repeat and add.

A sequence is a source, a separator, the output, a closing space, and more
spaces as padding. The loss counts the output, predicted from the separator on,
and the closing space. The split "valid" has lengths of the training range, 2 to
`max_length`, and "test" has max_length + 1 to max_length + 50.

References: formats of arXiv:2505.17852; its loss left out the first letter, and
its longest repetitions were cut.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax.tasks import vocabulary as vocabularies
from zorn_jax.tasks.types import Chunk, Split, Task
from zorn_jax.tasks.vocabulary import Vocabulary

_VALID_KEY, _TEST_KEY = 1, 2  # Split sets; training never uses these keys.
_SHORTEST, _BEYOND = 2, 50  # Lengths: the least, and those of "test" above.
_NUMERIC = Vocabulary(tuple("0123456789+-*/=()[],. "))
_MAX_INT32 = 2**31 - 1


class _Words(NamedTuple):
  """Tokens of sources and outputs [B, ...] and how many are used [B, 1]."""

  source: jax.Array
  source_size: jax.Array
  output: jax.Array
  output_size: jax.Array


def copy(
  batch_size: int,
  max_length: int,
  time_chunk: int,
  num_evaluation: int = 512,
) -> Task:
  """Strings `s + " " + s`, where s has 2 to `max_length` lowercase letters.

  Args:
    batch_size: Sequences B in a batch.
    max_length: Longest string of the training range, at least 2.
    time_chunk: Tokens C in a chunk.
    num_evaluation: Sequences in each split.
  Returns:
    A :class:`Task`.
  Raises:
    ValueError: If `max_length` is below 2.
  """

  def output(letters, length):
    del length
    return letters

  return _permutation(
    output, batch_size, max_length, time_chunk, num_evaluation
  )


def reverse(
  batch_size: int,
  max_length: int,
  time_chunk: int,
  num_evaluation: int = 512,
) -> Task:
  """Strings `s + " " + s[::-1]`; otherwise as :func:`copy`."""

  def output(letters, length):
    index = length - 1 - jnp.arange(letters.shape[1])[None]
    return jnp.take_along_axis(letters, jnp.maximum(index, 0), axis=1)

  return _permutation(
    output, batch_size, max_length, time_chunk, num_evaluation
  )


def sort(
  batch_size: int,
  max_length: int,
  time_chunk: int,
  num_evaluation: int = 512,
) -> Task:
  """Strings `s + " " + "".join(sorted(s))`; otherwise as :func:`copy`."""

  def output(letters, length):
    used = jnp.arange(letters.shape[1])[None] < length
    return jnp.sort(jnp.where(used, letters, _MAX_INT32), axis=1)

  return _permutation(
    output, batch_size, max_length, time_chunk, num_evaluation
  )


def repeat_copy(
  batch_size: int,
  max_length: int,
  time_chunk: int,
  num_evaluation: int = 512,
  max_repeats: int = 4,
) -> Task:
  """Strings `s + str(r) + " " + s * r`, with r in 1 to `max_repeats`.

  Args:
    batch_size: Sequences B in a batch.
    max_length: Longest string s of the training range, at least 2.
    time_chunk: Tokens C in a chunk.
    num_evaluation: Sequences in each split.
    max_repeats: Most repetitions, 1 to 9.
  Returns:
    A :class:`Task`.
  Raises:
    ValueError: If `max_length` is below 2, or `max_repeats` is no digit from 1.
  """
  if not 1 <= max_repeats <= 9:
    raise ValueError(
      f"max_repeats must be 1 to 9, got {max_repeats}. The number of "
      "repetitions is written as one digit."
    )
  vocabulary = vocabularies.printable()
  zero, space = vocabulary.encode("0 ").tolist()

  def write(key, length, longest):
    letter_key, repeat_key = jax.random.split(key)
    letters = _letters(letter_key, len(length), longest)
    repeats = jax.random.randint(repeat_key, length.shape, 1, max_repeats + 1)
    source = jnp.where(
      jnp.arange(longest + 1)[None] < length,
      jnp.pad(letters, ((0, 0), (0, 1))),
      zero + repeats,
    )
    index = jnp.arange(max_repeats * longest)[None] % length
    output = jnp.take_along_axis(letters, index, axis=1)
    return _Words(source, length + 1, output, repeats * length)

  return _task(
    vocabulary,
    space,
    write,
    lambda length: (length + 1, max_repeats * length),
    batch_size,
    max_length,
    time_chunk,
    num_evaluation,
  )


def add(
  batch_size: int,
  max_length: int,
  time_chunk: int,
  num_evaluation: int = 512,
  max_num: int = 9,
) -> Task:
  """Sums such as `3+14+9=26`, of numbers uniform in 0 to `max_num`.

  Args:
    batch_size: Sequences B in a batch.
    max_length: Most terms of the training range, at least 2.
    time_chunk: Tokens C in a chunk.
    num_evaluation: Sequences in each split.
    max_num: Largest term, at least 1.
  Returns:
    A :class:`Task`.
  Raises:
    ValueError: If `max_length` is below 2, or `max_num` is below 1, or a sum
      may need more than 32 bits.
  """
  if max_num < 1:
    raise ValueError(
      f"max_num must be at least 1, got {max_num}. It is the largest term."
    )
  if (max_length + _BEYOND) * max_num > _MAX_INT32:
    raise ValueError(
      f"sums of max_length + {_BEYOND} terms must be below 2**31, got "
      f"{max_length=}, {max_num=}. Choose a smaller max_num."
    )
  plus, equals = _NUMERIC.encode("+=").tolist()
  term_size = len(str(max_num)) + 1  # With the sign behind it.
  sizes = lambda length: (length * term_size - 1, _digits(length * max_num))

  def write(key, length, longest):
    source_size, output_size = sizes(longest)
    terms = _below(max_num + 1, key, (len(length), longest))
    used = jnp.arange(longest)[None] < length
    total = jnp.sum(terms, axis=1, keepdims=True, where=used)
    # One past the sign behind each term.
    ends = jnp.cumsum(_digits(terms, term_size - 1) + 1, axis=1)
    position = jnp.arange(source_size)
    passed = ends[:, None, :] <= position[None, :, None]
    index = jnp.minimum(jnp.sum(passed, axis=-1), longest - 1)
    of_term = lambda values: jnp.take_along_axis(values, index, axis=1)
    power = of_term(ends) - 2 - position[None]
    source = jnp.where(
      power < 0, plus, _digit(of_term(terms), power, term_size - 1)
    )
    size = _digits(total, output_size)
    power = size - 1 - jnp.arange(output_size)[None]
    output = _digit(total, power, output_size)
    last = jnp.take_along_axis(ends, length - 1, axis=1)
    return _Words(source, last - 1, output, size)

  return _task(
    _NUMERIC,
    equals,
    write,
    sizes,
    batch_size,
    max_length,
    time_chunk,
    num_evaluation,
  )


ALGORITHMIC = {
  "add": add,
  "copy": copy,
  "repeat_copy": repeat_copy,
  "reverse": reverse,
  "sort": sort,
}


def _letters(key, rows, longest):
  """Ids of lowercase letters, int32 [rows, longest]."""
  first = int(vocabularies.printable().encode("a")[0])
  return first + _below(26, key, (rows, longest))


def _below(count, key, shape):
  """Integers from 0, below `count`, int32, uniform but for 1 in 2**24 / count.

  One random word makes a small one, of which `jax.random.randint` takes two.
  """
  if count > 256:
    return jax.random.randint(key, shape, 0, count)
  words = jax.random.bits(key, shape, jnp.uint32)
  return ((words >> 8) * count >> 24).astype(jnp.int32)


def _digits(number, most=10):
  """How many digits an integer, or each of an array, has; at most `most`."""
  one = 0 * number + 1  # Of the same shape.
  return sum((number >= 10**power for power in range(1, most)), start=one)


def _digit(number, power, most):
  """Digit, and id, of a power of ten below `most`; 0 for any other power."""
  digits = (jnp.where(power == p, number // 10**p % 10, 0) for p in range(most))
  return sum(digits, start=jnp.zeros((), jnp.int32))


def _permutation(output, *args):
  """Letters and, as long as they are, (letters, length) -> output."""
  vocabulary = vocabularies.printable()

  def write(key, length, longest):
    letters = _letters(key, len(length), longest)
    return _Words(letters, length, output(letters, length), length)

  separator = int(vocabulary.encode(" ")[0])
  sizes = lambda length: (length, length)
  return _task(vocabulary, separator, write, sizes, *args)


def _task(
  vocabulary: Vocabulary,
  separator: int,
  write: Callable[[jax.Array, jax.Array, int], _Words],
  sizes: Callable[[Any], tuple[Any, Any]],
  batch_size: int,
  max_length: int,
  time_chunk: int,
  num_evaluation: int,
) -> Task:
  """A task of sequences that are put together from words.

  Args:
    vocabulary: Of all tokens; it has a space.
    separator: Id of the token between source and output.
    write: (key, lengths [B, 1], longest) -> the words.
    sizes: (length) -> tokens of the longest source and output of that length.
    batch_size, max_length, time_chunk, num_evaluation: As in :func:`copy`.
  Returns:
    A :class:`Task`; its batches are (tokens int32, weights float32), [B, W].
  """
  if max_length < _SHORTEST:
    raise ValueError(
      f"max_length must be at least {_SHORTEST}, got {max_length}. Shorter "
      "sequences are not made."
    )
  space = int(vocabulary.encode(" ")[0])

  def sample_lengths(key, rows, shortest, longest, longest_now):
    length_key, word_key = jax.random.split(key)
    length = jax.random.randint(
      length_key, (rows, 1), shortest, longest_now + 1
    )
    source, source_size, output, output_size = write(word_key, length, longest)
    words = jnp.concatenate([source, output], axis=1)
    # Whole chunks and the token behind them.
    position = jnp.arange(num_chunks(longest) * time_chunk + 1)[None]
    end = source_size + output_size
    answered = (position > source_size) & (position <= end)
    index = jnp.where(
      answered, source.shape[1] + position - source_size - 1, position
    )
    index = jnp.minimum(index, words.shape[1] - 1)
    tokens = jnp.where(
      answered | (position < source_size),
      jnp.take_along_axis(words, index, axis=1),
      jnp.where(position == source_size, separator, space),
    )
    weights = (position >= source_size) & (position <= end)
    return tokens, weights.astype(jnp.float32)

  def chunk(data, batch, index):
    del data
    cut = lambda x, size: jax.lax.dynamic_slice_in_dim(
      x, index * time_chunk, size, axis=1
    )
    tokens, weights = cut(batch[0], time_chunk + 1), cut(batch[1], time_chunk)
    return Chunk(tokens[:, :-1], tokens[:, 1:], weights)

  def sample(data, draw):
    del data
    return sample_lengths(
      draw.key, batch_size, _SHORTEST, max_length, draw.length
    )

  def num_chunks(length):
    source_size, output_size = sizes(length)
    return -(-(source_size + 1 + output_size) // time_chunk)

  def split(seed, shortest, longest):
    sample = lambda key: sample_lengths(
      key, num_evaluation, shortest, longest, longest
    )
    batch = jax.jit(sample)(jax.random.key(seed))
    return Split((), batch, num_chunks(longest))

  longest = max_length + _BEYOND
  return Task(
    vocabulary=vocabulary,
    data=(),
    sample=sample,
    chunk=chunk,
    max_length=max_length,
    num_chunks=num_chunks,
    tokens_per_batch=lambda length: batch_size * (sizes(length)[1] + 1),
    splits={
      "valid": lambda: split(_VALID_KEY, _SHORTEST, max_length),
      "test": lambda: split(_TEST_KEY, max_length + 1, longest),
    },
    min_length=_SHORTEST,
  )
