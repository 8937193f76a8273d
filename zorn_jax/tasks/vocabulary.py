"""Characters and their ids."""

import collections
import dataclasses
import functools
import string

import numpy as np

UNKNOWN = "\ufffd"


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

  def encode(self, text: str) -> np.ndarray:
    """Token ids of `text`, int32 [length]."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return self._ids[np.minimum(points, len(self._ids) - 1)]

  def decode(self, ids) -> str:
    """The text of token ids."""
    return "".join(self.symbols[i] for i in np.asarray(ids).tolist())

  def missing(self, text: str) -> collections.Counter[str]:
    """Characters of `text` that are not in the vocabulary, with counts."""
    known = set(self.symbols)
    counts = collections.Counter(text)
    return collections.Counter(
      {symbol: n for symbol, n in counts.items() if symbol not in known}
    )


def of_text(text: str) -> Vocabulary:
  """The characters of `text` in code point order, after the unknown symbol."""
  return Vocabulary((UNKNOWN, *sorted(set(text) - {UNKNOWN})))


def printable() -> Vocabulary:
  """The 100 characters of `string.printable`, in its order."""
  return Vocabulary(tuple(string.printable))
