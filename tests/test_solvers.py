"""Every estimator crossed with the promises that all of them make."""

import functools
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import (
  CLEAN,
  CURVATURE,
  EPSILON,
  ROWS,
  SIZE,
  amplified,
  close,
  curved,
  flat,
  integers,
  params_of,
  problems,
  quadratic,
  quick,
)

from zorn_jax import directions, estimators, plan, probe_map

SIGMAS = 5.5  # Five standard errors over a dozen entries at once.
EVERY = pytest.mark.parametrize("name", ROWS)
# Their directions are no integers.
ROUNDED = ("adaptive", "sanger_spsa within")


def test_every_estimator_is_in_the_table():
  names = {name.split()[0] for name in ROWS} - {"adaptive"}
  assert names == set(estimators.ESTIMATORS) | set(estimators.STREAMING)


# Runs.


@functools.cache
def programs(name):
  """A step of gradient descent, and the same from the losses alone."""
  live, later = (ROWS[name].make(EPSILON, 4) for _ in range(2))

  def descend(losses, params, state, key, estimator):
    grads, state = estimator.update(losses, params, state, key)
    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), state

  def step(params, state, key, batch):
    losses = live.query(quadratic, params, batch, state, key)
    return losses, *descend(losses, params, state, key, live)

  replay = functools.partial(descend, estimator=later)
  return live, jax.jit(step), jax.jit(replay)


def start(name):
  """Parameters, with values that sums round, and state."""
  params = params_of(np.random.default_rng(1).normal(size=SIZE))
  return params, programs(name)[0].init(params)


def inputs(step):
  """Key and batch of a step."""
  batch = jax.tree.map(lambda x: x[step % 3] / 7, problems())
  return jax.random.fold_in(jax.random.key(5), step), batch


def run(step, first, last, params, state):
  """Steps of a live program: the losses and what is left."""
  losses = []
  for index in range(first, last):
    new, params, state = step(params, state, *inputs(index))
    losses.append(np.asarray(new))
  return losses, params, state


def raw(tree):
  """The tree with data for its keys."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  data = lambda x: jax.random.key_data(x) if is_key(x) else x
  return jax.tree.map(data, tree)


def stored(*trees):
  """The leaves as bytes, with dtypes and shapes."""
  arrays = map(np.asarray, jax.tree.leaves(raw(trees)))
  return [(x.tobytes(), x.dtype, x.shape) for x in arrays]


def restored(leaves, like):
  like, treedef = jax.tree.flatten(like)

  def wrap(leaf, like):
    array = jnp.asarray(np.frombuffer(leaf[0], leaf[1]).reshape(leaf[2]))
    is_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(array) if is_key else array

  return treedef.unflatten(map(wrap, leaves, like))


# The estimate.


class Observed(NamedTuple):
  """Estimates of K keys from one state, on the three quadratics.

  Attributes:
    losses: By column [q, 3, K, n].
    grads: [3, K, d].
    state: That of the estimator.
    z: Directions [K, n, d].
    u: Second directions; zero where there are none.
  """

  losses: np.ndarray
  grads: np.ndarray
  state: Any
  z: np.ndarray
  u: np.ndarray


@functools.cache
def observed(name):
  """After four steps, by which states have become what they will be."""
  x, _, _ = integers()
  params = params_of(x)
  # The coordinates of a point are losses too.
  axes = jnp.zeros((SIZE, SIZE, SIZE)), jnp.eye(SIZE)
  batches = jax.tree.map(lambda *x: jnp.concatenate(x), problems(), axes)

  @quick
  def look(epsilon, state, keys):  # Epsilon may be traced.
    estimator = ROWS[name].make(epsilon, 4)

    def at(key):
      args = params, state, key
      query = lambda batch: estimator.query(
        quadratic, args[0], batch, *args[1:]
      )
      update = lambda losses: flat(estimator.update(losses, *args)[0])
      losses = jax.vmap(query)(batches)
      return losses[3:], losses[:3], jax.vmap(update)(losses[:3])

    return jax.vmap(at)(keys)

  _, _, state = run(programs(name)[1], 0, 4, *start(name))
  keys = jax.random.split(jax.random.key(2), 1024)
  arrays = look(jnp.float32(EPSILON), state, keys)
  points, losses, grads = (np.asarray(x, np.float64) for x in arrays)
  losses = np.moveaxis(losses, (-1, 1), (0, 1))
  points = np.moveaxis(points, (-1, 1), (0, -1))  # [q, K, n, d]
  if name == "forward_gradient":
    z = points[1]
  else:
    z = (points[ROWS[name].stencil.index((1, 0))] - x) / EPSILON
  u = (points[2] - x) / EPSILON - z if name == "spsa2" else 0 * z
  return Observed(losses, np.moveaxis(grads, 1, 0), state, z, u)


@EVERY
def test_losses_are_those_of_points_along_the_directions(name):
  seen, (x, hessians, b) = observed(name), integers()
  assert seen.losses.shape == (ROWS[name].columns, 3, 1024, 4)
  for losses, multiples in zip(seen.losses, ROWS[name].stencil, strict=True):
    if multiples is None:
      expected = np.einsum("knd,hd->hkn", seen.z, 2 * hessians @ x + b)
    else:
      step = multiples[0] * seen.z + multiples[1] * seen.u
      points = x + EPSILON * step
      expected = np.einsum("...i,hij,...j->h...", points, hessians, points)
      expected += points @ b
    # Where no direction is rounded no sum is.
    size = np.abs(expected).max() if name in ROUNDED else 0
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5 * size)
  if name not in ROUNDED:
    assert set(np.unique(seen.z)) == {-1.0, 1.0}
  if name == "spsa2":  # The second direction is one of its own.
    assert set(np.unique(seen.u)) == {-1.0, 1.0}
    products = np.sum(seen.z * seen.u, -1)
    assert abs(products.mean()) < 5 * np.sqrt(SIZE / products.size)


@EVERY
def test_every_estimate_is_its_formula(name):
  seen = observed(name)
  coefficients = ROWS[name].coefficient(seen.losses)
  expected = np.einsum("hkn,knd->hkd", coefficients, seen.z) / 4
  if name.startswith("sanger"):
    amplify = functools.partial(amplified, state=seen.state)
    expected = np.apply_along_axis(amplify, -1, expected)
  size = np.abs(expected).max()
  np.testing.assert_allclose(seen.grads, expected, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name].mean])
def test_the_mean_is_the_gradient_as_the_state_transforms_it(name):
  seen, (x, hessians, b) = observed(name), integers()
  for estimates, gradient in zip(seen.grads, 2 * hessians @ x + b, strict=True):
    mean, error = estimates.mean(0), estimates.std(0) / np.sqrt(1024)
    expected = ROWS[name].mean(np.float64(gradient), seen.state)
    distances = [
      np.max(np.abs(mean - factor * expected) / error) for factor in (1, 0.5, 2)
    ]
    assert distances[0] < SIGMAS < min(distances[1:])


@EVERY
def test_the_mean_descends_and_no_exact_slope_ascends(name):
  seen, (x, hessians, b) = observed(name), integers()
  for estimates, gradient in zip(seen.grads, 2 * hessians @ x + b, strict=True):
    products = estimates @ gradient
    assert products.mean() > 8 * products.std() / np.sqrt(1024)
    # Σ c z with c of the sign of z·g. Sanger's is a matrix times it, and
    # one-sided slopes have the curvature in them.
    if not name.startswith("sanger") and name != "forward_difference":
      assert products.min() >= -1e-6 * products.max()


# Promises of every row.


@EVERY
def test_nothing_is_changed_or_remembered_and_one_program_serves(name):
  _, step, _ = programs(name)
  params, state = start(name)
  before = stored(params, state)
  first = step(params, state, *inputs(0))
  assert stored(params, state) == before
  assert stored(step(params, state, *inputs(0))) == stored(first)
  step(*first[1:], *inputs(1))
  assert step._cache_size() == 1
  # Python that remembers something would not trace the same program again.
  trace = lambda: str(
    jax.make_jaxpr(step.__wrapped__)(params, state, *inputs(0))
  )
  assert trace() == trace()


@pytest.mark.parametrize(
  ("dtype", "kind"),
  [
    ("float32", "low_rank"),
    ("bfloat16", "rademacher"),
    ("bfloat16", "low_rank"),
  ],
)
@EVERY
def test_dtypes_and_shapes_are_kept(name, dtype, kind):
  params = jax.tree.map(lambda x: x.astype(dtype), params_of(np.ones(SIZE)))
  direction = getattr(directions, kind)()
  estimator = ROWS[name].make(EPSILON, 3, direction=direction)
  loss = lambda params, _: jnp.sum(flat(params) ** 2)
  assert jax.eval_shape(loss, params, ()).dtype == dtype

  def step(state, key):  # A scan takes only a state like the last.
    losses = estimator.query(loss, params, (), state, key)
    grads, state = estimator.update(losses, params, state, key)
    return state, (losses, grads)

  state, keys = estimator.init(params), jax.random.split(jax.random.key(0), 2)
  _, (losses, grads) = jax.eval_shape(
    lambda state: jax.lax.scan(step, state, keys), state
  )
  assert losses == jax.ShapeDtypeStruct((2, 3, ROWS[name].columns), jnp.float32)
  two = lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
  assert grads == jax.tree.map(two, params)


@EVERY
def test_results_do_not_depend_on_how_many_probes_run_at_once(name):
  used, three = [], probe_map.sequential(3)
  spy = probe_map.ProbeMap(
    lambda fn, xs: used.append("map") or three.map(fn, xs),
    lambda fn, xs: used.append("map") or three.keep(fn, xs),
    lambda fn, xs: used.append("sum") or three.sum(fn, xs),
  )
  estimator = ROWS[name].make(EPSILON, 4, probe_map=spy)

  @quick
  def step(params, state, key, batch):
    losses = estimator.query(quadratic, params, batch, state, key)
    grads, state = estimator.update(losses, params, state, key)
    return losses, jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), state

  at_once = programs(name)[1]
  _, params, state = run(at_once, 0, 2, *start(name))
  few = step(params, state, *inputs(2))
  many = at_once(params, state, *inputs(2))
  assert used.count("sum") == 1 <= used.count("map")
  jax.tree.map(close, raw(few), raw(many))


@EVERY
def test_a_resumed_run_is_the_uninterrupted_one(name):
  step = programs(name)[1]
  losses, *whole = run(step, 0, 6, *start(name))
  half = run(step, 0, 3, *start(name))[1:]
  leaves = stored(half)
  again = programs.__wrapped__(name)[1]  # Another process makes its own.
  resumed = run(again, 3, 6, *restored(leaves, like=half))
  assert stored(resumed) == stored((losses[3:], *whole))


@EVERY
def test_a_run_is_replayed_from_its_losses_alone(name):
  _, step, replay = programs(name)
  losses, *live = run(step, 0, 6, *start(name))
  file = io.BytesIO()
  np.save(file, np.stack(losses))
  file.seek(0)
  params, state = start(name)
  for index, saved in enumerate(np.load(file)):
    params, state = replay(saved, params, state, inputs(index)[0])
  assert stored(params, state) == stored(*live)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@EVERY
def test_losses_that_are_not_finite_poison_nothing(name, bad):
  replay, (params, state) = programs(name)[2], start(name)
  losses = np.random.default_rng(3).normal(size=(4, ROWS[name].columns))
  losses = np.float32(losses)
  for column in (*range(ROWS[name].columns), slice(None)):
    broken = losses.copy()
    broken[1, column] = bad
    params, state = replay(broken, params, state, jax.random.key(0))
  losses[:] = bad
  same, state = replay(losses, params, state, jax.random.key(1))
  assert stored(same) == stored(params)
  for leaf in jax.tree.leaves(raw((params, state))):
    assert np.all(np.isfinite(leaf))


@EVERY
def test_queries_per_step_counts_the_forward_passes(name):
  estimator, params = ROWS[name].make(EPSILON, 5), jnp.ones((6, 2))
  loss = lambda params, batch: jnp.sum(batch[None] @ params)
  program = jax.make_jaxpr(
    lambda state, key: estimator.query(loss, params, jnp.ones(6), state, key)
  )(estimator.init(params), jax.random.key(0))
  passes = plan.cost(program.jaxpr).flops / (2 * 6 * 2)
  if name == "sanger_spsa within":
    passes -= 5 * 2 * 2  # W (Wᵀ z) with W [2, 2].
  columns = ROWS[name].columns
  shared = CLEAN in ROWS[name].stencil and name != "forward_gradient"
  assert passes == estimator.queries_per_step == 5 * columns - 4 * shared
  derivatives = name == "forward_gradient"
  assert estimator.num_losses == columns - derivatives


# Curvature.


@pytest.mark.parametrize("name", CURVATURE)
def test_slopes_are_divided_by_a_power_of_the_curvature(name):
  seen, (x, hessians, _) = observed(name), integers()
  other = seen.u if name == "spsa2" else seen.z
  curvature = 2 * np.einsum("kni,hij,knj->hkn", seen.z, hessians, other)
  np.testing.assert_array_equal(CURVATURE[name](seen.losses), abs(curvature))

  half = np.median(abs(curvature[2, 0]))
  options = [(0.0, 1.0), (0.1, 1.0), (1.0, 1.0), (1.0, half), (0.5, 1e-3)]
  make = estimators.ESTIMATORS[name]
  rows = [make(EPSILON, 4, exponent=a, floor=least) for a, least in options]
  key = jax.random.split(jax.random.key(2), 1024)[0]
  losses, params = seen.losses[:, 2, 0], params_of(x)

  @quick
  def updates(losses):
    return [flat(row.update(losses, params, (), key)[0]) for row in rows]

  estimates = updates(jnp.float32(losses.T))
  for (exponent, floor), estimate in zip(options, estimates, strict=True):
    expected = curved(name, losses, exponent, floor) @ seen.z[0] / 4
    np.testing.assert_allclose(estimate, expected, rtol=1e-5, atol=1e-5)
  assert np.abs(np.diff(estimates, axis=0)).max(1).min() > 1e-2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["spsa1_5", "spsa2"])
def test_a_probe_without_its_curvature_is_dropped(name, bad):
  """The other counts whole, not half."""
  row = getattr(estimators, name)
  update = quick(row(0.5, 2, batch_per_probe=True).update)
  columns, params = ROWS[name].columns, jnp.zeros(5)
  losses = np.random.default_rng(3).normal(size=(2, columns)).astype("f4")
  found = []
  for column in range(columns):
    broken = losses.copy()
    broken[1, column] = bad
    found.append(update(broken, params, (), jax.random.key(0))[0])
  assert found[0].any()
  for grads in found[1:]:
    np.testing.assert_array_equal(grads, found[0])


# Mistakes.

WRONG = [
  *(
    (name, {option: value}, f"{option} must .* got {value}. Choose")
    for name in CURVATURE
    for option, value in [
      ("exponent", -0.1),
      ("exponent", float("nan")),
      ("floor", 0.0),
      ("floor", -1.0),
    ]
  ),
  ("bandit_spsa", {"capacity": 3}, "capacity=3, num_probes=4. Choose a larger"),
  ("bandit_spsa", {"temperature": 0.0}, "temperature .* got 0.0. Choose"),
  ("bandit_spsa", {"decay": 0.0}, r"decay must .* \(0, 1\], got 0.0. Choose"),
  ("bandit_spsa", {"decay": 1.5}, r"decay must .* \(0, 1\], got 1.5. Choose"),
  ("bandit_spsa", {"exploit": (0.2, 1.1)}, r"got \(0.2, 1.1\). Choose"),
  ("bandit_spsa", {"exploit": (-0.1, 1)}, r"got \(-0.1, 1\). Choose"),
  ("bandit_spsa", {"ramp": (9.0, 0.0)}, r"positive, got \(9.0, 0.0\)"),
  ("sanger_spsa", {"rank": 0}, "rank must be positive, got 0. Choose"),
  ("sanger_spsa", {"rate": 0.0}, r"rate must .* \(0, 1\], got 0.0. Choose"),
  ("sanger_spsa", {"rate": 1.5}, r"rate must .* \(0, 1\], got 1.5. Choose"),
  ("sanger_spsa", {"identity": -1.0}, "must not be negative, got -1.0, 8"),
  ("sanger_spsa", {"warmup": -1}, "must not be negative, got 0.5, -1"),
  *(
    (name, {option: value}, message)
    for name in ROWS
    for option, value, message in [
      ("epsilon", 0.0, "epsilon must be positive, got 0.0. Choose"),
      ("epsilon", float("nan"), "epsilon must be positive, got nan. Choose"),
      ("num_probes", 0, "num_probes must be at least 1, got 0. Choose"),
      ("shaping", "rank", "unknown shaping 'rank'. Choose one of"),
    ]
    if (name, option) != ("forward_gradient", "epsilon")
  ),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_a_wrong_option_is_named_with_its_remedy(name, options, message):
  with pytest.raises(ValueError, match=message):
    ROWS[name].make(**{"epsilon": 0.1, "num_probes": 4} | options)
