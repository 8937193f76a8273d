"""What translates between text and token ids, and the simplest: characters."""

import collections
import dataclasses
import functools
import hashlib
import string
from collections.abc import Sequence
from typing import Protocol

import numpy as np

UNKNOWN = "\ufffd"


class Tokenizer(Protocol):
  """Translates between text and the ids 0 to len - 1.

  Attributes:
    fingerprint: Equal for two tokenizers only if they give the same ids.
    end_of_text: Id that stands between two documents; None if there is none.
  """

  @property
  def fingerprint(self) -> str: ...

  @property
  def end_of_text(self) -> int | None: ...

  def __len__(self) -> int: ...

  def encode(self, text: str) -> np.ndarray:
    """Token ids of `text`, int32 [length]."""
    ...

  def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each of several texts."""
    ...

  def decode(self, ids) -> str:
    """The text of token ids."""
    ...

  def missing(self, text: str) -> collections.Counter[str]:
    """Parts of `text` that no id stands for, with counts."""
    ...


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """A fixed list of characters; the id of a character is its position.

  Attributes:
    symbols: The characters, each once.
    unknown: Id that stands for every other character.
  """

  symbols: tuple[str, ...]
  unknown: int = 0

  def __len__(self):
    return len(self.symbols)

  @functools.cached_property
  def _ids(self) -> np.ndarray:
    """Id of each code point up to the largest symbol."""
    points = np.array([ord(symbol) for symbol in self.symbols])
    ids = np.full(points.max() + 2, self.unknown, np.int32)
    ids[points] = np.arange(len(points))
    return ids

  @property
  def end_of_text(self) -> None:
    """A list of characters has no such symbol."""

  @functools.cached_property
  def fingerprint(self) -> str:
    """Digest of the symbols and of the unknown one's id."""
    content = f"{self.unknown} {''.join(self.symbols)}"
    content = content.encode("utf-8", "surrogatepass")
    return f"characters-{hashlib.sha256(content).hexdigest()}"

  def encode(self, text: str) -> np.ndarray:
    """Token ids of `text`, int32 [length]."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return self._ids[np.minimum(points, len(self._ids) - 1)]

  def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each of several texts."""
    return [self.encode(text) for text in texts]

  def decode(self, ids) -> str:
    """The text of token ids."""
    return "".join(self.symbols[i] for i in np.asarray(ids).tolist())

  def missing(self, text: str) -> collections.Counter[str]:
    """Characters of `text` that are not in the vocabulary, with counts."""
    lacking = set(text) - set(self.symbols)
    if not lacking:  # The usual case, found without counting.
      return collections.Counter()
    return collections.Counter(symbol for symbol in text if symbol in lacking)


def of_text(text: str) -> Vocabulary:
  """The characters of `text` in code point order, after the unknown symbol."""
  return Vocabulary((UNKNOWN, *sorted(set(text) - {UNKNOWN})))


def printable() -> Vocabulary:
  """The 100 characters of `string.printable`, in its order."""
  return Vocabulary(tuple(string.printable))
