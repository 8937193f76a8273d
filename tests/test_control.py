"""The watch over the loss, the search for a rate, and the optimiser's parts."""

import json
import math
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest
import small

import zorn_jax
from zorn_jax import build, control, methods, search, train as train_module
from zorn_jax.lock import lock
from zorn_jax.search import Search
from zorn_jax.step import init_state
from zorn_jax.train import train


def observed(watch, losses, grad_norm=1.0):
  state = control.init(watch)
  states = []
  for loss in losses:
    loss, norm = jnp.float32(loss), jnp.float32(grad_norm)
    state = control.observe(watch, state, loss, norm)
    states.append(state)
  return states


def test_the_average_is_an_exponential_one_until_an_explosion():
  losses = [4.0, 5.0, 2.0, math.nan, 2.0]
  wanted = [4.0, 4.05, 3.9475, 3.9475, 3.9475]
  states = observed(control.Watch(), losses)
  np.testing.assert_allclose([s.average for s in states], wanted, rtol=1e-6)
  np.testing.assert_allclose(
    [s.peak for s in states], [4.0] + [4.05] * 4, rtol=1e-6
  )


@pytest.mark.parametrize(
  ("losses", "exploded"),
  [
    ([3.0, 5.9], False),
    ([3.0, 6.1], True),
    ([3.0, 6.1, 3.0], True),  # Until it is rolled back.
    ([3.0, math.nan], True),
    ([math.inf], True),
    ([1e-3, 1e-3], False),
    ([10.0] + [1e-3] * 300 + [0.99], False),  # A tenth of the peak is little.
    ([10.0] + [1e-3] * 300 + [2.01], True),
  ],
)
def test_an_explosion_is_a_jump_or_no_finite_loss(losses, exploded):
  last = observed(control.Watch(explosion=2.0), losses)[-1]
  assert bool(last.exploded) == exploded


def test_without_a_watch_only_a_missing_loss_is_an_explosion():
  assert not observed(control.Watch(), [1.0, 1e9])[-1].exploded
  assert observed(control.Watch(), [1.0, math.nan])[-1].exploded
  assert observed(control.Watch(), [1.0], grad_norm=math.inf)[-1].exploded


def watched(**overrides):
  """Trained on four probes without progress: the rate halves."""
  return small.config(watch__patience=2, watch__threshold=0.5, **overrides)


def test_a_plateau_halves_the_rate():
  watch = build.experiment(watched(log_every=3)).watch
  states = observed(watch, [4.0] * 9)
  # The first three set the best mean, the next two threes do not beat it.
  scales = [float(control.scale(state)) for state in states]
  assert scales == [1.0] * 8 + [0.5]
  falling = observed(watch, [4.0 * 0.7**step for step in range(9)])
  assert float(control.scale(falling[-1])) == 1.0


# Search.


def test_the_search_finds_the_best_rate_by_halving_intervals():
  tried = []

  def trial(rate):
    tried.append(rate)
    return abs(math.log10(rate) + 2.2)

  found = search.best_rate(Search(1e-4, 1.0, depth=5), trial)
  assert tried[:3] == pytest.approx([1e-4, 1e-2, 1.0])
  # First round: 1e-2; its neighbours' means: 1e-3 and 1e-1.
  assert tried[3:5] == pytest.approx([1e-3, 1e-1])
  assert len(tried) == 3 + 2 * 4
  assert abs(math.log10(found) + 2.2) <= 0.2
  assert found == min(tried, key=lambda rate: abs(math.log10(rate) + 2.2))


def test_the_search_at_the_end_of_its_range():
  tried = []
  found = search.best_rate(
    Search(1e-4, 1.0, depth=3), lambda rate: tried.append(rate) or -rate
  )
  assert found == 1.0 and len(tried) == 5


def test_losses_that_are_not_finite_lose():
  worse = lambda rate: math.nan if rate > 1e-3 else 1 / rate
  assert search.best_rate(Search(1e-5, 1.0, depth=4), worse) <= 1e-3
  with pytest.raises(ValueError, match="no learning rate from 1e-05 to 1"):
    search.best_rate(Search(1e-5, 1.0), lambda rate: math.nan)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"search__low": 0.0}, "search needs 0 < low < high, got 0.0"),
    ({"search__depth": 0}, "search.depth and search.steps must be positive"),
    ({"optimizer__warmup_steps": 5}, "which a warm-up would make small"),
    ({"search__on_plateau": True}, "needs a plateau to be noticed"),
  ],
)
def test_wrong_searches(overrides, message):
  with pytest.raises(ValueError, match=message):
    build.experiment(
      small.config(
        search__enabled=True, **{"optimizer__warmup_steps": 0, **overrides}
      )
    )


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"watch__explosion": 0.5}, "watch.explosion must be above 1, got 0.5"),
    ({"watch__patience": -1}, "watch.patience must be positive, got -1"),
    ({"epsilon_schedule": "odd"}, "unknown epsilon_schedule 'odd'"),
  ],
)
def test_wrong_watches(overrides, message):
  with pytest.raises(ValueError, match=message):
    build.experiment(small.config(**overrides))


# In the loop.


def metrics_of(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def run(config, workdir):
  return train(build.experiment(config), workdir, config.to_dict())


def test_the_loop_starts_with_the_rate_that_was_found(tmp_path):
  config = small.config(
    steps=10,
    optimizer__warmup_steps=0,
    search__enabled=True,
    search__depth=4,
    search__steps=3,
  )
  run(config, tmp_path)
  scale = metrics_of(tmp_path)[0]["scale"]
  ratio = scale * config.learning_rate
  # One of the candidates, and not an end that would not learn.
  assert 1e-5 < ratio <= 0.1
  power = math.log(ratio / 1e-5) / math.log(1e4) * 16
  assert power == pytest.approx(round(power), abs=1e-3)


def test_a_second_signal_does_not_wait():
  before = signal.getsignal(signal.SIGINT)
  with train_module._stop_on_signal() as stopped:
    assert not stopped(1)
    signal.raise_signal(signal.SIGINT)
    assert stopped(2)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
  assert signal.getsignal(signal.SIGINT) is before


def test_a_directory_is_locked_before_it_is_claimed(tmp_path):
  config = small.config()
  with lock(tmp_path), pytest.raises(ValueError, match="another process"):
    train(build.experiment(config), tmp_path, config.to_dict())
  assert os.listdir(tmp_path) == ["lock"]


def test_a_plateau_searches_again(tmp_path):
  config = watched(
    steps=60,
    log_every=5,
    optimizer__warmup_steps=0,
    search__enabled=True,
    search__depth=1,
    search__on_plateau=True,
  )
  run(config, tmp_path)
  scales = {line["scale"] for line in metrics_of(tmp_path) if "scale" in line}
  # Rates of the search alone: the halved ones last until the next line.
  candidates = {1e-5 / 0.02, 1e-3 / 0.02, 0.1 / 0.02}
  # A halved rate is replaced before it is logged a second time.
  rates = {c * half for c in candidates for half in (1.0, 0.5)}
  for scale in scales:
    assert any(math.isclose(scale, rate, rel_tol=1e-4) for rate in rates)


def exploding(**overrides):
  """Steps that are far too long after a while; no validation in between."""
  return small.config(
    steps=40,
    log_every=5,
    checkpoint_every=10,
    watch__explosion=1.5,
    optimizer__schedule="constant",
    optimizer__warmup_steps=0,
    **overrides,
  )


def test_an_explosion_rolls_back_and_halves(tmp_path):
  config = exploding(learning_rate=3.0, watch__max_rollbacks=12)
  run(config, tmp_path)
  lines = [line for line in metrics_of(tmp_path) if "scale" in line]
  scales = [line["scale"] for line in lines]
  assert scales[-1] < 1 and math.log2(scales[-1]) % 1 == 0
  assert all(math.isfinite(line["loss"]) for line in lines)
  assert [line["step"] for line in lines] == list(range(5, 41, 5))
  again = tmp_path / "again"
  run(config, again)
  for left, right in zip(metrics_of(again), metrics_of(tmp_path), strict=True):
    assert left.get("loss") == right.get("loss")


def test_too_many_roll_backs_stop_the_run(tmp_path):
  config = exploding(learning_rate=1e6, watch__max_rollbacks=2)
  with pytest.raises(ValueError, match="again, after 2 roll-backs in a row"):
    run(config, tmp_path)


def test_a_loss_that_is_never_finite_stops_the_run(tmp_path):
  config = small.config(model__embedding_scale=float("inf"))
  with pytest.raises(ValueError, match="was finite until step 10"):
    run(config, tmp_path)


# Epsilon and the optimiser.


def test_epsilon_follows_the_learning_rate_or_stays():
  config = small.config(epsilon_schedule="learning_rate", steps=100)
  experiment = build.experiment(config)
  at = lambda step: float(experiment.rate_schedule(jnp.int32(step)))
  assert experiment.epsilon_follows
  assert at(10) == pytest.approx(0.5)  # Half of the warm-up of 20 steps.
  assert at(20) == pytest.approx(1.0)
  assert at(60) == pytest.approx(0.5, abs=1e-3)  # Half of the cosine.
  assert not build.experiment(small.config()).epsilon_follows


def updates_of(grads_value=1.0, params_value=2.0, **overrides):
  config = small.config(
    optimizer__schedule="constant",
    optimizer__warmup_steps=0,
    learning_rate=0.5,
    model__initial_state="trainable",
  )
  with config.unlocked():
    config.optimizer = {
      "name": "sgd",
      "momentum": 0.0,
      "schedule": "constant",
      "warmup_steps": 0,
      **overrides,
    }
  experiment = build.experiment(config)
  params = jax.tree.map(
    lambda x: jnp.full_like(x, params_value), init_state(experiment).params
  )
  grads = jax.tree.map(lambda x: jnp.full_like(x, grads_value), params)
  optimizer = experiment.optimizer
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  return updates


def test_weight_decay_shrinks_matrices_alone():
  updates = updates_of(grads_value=0.0, weight_decay=0.1)
  for name, leaf in updates.items():
    decays = name in ("embed", "w_in", "r", "w_proj")
    np.testing.assert_allclose(leaf, -0.5 * 0.1 * 2.0 * decays, rtol=1e-6)


def test_gradients_are_normalised_or_clipped():
  size = sum(leaf.size for leaf in jax.tree.leaves(updates_of()))
  for options, norm, order in (
    ({"normalize": "l2"}, 0.5, 2),
    ({"normalize": "l1"}, 0.5, 1),
    ({"clip": 3.0}, 1.5, 2),
    ({"clip": 1e9}, 0.5 * math.sqrt(size), 2),
  ):
    leaves = jax.tree.leaves(updates_of(**options))
    flat = np.concatenate([np.asarray(leaf).ravel() for leaf in leaves])
    assert np.linalg.norm(flat, order) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"clip": -1.0}, "optimizer.clip must be positive, got -1.0"),
    ({"weight_decay": -1.0}, "optimizer.weight_decay must be positive"),
    ({"normalize": "l3"}, "unknown optimizer.normalize 'l3'"),
    ({"b1": 0.9}, "'sgd' does not take b1. Drop it"),
  ],
)
def test_wrong_optimisers(overrides, message):
  with pytest.raises(ValueError, match=message):
    updates_of(**overrides)


# The curriculum.


def lengths(losses, **options):
  """The length after each loss."""
  defaults = {"start": 2, "maximum": 5, "step": 2, "threshold": 1.0}
  curriculum = control.Curriculum(**defaults | {"patience": 3} | options)
  watch = control.Watch(curriculum=curriculum)
  return [int(state.lesson.length) for state in observed(watch, losses)]


def test_sequences_grow_after_enough_good_steps_in_a_row():
  good, bad = 0.9, 1.1
  assert lengths([good] * 10) == [2, 2, 4, 4, 4, 5, 5, 5, 5, 5]
  assert lengths([good, good, bad, good, good, good]) == [2] * 5 + [4]
  assert lengths([good, good, math.nan, good, good, good]) == [2] * 5 + [4]
  assert lengths([1.0] * 9) == [2] * 9  # Not below the threshold.
  assert lengths([good] * 3, patience=1) == [4, 5, 5]


def test_a_longer_sequence_s_loss_is_no_explosion():
  curriculum = control.Curriculum(2, 8, 1, 0.5, 5)
  watch = control.Watch(explosion=2.0, curriculum=curriculum)
  states = observed(watch, [0.4] * 5 + [1.1, 1.2, 2.5])
  assert [bool(state.exploded) for state in states] == [False] * 7 + [True]


def test_steps_are_counted_by_their_length():
  curriculum = control.Curriculum(2, 7, 2, 1.0, 1)
  assert curriculum.lengths() == [2, 4, 6, 7]
  losses = [0.5, 0.5, 2.0, 0.5, 0.5, 0.5]
  states = observed(control.Watch(curriculum=curriculum), losses)
  spent = [state.lesson.spent.tolist() for state in states]
  assert spent[1] == [1, 1, 0, 0] and spent[2] == [1, 1, 1, 0]
  assert spent[-1] == [1, 1, 2, 2]


def test_a_plateau_is_forgotten_when_sequences_grow():
  """A longer sequence's loss is no lack of progress."""
  curriculum = control.Curriculum(2, 3, 1, 0.5, 1)
  plateau = optax.contrib.reduce_on_plateau(
    factor=0.5, rtol=0.01, patience=3, accumulation_size=1
  )
  watch = control.Watch(plateau=plateau, curriculum=curriculum)
  falling = [1 - 0.05 * i for i in range(8)]
  states = observed(watch, [1.0] * 4 + [0.4] + falling)
  assert [float(state.plateau.scale) for state in states[3:]] == [0.5] * 10


def growing(**overrides):
  return small.config(
    steps=40,
    curriculum__enabled=True,
    curriculum__start=2,
    curriculum__maximum=3,
    curriculum__threshold=100.0,
    curriculum__patience=15,
    **overrides,
  )


def test_a_run_with_a_curriculum_resumes_and_counts_its_tokens(tmp_path):
  config = growing()
  run(config, tmp_path / "whole")
  stopped = build.experiment(config)
  run_of = lambda experiment: train(
    experiment, tmp_path / "parts", config.to_dict()
  )
  assert run_of(stopped._replace(steps=20)) and run_of(stopped)
  whole, parts = (metrics_of(tmp_path / name) for name in ("whole", "parts"))
  lines = [line for line in whole if "length" in line]
  assert [line["length"] for line in lines] == [2, 3, 3, 3]
  assert [line["loss"] for line in whole if "loss" in line] == [
    line["loss"] for line in parts if "loss" in line
  ]
  # Two sequences of three or four predictions, eight passes a step.
  predictions = [10 * 6, 15 * 6 + 5 * 8, 15 * 6 + 15 * 8, 15 * 6 + 25 * 8]
  assert [line["forward_tokens"] for line in lines] == [
    8 * count for count in predictions
  ]


def test_bptt_pays_for_full_length(tmp_path):
  config = growing()
  config.num_probes, config.epsilon = 0, 0.0
  config.estimator = {"name": "bptt"}
  run(config, tmp_path)
  lines = [line for line in metrics_of(tmp_path) if "length" in line]
  tokens = [line["forward_tokens"] for line in lines]
  assert tokens == [3 * 8 * step for step in (10, 20, 30, 40)]


def test_short_sequences_take_fewer_chunks():
  """What lies beyond the present length is not computed."""
  config = growing(task__max_length=50, task__time_chunk=1)
  config.curriculum.maximum = 50
  experiment = build.experiment(config)
  seen = []

  def apply(params, carry, tokens):
    jax.debug.callback(lambda: seen.append(1))
    return experiment.model.apply(params, carry, tokens)

  method = methods.zero_order(
    experiment.model._replace(apply=apply, score=None),
    experiment.task,
    lambda epsilon: zorn_jax.central_difference(epsilon, 1),
    num_probes=1,
    batch_per_probe=False,
  )
  params = jax.jit(experiment.model.init)(jax.random.key(0))

  def query(length):
    keys = jax.random.key(1), jax.random.key(2)
    now = methods.Now(jnp.int32(0), *keys, 0.1, length)
    return method.query(params, (), (), now)[0]

  for length in (2, 20):
    seen.clear()
    jax.block_until_ready(jax.jit(query)(jnp.int32(length)))
    jax.effects_barrier()
    assert len(seen) in (2 * length + 1, 2 * (2 * length + 1))
  # Masked to the same length in a program of full length: the same losses.
  short, full = jax.jit(query)(jnp.int32(20)), jax.jit(lambda: query(20))()
  np.testing.assert_allclose(short, full, rtol=1e-6)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"start": 3, "maximum": 2}, "from 3 to 2, but the task has sequences"),
    ({"maximum": 4}, "from 2 to 4, but the task has sequences of 2 to 3"),
    ({"start": 1}, "from 1 to 3, but"),
    ({"patience": 0}, "curriculum.patience must be positive, got 0"),
    ({"step": 0}, "curriculum.step must be positive, got 0"),
    ({"threshold": 0.0}, "curriculum.threshold must be positive, got 0.0"),
  ],
)
def test_wrong_curricula(overrides, message):
  config = growing()
  config.curriculum.update(overrides)
  with pytest.raises(ValueError, match=message):
    build.experiment(config)


def test_what_has_one_length_takes_no_curriculum():
  config = growing(task__one_batch=True)
  with pytest.raises(ValueError, match="sequences of 3 to 3"):
    build.experiment(config)


def test_a_step_without_predictions_changes_nothing():
  watch = control.Watch(explosion=2.0)
  before = control.observe(watch, control.init(watch), 3.0, 1.0)
  after = control.observe(watch, before, 0.0, 0.0, silent=True)
  chex.assert_trees_all_equal(after, before)
