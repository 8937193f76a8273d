"""What docs/paper.md says of mistakes behind published numbers holds here.

Most have a test elsewhere, which that page names; here are the others.
"""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from zorn_jax import build, estimators, methods
from zorn_jax.step import init_state, programs, update

PAGE = (small.ROOT / "docs" / "paper.md").read_text()


def test_the_tests_that_the_page_names_exist():
  named = re.findall(r"`(tests/\w+\.py)::(\w+)`", PAGE)
  assert len(named) > 10
  for path, name in named:
    assert f"\ndef {name}(" in (small.ROOT / path).read_text(), name


def test_the_files_that_the_page_names_exist():
  named = re.findall(r"`((?:docs|benchmarks|scripts|configs)/[\w./]+)`", PAGE)
  assert len(named) > 5
  for path in named:
    assert (small.ROOT / path).exists(), path


def test_micro_batches_are_different_ones_and_their_losses_averaged():
  # Theirs was one batch, read again for each, and the sum of its losses.
  experiment = build.experiment(small.config())
  task, key = experiment.task, jax.random.key(0)

  @jax.jit
  def sample(data):
    now = methods.Now(jnp.int32(0), key, key, 0.0, task.max_length)
    return methods.sample_batches(task, data, now, 4)

  (leaf, *_) = jax.tree.leaves(sample(task.data))
  assert len(np.unique(np.asarray(leaf), axis=0)) == 4
  _, values = jax.jit(partial(update, experiment))(
    jax.jit(partial(init_state, experiment))(), jnp.full((4, 2), 2.0), ()
  )
  assert values["loss"] == 2


@pytest.mark.parametrize(
  "make",
  [
    estimators.central_difference,
    estimators.forward_difference,
    estimators.spsa1_5,
    estimators.spsa2,
  ],
)
def test_epsilon_is_no_learning_rate(make):
  # Theirs entered as lr / epsilon, or not at all, solver by solver.
  def slopes_of(epsilon):
    """The update of SGD on a linear loss, at a smoothing radius."""
    gradient = jnp.arange(1.0, 9.0)
    estimator = make(epsilon, 4)
    args = jnp.zeros(8), estimator.init(jnp.zeros(8)), jax.random.key(0)
    params, state, key = args
    loss = lambda params, _: gradient @ params
    losses = estimator.query(loss, params, (), state, key)
    return estimator.update(losses, params, state, key)[0]

  np.testing.assert_allclose(slopes_of(1e-2), slopes_of(1.0), rtol=1e-3)


OPTIMIZERS = [
  ("shakespeare.py", "pure"),
  ("paper/lstm.py", "tiny,adamw"),
  ("paper/dnc.py", "solver=adamw"),
]


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize(("path", "arg"), OPTIMIZERS)
def test_steps_of_adam_do_not_grow_with_time(path, arg, scale):
  # Theirs began with a second moment of one, which then decayed; and moments
  # of zero, BPTT's default, make a step of the sign of each gradient.
  config = small.config(small.ROOT / "configs" / path, arg)
  config.optimizer.schedule = "constant"
  config.optimizer.warmup_steps = 0
  optimizer = build.experiment(config).optimizer
  params = {"w": jnp.zeros(3)}
  state, sizes = optimizer.init(params), []
  for sign in (1,) * 60 + (-1, 1e-3):
    grads = {"w": jnp.full(3, sign * scale)}
    updates, state = jax.jit(optimizer.update)(grads, state, params)
    sizes.append(-float(updates["w"][0]))
  np.testing.assert_allclose(sizes[:60], config.learning_rate, rtol=1e-3)
  b1, b2 = config.optimizer.b1, config.optimizer.b2
  moments = np.zeros(2)
  for t, sign in enumerate((1,) * 60 + (-1, 1e-3), 1):
    moments += (1 - np.array([b1, b2])) * ([sign, sign**2] - moments)
    mean, square = moments / (1 - np.array([b1, b2]) ** t)
    expected = config.learning_rate * mean / np.sqrt(square)
    np.testing.assert_allclose(sizes[t - 1], expected, rtol=1e-2)


@pytest.mark.parametrize("name", ["rademacher", "low_rank"])
def test_probes_leave_no_trace_in_bfloat16(name):
  # Theirs came and went by rounded sums, and the parameters drifted.
  path = small.ROOT / "configs" / "paper" / "lstm.py"
  config = small.config(
    path, "tiny", batch_size=2, num_probes=32, model__dtype="bfloat16"
  )
  config.learning_rate = 1e-4  # And epsilon, as theirs of xxlarge.
  if name == "low_rank":
    direction = {"name": name, "rank": 1, "base": "normal"}
    config.estimator.direction = direction
  experiment = build.experiment(config)
  parts, data = programs(experiment), experiment.task.data
  state = parts.init()
  before = jax.tree.map(np.array, state.params)
  assert {x.dtype.name for x in jax.tree.leaves(before)} == {"bfloat16"}
  losses, _, aside = parts.query(state, data)
  assert np.unique(np.asarray(losses)).size > 1
  # Of slopes of zero, the update is none.
  state, _ = parts.update(state, jnp.full_like(losses, 2.0), aside)
  chex.assert_trees_all_equal(jax.tree.map(np.array, state.params), before)


def test_a_loss_above_seven_nats_is_no_divergence():
  # Theirs ended such a run, but healthy large models begin there.
  experiment = build.experiment(small.config(watch__explosion=2.0))
  state = jax.jit(partial(init_state, experiment))()
  step = jax.jit(partial(update, experiment))
  for _ in range(3):
    state, values = step(state, jnp.full((4, 2), 16.0), ())
  assert values["loss"] == 16 and not bool(state.control.exploded)
