"""Every aggregator against a loop in NumPy, and what it holds in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import aggregators

SHAPES = {"bias": (5,), "matrix": (3, 4), "scale": ()}
DTYPES = {"bias": jnp.bfloat16, "matrix": jnp.float32, "scale": jnp.float32}
SIZES = [int(np.prod(shape)) for shape in SHAPES.values()]
THRESHOLDS = (0.3, 0.7, 0.97, 1.0, 1.1, 2.0)
ROWS = {
  "mean": aggregators.mean(),
  "gaf": aggregators.gaf(0.97),
  "gaf_of_all": aggregators.gaf(2.0),
}


def tree_of(rows):
  """Vectors [..., 18] as a tree with leaves of several dtypes."""
  parts = np.split(np.asarray(rows), np.cumsum(SIZES)[:-1], axis=-1)
  return {
    name: jnp.asarray(part.reshape(*part.shape[:-1], *shape), DTYPES[name])
    for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
  }


def rows_of(tree):
  """The inverse of `tree_of`, in float64."""
  parts = [
    np.asarray(tree[name], np.float64).reshape(-1, size)
    for name, size in zip(SHAPES, SIZES, strict=True)
  ]
  return np.squeeze(np.concatenate(parts, axis=-1))


def random_gradients(seed, m=8):
  """Stacked micro-gradients that agree in part, each of another length."""
  rng = np.random.default_rng(seed)
  rows = rng.normal(size=sum(SIZES)) + 3 * rng.normal(size=(m, sum(SIZES)))
  return tree_of(rows * 10.0 ** rng.uniform(-1, 1, (m, 1)))


def loop(rows, threshold):
  """(mean, indices of those kept, distance of the closest decision)."""
  kept, margin = [], np.inf
  for index, row in enumerate(rows):
    if not np.all(np.isfinite(row)) or not np.any(row):
      continue
    if kept:
      mean = np.mean(rows[kept], axis=0)
      cosine = mean @ row / np.linalg.norm(mean) / np.linalg.norm(row)
      margin = min(margin, abs(1 - cosine - threshold))
      if 1 - cosine > threshold:
        continue
    kept.append(index)
  if len(kept) < min(2, len(rows)):
    return np.zeros_like(rows[0]), kept, margin
  return np.mean(rows[kept], axis=0), kept, margin


def aggregate(aggregator, stacked):
  return jax.jit(lambda xs: aggregator(lambda x: x, xs))(stacked)


def check(result, expected, largest):
  """`result` is `expected`, summed in float32 and rounded once to its dtypes.

  Args:
    result: A tree.
    expected: The vector that it should be, in float64.
    largest: The largest entry of the micro-gradients, which may cancel.
  """
  assert {name: leaf.shape for name, leaf in result.items()} == SHAPES
  assert {name: leaf.dtype for name, leaf in result.items()} == DTYPES
  units = [jnp.finfo(dtype).eps / 2 for dtype in DTYPES.values()]
  bound = 1.01 * np.repeat(units, SIZES) * np.abs(expected)
  assert np.all(np.abs(rows_of(result) - expected) <= bound + 4e-7 * largest)


@pytest.mark.parametrize("seed", range(4))
def test_mean_is_the_mean(seed):
  stacked = random_gradients(seed)
  rows = rows_of(stacked)
  result = aggregate(aggregators.mean(), stacked)
  check(result, rows.mean(0), np.abs(rows).max())


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_gaf_is_the_loop(threshold):
  numbers = set()
  for seed in range(6):
    stacked = random_gradients(seed)
    rows = rows_of(stacked)
    expected, kept, margin = loop(rows, threshold)
    assert margin > 1e-5  # Else float32 may decide otherwise.
    result = aggregate(aggregators.gaf(threshold), stacked)
    check(result, expected, np.abs(rows).max())
    numbers.add(len(kept))
  # The draws are no test if they never leave a choice.
  assert numbers == {8} if threshold == 2 else min(numbers) < 8


def test_the_thresholds_differ():
  rows = rows_of(random_gradients(0))
  assert len({len(loop(rows, x)[1]) for x in THRESHOLDS}) > 3


def test_the_mean_runs():
  # The third agrees with the first, but not with the mean of the two before.
  rows = np.zeros((3, sum(SIZES)))
  rows[:, :2] = [[1, 0], [1, 8], [1, -1]]
  result = aggregate(aggregators.gaf(0.95), tree_of(rows))
  check(result, rows[:2].mean(0), 8.0)


def test_the_cosine_is_that_of_the_whole_tree():
  # The biases point backwards; they are short.
  rows = np.ones((2, sum(SIZES)))
  rows[1, :5] = -1
  result = aggregate(aggregators.gaf(0.9), tree_of(rows))
  check(result, rows.mean(0), 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_the_cosine_is_float32(seed):
  # Only the bfloat16 leaf counts, and the decision is a close one.
  stacked = random_gradients(seed, m=2)
  stacked = {k: x if k == "bias" else 0 * x for k, x in stacked.items()}
  rows = rows_of(stacked)
  distance = loop(rows, 0.0)[2]
  for threshold in (distance - 1e-4, distance + 1e-4):
    result = aggregate(aggregators.gaf(threshold), stacked)
    check(result, loop(rows, threshold)[0], np.abs(rows).max())
  assert np.any(rows_of(result))


@pytest.mark.parametrize("position", range(1, 4))
def test_an_outlier_is_dropped(position):
  rng = np.random.default_rng(0)
  rows = 1 + 0.1 * rng.normal(size=(4, sum(SIZES)))
  rows[position] *= -100
  stacked = tree_of(rows)
  expected = np.delete(rows_of(stacked), position, axis=0).mean(0)
  check(aggregate(aggregators.gaf(0.97), stacked), expected, 1.5)


def test_no_agreement_gives_zeros():
  rows = np.eye(6, sum(SIZES))
  result = aggregate(aggregators.gaf(0.97), tree_of(rows))
  check(result, np.zeros(sum(SIZES)), 0.0)


def test_one_micro_gradient_is_returned():
  stacked = random_gradients(0, m=1)
  for aggregator in ROWS.values():
    check(aggregate(aggregator, stacked), rows_of(stacked), 0.0)


@pytest.mark.parametrize("position", (0, 3, 7))
@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf, 0.0))
def test_gaf_drops_what_is_zero_or_not_finite(bad, position):
  rows = rows_of(random_gradients(1))
  rows[position] *= 0 if bad == 0 else 1
  rows[position, -1] = bad
  stacked = tree_of(rows)
  for threshold in (0.97, 2.0):
    expected, kept, _ = loop(rows_of(stacked), threshold)
    assert position not in kept and len(kept) > 1
    result = aggregate(aggregators.gaf(threshold), stacked)
    check(result, expected, np.abs(np.nan_to_num(rows, posinf=0)).max())


@pytest.mark.parametrize("m", (1, 2, 3))
def test_gaf_of_nothing_usable_is_zero(m):
  rows = np.full((m, sum(SIZES)), np.nan)
  rows[1:2] = 1.0
  result = aggregate(aggregators.gaf(2.0), tree_of(rows))
  check(result, np.zeros(sum(SIZES)), 0.0)


def test_a_cancelled_mean_is_orthogonal_to_everything():
  rows = np.ones((3, sum(SIZES))) * [[1], [-1], [1]]
  result = aggregate(aggregators.gaf(2.0), tree_of(rows))
  check(result, rows.mean(0), 1.0)


def test_a_threshold_of_2_keeps_opposites():
  # A cosine of -1 is rounded to less by some of these.
  lengths = jnp.asarray([1.0, -3.0])
  opposites = jax.jit(
    lambda x: aggregators.gaf(2.0)(lambda length: x * length, lengths)
  )
  for seed in range(40):
    x = np.random.default_rng(seed).normal(size=50).astype(np.float32)
    np.testing.assert_allclose(opposites(x), -x, rtol=1e-6)


@pytest.mark.parametrize("exponent", (-40, 40))
def test_gaf_scales(exponent):
  # A power of two, so that scaling rounds nothing.
  stacked = random_gradients(2)
  scaled = jax.tree.map(lambda x: x * 2.0**exponent, stacked)
  aggregator = aggregators.gaf(0.97)
  expected = rows_of(aggregate(aggregator, stacked)) * 2.0**exponent
  np.testing.assert_array_equal(
    rows_of(aggregate(aggregator, scaled)), expected
  )


@pytest.mark.parametrize("threshold", (0, -0.5, 2.01, float("nan")))
def test_bad_thresholds_are_refused(threshold):
  with pytest.raises(ValueError, match=f"got {threshold}"):
    aggregators.gaf(threshold)


@pytest.mark.parametrize("row", ROWS)
def test_no_micro_gradient_is_refused(row):
  with pytest.raises(ValueError, match="length 0"):
    aggregate(ROWS[row], random_gradients(0, m=0))


def test_the_table():
  assert set(aggregators.AGGREGATORS) == {"mean", "gaf"}
  stacked = random_gradients(3)
  result = aggregate(aggregators.AGGREGATORS["gaf"](0.7), stacked)
  expected = loop(rows_of(stacked), 0.7)[0]
  check(result, expected, np.abs(rows_of(stacked)).max())


@pytest.mark.parametrize("row", ROWS)
def test_micro_gradients_are_made_from_their_inputs(row):
  keys = jax.random.split(jax.random.key(0), 5)
  bias = jnp.arange(3.0)
  xs = {"key": keys, "shift": jnp.arange(5.0)}

  def fn(x):
    return {"w": jax.random.normal(x["key"], (3,)) + x["shift"] * bias}

  eager = ROWS[row](fn, xs)
  compiled = jax.jit(lambda xs: ROWS[row](fn, xs))(xs)
  stacked = ROWS[row](lambda x: x, jax.vmap(fn)(xs))
  np.testing.assert_allclose(eager["w"], compiled["w"], rtol=1e-6)
  np.testing.assert_allclose(stacked["w"], compiled["w"], rtol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_aux_is_stacked_and_changes_nothing(row):
  stacked = random_gradients(4)
  grads, aux = ROWS[row](
    lambda x: (x, (x["scale"], jnp.ones(2))), stacked, has_aux=True
  )
  np.testing.assert_array_equal(aux[0], stacked["scale"])
  assert aux[1].shape == (8, 2)
  plain = ROWS[row](lambda x: x, stacked)
  np.testing.assert_array_equal(rows_of(grads), rows_of(plain))


@pytest.mark.parametrize("row", ROWS)
def test_memory_is_that_of_two_gradients(row):
  params = {"a": jnp.ones(1 << 16), "b": jnp.ones((64, 64))}
  size = sum(leaf.nbytes for leaf in params.values())

  def held(m):
    def step(params, xs):
      fn = lambda x: jax.tree.map(lambda leaf: jnp.sin(x * leaf), params)
      return ROWS[row](fn, xs)

    program = jax.jit(step).lower(params, jnp.ones(m)).compile()
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes

  assert held(4) < 2.1 * size
  assert held(64) - held(4) < 0.1 * size
