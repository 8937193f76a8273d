"""The training step: pure, compiled once, of constant memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from zorn_jax import build, metrics, tasks
from zorn_jax.methods import Now
from zorn_jax.step import init_state, programs, train_step
from zorn_jax.train_state import digest

pytestmark = pytest.mark.optimized

SHAKESPEARE = small.ROOT / "configs" / "shakespeare.py"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
  rng = np.random.default_rng(0)
  path = tmp_path_factory.mktemp("text") / "text.txt"
  path.write_text("".join(rng.choice(list("abcdefgh "), 40_000)))
  return str(path)


def text_experiment(text_file, seq_length, variant="recipe"):
  return build.experiment(
    small.config(
      SHAKESPEARE,
      variant,
      task__source=text_file,
      task__seq_length=seq_length,
      num_probes=4,
      model__hidden_size=16,
      model__embedding_size=8,
    )
  )


def compiled_step(experiment):
  state = jax.eval_shape(partial(init_state, experiment))
  step = jax.jit(partial(train_step, experiment), donate_argnums=0)
  return step.lower(state, experiment.task.data).compile()


def bptt_temporary_bytes(experiment):
  model, task = experiment.model, experiment.task

  def loss(params, data):
    batch = tasks.first_batch(task, data)
    split = tasks.Split(data, batch, task.num_chunks(task.max_length))
    return metrics.mean_loss(model, task, params, split)

  params = jax.eval_shape(partial(init_state, experiment)).params
  compiled = jax.jit(jax.grad(loss)).lower(params, task.data)
  return compiled.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("variant", ["recipe", "plain"])
def test_temporary_memory_does_not_grow_with_time(text_file, variant):
  short, long = (
    compiled_step(text_experiment(text_file, length, variant))
    .memory_analysis()
    .temp_size_in_bytes
    for length in (128, 8192)
  )
  assert abs(long - short) < 0.05 * short


def test_memory_check_would_notice_back_propagation(text_file):
  short, long = (
    bptt_temporary_bytes(text_experiment(text_file, length))
    for length in (128, 8192)
  )
  assert long > 10 * short


@pytest.fixture(scope="module")
def experiment():
  return build.experiment(small.config())


def test_step_is_pure_and_compiled_once(experiment):
  step = jax.jit(partial(train_step, experiment))
  state = init_state(experiment)
  before = digest(state)
  first, values = step(state, ())
  second, _ = step(first, ())
  assert digest(state) == before
  assert digest(step(state, ())[0]) == digest(first) != digest(second)
  assert step._cache_size() == 1
  assert int(second.step) == 2
  dtypes = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)
  assert dtypes(second) == dtypes(state)
  assert all(np.isfinite(float(value)) for value in values.values())


def test_training_data_does_not_depend_on_the_probes():
  """Probe i and its batch are the same for 2 and for 5 probes."""
  losses = {}
  for n in (2, 5):
    experiment = build.experiment(small.config(num_probes=n))
    state = init_state(experiment)

    def query(step, experiment=experiment, state=state):
      key = jax.random.fold_in(state.probe_key, step)
      now = Now(step, key, state.data_key, 0.1, experiment.task.max_length)
      return experiment.method.query(state.params, (), (), now)[0]

    losses[n] = np.stack([jax.jit(query)(step) for step in range(3)])
  np.testing.assert_allclose(losses[2], losses[5][:, :2], rtol=1e-6)
  assert np.abs(np.diff(losses[2], axis=0)).min() > 1e-4


def test_a_step_with_nothing_finite_changes_nothing(experiment):
  def query(*args):
    return jnp.full((experiment.num_probes, 2), jnp.nan), ()

  broken = experiment._replace(method=experiment.method._replace(query=query))
  state = init_state(broken)
  after, values = train_step(broken, state, ())
  assert digest(after.params) == digest(state.params)
  assert int(values["dropped"]) == 2 * experiment.num_probes
  assert bool(after.control.exploded)


@pytest.mark.parametrize("name", ["query", "update"])
def test_programs_in_bfloat16_make_no_copy_of_the_parameters(name):
  config = small.config(
    small.ROOT / "configs" / "paper" / "lstm.py",
    "medium",
    batch_size=1,
    num_probes=2,
    model__dtype="bfloat16",
    task__num_evaluation=4,
  )
  experiment = build.experiment(config)
  parts, data = programs(experiment), experiment.task.data
  state = parts.template
  losses, _, aside = jax.eval_shape(parts.query, state, data)
  args = {"query": (state, data), "update": (state, losses, aside)}[name]
  compiled = getattr(parts, name).lower(*args).compile()
  bytes_ = sum(2 * x.size for x in jax.tree.leaves(state.params))
  assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * bytes_
