"""Language modelling: evaluation, windows, streams and pools of a text."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from texts import corpus_of, model_text

from zorn_jax import build, evaluate, loggers, metrics, tasks
from zorn_jax.methods import Now, sample_batches
from zorn_jax.models import Model
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


def draw(seed=0, step=0, index=0, length=8):
  return tasks.Draw(
    jax.random.key(seed), jnp.int32(step), jnp.int32(index), length
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
