"""Updates in blocks: those of the whole gradient, without its memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import zorn_jax
from zorn_jax import build, directions, in_place, perturbed, tiles
from zorn_jax.estimators import stencil
from zorn_jax.step import programs
from zorn_jax.train_state import digest

pytestmark = pytest.mark.optimized

PAPER = small.ROOT / "configs" / "paper" / "lstm.py"
TILE = 512


@pytest.fixture
def small_tiles(monkeypatch):
  monkeypatch.setattr(tiles, "_LARGEST_ON_CPU", TILE)


# How arrays are cut.


SHAPES = [
  (1, 1, 7000),
  (4000, 3),
  (37, 1000),
  (600,),
  (3, 5, 7, 90),
  (2, 3, 150, 151),
  (40, 4, 4),
  (513,),
  (1, 545),
  (2, 1, 1, 64, 150),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_cover_every_element_once(shape):
  grid = tiles._grid(shape, TILE)
  assert len(grid) == len(shape)
  for cuts in grid:
    done = 0
    for index in range(cuts.count):
      start = int(cuts.start(index))
      first = start + int(cuts.fresh(index))
      assert first == done and start >= 0  # Where the one before it ended.
      done = start + cuts.length
      assert cuts.overlaps or first == start
    assert done == cuts.size
    assert not cuts.overlaps or cuts.count > 1
  # A column more than a word at most in each of at most √TILE rows.
  block = math.prod(cuts.length for cuts in grid)
  assert block <= TILE + 32 * math.isqrt(TILE)
  assert min(block, math.prod(shape)) > TILE / 4
  starts = [int(grid[-1].start(i)) for i in range(grid[-1].count)]
  assert all(start % 32 == 0 for start in starts)


@pytest.mark.parametrize("shape", [(37, 70), (7, 9, 11), (1300,)], ids=str)
def test_every_element_is_changed_once(shape, small_tiles):
  rng = np.random.default_rng(0)
  first, second = rng.normal(size=(2, *shape)).astype(np.float32)
  values = jnp.asarray(rng.normal(size=shape), jnp.float32)

  @jax.jit
  def update(first, second):
    return tiles.update(
      [first, second],
      lambda window: tiles.block(values, window),
      lambda values, old: [old[0] + values, 2 * old[1] + old[0]],
    )

  new, squares = update(first, second)
  np.testing.assert_array_equal(new[0], first + values)
  np.testing.assert_array_equal(new[1], 2 * second + first)
  np.testing.assert_allclose(
    squares, np.sum(np.square(values, dtype=np.float64)), rtol=1e-5
  )


# What becomes of parameters.


def tree():
  """Odd shapes, of which some are one block, and one is narrow."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "bias": draw(7),
    "heads": draw(3, 23, 21),
    "out": draw(37, 70).astype(jnp.bfloat16),
    "long": draw(1100),
  }


def rate(step):
  return 0.1 / (1 + step)


decayed = lambda params: {name: name in ("heads", "out") for name in params}
OPTIMIZERS = {
  "sgd": optax.sgd(0.1),
  "momentum": optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(rate)),
  "adam": optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.1, decayed),
    optax.scale_by_learning_rate(rate),
  ),
  "masked": optax.chain(
    optax.masked(optax.trace(0.5, nesterov=True), decayed), optax.scale(-0.1)
  ),
}
DIRECTIONS = {
  "rademacher": directions.rademacher(),
  "low_rank": directions.low_rank(2, "normal"),
}
LOSSES = np.random.default_rng(5).normal(size=(6, 2)).astype(np.float32)


def wide(params):
  return optax.tree.cast(params, jnp.float32)


def gradient(direction, params, key):
  """What a central difference with epsilon 0.5 makes of `LOSSES`."""
  keys = stencil.probe_keys(key, len(LOSSES))
  shapes = jax.tree.map(lambda x: jnp.zeros(x.shape), params)

  def one(key):
    z = direction.sample(key, params)
    return perturbed.materialize(direction.perturb(shapes, z, 1.0))

  z = jax.jit(jax.vmap(one))(keys)
  weights = (LOSSES[:, 0] - LOSSES[:, 1]).astype(np.float64) / len(LOSSES)
  return jax.tree.map(
    lambda x: np.tensordot(weights, np.float64(x), 1).astype(np.float32), z
  )


@pytest.mark.parametrize(
  ("optimizer", "direction"),
  [
    *((name, "rademacher") for name in OPTIMIZERS),
    ("adam", "low_rank"),
  ],
)
def test_the_update_is_that_of_the_whole_gradient(
  optimizer, direction, small_tiles
):
  optimizer, direction = OPTIMIZERS[optimizer], DIRECTIONS[direction]
  estimator = zorn_jax.central_difference(0.5, 6, direction=direction)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, opt_state, key):
    params, opt_state, state = zorn_jax.update_in_place(
      estimator, optimizer, LOSSES, params, opt_state, (), key
    )
    assert state == ()
    return params, opt_state

  params = tree()
  opt_state = optimizer.init(wide(params))
  expected, expected_state = tree(), optimizer.init(wide(params))
  for key in jax.random.split(jax.random.key(2), 3):
    grads = gradient(direction, params, key)
    params, opt_state = update(params, opt_state, key)
    updates, expected_state = optimizer.update(
      grads, expected_state, wide(expected)
    )
    expected = optax.apply_updates(expected, updates)

  def check(got, expected):
    assert got.dtype == expected.dtype
    if jnp.issubdtype(got.dtype, jnp.integer):
      assert int(got) == int(expected) == 3
      return
    # Of bfloat16 another rounding, once in a while, in one of the steps.
    eps = float(jnp.finfo(got.dtype).eps)
    bound = 2 * eps if eps > 1e-3 else 3e-6
    got, expected = np.float64(got), np.float64(expected)
    np.testing.assert_allclose(got, expected, rtol=bound, atol=bound)
    assert np.mean(got != expected) < 0.05 or eps < 1e-3

  jax.tree.map(check, params, expected)
  jax.tree.map(check, opt_state, expected_state)
  assert update._cache_size() == 1


def test_a_single_array_can_be_a_tree(small_tiles):
  optimizer = optax.adamw(0.1, weight_decay=0.1)
  params, grads = jnp.ones((40, 40)), jnp.arange(1600.0).reshape(40, 40)
  block = functools.partial(tiles.block, grads)

  @jax.jit
  def update(params):
    state = optimizer.init(params)
    got = in_place.apply(optimizer, block, params, state, scale=0.5)
    updates, state = optimizer.update(grads, state, params)
    halved = jax.tree.map(lambda x: x / 2, updates)
    norm = optax.tree.norm(grads)
    return got, (optax.apply_updates(params, halved), state, norm)

  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
  jax.tree.map(close, *update(params))


def test_an_optimizer_that_mixes_elements_is_refused():
  optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
  params = jnp.zeros((4, 6))
  blocks = functools.partial(tiles.block, params)
  with pytest.raises(ValueError, match="treats every element alone"):
    in_place.apply(optimizer, blocks, params, optimizer.init(params))


def test_an_estimate_without_blocks_is_refused():
  grouped = directions.grouped(
    directions.rademacher(), zorn_jax.aggregators.mean(), 2
  )
  optimizer, params = optax.sgd(0.1), jnp.zeros(3)
  for estimator in (
    zorn_jax.central_difference(0.1, 4, direction=grouped),
    zorn_jax.sanger_spsa(0.1, 4),
  ):
    state = estimator.init(params)
    args = LOSSES[:4], params, optimizer.init(params), state, jax.random.key(0)
    with pytest.raises(ValueError, match="cannot be had in blocks"):
      zorn_jax.update_in_place(estimator, optimizer, *args)


def test_labels_by_a_function_are_refused():
  params = {"w": jnp.ones(3), "v": jnp.ones(2)}
  estimator = zorn_jax.central_difference(0.1, 2)
  kinds = {"a": optax.sgd(0.1, momentum=0.9), "b": optax.adam(0.1)}
  labels = {"w": "a", "v": "b"}
  args = LOSSES[:2], params
  key = jax.random.key(0)
  for given, known in (
    (labels, True),
    (lambda p: {k: labels[k] for k in p}, 0),
  ):
    optimizer = optax.multi_transform(kinds, given)
    rest = optimizer.init(params), (), key
    if known:
      zorn_jax.update_in_place(estimator, optimizer, *args, *rest)
      continue
    with pytest.raises(ValueError, match="labels as a tree, not as a function"):
      zorn_jax.update_in_place(estimator, optimizer, *args, *rest)


def test_no_parameters_are_updated():
  optimizer, estimator = optax.adam(0.1), zorn_jax.central_difference(0.1, 2)
  args = LOSSES[:2], {}, optimizer.init({}), (), jax.random.key(0)
  params, *_ = zorn_jax.update_in_place(estimator, optimizer, *args)
  assert params == {}


# The step of a run.


SHAKESPEARE = small.ROOT / "configs" / "shakespeare.py"
RUNS = {
  "adam, and an exact readout": {},
  "clipped": {"optimizer.clip": 0.01},
  "momentum": {
    "estimator.readout": "estimated",
    "estimator.readout_batches": 0,
    "estimator.name": "bandit_spsa",
    "estimator.capacity": 8,
    "estimator.direction": {"name": "uniform", "norm": "l2"},
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "model.dtype": "bfloat16",
  },
}


def experiment_of(tmp_path, changes):
  text = tmp_path / "text.txt"
  text.write_text("".join(np.random.default_rng(0).choice(list("abc "), 9000)))
  config = small.config(
    SHAKESPEARE,
    task__source=str(text),
    task__seq_length=8,
    num_probes=6,
    model__hidden_size=24,
    model__embedding_size=20,
  )
  if changes.get("optimizer.name") == "sgd":
    config.optimizer = {
      "schedule": "constant",
      "warmup_steps": 0,
      "clip": 0.0,
      "weight_decay": 0.01,
    }
  with config.unlocked():
    config.estimator.direction = changes.get(
      "estimator.direction", config.estimator.direction
    )
    changes = {x: changes[x] for x in changes if x != "estimator.direction"}
    flat = {"optimizer.clip": 0.0, "optimizer.normalize": "none"} | changes
    config.update_from_flattened_dict(flat)
  return build.experiment(config)


@pytest.mark.parametrize("run", RUNS)
def test_a_step_in_place_is_the_step(run, tmp_path, small_tiles):
  experiment = experiment_of(tmp_path, RUNS[run])
  method = experiment.method
  assert experiment.elementwise == (run != "clipped") and method.blocks
  rng = np.random.default_rng(7)
  losses = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
  losses = losses.at[1, 0].set(jnp.nan)  # One probe is dropped.
  parts = programs(experiment)
  aside = jax.eval_shape(parts.recall, parts.template, experiment.task.data)
  aside = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), aside
  )
  results = []
  for blocks in (method.blocks, None):
    method = method._replace(blocks=blocks)
    parts = programs(experiment._replace(method=method))
    state = parts.init()
    for _ in range(2):
      state, values = parts.update(state, losses, aside)
    assert parts.update._cache_size() == 1
    results.append((state, values))
  (state, values), (expected, expected_values) = results
  assert int(state.step) == 2 and int(values["dropped"]) == 1
  assert values.keys() == expected_values.keys()
  half = state.params["w_in"].dtype == jnp.bfloat16

  def check(got, expected):
    assert got.dtype == expected.dtype
    if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
      got, expected = map(jax.random.key_data, (got, expected))
    if not jnp.issubdtype(got.dtype, jnp.floating):
      np.testing.assert_array_equal(got, expected)
      return
    # The gradient itself is rounded to bfloat16 where it is a tree.
    bound = 2 * float(jnp.finfo(jnp.bfloat16).eps) if half else 1e-4
    size = max(np.abs(np.float32(expected)).max(), 1e-3)
    got, expected = np.float32(got), np.float32(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound * size)

  jax.tree.map(check, (state, values), (expected, expected_values))


@pytest.mark.parametrize("tile", [32, 2**17])
def test_devices_that_share_the_probes_agree_to_the_bit(tile, monkeypatch):
  monkeypatch.setattr(tiles, "_LARGEST_ON_CPU", tile)
  after = []
  for devices in (1, 8):
    config = small.config(num_probes=8, mesh__probe=devices)
    config.estimator.direction = {"name": "rademacher"}
    config.optimizer.warmup_steps = 0
    experiment = build.experiment(config)
    parts = programs(experiment)
    state = parts.init()
    for step in range(2):
      losses = np.random.default_rng(step).normal(size=(8, 2))
      losses = jax.device_put(np.float32(losses), experiment.layout.everywhere)
      state, _ = parts.update(state, losses, ())
    after.append(digest((state.params, state.opt_state)))
  assert after[0] == after[1]


@pytest.mark.parametrize(
  ("changes", "elementwise", "whole"),
  [
    ({}, True, False),
    ({"optimizer.clip": 1.0}, False, False),
    ({"optimizer.normalize": "l2"}, False, False),
    ({"mesh.updates": "sharded"}, True, True),
    ({"mesh.head": 2}, True, True),
    ({"estimator.adaptive": 0.99}, True, True),
  ],
  ids=str,
)
def test_the_gradient_is_whole_where_it_must_be(
  changes, elementwise, whole, monkeypatch
):
  config = small.config(model__num_heads=2)
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  experiment = build.experiment(config, num_devices=2)
  assert experiment.elementwise == elementwise
  used = []
  method = experiment.method
  spy = lambda *args: used.append("whole") or method.update(*args)
  experiment = experiment._replace(method=method._replace(update=spy))
  parts = programs(experiment)
  losses, _, aside = jax.eval_shape(parts.query, parts.template, ())
  jax.eval_shape(parts.update, parts.template, losses, aside)
  assert bool(used) == whole


# Memory.


def peak(program):
  """Bytes that a compiled program holds at most."""
  memory = program.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )


def size_of(*trees):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


@pytest.mark.parametrize(
  ("direction", "optimizer"),
  [("rademacher", "sgd"), ("low_rank", "sgd"), ("rademacher", "adam")],
)
def test_an_update_of_the_medium_lstm_is_in_place(direction, optimizer):
  config = small.config(PAPER, "medium")
  config.estimator.direction.name = direction
  config.optimizer.name = optimizer
  if optimizer == "adam":
    del config.optimizer.momentum
  parts = programs(build.experiment(config))
  state = parts.template
  losses = jax.ShapeDtypeStruct((config.num_probes, 2), jnp.float32)
  program = parts.update.lower(state, losses, ()).compile()
  assert peak(program) < 1.05 * size_of(state.params, state.opt_state)


@pytest.mark.parametrize("in_place", [True, False])
def test_momentum_holds_one_buffer(in_place):
  """And the check sees a gradient where there is one."""
  params = {"w": jax.ShapeDtypeStruct((100, 120_000), jnp.float32)}
  optimizer = optax.sgd(0.1, momentum=0.9)
  state = jax.eval_shape(optimizer.init, params)
  estimator = zorn_jax.central_difference(0.1, 8, direction=zorn_jax.low_rank())

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, state, losses, key):
    if in_place:
      return zorn_jax.update_in_place(
        estimator, optimizer, losses, params, state, (), key
      )
    grads, _ = estimator.update(losses, params, (), key)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, ()

  losses = jax.ShapeDtypeStruct((8, 2), jnp.float32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  program = update.lower(params, state, losses, key).compile()
  assert (peak(program) < 1.05 * size_of(params, state)) == in_place
