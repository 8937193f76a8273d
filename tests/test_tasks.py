"""Algorithmic tasks and random tokens: what is shown, predicted and counted."""

import collections
import functools
import math
import re
import string
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import metrics, tasks
from zorn_jax.methods import Now, sample_batches
from zorn_jax.models import Model
from zorn_jax.tasks import algorithmic

LARGE = 50.0  # A logit that leaves e⁻⁵⁰ for all other tokens.


class Case(NamedTuple):
  """A task and, in plain Python, what it has to be.

  Attributes:
    make: Its factory.
    source: Pattern of what is shown.
    separator: Between source and output.
    solve: (source) -> output.
    length: (source) -> its length.
    longest: (length) -> characters of the longest source and output.
  """

  make: Callable[..., tasks.Task]
  source: str
  separator: str
  solve: Callable[[str], str]
  length: Callable[[str], int]
  longest: Callable[[int], tuple[int, int]]


def letters_case(make, solve):
  return Case(make, "[a-z]+", " ", solve, len, lambda n: (n, n))


def repeat_case(make, most):
  solve = lambda source: source[:-1] * int(source[-1])
  length = lambda source: len(source) - 1
  longest = lambda n: (n + 1, most * n)
  return Case(make, f"[a-z]+[1-{most}]", " ", solve, length, longest)


def add_case(make, most):
  solve = lambda source: str(sum(map(int, source.split("+"))))
  length = lambda source: len(source.split("+"))
  longest = lambda n: (len("+".join([str(most)] * n)), len(str(n * most)))
  number = "(0|[1-9][0-9]*)"
  return Case(make, rf"{number}(\+{number})*", "=", solve, length, longest)


CASES = {
  "copy": letters_case(tasks.copy, lambda s: s),
  "reverse": letters_case(tasks.reverse, lambda s: s[::-1]),
  "sort": letters_case(tasks.sort, lambda s: "".join(sorted(s))),
  "repeat_copy": repeat_case(tasks.repeat_copy, 4),
  "repeat_copy_9": repeat_case(partial(tasks.repeat_copy, max_repeats=9), 9),
  "add": add_case(tasks.add, 9),
  "add_120": add_case(partial(tasks.add, max_num=120), 120),
}
each_case = pytest.mark.parametrize("name", CASES)
# Those of the list, with the options that they have by default.
each_task = pytest.mark.parametrize("name", tasks.ALGORITHMIC)
LONGEST = 6


@functools.cache
def made(name) -> tasks.Task:
  """The task of most tests."""
  return CASES[name].make(2048, LONGEST, time_chunk=4, num_evaluation=512)


@functools.cache
def split_of(name, split) -> tasks.Split:
  return made(name).splits[split]()


def draw(key, length) -> tasks.Draw:
  zero = jnp.zeros((), jnp.int32)
  return tasks.Draw(key, zero, zero, length)


@functools.cache
def compiled(sample):
  return jax.jit(lambda key, length: sample((), draw(key, length)))


def batch_of(task, seed=0, length=None):
  """A training batch; of full length if none is given."""
  length = task.max_length if length is None else length
  return compiled(task.sample)(jax.random.key(seed), jnp.int32(length))


def strings(task, batch) -> list[str]:
  return [task.vocabulary.decode(row) for row in np.asarray(batch[0])]


def padded_width(case, length, time_chunk) -> int:
  """Tokens of the longest sequence in whole chunks, and the one behind them."""
  size = sum(case.longest(length)) + 1
  return math.ceil(size / time_chunk) * time_chunk + 1


def sources(case, task, batch) -> list[str]:
  return [s.split(case.separator)[0] for s in strings(task, batch)]


def chunks(task, data, batch, num_chunks):
  """All chunks, side by side, as NumPy arrays [B, chunks * C]."""
  chunk = jax.jit(task.chunk)
  parts = [chunk(data, batch, index) for index in range(num_chunks)]
  return tasks.Chunk(
    *(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
  )


def counted_pairs(task, seen, row) -> list[str]:
  """What is read and what must follow, of the predictions that count."""
  decode = lambda ids: task.vocabulary.decode(ids[row][seen.weights[row] > 0])
  pairs = zip(decode(seen.inputs), decode(seen.targets), strict=True)
  return ["".join(pair) for pair in pairs]


def frequencies_are_even(values, possible):
  """Whether each possible value occurs as often as the others, to 6 sigma."""
  counts = collections.Counter(values)
  assert set(counts) <= set(possible)
  p, total = 1 / len(possible), len(values)
  bound = 6 * math.sqrt(total * p * (1 - p))
  return all(abs(counts[value] - total * p) <= bound for value in possible)


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


def scores(task, split, *models):
  """Summaries of models, which are compiled together."""
  sums = jax.jit(
    lambda params: [
      metrics.stream_sums(model, task, p, split)
      for model, p in zip(models, params, strict=True)
    ]
  )([model.init(None) for model in models])
  return [metrics.summary(one) for one in sums]


# Algorithmic tasks: strings.


def check_strings(case, task, batch, longest):
  tokens, weights = batch
  assert tokens.dtype == jnp.int32 and weights.dtype == jnp.float32
  assert tokens.shape == weights.shape
  lengths, expected = [], np.zeros(weights.shape)
  for row, shown in enumerate(strings(task, batch)):
    source, rest = shown.split(case.separator, 1)
    assert re.fullmatch(case.source, source)
    output = case.solve(source)
    assert rest.rstrip(" ") == output
    lengths.append(case.length(source))
    # From the separator, which predicts the first token, to the one space.
    first = len(source)
    expected[row, first : first + len(output) + 1] = 1
  np.testing.assert_array_equal(weights, expected)
  assert frequencies_are_even(lengths, range(2, longest + 1))


@each_case
def test_outputs_are_what_python_finds(name):
  case, task = CASES[name], made(name)
  batch = batch_of(task)
  check_strings(case, task, batch, LONGEST)
  _, output = case.longest(LONGEST)
  assert batch[0].shape == (2048, padded_width(case, LONGEST, 4))
  assert (task.min_length, task.max_length) == (2, LONGEST)
  tokens = task.tokens_per_batch(task.max_length)
  assert tokens == 2048 * (output + 1) > batch[1].sum()


@pytest.mark.parametrize("name", ["copy", "add"])
def test_two_letters_or_terms_are_enough(name):
  task = CASES[name].make(256, 2, time_chunk=4)
  check_strings(CASES[name], task, batch_of(task), 2)


@pytest.mark.parametrize("name", ["copy", "sort", "repeat_copy_9", "add_120"])
def test_symbols_are_uniform(name):
  task = made(name)
  shown = sources(CASES[name], task, batch_of(task, seed=3))
  if name == "add_120":
    terms = [int(term) for source in shown for term in source.split("+")]
    assert frequencies_are_even(terms, range(121))
    return
  if name == "repeat_copy_9":
    digits = [int(source[-1]) for source in shown]
    assert frequencies_are_even(digits, range(1, 10))
    shown = [source[:-1] for source in shown]
  assert frequencies_are_even("".join(shown), string.ascii_lowercase)


@pytest.mark.parametrize(
  ("name", "drawn", "expected"),
  [
    ("copy", [[2, 0, 1, 2, 3]], ["cab cab", "ca ca"]),
    ("reverse", [[2, 0, 1, 2, 3]], ["cab bac", "ca ac"]),
    ("sort", [[2, 0, 1, 2, 3]], ["cab abc", "ca ac"]),
    (
      "repeat_copy",
      [[2, 0, 1, 2, 3], [[2], [4]]],
      ["cab2 cabcab", "ca4 cacacaca"],
    ),
    ("add", [[2, 9, 8, 1, 3]], ["2+9+8=19", "2+9=11"]),
    ("add_120", [[12, 100, 7, 0, 3]], ["12+100+7=119", "12+100=112"]),
  ],
)
def test_known_strings(monkeypatch, name, drawn, expected):
  # In place of random numbers: lengths, then letters or terms, then the rest.
  letters, *rest = drawn
  values = iter([[[3], [2]], [letters, letters], *rest])

  def randint(key, shape, low, high):
    value = np.asarray(next(values), np.int32)
    assert value.shape == shape
    assert low <= value.min() and value.max() < high
    return jnp.asarray(value)

  below = lambda count, key, shape: randint(key, shape, 0, count)
  monkeypatch.setattr(jax.random, "randint", randint)
  monkeypatch.setattr(algorithmic, "_below", below)
  case = CASES[name]
  task = case.make(2, 5, time_chunk=4)
  batch = jax.jit(lambda: task.sample((), draw(jax.random.key(0), 5)))()
  width = padded_width(case, 5, 4)
  assert strings(task, batch) == [one.ljust(width) for one in expected]
  assert next(values, None) is None


def from_words(count, key, shape):
  """The numbers below `count` of random words, in 64 bits."""
  words = np.asarray(jax.random.bits(key, shape, jnp.uint32), np.uint64)
  return (words // 2**8) * count // 2**24


def test_copy_keeps_its_random_numbers():
  # What a run is resumed with; another draw is another run.
  task = made("copy")
  width = padded_width(CASES["copy"], LONGEST, 4)
  for seed, longest in ((0, LONGEST), (2, 4)):
    length_key, letter_key = jax.random.split(jax.random.key(seed))
    lengths = jax.random.randint(length_key, (2048, 1), 2, longest + 1)
    letters = from_words(26, letter_key, (2048, LONGEST))
    expected = []
    for (length,), row in zip(lengths.tolist(), letters.tolist(), strict=True):
      word = "".join(string.ascii_lowercase[x] for x in row[:length])
      expected.append(f"{word} {word}".ljust(width))
    assert strings(task, batch_of(task, seed, longest)) == expected


@pytest.mark.parametrize("count", [1, 2, 10, 26, 121, 255, 256])
def test_small_numbers_are_those_of_their_words(count):
  key, shape = jax.random.key(count), (512, 64)
  numbers = algorithmic._below(count, key, shape)
  assert numbers.dtype == jnp.int32
  np.testing.assert_array_equal(numbers, from_words(count, key, shape))


@pytest.mark.parametrize(
  ("word", "count", "expected"),
  [
    (0, 256, 0),
    (2**32 - 1, 256, 255),
    (2**32 - 1, 26, 25),
    (2**31 - 1, 10, 4),
    (2**31, 10, 5),
  ],
)
def test_the_number_of_a_word(monkeypatch, word, count, expected):
  words = lambda key, shape, dtype: jnp.full(shape, word, dtype)
  monkeypatch.setattr(jax.random, "bits", words)
  assert algorithmic._below(count, jax.random.key(0), ()) == expected


def test_large_numbers_are_those_of_jax():
  key, shape = jax.random.key(3), (64, 32)
  for count in (257, 10**9):
    np.testing.assert_array_equal(
      algorithmic._below(count, key, shape),
      jax.random.randint(key, shape, 0, count),
    )


@pytest.mark.parametrize("count", [2, 10, 26, 121, 256, 257])
def test_numbers_below_a_count_are_uniform(count):
  def is_even(numbers):
    """By chi-square, with five sigma of room and what few degrees need."""
    counts = np.bincount(numbers.ravel(), minlength=count)
    mean, degrees = numbers.size / count, count - 1
    squares = np.sum((counts - mean) ** 2) / mean
    return squares < degrees + 5 * math.sqrt(2 * degrees) + 25

  draws = np.asarray(algorithmic._below(count, jax.random.key(1), (2**20,)))
  assert draws.min() == 0 and draws.max() == count - 1
  assert is_even(draws)
  # The rest of a byte is not, nor is what leaves out a value.
  assert is_even(np.arange(2**20) % 256 % count) == (256 % count == 0)
  assert not is_even(np.arange(2**20) % (count - 1))


def test_ids_are_those_of_the_paper():
  printable = tasks.repeat_copy(1, 2, 1).vocabulary
  for make in (tasks.copy, tasks.reverse, tasks.sort):
    assert make(1, 2, 1).vocabulary == printable
  assert "".join(printable.symbols) == string.printable
  for symbol, index in (("0", 0), ("9", 9), ("a", 10), ("A", 36), (" ", 94)):
    assert printable.encode(symbol) == index
  numeric = tasks.add(1, 2, 1).vocabulary
  assert "".join(numeric.symbols) == "0123456789+-*/=()[],. "
  for symbol, index in (("7", 7), ("+", 10), ("=", 14), (" ", 21)):
    assert numeric.encode(symbol) == index


def test_sums_may_fill_32_bits():
  most = (2**31 - 1) // 52
  task = tasks.add(4, 2, time_chunk=16, num_evaluation=256, max_num=most)
  data, batch, num_chunks = task.splits["test"]()
  totals = []
  for shown in strings(task, batch):
    source, output = shown.rstrip(" ").split("=")
    assert sum(map(int, source.split("+"))) == int(output)
    totals.append(int(output))
  assert max(totals) > 2**30
  seen = chunks(task, data, batch, num_chunks)
  assert seen.weights.sum() == sum(len(str(total)) + 1 for total in totals)
  case = add_case(tasks.add, most)
  assert batch[0].shape[1] == padded_width(case, 52, 16) == 16 * num_chunks + 1
  assert jax.jit(task.num_chunks)(52) == num_chunks


# Algorithmic tasks: chunks and lengths.


@pytest.mark.parametrize(
  ("name", "time_chunk"),
  [(name, 4) for name in CASES]
  + [("copy", 1), ("copy", 13), ("add_120", 7), ("repeat_copy", 256)],
)
def test_chunks_show_the_string_and_count_the_output(name, time_chunk):
  case = CASES[name]
  task = case.make(32, LONGEST, time_chunk)
  batch = batch_of(task, seed=1)
  seen = chunks(task, (), batch, task.num_chunks(LONGEST))
  assert seen.inputs.shape[1] + 1 == padded_width(case, LONGEST, time_chunk)
  decode = task.vocabulary.decode
  for row, shown in enumerate(strings(task, batch)):
    assert decode(seen.inputs[row]) == shown[:-1]
    assert decode(seen.targets[row]) == shown[1:]
    answer = case.solve(shown.split(case.separator)[0]) + " "
    pairs = zip(case.separator + answer[:-1], answer, strict=True)
    assert counted_pairs(task, seen, row) == ["".join(p) for p in pairs]
  assert set(np.unique(seen.weights)) <= {0.0, 1.0}


@pytest.mark.parametrize(
  ("name", "time_chunk", "shown", "weights", "pairs"),
  [
    ("copy", 4, "abc abc", "0001111", [" a", "ab", "bc", "c "]),
    ("copy", 4, "abcd abcd", "000011111", [" a", "ab", "bc", "cd", "d "]),
    # The closing space lies behind the last chunk.
    (
      "sort",
      11,
      "dacbf abcdf",
      "00000111111",
      [" a", "ab", "bc", "cd", "df", "f "],
    ),
    ("add", 4, "9+8+3=20", "00000111", ["=2", "20", "0 "]),
  ],
)
def test_chunks_of_known_strings(name, time_chunk, shown, weights, pairs):
  case = CASES[name]
  task = case.make(1, 5, time_chunk)
  width = padded_width(case, 5, time_chunk)
  tokens = jnp.asarray(task.vocabulary.encode(shown.ljust(width))[None])
  weights = jnp.asarray([[float(x) for x in weights.ljust(width, "0")]])
  seen = chunks(task, (), (tokens, weights), task.num_chunks(5))
  assert counted_pairs(task, seen, 0) == pairs


@pytest.mark.parametrize("name", ["copy", "repeat_copy", "add"])
@pytest.mark.parametrize(
  ("split", "shortest", "longest"),
  [("valid", 2, LONGEST), ("test", LONGEST + 1, LONGEST + 50)],
)
def test_splits_have_their_lengths(name, split, shortest, longest):
  case, task = CASES[name], made(name)
  data, batch, num_chunks = split_of(name, split)
  shown = sources(case, task, batch)
  lengths = [case.length(source) for source in shown]
  # Of 512, one is missing with probability 50 exp(-512/50), below 0.2 percent.
  assert set(lengths) == set(range(shortest, longest + 1))
  width = padded_width(case, longest, 4)
  assert batch[0].shape == (512, width)
  assert num_chunks == task.num_chunks(longest) == width // 4
  seen = chunks(task, data, batch, num_chunks)
  # Nothing that counts lies beyond the last chunk.
  np.testing.assert_array_equal(
    seen.weights.sum(1), [len(case.solve(source)) + 1 for source in shown]
  )


def test_splits_stay():
  again = made("copy").splits["valid"]()
  jax.tree.map(np.testing.assert_array_equal, again, split_of("copy", "valid"))


@each_task
def test_splits_are_not_the_training_data(name):
  case, task = CASES[name], made(name)
  train = set(sources(case, task, batch_of(task)))
  valid = set(sources(case, task, split_of(name, "valid").batch))
  # The shortest must coincide, and few of the longer ones do.
  long = {source for source in valid if case.length(source) >= 5}
  assert len(long) > 150 and len(long & train) < 10


@each_case
@pytest.mark.parametrize("time_chunk", [1, 3, 8])
def test_shorter_sequences_take_fewer_chunks(name, time_chunk):
  case = CASES[name]
  task = case.make(4, 12, time_chunk)
  traced = jax.jit(task.num_chunks)
  counts = []
  for length in range(2, 13):
    width = sum(case.longest(length)) + 1
    count = task.num_chunks(length)
    assert isinstance(count, int)
    assert count == traced(length) == -(-width // time_chunk)
    counts.append(count)
  assert counts == sorted(counts) and counts[0] < counts[-1]


@each_case
def test_a_draw_bounds_the_lengths(name):
  case, task = CASES[name], made(name)
  for length in range(2, LONGEST + 1):
    batch = batch_of(task, 4, length)
    assert batch[0].shape == batch_of(task)[0].shape
    found = {case.length(source) for source in sources(case, task, batch)}
    assert found == set(range(2, length + 1))
    # All that counts lies in the chunks of that length.
    seen = chunks(task, (), batch, task.num_chunks(length))
    np.testing.assert_array_equal(seen.weights.sum(1), batch[1].sum(1))


# Algorithmic tasks: scores.


@pytest.mark.parametrize(
  ("name", "split"),
  [
    ("copy", "valid"),
    ("reverse", "valid"),
    ("sort", "valid"),
    ("repeat_copy", "valid"),
    ("add", "test"),
  ],
)
def test_an_oracle_solves_the_task_and_an_echo_does_not(name, split):
  case, task = CASES[name], made(name)
  fixed = split_of(name, split)
  vocab = len(task.vocabulary)
  solved, echoed, even = scores(
    task,
    fixed,
    oracle(fixed.batch[0], vocab),
    echo(vocab),
    indifferent(vocab),
  )
  assert solved["loss"] < 1e-6 and solved["bits"] < 1e-6
  assert solved["accuracy"] == solved["sequence_accuracy"] == 1.0
  assert solved["tokens"] == int(np.sum(fixed.batch[1]))
  # An echo is right where a symbol is doubled, for which sorting cares.
  pairs = []
  for source in sources(case, task, fixed.batch):
    answer = case.separator + case.solve(source) + " "
    pairs += zip(answer, answer[1:], strict=False)
  rate = np.mean([first == second for first, second in pairs])
  assert echoed["accuracy"] == pytest.approx(rate, rel=1e-6)
  assert echoed["loss"] == pytest.approx(LARGE * (1 - rate), rel=1e-5)
  assert rate < 0.3 and echoed["sequence_accuracy"] == 0
  assert even["loss"] == pytest.approx(math.log(vocab), rel=1e-6)
  assert even["bits"] == pytest.approx(math.log2(vocab), rel=1e-6)


def test_one_mistake_costs_one_token_and_one_sequence():
  task, fixed = made("copy"), split_of("copy", "valid")
  tokens = np.array(fixed.batch[0])
  separator = int(np.argmax(np.asarray(fixed.batch[1])[0]))
  tokens[0, separator + 1] = 0  # A digit where the first letter belongs.
  (found,) = scores(task, fixed, oracle(tokens, 100))
  count = int(np.sum(fixed.batch[1]))
  assert found["accuracy"] == pytest.approx(1 - 1 / count, rel=1e-6)
  assert found["sequence_accuracy"] == 511 / 512
  assert found["loss"] == pytest.approx(LARGE / count, rel=1e-4)


@pytest.mark.parametrize("traced", [False, True])
def test_the_training_loss_is_that_of_the_counted_tokens(traced):
  task, length = made("copy"), 4
  batch = jax.tree.map(lambda x: x[:8], batch_of(task, 2, length))
  tokens = np.array(batch[0])

  @functools.partial(jax.jit, static_argnums=() if traced else 1)
  def loss(tokens, length):
    split = tasks.Split((), batch, task.num_chunks(length))
    return metrics.mean_loss(oracle(tokens, 100), task, tokens, split)

  assert loss(tokens, length) < 1e-6
  # Each token counts alike, in a short sequence and in a long one.
  shortest = int(np.argmin(batch[1].sum(1)))
  separator = int(np.argmax(np.asarray(batch[1])[shortest]))
  tokens[shortest, separator + 1] = 0
  assert len(np.unique(batch[1].sum(1))) > 1
  assert loss(tokens, length) == pytest.approx(
    LARGE / float(batch[1].sum()), rel=1e-5
  )


def test_many_predictions_are_counted_exactly():
  many = 2**24  # From here on float32 leaves out numbers.
  count = jnp.float32([many, 1, 1, 1, 0])
  correct = jnp.float32([many - 1, 1, 0, 1, 0])
  found = metrics.summary(metrics.Sums(2 * count, correct, count))
  assert found["tokens"] == many + 3
  assert found["accuracy"] == (many + 1) / (many + 3)
  assert found["loss"] == 2 and found["bits"] == 2 / math.log(2)
  assert found["sequence_accuracy"] == 1 / 2  # Of those that count.


# Algorithmic tasks: mistakes.


@pytest.mark.parametrize("name", tasks.ALGORITHMIC)
def test_a_length_of_one_is_refused(name):
  with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
    tasks.ALGORITHMIC[name](4, 1, 8)


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("repeat_copy", {"max_repeats": 0}, "max_repeats must be 1 to 9, got 0"),
    ("repeat_copy", {"max_repeats": 10}, "max_repeats must be 1 to 9, got 10"),
    ("add", {"max_num": 0}, "max_num must be at least 1, got 0"),
    (
      "add",
      {"max_num": (2**31 - 1) // 60 + 1},
      r"50 terms must be below 2\*\*31.*max_length=10, max_num=35791395",
    ),
  ],
)
def test_an_option_out_of_range_is_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    tasks.ALGORITHMIC[name](4, 10, 8, **options)


def test_every_task_is_on_the_list():
  made = {case.make for case in CASES.values()}
  assert set(tasks.ALGORITHMIC.values()) <= made
  for name, make in tasks.ALGORITHMIC.items():
    assert make is getattr(algorithmic, name)


# Random tokens.


@pytest.mark.parametrize(
  ("source_length", "time_chunk"), [(1, 4), (1, 16), (5, 7), (10, 3)]
)
def test_random_tokens_are_one_fixed_batch(source_length, time_chunk):
  make = partial(tasks.random_tokens, 3, 100, 10, time_chunk, source_length)
  task = make()
  tokens = np.asarray(task.data)
  # Every token after the source is predicted once, from all before it.
  batch = task.sample(task.data, draw(jax.random.key(5), 10))
  seen = chunks(task, task.data, batch, task.num_chunks(10))
  np.testing.assert_array_equal(
    seen.inputs[:, : source_length + 9], tokens[:, :-1]
  )
  counted = seen.weights > 0
  np.testing.assert_array_equal(
    seen.targets[counted], tokens[:, source_length:].ravel()
  )
  assert seen.weights.sum() == task.tokens_per_batch(task.max_length) == 30
  assert set(np.unique(seen.weights)) <= {0.0, 1.0}
  assert tokens.shape == (3, source_length + 10)
  assert len(np.unique(tokens)) > 20
  np.testing.assert_array_equal(make().data, tokens)
  assert task.min_length == task.max_length == 10
  assert len(task.vocabulary) == 100
  fixed = task.splits["valid"]()
  solved, echoed = scores(task, fixed, oracle(tokens, 100), echo(100))
  assert solved["accuracy"] == 1.0 and solved["tokens"] == 30
  assert solved["loss"] < 1e-6 and echoed["accuracy"] < 0.2


def test_random_tokens_keep_their_random_numbers():
  task = tasks.random_tokens(3, 100, 10, 4)
  expected = jax.random.randint(jax.random.key(0), (3, 11), 0, 100)
  np.testing.assert_array_equal(task.data, expected)


@pytest.mark.parametrize("size", [0, 2**20 + 1, 10**9])
def test_random_tokens_that_no_character_stands_for_are_refused(size):
  with pytest.raises(ValueError, match=f"be 1 to 1048576, got {size}"):
    tasks.random_tokens(3, size, 10, 4)


def test_random_tokens_may_take_all_characters():
  task = tasks.random_tokens(2, 2**20, 10, 4)
  symbols = task.vocabulary.symbols
  assert len(set(symbols)) == 2**20 and symbols[-1] == chr(sys.maxunicode)


def test_random_tokens_without_a_source_are_refused():
  with pytest.raises(ValueError, match="source_length must be at least 1.*0"):
    tasks.random_tokens(3, 100, 10, 4, source_length=0)


# Sampling.


def test_a_batch_depends_on_its_key_alone():
  first = batch_of(made("copy"), 7)
  same = batch_of(made("copy"), 7)
  jax.tree.map(np.testing.assert_array_equal, same, first)
  # Other chunks only change how many spaces follow.
  other = tasks.copy(2048, LONGEST, time_chunk=5, num_evaluation=1)
  again = batch_of(other, 7)
  assert again[0].shape[1] < first[0].shape[1]
  cut = jax.tree.map(lambda x: x[:, : again[0].shape[1]], first)
  jax.tree.map(np.testing.assert_array_equal, again, cut)
  assert not np.array_equal(batch_of(made("copy"), 8)[0], first[0])


@pytest.mark.parametrize("name", ["copy", "repeat_copy", "add"])
def test_each_probe_has_a_batch_that_does_not_depend_on_the_others(name):
  task, root = made(name), jax.random.key(9)
  now = Now(jnp.int32(7), root, root, 0.1, 5)
  batches = jax.jit(partial(sample_batches, task, (), now, 3))()
  for index in range(3):
    one = jax.tree.map(lambda x, index=index: x[index], batches)
    key = jax.random.fold_in(jax.random.fold_in(root, 7), index)
    alone = compiled(task.sample)(key, jnp.int32(5))
    jax.tree.map(np.testing.assert_array_equal, one, alone)
  assert len(np.unique(np.reshape(batches[0], (3, -1)), axis=0)) == 3


def test_one_batch_stays_and_has_full_length():
  task = tasks.one_batch(made("copy"))
  batches = [batch_of(task, seed) for seed in (0, 1)]
  jax.tree.map(np.testing.assert_array_equal, *batches)
  shown = sources(CASES["copy"], task, batches[0])
  assert max(map(len, shown)) == LONGEST
