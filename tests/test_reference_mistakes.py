"""What docs/paper.md says of mistakes behind published numbers holds here.

Most have a test elsewhere, which that page names; here are the others.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from zorn_jax import build, estimators, methods
from zorn_jax.step import init_state, update

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


def slopes_of(epsilon):
  """The update of SGD on a linear loss, at a smoothing radius."""
  gradient = jnp.arange(1.0, 9.0)
  estimator = estimators.central_difference(epsilon, 4)
  args = jnp.zeros(8), (), (), jax.random.key(0)
  losses = estimator.query(lambda params, _: gradient @ params, *args)
  return estimator.update(losses, args[0], (), args[-1])[0]


def test_epsilon_is_no_learning_rate():
  # Theirs entered as lr / epsilon, or not at all, solver by solver.
  np.testing.assert_allclose(slopes_of(1e-2), slopes_of(1.0), rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_steps_of_adam_do_not_grow_with_time(scale):
  # Theirs began with a second moment of one, which then decayed.
  config = small.config(small.ROOT / "configs" / "shakespeare.py", "pure")
  config.optimizer.schedule = "constant"
  config.optimizer.warmup_steps = 0
  optimizer = build.experiment(config).optimizer
  params = {"w": jnp.zeros(3)}
  state, sizes = optimizer.init(params), []
  for _ in range(60):
    grads = {"w": jnp.full(3, scale)}
    updates, state = optimizer.update(grads, state, params)
    sizes.append(-float(updates["w"][0]))
  np.testing.assert_allclose(sizes, config.learning_rate, rtol=1e-3)


def test_a_loss_above_seven_nats_is_no_divergence():
  # Theirs ended such a run, but healthy large models begin there.
  experiment = build.experiment(small.config(watch__explosion=2.0))
  state = jax.jit(partial(init_state, experiment))()
  step = jax.jit(partial(update, experiment))
  for _ in range(3):
    state, values = step(state, jnp.full((4, 2), 16.0), ())
  assert values["loss"] == 16 and not bool(state.control.exploded)
