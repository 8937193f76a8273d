"""Token ids of a text: in memory, or in a file that is made once."""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator

import numpy as np
from absl import logging

from zorn_jax.tasks.corpora import Text, documents, fingerprint
from zorn_jax.tasks.vocabulary import Tokenizer

_RULE = 1  # Changes when the ids of a text change for another reason.
_GROUP = 2**22  # Characters of documents that are encoded together.


def load(
  name: str, text: Text, tokenizer: Tokenizer, cache: str = ""
) -> np.ndarray:
  """Token ids of all documents, one after the other.

  Between two documents stands the end of text, or what a newline is read as
  where the tokenizer has no such token.

  Args:
    name: What messages call the text.
    text: The text or its documents; a document is held whole, but not all.
    tokenizer: Gives the ids.
    cache: Folder of the file, named by a digest of the content of the text and
      of the tokenizer; "" keeps the ids in memory.
  Returns:
    Ids [tokens] in the smallest unsigned type; those of a file are read only
    where they are used.
  Raises:
    ValueError: If the text or the folder cannot be read, or the folder cannot
      be written.
  """
  dtype = np.min_scalar_type(len(tokenizer) - 1)
  if not cache:
    arrays = [ids.astype(dtype) for ids in _ids(name, text, tokenizer)]
    return np.concatenate([np.zeros(0, dtype), *arrays])
  with _reading(name):
    content = fingerprint(text)
  key = json.dumps([_RULE, content, tokenizer.fingerprint])
  file = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
  path = pathlib.Path(cache) / file
  if not path.exists():
    logging.info("tokenizing the %s text into %s", name, path)
    remedy = "Name a folder with room in task.cache"
    with _explained(f"write token ids in {cache!r}", remedy):
      _write(path, dtype, _ids(name, text, tokenizer))
  with _explained(f"read token ids in {cache!r}", "Look at its permissions"):
    return np.load(path, mmap_mode="r")


def digest(ids: np.ndarray) -> str:
  """SHA-256 of token ids that `load` gave.

  That of a file is kept beside it, so that the file is read once.
  """
  path = getattr(ids, "filename", None)
  kept = path and pathlib.Path(path).with_suffix(".sha256")
  if kept and kept.exists():
    return kept.read_text()
  found = hashlib.sha256(ids).hexdigest()
  if kept:
    # A folder that is only read has none.
    with contextlib.suppress(OSError), _replacing(kept) as file:
      file.write(found.encode())
  return found


def _reading(name):
  return _explained(f"read the {name} text", "Look at what task.source names")


@contextlib.contextmanager
def _explained(attempt, remedy):
  """Makes one sentence of an error of the system."""
  try:
    yield
  except OSError as error:
    fact = error.strerror or error
    raise ValueError(f"cannot {attempt}: {fact}. {remedy}.") from error


def _ids(name, text, tokenizer) -> Iterator[np.ndarray]:
  """Ids of one document or separator after the other; reports what is lost."""
  end = tokenizer.end_of_text
  separator = tokenizer.encode("\n") if end is None else np.array([end])
  missing = collections.Counter()
  first = True
  for group in _groups(_read(name, text)):
    for document, ids in zip(group, tokenizer.encode_all(group), strict=True):
      missing.update(tokenizer.missing(document))
      if not first:
        yield separator
      first = False
      yield ids
  if missing:
    shown = ", ".join(repr(symbol) for symbol, _ in missing.most_common(5))
    logging.warning(
      "the %s text has %d characters (%d different, such as %s) that the "
      "tokenizer lacks; they are read as the unknown symbol.",
      name,
      missing.total(),
      len(missing),
      shown,
    )


def _read(name, text):
  with _reading(name):
    yield from documents(text)


def _groups(texts):
  group, size = [], 0
  for text in texts:
    group.append(text)
    size += len(text)
    if size >= _GROUP:
      yield group
      group, size = [], 0
  if group:
    yield group


def _write(path, dtype, arrays):
  """Writes a .npy file of unknown length, under its name when complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with _replacing(path) as file:
    _write_header(file, dtype, 0)
    begin, length = file.tell(), 0
    for array in arrays:
      file.write(array.astype(dtype).data)
      length += len(array)
    file.seek(0)
    _write_header(file, dtype, length)
    if file.tell() != begin:
      raise AssertionError("NumPy leaves room for a longer shape.")


@contextlib.contextmanager
def _replacing(path):
  """A file that gets its name when it is complete."""
  # Other processes may write the same file.
  unfinished = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
  try:
    with open(unfinished, "xb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise


def _write_header(file, dtype, length):
  np.lib.format.write_array_header_1_0(
    file,
    {
      "descr": np.lib.format.dtype_to_descr(dtype),
      "fortran_order": False,
      "shape": (length,),
    },
  )
