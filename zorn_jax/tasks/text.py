"""Language modelling: predict every next token of a corpus."""

import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zorn_jax.tasks import token_files
from zorn_jax.tasks.corpora import Corpus
from zorn_jax.tasks.types import Chunk, Split, Task
from zorn_jax.tasks.vocabulary import Tokenizer

_STREAM_KEY = 0  # Where rows begin is the same in every run.
_POOL_SEED = 0  # So is what a pool consists of.
_MOST_TOKENS = 2**30  # Positions are int32, with room for a window beyond.


class Windows(NamedTuple):
  """Stretches of the corpus: inputs lie at start <= position < stop.

  Attributes:
    start: int32 [B].
    stop: int32 [B].
  """

  start: jax.Array
  stop: jax.Array


def language_model(
  corpus: Corpus,
  tokenizer: Tokenizer,
  batch_size: int,
  seq_length: int,
  time_chunk: int,
  evaluation_rows: int = 64,
  evaluation_tokens: int = 0,
  order: str = "windows",
  resident_tokens: int = 2**28,
  refresh_every: int = 1000,
  cache: str = "",
) -> Task:
  """Predicts every next token in windows of the corpus.

  A split is read as `evaluation_rows` long streams, in which every token but
  the first of its text is predicted once. Of the training text, as many as of
  the validation text.

  Of a training text of more than `resident_tokens` tokens the device holds a
  pool of long segments from random places, another one after every
  `refresh_every` steps, and a window lies within a segment. Which segments is
  determined by the number of the pool alone.

  Args:
    corpus: The texts.
    tokenizer: Makes tokens of them.
    batch_size: Windows B in a batch.
    seq_length: Predictions T in a window.
    time_chunk: Tokens C in a chunk.
    evaluation_rows: Streams of a split, read side by side.
    evaluation_tokens: Predictions of a split, at most: each stream is then the
      beginning of its share of the text. 0 for all.
    order: `windows` begin at random places. With `streams` each row of the run
      begins at a place that its number (batch index, row in the batch) alone
      determines, and reads on by `seq_length` every step, or every episode of
      many steps; at the end of the text it goes on near the beginning.
    resident_tokens: Most tokens of the training text on the device.
    refresh_every: Steps that one pool serves.
    cache: Folder for files of token ids, made once; "" keeps them in memory.
  Returns:
    A :class:`Task`.
  Raises:
    ValueError: If a text is too short, or an option makes no sense.
  """
  _check_options(
    seq_length,
    evaluation_rows,
    evaluation_tokens,
    order,
    resident_tokens,
    refresh_every,
  )
  tokens = {
    name: token_files.load(name, text, tokenizer, cache)
    for name, text in corpus._asdict().items()
  }
  _check_lengths(tokens, seq_length, evaluation_rows)
  train = tokens["train"]
  pooled = len(train) > resident_tokens
  if pooled and order == "streams":
    raise ValueError(
      f"the train text has {len(train)} tokens, more than the "
      f"{resident_tokens} that streams can read from. Raise "
      "task.resident_tokens to its length, or set task.order to windows."
    )
  segment = _segment_length(resident_tokens, seq_length)

  def random_starts(data, draw):
    if not pooled:
      last = len(data) - seq_length
      return jax.random.randint(draw.key, (batch_size,), 0, last)
    segment_key, place_key = jax.random.split(draw.key)
    number = jax.random.randint(
      segment_key, (batch_size,), 0, len(data) // segment
    )
    place = jax.random.randint(
      place_key, (batch_size,), 0, segment - seq_length
    )
    return number * segment + place

  def stream_starts(data, draw):
    row = draw.index * batch_size + jnp.arange(batch_size)
    first = jax.vmap(lambda r: _first_place(r, len(data), seq_length))(row)
    # Windows of a row tile the text, whichever of them is the first.
    phase, number = first % seq_length, first // seq_length
    windows = (len(data) - 1 - phase) // seq_length
    return phase + (number + draw.step % windows) % windows * seq_length

  starts = {"windows": random_starts, "streams": stream_starts}[order]

  def sample(data, draw):
    start = starts(data, draw)
    return Windows(start, start + draw.length)

  def chunk(data, batch, index):
    position = batch.start[:, None] + index * time_chunk
    position = position + jnp.arange(time_chunk + 1)[None]
    ids = jnp.take(data, position, mode="clip").astype(jnp.int32)
    weights = position[:, :-1] < batch.stop[:, None]
    return Chunk(ids[:, :-1], ids[:, 1:], weights.astype(jnp.float32))

  def split(name):
    most = evaluation_tokens
    if name == "train":
      most = min(most or _MOST_TOKENS, len(tokens["valid"]) - 1)
    data, windows = _streams(tokens[name], evaluation_rows, most)
    longest = int(np.max(windows.stop - windows.start))
    return Split(data, windows, -(-longest // time_chunk))

  def refresh(number):
    return _pool(train, number, segment, resident_tokens // segment)

  digests = [token_files.digest(part) for part in tokens.values()]
  identity = " ".join([*digests, tokenizer.fingerprint])

  return Task(
    vocabulary=tokenizer,
    data=refresh(0) if pooled else train,
    sample=sample,
    chunk=chunk,
    max_length=seq_length,
    num_chunks=lambda length: -(-length // time_chunk),
    tokens_per_batch=lambda length: batch_size * length,
    splits={name: lambda name=name: split(name) for name in tokens},
    refresh=refresh if pooled else None,
    refresh_every=refresh_every if pooled else 0,
    fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
  )


def _first_place(row, num_tokens, seq_length):
  """Where a row begins, so that a window fits behind it."""
  key = jax.random.fold_in(jax.random.key(_STREAM_KEY), row)
  return jax.random.randint(key, (), 0, num_tokens - seq_length)


def _streams(tokens, rows, most):
  """The text of a split, and its streams."""
  predictions = len(tokens) - 1
  share = -(-predictions // rows)
  if not most or most >= predictions:
    if predictions > _MOST_TOKENS:
      raise ValueError(
        f"a text of {predictions + 1} tokens is too long to evaluate on. Set "
        "task.evaluation_tokens, for example to 1000000."
      )
    start = np.arange(rows, dtype=np.int32) * share
    stop = np.minimum(start + share, predictions).astype(np.int32)
    return tokens, Windows(start, stop)
  length, share = most // rows, predictions // rows
  parts = [tokens[i * share : i * share + length + 1] for i in range(rows)]
  start = np.arange(rows, dtype=np.int32) * (length + 1)
  return np.concatenate(parts), Windows(start, start + np.int32(length))


def _segment_length(resident_tokens, seq_length):
  """Tokens in a segment: many segments, but long beside a window."""
  longest = max(resident_tokens // 1024, 16 * (seq_length + 1))
  return min(resident_tokens, longest)


def _pool(tokens, number, length, count):
  """Segments from random places; the same ones for the same number."""
  seeds = np.random.SeedSequence([_POOL_SEED, number])
  places = seeds.generate_state(count, np.uint64) % np.uint64(
    len(tokens) - length + 1
  )
  return np.concatenate([tokens[i : i + length] for i in places.tolist()])


def _check_options(
  seq_length, evaluation_rows, evaluation_tokens, order, resident_tokens, every
):
  if order not in ("windows", "streams"):
    raise ValueError(f"unknown order {order!r}. Choose windows or streams.")
  if evaluation_tokens and evaluation_tokens < evaluation_rows:
    raise ValueError(
      "evaluation_tokens must give each row a token, got "
      f"{evaluation_tokens=}, {evaluation_rows=}. Choose more tokens, or 0 for "
      "all."
    )
  if not seq_length < resident_tokens <= _MOST_TOKENS:
    raise ValueError(
      f"resident_tokens must be above seq_length and at most {_MOST_TOKENS}, "
      f"got {resident_tokens=}, {seq_length=}. Choose for example {2**28}."
    )
  if every < 1:
    raise ValueError(
      f"refresh_every must be positive, got {every}. Choose 1 or more."
    )


def _check_lengths(tokens, seq_length, evaluation_rows):
  for name, needed in (
    ("train", seq_length + 1),
    ("valid", evaluation_rows + 1),
    ("test", evaluation_rows + 1),
  ):
    if len(tokens[name]) < needed:
      raise ValueError(
        f"the {name} text has {len(tokens[name])} tokens, but "
        f"{needed} are needed. Use a longer text"
        + (" or a smaller seq_length." if name == "train" else ".")
      )
