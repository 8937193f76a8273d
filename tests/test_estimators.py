"""Every estimator against the algebra of quadratics and cubics."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import directions, estimators, perturbed, plan, probe_map
from zorn_jax.estimators import shaping, stencil

ROWS = {
  "central": estimators.central_difference,
  "forward": estimators.forward_difference,
  "antithetic": functools.partial(
    estimators.forward_difference, antithetic=True
  ),
}
QUERIES = {"central": 2, "forward": 2, "antithetic": 3}  # Columns of losses.
KINDS = {
  "rademacher": directions.rademacher(),
  "normal": directions.normal(),
  "sparse_uniform": directions.sparse(0.5, "uniform"),
  "low_rank_1": directions.low_rank(),
  "low_rank_2_normal": directions.low_rank(2, "normal"),
}
SHAPINGS = tuple(shaping.SHAPINGS)
SIZE = 15  # Parameters of `params_of`.
SIGMAS = 5.5  # Five standard errors over a dozen entries at once.


def params_of(vector):
  """A matrix and a vector."""
  vector = jnp.asarray(vector, jnp.float32)
  return {"matrix": vector[:12].reshape(4, 3), "vector": vector[12:]}


def flat(params):
  params = perturbed.materialize(params)
  return jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])


def integers():
  """Integers (x, H, b) of f(x) = xᵀHx + bx: no float32 sum of f is rounded."""
  rng = np.random.default_rng(0)
  hessian = rng.integers(-2, 3, (SIZE, SIZE))
  x, b = rng.integers(-3, 4, SIZE), rng.integers(-9, 10, SIZE)
  return x, hessian + hessian.T, b


def quadratic(params, batch):
  x, (hessian, b) = flat(params), batch
  return x @ hessian @ x + b @ x


def whole(tree):
  """The tree as one float64 vector."""
  leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  return np.concatenate(leaves)


def directions_of(direction, key, num_probes):
  """The directions of a step as the rows of an array [n, d]."""
  zeros = params_of(jnp.zeros(SIZE))
  draw = lambda key: flat(
    direction.perturb(zeros, direction.sample(key, zeros), jnp.ones(()))
  )
  keys = stencil.probe_keys(key, num_probes)
  return np.asarray(jax.jit(jax.vmap(draw))(keys), np.float64)


def compiled(estimator, loss_fn):
  """Query and update as programs."""
  query = jax.jit(
    lambda params, batch, key: estimator.query(loss_fn, params, batch, (), key)
  )
  update = jax.jit(
    lambda losses, params, key: estimator.update(losses, params, (), key)[0]
  )
  return query, update


@functools.cache
def programs(row, num_probes=4):
  """The programs that tests share, as compiling them takes the time."""
  return compiled(ROWS[row](0.5, num_probes), quadratic)


def many_estimates(estimator, loss_fn, params, batch, count):
  """Independent estimates [count, d] in float64."""

  def estimate(key):
    losses = estimator.query(loss_fn, params, batch, (), key)
    return flat(estimator.update(losses, params, (), key)[0])

  keys = jax.random.split(jax.random.key(7), count)
  return np.asarray(jax.jit(jax.vmap(estimate))(keys), np.float64)


def check_mean(estimates, expected, *rejected):
  """The mean is `expected` to within its standard error; others are not."""
  mean = estimates.mean(0)
  error = estimates.std(0) / np.sqrt(len(estimates))
  distance = lambda point: np.max(np.abs(mean - point) / error)
  assert distance(expected) < SIGMAS, (mean, expected, error)
  for point in rejected:
    assert distance(point) > SIGMAS


# The estimate.


@functools.cache
def estimates_on_a_quadratic(kind):
  """Of all rows in one program, which draws their directions once."""
  x, hessian, b = integers()
  hessian, b = hessian[:12, :12], b[:12]
  batch = (jnp.float32(hessian), jnp.float32(b))
  params = jnp.float32(x[:12]).reshape(4, 3)

  def estimate(key):
    result = {}
    for name, row in ROWS.items():
      estimator = row(0.5, 2, direction=KINDS[kind])
      losses = estimator.query(quadratic, params, batch, (), key)
      result[name] = flat(estimator.update(losses, params, (), key)[0])
    return result

  keys = jax.random.split(jax.random.key(7), 4096)
  return 2 * hessian @ x[:12] + b, jax.jit(jax.vmap(estimate))(keys)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_on_a_quadratic(kind, row):
  gradient, estimates = estimates_on_a_quadratic(kind)
  # Without 1/n, or with half of the slope, the mean would be off by two.
  check_mean(
    np.asarray(estimates[row], np.float64),
    gradient,
    1.25 * gradient,
    0.8 * gradient,
  )


@pytest.mark.parametrize(
  ("row", "kind"),
  [*((row, "rademacher") for row in ROWS), ("central", "low_rank_1")],
)
def test_slopes_on_a_quadratic_are_exact_at_every_epsilon(row, kind):
  # All numbers are integers or sixteenths below 2^20: nothing is rounded.
  x, hessian, b = integers()
  batch = (jnp.float32(hessian), jnp.float32(b))
  epsilons = (0.25, 1.0, 8.0)

  @jax.jit
  def run(params, key):
    results = []
    for epsilon in epsilons:
      estimator = ROWS[row](epsilon, 4, direction=KINDS[kind])
      losses = estimator.query(quadratic, params, batch, (), key)
      grads, state = estimator.update(losses, params, (), key)
      assert state == estimator.init(params) == ()
      results.append((losses, grads))
    return results

  key, params = jax.random.key(3), params_of(x)
  z = directions_of(KINDS[kind], key, 4)
  at = lambda point: (
    np.einsum("...i,ij,...j", point, hessian, point) + (point @ b)
  )
  results = run(params, key)
  for epsilon, (losses, grads) in zip(epsilons, results, strict=True):
    clean, plus, minus = (
      np.full(4, at(x)),
      at(x + epsilon * z),
      at(x - epsilon * z),
    )
    columns = {
      "central": [plus, minus],
      "forward": [clean, plus],
      "antithetic": [clean, plus, minus],
    }
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, np.stack(columns[row], 1))
    slopes = z @ (2 * hessian @ x + b)
    if row == "forward":
      slopes = slopes + epsilon * np.einsum("ni,ij,nj->n", z, hessian, z)
    np.testing.assert_array_equal(whole(grads), slopes @ z / 4)


def test_antithetic_forward_difference_is_the_central_difference():
  x, hessian, b = integers()
  params, batch = params_of(x), (jnp.float32(hessian), jnp.float32(b))
  key, grads, losses = jax.random.key(5), {}, {}
  for row in ("central", "antithetic"):
    query, update = programs(row)
    losses[row] = np.asarray(query(params, batch, key))
    grads[row] = whole(update(losses[row], params, key))
  np.testing.assert_array_equal(losses["antithetic"][:, 1:], losses["central"])
  np.testing.assert_array_equal(grads["antithetic"], grads["central"])


@pytest.mark.parametrize(
  ("direction", "law"),
  [  # Relative squared error times n, of a 3 x 4 matrix.
    (directions.rademacher(), 12 - 1),
    (directions.low_rank(), 12 - 1),
    (directions.normal(), 12 + 1),
    (directions.low_rank(1, "normal"), (3 + 2) * (4 + 2) - 1),
  ],
  ids=["rademacher", "low_rank_rademacher", "normal", "low_rank_normal"],
)
def test_the_error_follows_the_law_of_its_directions(direction, law):
  gradient = np.random.default_rng(1).normal(size=(3, 4))
  gradient = jnp.float32(gradient / np.linalg.norm(gradient))
  loss = lambda params, _: jnp.sum(gradient * perturbed.materialize(params))
  estimator = estimators.central_difference(1.0, 4, direction=direction)
  estimates = many_estimates(
    estimator, loss, jnp.zeros((3, 4)), (), 131072 if law > 20 else 32768
  )
  errors = 4 * np.sum((estimates - np.asarray(gradient).ravel()) ** 2, axis=1)
  mean, error = errors.mean(), errors.std() / np.sqrt(len(errors))
  assert abs(mean - law) < 5 * error
  # A law ten per cent away is rejected: 11 is told from 12 and from 13.
  for wrong in (0.9 * law, 1.1 * law):
    assert abs(mean - wrong) > 5 * error


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_a_cubic_is_smoothed_as_its_directions_say(kind):
  r"""The laws are exact where the fourth derivative is zero.

  Normal directions: the gradient of f + ε²/2 tr ∇²f. Signs: as much, less
  ε²/3 ∂_iii f.
  """
  rng, epsilon = np.random.default_rng(2), 0.75
  third = rng.normal(size=(4, 4, 4))
  axes = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
  third = sum(third.transpose(a) for a in axes) / 3
  third[range(4), range(4), range(4)] += 4
  b, x = rng.normal(size=4), rng.normal(size=4)

  def cubic(params, batch):
    tensor, b = batch
    return params @ (params @ (tensor @ params)) / 6 + b @ params

  estimator = estimators.central_difference(epsilon, 2, direction=KINDS[kind])
  batch = (jnp.float32(third), jnp.float32(b))
  estimates = many_estimates(estimator, cubic, jnp.float32(x), batch, 65536)
  gradient = np.einsum("ijk,j,k->i", third, x, x) / 2 + b
  smoothed = gradient + epsilon**2 / 2 * np.einsum("ijj->i", third)
  corrected = smoothed - epsilon**2 / 3 * np.einsum("iii->i", third)
  if kind == "normal":
    check_mean(estimates, smoothed, gradient, corrected)
  else:
    check_mean(estimates, corrected, gradient, smoothed)


# Promises of every row.


@pytest.mark.parametrize("row", ROWS)
def test_params_are_left_alone_and_the_second_call_compiles_nothing(row):
  x, hessian, b = integers()
  query, update = compiled(ROWS[row](1e-3, 4), quadratic)
  params = params_of(x + 0.1)
  for seed in (0, 1):
    key = jax.random.key(seed)
    batch = (jnp.float32(hessian + seed), jnp.float32(b))
    before = jax.tree.map(np.array, params)
    grads = update(query(params, batch, key), params, key)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
  assert query._cache_size() == update._cache_size() == 1


@pytest.mark.parametrize("kind", ["rademacher", "low_rank_1"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("row", ROWS)
def test_dtypes_are_kept_and_losses_are_float32(row, dtype, kind):
  params = jax.tree.map(
    lambda x: x.astype(dtype), params_of(np.arange(SIZE) / SIZE)
  )
  loss = lambda params, _: jnp.sum(flat(params) ** 2)
  estimator = ROWS[row](0.1, 3, direction=KINDS[kind])
  assert jax.eval_shape(loss, params, ()).dtype == dtype

  def step(params, key):
    losses = estimator.query(loss, params, (), (), key)
    return losses, estimator.update(losses, params, (), key)[0]

  losses, grads = jax.eval_shape(step, params, jax.random.key(0))
  assert losses.dtype == jnp.float32
  assert grads == jax.eval_shape(lambda: params)


@pytest.mark.parametrize(
  ("kind", "sizes"),
  [("rademacher", (None, 1, 3)), ("low_rank_1", (None, 100))],
)
def test_results_do_not_depend_on_how_many_probes_run_at_once(kind, sizes):
  x, hessian, b = integers()
  params, batch = params_of(x / 4), (jnp.float32(hessian), jnp.float32(b))
  key, results = jax.random.key(1), []
  given = jnp.float32(np.random.default_rng(0).normal(size=(7, 2)))
  for batch_size in sizes:
    estimator = estimators.central_difference(
      0.1,
      7,
      direction=KINDS[kind],
      probe_map=probe_map.sequential(batch_size),
    )
    query, update = compiled(estimator, quadratic)
    results.append((query(params, batch, key), update(given, params, key)))
  (losses, grads), *others = results
  size = np.abs(hessian).sum()
  for other_losses, other_grads in others:
    # A few roundings of the largest sums.
    np.testing.assert_allclose(other_losses, losses, rtol=0, atol=1e-7 * size)
    jax.tree.map(np.testing.assert_array_equal, other_grads, grads)


@pytest.mark.parametrize("row", ["central", "antithetic"])
def test_a_probe_does_not_depend_on_how_many_there_are(row):
  x, hessian, b = integers()
  params, batch = params_of(x), (jnp.float32(hessian), jnp.float32(b))
  key, grads, losses = jax.random.key(2), {}, {}
  for num_probes in (2, 4):
    query, update = programs(row, num_probes)
    losses[num_probes] = np.asarray(query(params, batch, key))
    only = np.zeros_like(losses[num_probes])
    only[1] = [3.0, 1.0, 2.0][: QUERIES[row]]
    grads[num_probes] = num_probes * whole(update(only, params, key))
  np.testing.assert_array_equal(losses[4][:2], losses[2])
  assert np.abs(grads[2]).max() > 0
  np.testing.assert_array_equal(grads[4], grads[2])


@pytest.mark.parametrize("row", ROWS)
def test_an_update_is_replayed_from_the_saved_losses(row):
  x, hessian, b = integers()
  params, key = params_of(x / 3), jax.random.key(4)
  batch = (jnp.float32(hessian / 7), jnp.float32(b / 3))
  estimator = ROWS[row](0.03, 4)

  @jax.jit
  def step(params, key):
    losses = estimator.query(quadratic, params, batch, (), key)
    return losses, estimator.update(losses, params, (), key)[0]

  losses, grads = step(params, key)
  file = io.BytesIO()
  np.save(file, losses)
  file.seek(0)
  # Another program, that of another estimator, which has no loss function.
  _, later = compiled(ROWS[row](0.03, 4), None)
  replayed = later(np.load(file), params, key)
  jax.tree.map(np.testing.assert_array_equal, replayed, grads)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_update_outside_jit_is_the_same(dtype):
  losses = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
  estimator = estimators.central_difference(0.03, 16)
  params, key = jnp.zeros(3), jax.random.key(0)
  _, update = compiled(estimator, None)
  grads, _ = estimator.update(losses.astype(dtype), params, (), key)
  np.testing.assert_array_equal(grads, update(losses, params, key))
  losses[3] = np.inf
  grads, _ = estimator.update(losses.astype(dtype), params, (), key)
  np.testing.assert_array_equal(grads, update(losses, params, key))


@pytest.mark.parametrize("batch_per_probe", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_queries_per_step_counts_the_forward_passes(row, batch_per_probe):
  estimator = ROWS[row](0.1, 5, batch_per_probe=batch_per_probe)
  loss = lambda params, batch: (batch[None] @ params)[0, 0]
  batch = jnp.ones((5, 6) if batch_per_probe else 6)
  program = jax.make_jaxpr(
    lambda key: estimator.query(loss, jnp.ones((6, 1)), batch, (), key)
  )(jax.random.key(0))
  forward_passes = plan.cost(program.jaxpr).flops / (2 * 6)
  assert estimator.queries_per_step == forward_passes
  clean = {"central": 0}.get(row, 5 if batch_per_probe else 1)
  assert forward_passes == clean + 5 * (1 if row == "forward" else 2)


@pytest.mark.parametrize(
  ("row", "batch_size"),
  [*((row, None) for row in ROWS), ("antithetic", 3)],
)
def test_a_probe_sees_its_own_batch_alone(row, batch_size):
  x, hessian, b = integers()
  params, key = params_of(x), jax.random.key(6)
  estimator = ROWS[row](
    0.5,
    4,
    batch_per_probe=True,
    probe_map=probe_map.sequential(batch_size),
  )
  factors = np.array([1.0, 2.0, -3.0, 0.5])
  batch = (
    jnp.float32(factors[:, None, None] * hessian),
    jnp.float32(factors[:, None] * b),
  )
  query, _ = compiled(estimator, quadratic)
  shared, _ = programs(row)
  common = shared(params, (jnp.float32(hessian), jnp.float32(b)), key)
  np.testing.assert_array_equal(
    query(params, batch, key), factors[:, None] * np.asarray(common)
  )
  broken = (batch[0].at[1].set(jnp.nan), batch[1])
  np.testing.assert_array_equal(
    np.isnan(query(params, broken, key)).all(1), [False, True, False, False]
  )


@pytest.mark.parametrize("row", ROWS)
def test_batches_without_arrays_can_be_one_per_probe(row):
  # As those of tasks.random_tokens.
  loss = lambda params, _: jnp.sum(flat(params))
  estimator = ROWS[row](0.5, 3, batch_per_probe=True)
  query = lambda: estimator.query(
    loss, params_of(np.ones(SIZE)), (), (), jax.random.key(0)
  )
  assert jax.eval_shape(query).shape == (3, QUERIES[row])


# Shaping and losses that are not finite.


def coefficients(slopes, name):
  """Of a mean over the probes: times n."""
  slopes = jnp.asarray(slopes, jnp.float32)
  return np.asarray(shaping.coefficients(slopes, name)) * len(slopes)


SLOPES = (0.5, -2.0, 8.0, -0.25, 1.0, -1.5, 0.75, 0.3)


def test_unshaped_slopes_are_averaged():
  np.testing.assert_array_equal(
    coefficients(SLOPES, "none"), np.float32(SLOPES)
  )


@pytest.mark.parametrize("name", ["std", "ranks", "sign"])
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_shaped_slopes_have_no_scale(name, factor):
  # A power of two changes no digit.
  np.testing.assert_array_equal(
    coefficients(np.float32(SLOPES) * factor, name),
    coefficients(SLOPES, name),
  )


@pytest.mark.parametrize("name", ["std", "ranks", "sign"])
def test_shaped_slopes_are_odd_and_monotone(name):
  shaped = coefficients(SLOPES, name)
  np.testing.assert_array_equal(coefficients(-np.array(SLOPES), name), -shaped)
  np.testing.assert_array_equal(np.sign(shaped), np.sign(SLOPES))
  assert np.all(np.diff(shaped[np.argsort(SLOPES)]) >= 0)


def test_std_divides_by_the_deviation_and_clips():
  slopes = np.array([1.0, -2.0, 0.5, 1.5])
  np.testing.assert_allclose(
    coefficients(slopes, "std"),
    slopes / np.sqrt(np.mean(slopes**2)),
    rtol=1e-6,  # A square root, a mean and a quotient.
  )
  # 15 slopes of one: the outlier lies 10 / sqrt(115 / 16) > 3 deviations out.
  outlier = [1.0] * 15 + [-10.0]
  assert coefficients(outlier, "std").min() == -3.0


def test_ranks_are_those_of_the_sizes():
  order = np.argsort(np.argsort(np.abs(SLOPES)))
  np.testing.assert_allclose(
    coefficients(SLOPES, "ranks"), np.sign(SLOPES) * (order + 1) / 8, rtol=1e-6
  )


def test_sign_is_the_sign():
  np.testing.assert_array_equal(coefficients(SLOPES, "sign"), np.sign(SLOPES))


@pytest.mark.parametrize("slope", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("name", SHAPINGS)
def test_slopes_of_zero_or_none_at_all_make_no_step(name, slope):
  np.testing.assert_array_equal(coefficients([slope] * 4, name), np.zeros(4))


def test_std_counts_slopes_of_zero():
  np.testing.assert_allclose(
    coefficients([1, -1, 0, 0], "std"), [2**0.5, -(2**0.5), 0, 0], rtol=1e-6
  )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", SHAPINGS)
def test_a_dropped_probe_leaves_the_mean_of_the_others(name, bad):
  slopes = np.float32([0.5, bad, -2.0, bad, 1.0])
  finite = np.isfinite(slopes)
  shaped = np.asarray(shaping.coefficients(jnp.asarray(slopes), name))
  alone = np.asarray(shaping.coefficients(jnp.asarray(slopes[finite]), name))
  np.testing.assert_array_equal(shaped[~finite], 0)
  np.testing.assert_allclose(shaped[finite], alone, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", ROWS)
def test_a_loss_that_is_not_finite_drops_its_probe(row, bad):
  params, key = params_of(np.zeros(SIZE)), jax.random.key(8)
  _, update = programs(row)
  losses = np.float32([[1, 2, 4], [3, -1, 7], [5, 5, 1], [0, 1, 3]])
  losses = losses[:, : QUERIES[row]]
  z = directions_of(KINDS["rademacher"], key, 4)
  for column in range(QUERIES[row]):
    broken = losses.copy()
    broken[2, column] = bad
    expected = {
      "central": lambda x: x[:, 0] - x[:, 1],
      "forward": lambda x: 2 * (x[:, 1] - x[:, 0]),
      "antithetic": lambda x: x[:, 1] - x[:, 2],
    }[row](losses)[[0, 1, 3]]
    np.testing.assert_allclose(
      whole(update(broken, params, key)),
      expected @ z[[0, 1, 3]] / 3,
      rtol=1e-6,  # Thirds are rounded.
      atol=1e-6,
    )
  both = losses.copy()
  both[1] = bad  # Infinity less infinity.
  assert np.all(np.isfinite(whole(update(both, params, key))))


@pytest.mark.parametrize("row", ROWS)
def test_no_finite_loss_makes_no_step(row):
  _, update = programs(row)
  losses = np.full((4, QUERIES[row]), np.inf, np.float32)
  losses[0, 0] = np.nan
  grads = update(losses, params_of(np.ones(SIZE)), jax.random.key(0))
  np.testing.assert_array_equal(whole(grads), 0)


# Mistakes.


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
    ({"epsilon": -0.1}, "epsilon must be positive, got -0.1"),
    ({"epsilon": float("nan")}, "epsilon must be positive, got nan"),
    ({"epsilon": 1e-50}, "epsilon must be finite in float32, got 1e-50"),
    ({"epsilon": 1e39}, "epsilon must be finite in float32, got 1e.39"),
    ({"num_probes": 0}, "num_probes must be at least 1, got 0"),
    ({"shaping": "rank"}, "unknown shaping 'rank'.*'none', 'ranks'"),
  ],
)
@pytest.mark.parametrize("row", ROWS)
def test_a_wrong_option_is_named_with_its_remedy(row, options, message):
  with pytest.raises(ValueError, match=message):
    ROWS[row](**{"epsilon": 0.1, "num_probes": 2, **options})


def test_a_probe_map_of_no_probes_is_refused():
  with pytest.raises(ValueError, match="batch_size.*must be positive, got 0"):
    probe_map.sequential(0)


@pytest.mark.parametrize("row", ROWS)
def test_a_loss_that_is_no_scalar_is_refused(row):
  estimator = ROWS[row](0.1, 2)
  with pytest.raises(ValueError, match=r"scalar, got shape \(3,\).*mean"):
    estimator.query(
      lambda params, _: params, jnp.zeros(3), (), (), jax.random.key(0)
    )


@pytest.mark.parametrize("wrong", [(3,), ()], ids=str)
@pytest.mark.parametrize("row", ROWS)
def test_a_batch_without_one_entry_per_probe_is_refused(row, wrong):
  estimator = ROWS[row](0.1, 2, batch_per_probe=True)
  batch = {"right": jnp.zeros((2, 4)), "wrong": jnp.zeros(wrong)}
  with pytest.raises(ValueError, match="num_probes=2, got leading axes.*Stack"):
    estimator.query(
      lambda params, batch: jnp.sum(params),
      jnp.zeros(3),
      batch,
      (),
      jax.random.key(0),
    )
