"""Token files: made once, never stale, and told apart by fingerprints."""

import collections
import hashlib
import os
import re
import shutil

import jax
import numpy as np
import pytest
from texts import Warnings, corpus_of, model_text

from zorn_jax import tasks
from zorn_jax.tasks import corpora, token_files, vocabulary as vocabularies


class Counting(vocabularies.Vocabulary):
  """Characters that count how many of them are encoded."""

  encoded = 0

  def encode(self, text):
    Counting.encoded += len(text)
    return super().encode(text)


def counting(corpus):
  Counting.encoded = 0
  made = tasks.make_tokenizer("characters", corpus.train)
  return Counting(made.symbols)


class Unreadable:
  """Documents of which some cannot be read."""

  def __init__(self, good=1):
    self.good, self.calls = good, 0

  def __iter__(self):
    self.calls += 1
    yield "a"
    if self.calls > self.good:
      raise OSError(5, "Input/output error", "a/file")


# Token files.


def test_a_text_is_tokenized_once_into_a_small_file(tmp_path):
  text = corpus_of(300).train
  vocabulary = counting(corpus_of(300))
  cache = tmp_path / "new" / "folder"
  first = token_files.load("train", text, vocabulary, str(cache))
  assert Counting.encoded == 301  # And the newline between documents.
  again = token_files.load("train", text, vocabulary, str(cache))
  assert Counting.encoded == 301
  for array in (first, again):
    assert isinstance(array, np.memmap) and not array.flags.writeable
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, vocabulary.encode(text))
  (file,) = cache.iterdir()
  assert file.suffix == ".npy" and file.stat().st_size < 300 + 200
  np.testing.assert_array_equal(np.load(file), vocabulary.encode(text))
  memory = token_files.load("train", text, vocabulary)
  assert not isinstance(memory, np.memmap) and memory.dtype == np.uint8
  np.testing.assert_array_equal(memory, first)


def test_ids_of_a_large_vocabulary_take_two_bytes(tmp_path):
  text = "".join(map(chr, range(0x100, 0x300)))
  vocabulary = vocabularies.of_text(text)
  for cache in ("", str(tmp_path)):
    ids = token_files.load("train", text, vocabulary, cache)
    assert ids.dtype == np.uint16
    assert vocabulary.decode(ids) == text


def test_a_stale_file_is_not_used(tmp_path):
  folder, cache = tmp_path / "texts", str(tmp_path / "cache")
  folder.mkdir()
  for name in "abcd":
    (folder / name).write_text(f"text {name} " * 9)
  load = lambda errors="strict": tasks.load_corpus(str(folder), errors=errors)
  vocabulary = counting(tasks.Corpus("\n abdetx", "", ""))
  read = lambda text: vocabulary.decode(
    token_files.load("train", text, vocabulary, cache)
  )
  before = (folder / "a").stat()
  assert read(load().train) == "\n".join(f"text {name} " * 9 for name in "ab")
  (folder / "a").write_text("text d " * 9)  # As long as it was, and as old.
  os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
  assert read(load().train) == "\n".join(f"text {name} " * 9 for name in "db")
  # Another place of the same files is the same text.
  count = Counting.encoded
  shutil.copytree(folder, tmp_path / "copy")
  assert read(tasks.load_corpus(str(tmp_path / "copy")).train)
  assert Counting.encoded == count
  # Another tokenizer is not.
  other = vocabularies.Vocabulary(vocabulary.symbols[::-1])
  ids = token_files.load("train", load().train, other, cache)
  assert other.decode(ids) == read(load().train)


@pytest.mark.parametrize(("cached", "good"), [(False, 0), (True, 0), (True, 1)])
def test_a_text_that_cannot_be_read_is_named(tmp_path, cached, good):
  # Once for its digest, and again for its ids.
  cache = str(tmp_path / "cache") if cached else ""
  message = "cannot read the valid text: Input/output error. .*task.source"
  with pytest.raises(ValueError, match=message):
    token_files.load(
      "valid", Unreadable(good), vocabularies.of_text("a\n"), cache
    )
  assert not list(tmp_path.glob("cache/*"))


def test_token_ids_that_cannot_be_read_are_not_written(tmp_path):
  vocabulary = vocabularies.of_text("a")
  token_files.load("train", "a", vocabulary, str(tmp_path))
  (path,) = tmp_path.iterdir()
  path.unlink()
  path.mkdir()
  with pytest.raises(ValueError, match="cannot read token ids in .*: Is a dir"):
    token_files.load("train", "a", vocabulary, str(tmp_path))


def test_what_was_interrupted_leaves_no_file(tmp_path):
  def broken():
    yield "a" * 10
    raise KeyboardInterrupt

  class Once:
    """Documents that end in an error when they are read again."""

    def __init__(self):
      self.calls = 0

    def __iter__(self):
      self.calls += 1
      return iter(["a" * 10]) if self.calls == 1 else broken()

  with pytest.raises(KeyboardInterrupt):
    token_files.load("t", Once(), vocabularies.of_text("a\n"), str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="cannot write token ids.*task.cache"):
    token_files.load(
      "t", "a", vocabularies.of_text("a"), str(tmp_path / "file" / "x")
    )


@pytest.mark.parametrize("group", [1, 5, 10**6])
@pytest.mark.parametrize("cached", [False, True])
def test_documents_are_kept_apart(tmp_path, monkeypatch, group, cached):
  monkeypatch.setattr(token_files, "_GROUP", group)
  texts = ["ab", "", "c", "dd ", "", "e"]
  cache = str(tmp_path) if cached else ""
  plain = tasks.make_tokenizer("characters", texts)
  ids = token_files.load("train", texts, plain, cache)
  assert plain.decode(ids) == "ab\nc\ndd \ne"
  pairs = tasks.make_tokenizer("bpe", texts, 260)
  ids = token_files.load("train", texts, pairs, cache)
  end = "<|endoftext|>"
  assert pairs.decode(ids) == f"ab{end}c{end}dd {end}e"
  assert (ids == pairs.end_of_text).sum() == 3
  assert len(token_files.load("train", [], plain, cache)) == 0


def test_cached_and_held_tasks_are_the_same(tmp_path):
  corpus = corpus_of(500)
  held = model_text(corpus, 4, 8, 4)
  for _ in range(2):
    cached = model_text(corpus, 4, 8, 4, cache=str(tmp_path))
    np.testing.assert_array_equal(held.data, cached.data)
    for name in ("valid", "test"):
      jax.tree.map(
        np.testing.assert_array_equal,
        held.splits[name](),
        cached.splits[name](),
      )
    assert held.fingerprint == cached.fingerprint
  files = collections.Counter(path.suffix for path in tmp_path.iterdir())
  assert files == {".npy": 3, ".sha256": 3}


# Fingerprints.


def test_a_fingerprint_tells_texts_and_tokenizers_apart():
  corpus = corpus_of(300)
  make = lambda corpus, tokenizer: tasks.language_model(
    corpus, tokenizer, 4, 8, 4, evaluation_rows=4
  )
  characters = tasks.make_tokenizer("characters", corpus.train)
  same = tasks.make_tokenizer("characters", corpus.train)
  first = make(corpus, characters).fingerprint
  assert first == make(corpus, same).fingerprint
  assert re.fullmatch("[0-9a-f]{64}", first)
  other = corpus._replace(train=corpus.train[:-1] + "a")
  assert corpus.train[-1] != "a"
  # The same ids that stand for other letters.
  symbols = characters.symbols
  swapped = vocabularies.Vocabulary((*symbols[:2], *symbols[:1:-1]))
  table = dict(zip(map(ord, symbols), swapped.symbols, strict=True))
  renamed = corpus._replace(train=corpus.train.translate(table))
  np.testing.assert_array_equal(
    swapped.encode(renamed.train), characters.encode(corpus.train)
  )
  found = {
    first,
    make(other, characters).fingerprint,
    make(renamed, swapped).fingerprint,
    make(corpus._replace(valid=other.train), characters).fingerprint,
    make(corpus._replace(test=other.train), characters).fingerprint,
    make(corpus, tasks.make_tokenizer("bytes", "")).fingerprint,
  }
  assert len(found) == 6
  assert tasks.one_batch(make(corpus, same)).fingerprint == first
  assert tasks.copy(1, 2, 1).fingerprint == ""
  assert tasks.random_tokens(1, 2, 2, 1).fingerprint == ""


def test_the_digest_of_a_file_is_made_once(tmp_path, monkeypatch):
  text, folder = corpus_of(300).train, tmp_path / "cache"
  vocabulary = tasks.make_tokenizer("characters", text)
  load = lambda: token_files.load("train", text, vocabulary, str(folder))
  first = token_files.digest(load())
  expected = hashlib.sha256(vocabulary.encode(text).astype(np.uint8).tobytes())
  assert first == expected.hexdigest()
  assert first == token_files.digest(token_files.load("t", text, vocabulary))
  ids = load()
  monkeypatch.setattr(hashlib, "sha256", None)
  assert token_files.digest(ids) == first


def test_a_digest_needs_no_room(tmp_path, monkeypatch):
  text = corpus_of(300).train
  vocabulary = tasks.make_tokenizer("characters", text)
  ids = token_files.load("train", text, vocabulary, str(tmp_path))

  def full(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  found = token_files.digest(ids)
  monkeypatch.undo()
  assert len(list(tmp_path.iterdir())) == 1
  assert token_files.digest(ids) == found
  assert len(list(tmp_path.iterdir())) == 2


def test_unknown_characters_are_counted_and_read_as_the_unknown(monkeypatch):
  warnings = Warnings(monkeypatch)
  corpus = tasks.Corpus("abcab" * 20, "abxbxé" * 5, "abc" * 10)
  task = model_text(corpus, 2, 8, 4, evaluation_rows=2)
  (line,) = warnings.lines  # None about the test text.
  assert "valid text has 15 characters (2 different, such as 'x', 'é')" in line
  data = task.splits["valid"]().data
  assert task.vocabulary.decode(data[:6]) == "ab\ufffdb\ufffd\ufffd"
  assert list(data[:6]) == [1, 2, 0, 2, 0, 0]


def test_fingerprints_tell_texts_apart():
  differ = ["ab", "ba", ["a", "b"], ["a", "b", "c"], ["ab", "c"], "a\nb", ""]
  assert len({corpora.fingerprint(text) for text in differ}) == len(differ)
  assert corpora.fingerprint("ab") == corpora.fingerprint(["ab", ""])
