"""Token ids of a text: in memory, or in a file that is made once."""

import collections
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
    ValueError: If the folder cannot be written.
  """
  dtype = np.min_scalar_type(len(tokenizer) - 1)
  if not cache:
    arrays = [ids.astype(dtype) for ids in _ids(name, text, tokenizer)]
    return np.concatenate([np.zeros(0, dtype), *arrays])
  key = json.dumps([_RULE, fingerprint(text), tokenizer.fingerprint])
  digest = hashlib.sha256(key.encode()).hexdigest()[:32]
  path = pathlib.Path(cache) / f"{digest}.npy"
  if not path.exists():
    logging.info("tokenizing the %s text into %s", name, path)
    try:
      _write(path, dtype, _ids(name, text, tokenizer))
    except OSError as error:
      raise ValueError(
        f"cannot write token ids in {cache!r}: {error.strerror}. Name a folder "
        "with room in task.cache."
      ) from error
  return np.load(path, mmap_mode="r")


def _ids(name, text, tokenizer) -> Iterator[np.ndarray]:
  """Ids of one document or separator after the other; reports what is lost."""
  end = tokenizer.end_of_text
  separator = tokenizer.encode("\n") if end is None else np.array([end])
  missing = collections.Counter()
  first = True
  for group in _groups(documents(text)):
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
  # Other processes may write the same file.
  unfinished = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.tmp")
  try:
    with open(unfinished, "xb") as file:
      _write_header(file, dtype, 0)
      begin, length = file.tell(), 0
      for array in arrays:
        file.write(array.astype(dtype).data)
        length += len(array)
      file.seek(0)
      _write_header(file, dtype, length)
      if file.tell() != begin:
        raise AssertionError("NumPy leaves room for a longer shape.")
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
