"""Methods: BPTT, streaming unrolls, and what they cost."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from zorn_jax import build, methods, metrics
from zorn_jax.aggregators import gaf
from zorn_jax.methods import Now
from zorn_jax.step import init_state, train_step
from zorn_jax.tasks import Draw

SHAKESPEARE = small.ROOT / "configs" / "shakespeare.py"


def now(task, step=3, epsilon=0.0):
  keys = jax.random.key(1), jax.random.key(2)
  return Now(step, *keys, epsilon, task.max_length)


@pytest.fixture(scope="module")
def experiment():
  """Seven tokens of copy in chunks of one, for an LSTM of four units."""
  return build.experiment(
    small.config(task__time_chunk=1, model__initial_state="trainable")
  )


@pytest.fixture(scope="module")
def params(experiment):
  params = jax.jit(experiment.model.init)(jax.random.key(0))
  # Large enough that a state is remembered.
  return jax.tree.map(lambda x: 2 * x + 0.1, params)


def gradient(experiment, params, **options):
  task = experiment.task
  method = methods.bptt(experiment.model, task, **options)
  losses, measured = jax.jit(
    lambda params: method.query(params, (), (), now(task))
  )(params)
  return losses, method.update(losses, measured, params, (), now(task))[0]


def expected(experiment, params, num_batches):
  """Losses and gradients of the batches of step 3, by `jax.grad`."""
  task = experiment.task
  batches = methods.sample_batches(task, (), now(task), num_batches)

  def one(params, batch):
    split = methods.Split((), batch, task.num_chunks(task.max_length))
    return metrics.mean_loss(experiment.model, task, params, split)

  return jax.vmap(jax.value_and_grad(one), (None, 0))(params, batches)


def assert_close(actual, wanted, rtol=1e-4):
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_bptt_is_the_mean_gradient(experiment, params, checkpoint):
  losses, grads = gradient(
    experiment, params, micro_batches=3, checkpoint=checkpoint
  )
  values, each = expected(experiment, params, 3)
  np.testing.assert_allclose(losses[:, 0], values, rtol=1e-5)
  assert_close(grads, jax.tree.map(lambda g: g.mean(0), each))


def test_bptt_hands_its_micro_batches_to_the_aggregator(experiment, params):
  _, each = expected(experiment, params, 4)
  wanted = gaf(0.3)(lambda g: g, each)
  _, grads = gradient(experiment, params, micro_batches=4, aggregator=gaf(0.3))
  assert_close(grads, wanted)


def test_truncation_stops_the_gradient(experiment, params):
  _, full = gradient(experiment, params)
  _, whole = gradient(experiment, params, truncation=7)
  _, short = gradient(experiment, params, truncation=2)
  assert_close(whole, full)
  # The readout's gradient does not go through time.
  for name in ("w_proj", "b_proj"):
    np.testing.assert_allclose(short[name], full[name], rtol=1e-4, atol=1e-6)
  difference = np.abs(short["r"] - full["r"]).max()
  assert difference > 0.01 * np.abs(full["r"]).max()
  # Scored predictions begin two tokens in or later: the initial state is out
  # of reach of all but those of the first two.
  assert np.abs(full["states0"]).max() > 0
  one = gradient(experiment, params, truncation=1)[1]["states0"]
  np.testing.assert_array_equal(one, 0)


def bptt_bytes(length, checkpoint, path):
  config = small.config(
    SHAKESPEARE, "bptt", task__source=path, task__seq_length=length
  )
  config.estimator.checkpoint = checkpoint
  experiment = build.experiment(config)
  state = jax.eval_shape(partial(init_state, experiment))
  step = jax.jit(partial(train_step, experiment))
  compiled = step.lower(state, experiment.task.data).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_checkpointed_bptt_needs_less_memory(tmp_path):
  path = tmp_path / "text.txt"
  path.write_text("the quick brown fox jumps\n" * 2000)
  full = bptt_bytes(512, False, str(path))
  assert bptt_bytes(512, True, str(path)) < full / 2


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"micro_batches": 0}, "micro_batches must be positive, got 0"),
    ({"truncation": -1}, "truncation must not be negative, got -1"),
  ],
)
def test_wrong_options_of_bptt(experiment, options, message):
  with pytest.raises(ValueError, match=message):
    methods.bptt(experiment.model, experiment.task, **options)


# Streaming.


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  rng = np.random.default_rng(0)
  path = tmp_path_factory.mktemp("text") / "text.txt"
  path.write_text("".join(rng.choice(list("abcdefgh "), 20_000)))
  return str(path)


def streaming(text, unrolls=4, **overrides):
  config = small.config(
    SHAKESPEARE,
    "nres",
    task__source=text,
    task__seq_length=16,
    task__time_chunk=2,
    num_probes=4,
    model__hidden_size=4,
    model__embedding_size=4,
    estimator__unrolls=unrolls,
    **overrides,
  )
  return build.experiment(config)


def test_unrolls_read_on_where_the_last_one_stopped(text):
  """With a tiny epsilon the unrolls' losses are those of the whole episode."""
  experiment = streaming(text, epsilon=1e-6)
  model, task, method = experiment.model, experiment.task, experiment.method
  data = jnp.asarray(task.data)
  params = jax.jit(model.init)(jax.random.key(0))
  state = method.init(params)
  step_of = jax.jit(
    lambda state, step: method.query(params, state, data, now(task, step, 1e-6))
  )
  losses = []
  for step in range(8):
    queried, measured = step_of(state, step)
    _, state = method.update(
      queried, measured, params, state, now(task, step, 1e-6)
    )
    losses.append(np.asarray(queried).mean(1))
  # Probe 0 began at steps 0 and 4, probe 1 (staggered) at 0, 3 and 7.
  for probe, began in ((0, 0), (0, 4), (1, 3)):
    key = jax.random.fold_in(now(task).data_key, began + 4)
    key = jax.random.fold_in(key, probe)
    batch = task.sample(data, Draw(key, began + 4, probe, task.max_length))
    carry = model.initial_carry(params, 1)
    for part in range(4):
      split = methods.Split(data, batch, 2)
      carry, sums = metrics.stream(model, task, params, split, carry, 2 * part)
      np.testing.assert_allclose(
        losses[began + part][probe], sums.loss[0] / 2 / 2, rtol=1e-4
      )


def test_streaming_counts_the_part_that_it_reads(text):
  experiment = streaming(text)
  assert experiment.method.passes_per_step == 2 * 4 / 4
  with pytest.raises(ValueError, match="unrolls must divide the chunks"):
    streaming(text, unrolls=3)


def test_streaming_refuses_a_text_that_is_read_in_parts(text):
  task = streaming(text).task._replace(refresh=lambda part: None)
  with pytest.raises(ValueError, match="larger than the device"):
    methods.streaming(None, task, None, num_probes=1, unrolls=1)


@pytest.mark.parametrize("name", ["noise_reuse_es", "persistent_es"])
def test_streaming_trains_in_one_program(text, name):
  experiment = streaming(text, estimator__name=name)
  step = jax.jit(partial(train_step, experiment))
  state = init_state(experiment)
  data = jnp.asarray(experiment.task.data)
  for _ in range(5):
    state, values = step(state, data)
  assert step._cache_size() == 1
  assert np.isfinite(float(values["loss"])) and values["grad_norm"] > 0


# The exact readout.


def test_the_readout_is_exact_and_the_rest_estimated():
  config = small.config()
  with config.unlocked():
    config.estimator.readout = "exact"
    config.estimator.readout_batches = 3
  method = build.experiment(config).method
  plain = build.experiment(small.config()).method
  experiment = build.experiment(config)
  params = jax.jit(experiment.model.init)(jax.random.key(0))

  def run(method):
    this = now(experiment.task, epsilon=0.01)
    losses, _ = method.query(params, (), (), this)
    exact = method.recall(params, (), this)
    return method.update(losses, exact, params, (), this)[0]

  grads = jax.jit(lambda: run(method))()
  _, each = expected(experiment, params, 3)
  # Every copy has its own number of predictions: the mean is over tokens.
  task = experiment.task
  batches = methods.sample_batches(task, (), now(task), 3)
  counts = batches[1].sum((1, 2))
  for name in ("w_proj", "b_proj"):
    weighted = np.einsum("n...,n->...", each[name], counts / counts.sum())
    np.testing.assert_allclose(grads[name], weighted, rtol=1e-4, atol=1e-6)
  assert jax.tree.structure(grads) == jax.tree.structure(params)
  assert method.passes_per_step == plain.passes_per_step + 6
  assert set(method.estimated(params)) == set(params) - {"w_proj", "b_proj"}
