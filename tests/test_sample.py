"""Generation: how tokens are chosen, ragged prompts, and running free."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from absl import flags
from absl.testing import flagsaver

from zorn_jax import evaluate, models, tasks
from zorn_jax.cli import sample as cli
from zorn_jax.models import Model
from zorn_jax.sample import Decoding, Prompts, align, check, sample

GREEDY = Decoding(temperature=0)
KEY = jax.random.key(5)


# Models.


def elman(vocab=9, hidden=6):
  """An Elman network and its parameters, float32."""
  rng = np.random.default_rng(0)
  shapes = ((vocab, hidden), (hidden, hidden), (hidden, vocab))
  params = tuple(rng.normal(size=s).astype(np.float32) for s in shapes)

  def apply(params, h, tokens):
    def step(h, token):
      h = jnp.tanh(params[0][token] + h @ params[1])
      return h, h @ params[2]

    h, logits = jax.lax.scan(step, h, tokens.T)
    return h, logits.swapaxes(0, 1)

  start = lambda params, rows: jnp.zeros((rows, hidden))
  return Model(lambda key: params, start, apply), params


def elman_greedy(params, prompt, length):
  """Repeated argmax in float64, and the smallest gap between the best two."""
  embed, recurrent, out = (np.asarray(p, np.float64) for p in params)
  h, written, gap = np.zeros(len(recurrent)), [], np.inf
  for token in prompt:
    h = np.tanh(embed[token] + h @ recurrent)
  for _ in range(length):
    logits = h @ out
    written.append(int(np.argmax(logits)))
    second, first = np.sort(logits)[-2:]
    gap = min(gap, first - second)
    h = np.tanh(embed[written[-1]] + h @ recurrent)
  return written, gap


def lstm(vocab, seed):
  module = models.Recurrent(
    "lstm", vocab_size=vocab, embedding_size=4, hidden_size=8, num_heads=2
  )
  model = models.from_linen(module)
  return model, jax.jit(model.init)(jax.random.key(seed))


def remembering(vocab):
  """Says a number that every token of the past has a part in, exactly.

  Its count has no batch axis.
  """

  def apply(params, carry, tokens):
    def step(carry, token):
      count, total = carry
      carry = count + 1, (5 * total + token + count + 1) % vocab
      return carry, jax.nn.one_hot(carry[1], vocab)

    carry, logits = jax.lax.scan(step, carry, tokens.T)
    return carry, logits.swapaxes(0, 1)

  start = lambda params, rows: (jnp.int32(0), jnp.zeros(rows, jnp.int32))
  return Model(lambda key: (), start, apply)


def remembered(prompt, length, vocab):
  total, read, written = 0, list(prompt), []
  for count in range(len(prompt) + length):
    if count >= len(prompt):
      written.append(total)
      read.append(total)
    total = (5 * total + read[count] + count + 1) % vocab
  return written


def constant():
  """Has the parameters as its logits, whatever it reads."""

  def apply(params, carry, tokens):
    return carry, jnp.broadcast_to(params, (*tokens.shape, len(params)))

  return Model(lambda key: (), lambda params, rows: (), apply)


def following(successor):
  """Says `successor[token]` after every token."""
  table = jnp.asarray(successor)
  apply = lambda params, carry, tokens: (
    carry,
    jax.nn.one_hot(table[tokens], len(table)),
  )
  return Model(lambda key: (), lambda params, rows: (), apply)


# How tokens are chosen.


def distribution(logits, decoding):
  """Probability of each token, written out."""
  scaled = [float(x) / decoding.temperature for x in logits]
  order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
  order = order[: decoding.top_k or None]
  total = sum(np.exp(scaled[i]) for i in order)
  kept, reached = [], 0.0
  for i in order:
    if reached < decoding.top_p or not kept:
      kept.append(i)
    reached += np.exp(scaled[i]) / total
  total = sum(np.exp(scaled[i]) for i in kept)
  result = np.zeros(len(scaled))
  for i in kept:
    result[i] = np.exp(scaled[i]) / total
  return result


LOGITS = np.array([0.3, 1.5, -0.4, 1.5, 0.9, -2.0, 0.3], np.float32)


@pytest.mark.parametrize(
  ("decoding", "support"),
  [
    (Decoding(), 7),
    (Decoding(top_k=4), 4),  # Parts two equal tokens.
    (Decoding(top_k=70, top_p=0.75), 3),
    (Decoding(top_p=1e-50), 1),  # Nothing in float32.
    (Decoding(temperature=0.5, top_p=0.78), 2),
    (Decoding(temperature=1.0, top_k=3, top_p=0.77), 2),  # Of three, not seven.
  ],
)
def test_draws_follow_the_renormalised_softmax(decoding, support):
  expected = distribution(LOGITS, decoding)
  assert np.sum(expected > 0) == support
  prompts = align([np.array([0])] * 4)
  tokens = sample(
    constant(), jnp.asarray(LOGITS), prompts, decoding, 50, KEY, 100
  )
  assert tokens.shape == (4, 100, 50) and tokens.dtype == jnp.int32
  counts = np.bincount(np.ravel(tokens), minlength=len(LOGITS))
  np.testing.assert_array_equal(counts > 0, expected > 0)
  if support == 1:
    return
  kept = expected > 0
  total = counts.sum()

  def chance(probabilities):
    return scipy.stats.chisquare(counts[kept], total * probabilities).pvalue

  wrong = expected[kept] ** 1.3  # Another temperature.
  assert chance(expected[kept]) > 1e-3
  if len(set(expected[kept])) > 1:
    assert chance(wrong / wrong.sum()) < 1e-3


@pytest.mark.parametrize(("top_p", "support"), [(0.5, 2), (0.51, 3)])
def test_a_probability_that_is_just_reached_is_enough(top_p, support):
  # Four quarters are exact in float32.
  decoding = Decoding(top_p=top_p)
  prompts = align([np.array([0])])
  tokens = sample(constant(), jnp.zeros(4), prompts, decoding, 200, KEY)
  assert set(np.ravel(tokens)) == set(range(support))


def test_rows_samples_and_positions_draw_on_their_own():
  prompts = align([np.array([0])] * 8)
  model, flat = constant(), jnp.zeros(2)
  tokens = np.asarray(sample(model, flat, prompts, Decoding(), 64, KEY, 8))
  rows = tokens.reshape(64, 64)
  agreement = rows @ rows.T + (1 - rows) @ (1 - rows).T
  others = agreement[~np.eye(64, dtype=bool)]
  assert others.max() < 64  # No two are the same ...
  assert abs(others.mean() - 32) < 1  # ... or have anything to do with it.
  columns = tokens.mean((0, 1))
  assert 0.2 < columns.min() and columns.max() < 0.8
  again = sample(model, flat, prompts, Decoding(), 64, KEY, 8)
  np.testing.assert_array_equal(tokens, again)
  other = sample(model, flat, prompts, Decoding(), 64, jax.random.key(6), 8)
  assert np.any(tokens != np.asarray(other))


def test_greedy_is_repeated_argmax():
  model, params = elman()
  rng = np.random.default_rng(1)
  prompts = [rng.integers(0, 9, size) for size in (4, 1, 7)]
  written = sample(model, params, align(prompts), GREEDY, 12, KEY)[:, 0]
  different = set()
  for row, prompt in zip(np.asarray(written), prompts, strict=True):
    expected, gap = elman_greedy(params, prompt, 12)
    assert gap > 1e-4
    assert row.tolist() == expected
    different.add(tuple(expected))
  assert len(different) == 3 and all(len(set(row)) > 2 for row in different)


def test_top_1_is_greedy():
  model, params = elman()
  prompts = align([np.array([3, 1]), np.array([7])])
  greedy = sample(model, params, prompts, GREEDY, 20, KEY)
  top_1 = sample(model, params, prompts, Decoding(top_k=1), 20, KEY)
  np.testing.assert_array_equal(greedy, top_1)


# Prompts.


def test_align_puts_the_last_tokens_side_by_side():
  prompts = align([np.array([4]), np.array([1, 2, 3]), np.array([5, 6])])
  assert prompts.lengths.tolist() == [1, 3, 2]
  tokens = prompts.tokens.tolist()
  assert (tokens[0][2:], tokens[1], tokens[2][1:]) == ([4], [1, 2, 3], [5, 6])


def test_padding_is_not_read():
  vocab, model = 97, remembering(97)
  prompts = [[5], [0, 0, 0, 8], [3, 0], [90, 1, 2]]
  tokens, lengths = align([np.array(prompt) for prompt in prompts])
  expected = [remembered(prompt, 6, vocab) for prompt in prompts]
  assert remembered([0, 0, 3, 0], 6, vocab) != expected[2]
  written = sample(model, (), Prompts(tokens, lengths), GREEDY, 6, KEY)
  assert written[:, 0].tolist() == expected
  wider = jnp.pad(tokens, ((0, 0), (3, 0)), constant_values=50)
  written = sample(model, (), Prompts(wider, lengths), GREEDY, 6, KEY)
  assert written[:, 0].tolist() == expected


@pytest.mark.parametrize("decoding", [GREEDY, Decoding(0.8, 7, 0.9)])
def test_a_row_does_not_know_the_others(decoding):
  model, params = elman()
  rng = np.random.default_rng(2)
  prompts = align([rng.integers(0, 9, size) for size in (2, 7, 1, 4)])

  def write(chosen, length=30, num_samples=1):
    rows = Prompts(*(np.asarray(x)[chosen] for x in prompts))
    return np.asarray(
      sample(model, params, rows, decoding, length, KEY, num_samples)
    )

  together = write([0, 1, 2, 3])
  np.testing.assert_array_equal(write([0, 1]), together[:2])
  mixed = write([2, 1, 0, 3])
  np.testing.assert_array_equal(mixed[1::2], together[1::2])
  if decoding == GREEDY:  # Elsewhere the row decides on the draws.
    np.testing.assert_array_equal(mixed[::2], together[2::-2])
    alone = np.concatenate([write([row]) for row in range(4)])
    np.testing.assert_array_equal(alone, together)
  else:
    assert np.any(mixed[0] != together[2])
    more = write([0, 1, 2, 3], length=40, num_samples=3)
    np.testing.assert_array_equal(more[:, :1, :30], together)


def test_sampling_within_another_jit():
  model, params = elman()
  prompts = align([np.array([1, 2]), np.array([3])])
  write = lambda params, prompts, key: sample(
    model, params, prompts, Decoding(1.0, 4, 0.9), 10, key
  )
  np.testing.assert_array_equal(
    jax.jit(write)(params, prompts, KEY), write(params, prompts, KEY)
  )


@pytest.mark.parametrize(
  ("decoding", "fact"),
  [
    (Decoding(temperature=-1.0), "temperature must not be negative, got -1.0"),
    (Decoding(temperature=float("nan")), "temperature must not be negative"),
    (Decoding(top_k=-1), "top_k must not be negative, got -1"),
    (Decoding(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
    (Decoding(top_p=1.5), "top_p must be above 0 and at most 1, got 1.5"),
    (Decoding(top_p=float("nan")), "top_p must be above 0"),
  ],
)
def test_no_way_to_choose(decoding, fact):
  with pytest.raises(ValueError, match=fact):
    check(decoding)
  with pytest.raises(ValueError, match=fact):
    sample(constant(), jnp.zeros(3), align([np.array([0])]), decoding, 2, KEY)


def test_no_prompt():
  with pytest.raises(ValueError, match="the prompt is empty"):
    align([np.array([1]), np.array([], np.int32)])
  with pytest.raises(ValueError, match="there is no prompt"):
    align([])


# The command, on a run that needs no training.


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs the command on a model that says the letter after the last."""
  vocabulary = tasks.Vocabulary(tuple("?abcdef"))
  experiment = types.SimpleNamespace(
    model=following([1, 2, 3, 4, 5, 6, 1]),
    task=types.SimpleNamespace(vocabulary=vocabulary),
  )
  restored = []

  def restore(experiment, workdir, best):
    restored.append(best)
    return (), 7

  monkeypatch.setattr(cli.build, "load", lambda workdir: experiment)
  monkeypatch.setattr(cli, "restore_params", restore)

  def call(*args):
    with flagsaver.flagsaver():
      flags.FLAGS(["sample", "--workdir=run", *args])
      assert cli.main([]) == 0
    out, err = capsys.readouterr()
    return out, err, restored[-1]

  return call


def test_one_text_has_no_heading(command):
  args = ("--length=4", "--temperature=0")
  assert command("--prompt=ab", *args) == ("abcdef\n", "", False)
  out, err, best = command("--prompt=ax", "--best", *args)
  assert out == "axabcd\n" and best
  assert err == (
    "warning: 1 characters of the prompt are not in the vocabulary ('x'); read "
    "as unknown.\n"
  )
  assert command(*args)[0] == "\nabcd\n"


@pytest.mark.parametrize(
  ("prompt", "tokens", "text"),
  [
    ([0, 1], [2, 3], " of men"),  # Alone it is trimmed.
    ([4], [1], " king"),
    ([5], [6, 7], "é"),  # What was half a letter before.
  ],
)
def test_a_text_is_what_follows_the_prompt(prompt, tokens, text):
  pieces = [b"the", b" king", b" of", b" men", b"\n", b"\xc3", b"\xc3", b"\xa9"]

  def decode(ids):
    whole = b"".join(pieces[i] for i in ids)
    return whole.decode(errors="replace").lstrip(" ")

  vocabulary = types.SimpleNamespace(decode=decode)
  assert cli._continuation(vocabulary, np.array(prompt), np.array(tokens)) == (
    text
  )


def test_several_prompts(command, tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("cd\nx-\n")
  out, err, _ = command(
    "--prompt=a",
    "--prompt=fab x",
    f"--prompts_file={path}",
    "--length=2",
    "--temperature=0",
  )
  assert out == (
    "=== prompt 1 of 4 ===\nabc\n\n"
    "=== prompt 2 of 4 ===\nfab xab\n\n"
    "=== prompt 3 of 4 ===\ncdef\n\n"
    "=== prompt 4 of 4 ===\nx-ab\n"
  )
  assert "4 characters of the prompts are not in the vocabulary" in err
  args = (f"--prompts_file={path}", "--length=2", "--temperature=0")
  assert command(*args)[0].startswith("=== prompt 1 of 2 ===\ncdef\n")


def test_several_samples(command):
  args = ("--length=20", "--temperature=9")
  out, _, _ = command("--prompt=a", "--num_samples=3", *args)
  lines = out.split("\n")
  assert lines[::3] == [f"=== sample {n} of 3 ===" for n in (1, 2, 3)]
  texts = lines[1::3]
  assert len({*texts}) == 3 and all(len(text) == 21 for text in texts)
  out, _, _ = command(
    "--prompt=a", "--prompt=fab", "--num_samples=2", "--top_k=1", *args
  )
  after_a, after_b = "bcdefabcdefabcdefabc", "cdefabcdefabcdefabcd"
  assert out == (
    f"=== prompt 1 of 2, sample 1 of 2 ===\na{after_a}\n\n"
    f"=== prompt 1 of 2, sample 2 of 2 ===\na{after_a}\n\n"
    f"=== prompt 2 of 2, sample 1 of 2 ===\nfab{after_b}\n\n"
    f"=== prompt 2 of 2, sample 2 of 2 ===\nfab{after_b}\n"
  )
  out, _, _ = command("--prompt=a", "--top_p=0.01", *args)
  assert out == f"a{after_a}\n"
  out, _, _ = command("--prompt=a", "--seed=1", *args)
  other, _, _ = command("--prompt=a", "--seed=2", *args)
  assert out != other


@pytest.mark.parametrize(
  ("args", "fact"),
  [
    (["--prompt="], "the prompt is empty"),
    (["--prompt=a", "--prompt="], "the prompt is empty"),
    (["--length=0"], "length must be positive, got 0"),
    (["--num_samples=0"], "num_samples must be positive, got 0"),
    (["--num_samples=2", "--temperature=0"], "got num_samples=2"),
    (["--temperature=-0.5"], "temperature must not be negative, got -0.5"),
    (["--top_k=-2"], "top_k must not be negative, got -2"),
    (["--top_p=0"], "top_p must be above 0 and at most 1, got 0.0"),
    (["--top_p=1.01"], "top_p must be above 0 and at most 1, got 1.01"),
  ],
)
def test_bad_flags_are_refused_before_the_run_is_read(
  command, monkeypatch, args, fact
):
  monkeypatch.setattr(cli.build, "load", None)
  with pytest.raises(ValueError, match=fact):
    command(*args)


@pytest.mark.parametrize(
  ("content", "fact"),
  [
    (b"ab\n\ncd\n", "line 2 of the prompts file .* is empty"),
    (b"", "line 1 of the prompts file .* is empty"),
    (b"ab\n\xff", "not UTF-8 at byte 3"),
  ],
)
def test_bad_prompts_files(command, tmp_path, content, fact):
  path = tmp_path / "prompts.txt"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=fact):
    command(f"--prompts_file={path}")


# Running free.


def fixed(tokens, weights, time_chunk):
  """A split of sequences [B, W], and the only part of its task that is used."""
  tokens, weights = np.asarray(tokens), np.asarray(weights, np.float32)
  num_chunks = -(-weights.shape[1] // time_chunk)
  spare = num_chunks * time_chunk - weights.shape[1]
  tokens = jnp.pad(tokens, ((0, 0), (0, spare)))
  weights = jnp.pad(weights, ((0, 0), (0, spare)))

  def chunk(data, batch, index):
    cut = lambda x, size: jax.lax.dynamic_slice_in_dim(
      x, index * time_chunk, size, axis=1
    )
    ids = cut(tokens, time_chunk + 1)
    return tasks.Chunk(ids[:, :-1], ids[:, 1:], cut(weights, time_chunk))

  return types.SimpleNamespace(chunk=chunk), tasks.Split((), (), num_chunks)


@pytest.mark.parametrize("time_chunk", [1, 2, 3, 5, 8])
def test_a_mistake_leads_astray(time_chunk):
  successor = [*range(1, 14), 0]
  successor[5] = 8  # Wrong: all sequences count.
  start = np.array([3, 6, 4, 4, 2])
  tokens = start[:, None] + np.arange(6)[None]
  weights = [
    [0, 1, 1, 1, 1],  # 4→5, 5→8, then it goes on from 8: 1 of 4, not 3.
    [0, 1, 1, 1, 1],  # Never meets 5: 4 of 4.
    [0, 0, 1, 1, 0],  # What it says after 5 does not count: 2 of 2.
    [0, 1, 0, 1, 1],  # 5→8, which is read, but then the true 7: 2 of 3.
    [0, 0, 0, 0, 0],  # Nothing counts.
  ]
  model = following(successor)
  task, split = fixed(tokens, weights, time_chunk)
  forced = evaluate.evaluator(model, task)((), split)
  free = evaluate.free_runner(model, task)((), split)
  assert forced["accuracy"] == pytest.approx(11 / 13, rel=1e-6)
  assert free["accuracy"] == pytest.approx(9 / 13, rel=1e-6)
  assert free["sequence_accuracy"] == forced["sequence_accuracy"] == 0.5
  assert free["tokens"] == 13


def test_without_a_mistake_it_reads_what_it_is_given():
  successor = [*range(1, 14), 0]
  task, split = fixed(
    np.arange(3)[:, None] + np.arange(9)[None], [[0, 0] + 6 * [1]] * 3, 4
  )
  model = following(successor)
  scores = evaluate.free_runner(model, task)((), split)
  assert scores == pytest.approx(evaluate.evaluator(model, task)((), split))
  assert scores["accuracy"] == scores["sequence_accuracy"] == 1.0


def test_a_model_that_never_errs_on_the_real_tasks():
  for name in ("copy", "add"):
    task = tasks.ALGORITHMIC[name](
      2, max_length=4, time_chunk=7, num_evaluation=6
    )
    split = task.splits["valid"]()
    shown = [
      task.chunk(split.data, split.batch, index)
      for index in range(split.num_chunks)
    ]
    targets = jnp.concatenate([part.targets for part in shown], axis=1)

    def apply(params, position, tokens, targets=targets):
      following = jax.lax.dynamic_slice_in_dim(
        targets, position, tokens.shape[1], axis=1
      )
      logits = 50 * jax.nn.one_hot(following, len(task.vocabulary))  # noqa: B023
      return position + tokens.shape[1], logits

    model = Model(lambda key: (), lambda params, rows: jnp.int32(0), apply)
    scores = evaluate.free_runner(model, task)((), split)
    assert scores["accuracy"] == scores["sequence_accuracy"] == 1.0, name
    assert scores["loss"] < 1e-6, name


def by_hand(model, params, tokens, weights):
  """Sums over each sequence, one token of one row at a time."""
  apply = jax.jit(model.apply)
  losses, correct = [], []
  for row, counts in zip(tokens, weights, strict=True):
    carry, read = model.initial_carry(params, 1), row[0]
    losses.append([])
    correct.append([])
    for t, count in enumerate(counts):
      carry, logits = apply(params, carry, jnp.full((1, 1), read))
      logits = np.asarray(logits[0, 0], np.float64)
      said = int(np.argmax(logits))
      if count:
        total = np.log(np.sum(np.exp(logits)))
        losses[-1].append(total - logits[row[t + 1]])
        correct[-1].append(said == row[t + 1])
      read = said if count else row[t + 1]
  return losses, correct


def test_exact_sequences_are_those_of_teacher_forcing():
  model, params = lstm(2, seed=5)
  params = jax.tree.map(lambda x: 2 * x, params)  # Else it repeats itself.
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, 2, (64, 8))
  weights = np.zeros((64, 7))
  weights[:, 3:6] = 1
  weights[::2, 2] = 1
  task, split = fixed(tokens, weights, 3)
  forced = evaluate.evaluator(model, task)(params, split)
  free = evaluate.free_runner(model, task)(params, split)
  assert 0.05 < free["sequence_accuracy"] < 0.95
  assert free["sequence_accuracy"] == forced["sequence_accuracy"]
  assert free["accuracy"] != forced["accuracy"]
  losses, correct = by_hand(model, params, tokens, weights)
  assert free["accuracy"] == pytest.approx(np.mean(sum(correct, [])), rel=1e-6)
  exact = [all(row) for row in correct]
  assert free["sequence_accuracy"] == pytest.approx(np.mean(exact), rel=1e-6)
  assert free["loss"] == pytest.approx(np.mean(sum(losses, [])), rel=1e-5)
  assert free["tokens"] == weights.sum()


def test_running_free_needs_something_to_read_first():
  text = tasks.random_tokens(2, 5, 6, 4)  # Counts everywhere, as a text does.
  run = evaluate.free_runner(following([0] * 5), text)
  with pytest.raises(ValueError, match="the first prediction counts already"):
    run((), text.splits["test"]())
  later = tasks.random_tokens(2, 5, 6, 4, source_length=2)
  run = evaluate.free_runner(following([0] * 5), later)
  assert run((), later.splits["test"]())["tokens"] == 12
