"""Every estimator crossed with the promises that all of them make."""

import functools
import inspect
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

import zorn_jax
from zorn_jax import (
  aggregators,
  build,
  directions,
  estimators,
  methods,
  metrics,
  perturbed,
  plan,
  probe_map,
  tasks,
)

EPSILON = 0.5  # 2ε = 1, and sums of integers stay exact.
SIZE = 15  # Parameters of `params_of`.
SIGMAS = 5.5  # Five standard errors over a dozen entries at once.
# Compiling takes the time of these tests, not running.
quick = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def params_of(vector):
  """A matrix and a vector."""
  vector = jnp.asarray(vector, jnp.float32)
  return {"matrix": vector[:12].reshape(4, 3), "vector": vector[12:]}


def flat(params):
  leaves = jax.tree.leaves(perturbed.materialize(params))
  return jnp.concatenate([x.ravel() for x in leaves])


def quadratic(params, batch):
  x, (hessian, b) = flat(params), batch
  return x @ hessian @ x + b @ x


def integers():
  """Integers (x, H [3, d, d], b) of f(x) = xᵀHx + bx, which no sum rounds.

  The first f is convex, the second concave and the third neither.
  """
  rng = np.random.default_rng(0)
  mixed, root = rng.integers(-1, 2, (2, SIZE, SIZE))
  hessians = np.stack([root @ root.T, -root @ root.T, 2 * (mixed + mixed.T)])
  return rng.integers(-3, 4, SIZE), hessians, rng.integers(-9, 10, SIZE)


def problems():
  """The same as batches [3, ...] of `quadratic`."""
  _, hessians, b = integers()
  return jnp.float32(hessians), jnp.float32(np.tile(b, (3, 1)))


# The table.


class Row(NamedTuple):
  """An estimator and its formula.

  Attributes:
    make: (epsilon, num_probes, **options) -> the estimator.
    stencil: Multiples of z and u at the points of its losses; None for a
      column of derivatives.
    coefficient: (losses of a probe by column, in NumPy) -> that of z.
    mean: (gradient, state) -> the mean of the estimates on a quadratic; None
      where it has no simple form.
  """

  make: Callable
  stencil: tuple = ((1, 0), (-1, 0))
  coefficient: Callable = lambda f: f[0] - f[1]
  mean: Any = lambda gradient, state: gradient

  @property
  def columns(self):
    return len(self.stencil)


CURVATURE = {  # Along z, and between z and u.
  "spsa1_5": lambda f: np.abs(f[1] - 2 * f[0] + f[2]) / EPSILON**2,
  "spsa2": lambda f: np.abs(f[2] - f[3] - f[4] + f[5]) / (4 * EPSILON**2),
}


def curved(name, f, exponent, floor):
  """The coefficient of 1.5-SPSA or 2-SPSA."""
  plus, minus = {"spsa1_5": f[1:3], "spsa2": f[:2]}[name]
  return (plus - minus) / np.maximum(CURVATURE[name](f) ** exponent, floor)


def forward_gradient(epsilon, num_probes, **options):
  del epsilon
  return estimators.forward_gradient(num_probes, **options)


def adaptive(epsilon, num_probes, *, direction=None, **options):
  make = lambda direction: estimators.central_difference(
    epsilon, num_probes, direction=direction, **options
  )
  return estimators.adaptive(make, direction or directions.rademacher(), 0.5)


def streaming(name, epsilon, num_probes, **options):
  """A streaming estimator of two unrolls, which hand nothing on."""
  base = estimators.STREAMING[name](
    epsilon, num_probes, 2, stagger=False, **options
  )

  def query(loss_fn, params, batch, state, key):
    unroll = lambda params, carry, batch, first: (carry, loss_fn(params, batch))
    stack = lambda x: jnp.broadcast_to(x, (num_probes, *x.shape))
    batch = jax.tree.map(stack, batch)
    return base.query(unroll, params, batch, (), state, key)[0]

  queries = base.queries_per_step
  return estimators.Estimator(base.init, query, base.update, queries, 2)


SANGER = {"rank": 2, "rate": 0.3, "identity": 0.5, "warmup": 8}


def stretched(w, side):
  """What `subspace_probes` multiplies directions with, in NumPy."""
  ratio = side / w.shape[-1]
  stretch = np.eye(side) + (np.sqrt(ratio) - 1) * w @ w.swapaxes(-1, -2)
  return stretch / np.sqrt(2 - 1 / ratio)


def amplified(gradient, state, within=False):
  """What Sanger-SPSA makes of a gradient, in NumPy."""
  w = np.asarray(state.factors["matrix"], np.float64)
  matrix = gradient[:12].reshape(4, 3)
  if within:  # E[z zᵀ] of (z + (a - 1) P z) / √(2 - 1/a²), P no projection.
    stretch = stretched(w, 3)
    matrix = matrix @ stretch @ stretch.T
  weight = min((int(state.step) + 1) / SANGER["warmup"], 1)
  matrix = SANGER["identity"] * matrix + weight * matrix @ w @ w.T
  return np.concatenate([matrix.ravel(), gradient[12:]])


def scales(moment):
  """The scales of `adaptive`, in NumPy."""
  inverse = (moment + 0.01 * moment.mean()) ** -0.5
  return inverse / np.sqrt(np.mean(inverse**2))


def preconditioned(gradient, state):
  moment = np.asarray(flat(state.moment), np.float64)
  return scales(moment) ** 2 * gradient


def known(name, **options):
  return functools.partial(estimators.ESTIMATORS[name], **options)


CLEAN, PAIR = (0, 0), ((1, 0), (-1, 0))
CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))
BANDIT = {"capacity": 6, "exploit": (0.5, 0.9), "ramp": (3.0, 1.0)}
ROWS = {
  "central_difference": Row(known("central_difference")),
  "forward_difference": Row(
    known("forward_difference"), (CLEAN, (1, 0)), lambda f: 2 * (f[1] - f[0])
  ),
  "forward_difference antithetic": Row(
    known("forward_difference", antithetic=True),
    (CLEAN, *PAIR),
    lambda f: f[1] - f[2],
  ),
  "spsa1_5": Row(
    known("spsa1_5", exponent=0.5, floor=2.0),
    (CLEAN, *PAIR),
    lambda f: curved("spsa1_5", f, 0.5, 2.0),
    mean=None,
  ),
  "spsa2": Row(
    known("spsa2", exponent=1.0, floor=3.0),
    (*PAIR, *CORNERS),
    lambda f: curved("spsa2", f, 1.0, 3.0),
    mean=None,
  ),
  "bandit_spsa": Row(known("bandit_spsa", **BANDIT), mean=None),
  "sanger_spsa": Row(known("sanger_spsa", **SANGER), mean=amplified),
  "sanger_spsa within": Row(
    known("sanger_spsa", subspace_probes=True, **SANGER),
    mean=functools.partial(amplified, within=True),
  ),
  "forward_gradient": Row(forward_gradient, (CLEAN, None), lambda f: f[1]),
  "adaptive": Row(adaptive, mean=preconditioned),
  "noise_reuse_es": Row(functools.partial(streaming, "noise_reuse_es")),
  "persistent_es": Row(functools.partial(streaming, "persistent_es")),
}
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


# The reservoir.

WIDE = 64  # Parameters; no two probes have the same signs.


@functools.cache
def bandit(temperature, exploit=(0.2, 0.9)):
  """State, and programs: directions [n, d] of a step, update, those held."""
  estimator = estimators.bandit_spsa(
    EPSILON,
    6,
    capacity=10,
    temperature=temperature,
    decay=0.9,
    exploit=exploit,
    ramp=(15.0, 4.0),
  )
  params, signs = jnp.zeros(WIDE), directions.rademacher()
  linear = lambda params, slope: params @ slope

  def probes(state, key):
    at = lambda axis: estimator.query(linear, params, axis, state, key)
    return jax.vmap(at)(jnp.eye(WIDE))[..., 0].T / EPSILON

  def held(state):
    return jax.vmap(lambda key: signs.sample(key, params))(state.keys)

  def update(losses, state, key):
    return estimator.update(losses, params, state, key)

  return estimator.init(params), quick(probes), quick(update), quick(held)


def pairs(slopes):
  """Losses with these slopes."""
  return np.float32(np.stack([slopes, -slopes], 1) * EPSILON)


@pytest.mark.parametrize("temperature", [1.0, 1e-4])
def test_the_reservoir_follows_its_rules(temperature):
  """Here probes are known by their directions: {direction: (value, count)}."""
  state, probes, update, held = bandit(temperature)
  model, evicted, rng = {}, 0, np.random.default_rng(0)
  for step in range(40):
    key = jax.random.fold_in(jax.random.key(3), step)
    z = np.asarray(probes(state, key))
    names = [row.tobytes() for row in z]
    old = [name in model for name in names]
    share = 0.2 + 0.7 / (1 + np.exp(-(step - 15) / 4))
    assert sum(old) == min(round(share * 6), len(model))
    assert len(set(names)) == 6  # Drawn without replacement.
    if temperature < 1 and any(old):
      # The steepest come back: the noise is of the order of the temperature.
      chosen = min(model[name][0] for name in names if name in model)
      rest = [value for name, (value, _) in model.items() if name not in names]
      assert chosen > max([0, *rest]) - 2e-3 * max(model.values())[0]

    slopes = z @ np.logspace(0, -3, WIDE) * rng.uniform(0.5, 2)
    losses = pairs(slopes)
    if step % 5 == 4:
      losses[step % 6, 0] = (np.nan, np.inf, -np.inf)[step % 3]
    finite = np.isfinite(losses).all(1)
    grads, state = update(losses, state, key)
    close(grads, slopes[finite] @ z[finite] / finite.sum())

    rewards = np.where(finite, np.abs(slopes), 0)
    queried = {
      name: ((model[name][0] + r) / 2, model[name][1] + 1) if is_old else (r, 1)
      for name, r, is_old in zip(names, rewards, old, strict=True)
    }
    decayed = {name: (0.9 * value, c) for name, (value, c) in model.items()}
    pool = sorted((decayed | queried).items(), key=lambda x: -x[1][0])
    evicted, model = evicted + len(pool[10:]), dict(pool[:10])
    counts, keys = np.asarray(state.counts), np.asarray(held(state))
    free = counts == 0
    assert counts.shape == (10,) and not state.values[free].any()
    seen = [row.tobytes() for row in keys[~free]]
    assert sorted(seen) == sorted(model)
    np.testing.assert_array_equal(
      counts[~free], [model[name][1] for name in seen]
    )
    close(state.values[~free], [model[name][0] for name in seen])
  assert evicted > 20 and counts.max() > 3 and int(state.step) == 40


def test_an_empty_reservoir_gives_the_central_difference():
  state, probes, update, _ = bandit(1.0)
  key, slopes = jax.random.key(4), np.array([1, -2, 0.5, 4, -1, 8])
  grads, _ = update(pairs(slopes), state, key)
  np.testing.assert_allclose(grads, slopes @ probes(state, key) / 6, rtol=1e-5)
  central = estimators.central_difference(EPSILON, 6)
  args = pairs(slopes), jnp.zeros(WIDE), (), jax.random.split(key)[1]
  np.testing.assert_array_equal(grads, quick(central.update)(*args)[0])


@pytest.mark.parametrize("temperature", [0.5, 1e6])
def test_known_probes_are_drawn_as_their_values_say(temperature):
  state, probes, _, held = bandit(temperature, exploit=(1.0, 1.0))
  values = np.array([0.0, 2.0, 4.0, 8.0, 5.0, 7.0, 1.0])
  state = state._replace(
    keys=jax.random.split(jax.random.key(9), 10),
    values=jnp.zeros(10).at[:7].set(jnp.float32(values)),
    counts=jnp.zeros(10, jnp.int32).at[:7].set(1),
  )
  keys = jax.random.split(jax.random.key(5), 512)
  drawn = np.asarray(jax.vmap(probes, (None, 0))(state, keys))
  same = drawn @ np.asarray(held(state)).T == WIDE  # [draws, n, capacity]
  assert same[..., :7].sum() == same.sum() == 512 * 6
  frequency = same[:, 0, :7].mean(0)  # The first of six is a single draw.

  def distance(temperature):
    share = np.exp(values / 8 / temperature)
    share /= share.sum()
    return np.abs(frequency - share) / np.sqrt(share * (1 - share) / 512)

  other = 0.5 if temperature > 1 else 1e6
  assert distance(temperature).max() < 5 < distance(other).max()


@pytest.mark.parametrize("loss", [0.0, np.inf])
def test_a_reservoir_without_a_slope_is_drawn_from_all_the_same(loss):
  state, probes, update, _ = bandit(1e-4)
  for step in range(12):
    key, state = jax.random.key(step), state._replace(step=jnp.int32(99))
    grads, state = update(np.full((6, 2), loss, np.float32), state, key)
    assert not grads.any() and not state.values.any()
  assert state.counts.sum() > 40 and np.isfinite(probes(state, key)).all()


# Subspaces.

MATRICES = {
  "stack": jnp.zeros((2, 4, 3)),
  "tall": jnp.zeros((5, 3)),
  "vector": jnp.zeros(3),
  "wide": jnp.zeros((3, 5)),
}


def upright(name, matrix):
  """With the smaller side, of three, first."""
  matrix = np.asarray(matrix, np.float64)
  return matrix if name == "wide" else matrix.swapaxes(-1, -2)


def sanger_rule(g, w, rate):
  """Sanger's rule, a column and its predecessors at a time."""
  covariance, new = g @ g.T / np.sum(g**2), w.copy()
  for i in range(w.shape[1]):
    for j in range(i + 1):
      new[:, i] -= rate * w[:, j] * (w[:, j] @ covariance @ w[:, i])
    new[:, i] += rate * covariance @ w[:, i]
    new[:, i] /= np.linalg.norm(new[:, i])
  return new


def test_sanger_amplifies_and_learns_as_numpy_does():
  row = estimators.sanger_spsa(
    0.5, 4, identity=0.25, warmup=5, rank=2, rate=0.3
  )
  central, update = estimators.central_difference(0.5, 4), quick(row.update)
  state, rng = row.init(MATRICES), np.random.default_rng(0)
  plain_update = quick(central.update)
  for step, weight in {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 200: 1.0}.items():
    losses, key = jnp.float32(rng.normal(size=(4, 2))), jax.random.key(step)
    state = state._replace(step=jnp.int32(step))
    grads, new = update(losses, MATRICES, state, key)
    plain, _ = plain_update(losses, MATRICES, (), key)
    np.testing.assert_array_equal(grads["vector"], plain["vector"])
    assert int(new.step) == step + 1
    for name in ("stack", "tall", "wide"):
      g, w = upright(name, plain[name]), np.float64(state.factors[name])
      amplified = 0.25 * g + weight * (w @ w.swapaxes(-1, -2) @ g)
      close(upright(name, grads[name]), amplified)
      learned = [
        sanger_rule(*pair, 0.3)
        for pair in zip(
          g.reshape(-1, 3, g.shape[-1]), w.reshape(-1, 3, 2), strict=True
        )
      ]
      close(new.factors[name], np.reshape(learned, w.shape))
      assert np.abs(learned - w).max() > 1e-2
      close(np.linalg.norm(new.factors[name], axis=-2), 1, rtol=1e-5)
    state = new


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_sanger_finds_the_dominant_directions_in_their_order(shape):
  rng = np.random.default_rng(0)
  left, right = (np.linalg.qr(rng.normal(size=(m, 4)))[0] for m in shape)
  gradient = jnp.float32(left * [8.0, 4.0, 0.5, 0.25] @ right.T)
  row, params = estimators.sanger_spsa(0.5, 256, rank=2), jnp.zeros(shape)
  loss = lambda params, _: jnp.sum(params * gradient)

  def step(state, key):
    losses = row.query(loss, params, (), state, key)
    return row.update(losses, params, state, key)[1], None

  keys = jax.random.split(jax.random.key(0), 300)
  first = row.init(params)
  last, _ = quick(lambda state: jax.lax.scan(step, state, keys))(first)
  truth = (left if shape[0] == 4 else right)[:, :2]
  before, after = (
    np.abs(np.sum(np.asarray(state.factors) * truth, 0))
    for state in (first, last)
  )
  assert before.max() < 0.9 < 0.95 < after.min()


def test_probes_within_are_stretched_and_keep_their_mean_square():
  params = MATRICES | {"wide": jnp.zeros((3, 40)), "tall": jnp.zeros((40, 3))}
  row = estimators.sanger_spsa(0.5, 1, rank=2, warmup=0, subspace_probes=True)
  state = row.init(params)
  update = quick(jax.vmap(row.update, (None, None, None, 0)))
  keys = jax.random.split(jax.random.key(1), 64)
  z, _ = update(jnp.eye(1, 2), params, state, keys)  # Slopes are one.
  assert set(np.unique(z["vector"])) == {-1.0, 1.0}
  for name in ("stack", "tall", "wide"):
    # W starts with orthonormal columns, and what is within counts twice.
    w, amplified = np.float64(state.factors[name]), upright(name, z[name])
    projector = w @ w.swapaxes(-1, -2)
    probes = amplified - projector @ amplified / 2
    signs = np.linalg.solve(stretched(w, 3), probes)
    close(np.abs(signs), 1)
    square = np.mean(probes**2, (-2, -1)).ravel()
    assert abs(square.mean() - 1) < 5 * square.std() / np.sqrt(square.size)


# Longer probes.


def test_probes_are_longer_where_the_gradient_has_been_small():
  params = {"flat": jnp.zeros(8), "steep": jnp.zeros((4, 2))}
  loss = lambda params, _: (
    jnp.sum(params["steep"]) + 1e-2 * jnp.sum(params["flat"])
  )
  row = adaptive(0.5, 256)  # Many: their noise is the same in all entries.

  def lengths(state):  # All weight is on the first probe.
    losses = jnp.zeros((256, 2)).at[0, 0].set(256.0)
    grads, _ = row.update(losses, params, state, jax.random.key(0))
    return jnp.abs(flat(grads))

  def step(state, key):
    losses = row.query(loss, params, (), state, key)
    grads, new = row.update(losses, params, state, key)
    moments = flat(state.moment), flat(new.moment)
    return new, (lengths(state), flat(grads), *moments)

  keys, state = jax.random.split(jax.random.key(1), 10), row.init(params)
  state, history = quick(lambda s: jax.lax.scan(step, s, keys))(state)
  long, grads, before, after = (np.asarray(x, np.float64) for x in history)
  np.testing.assert_allclose(after, (before + grads**2) / 2, rtol=1e-5)
  np.testing.assert_array_equal(long[0], 1)
  for scale, moment in zip(long[1:], before[1:], strict=True):
    np.testing.assert_allclose(scale, scales(moment), rtol=1e-4)
  assert long[-1, :8].min() > 1.5 * long[-1, 8:].max()


def test_without_slopes_no_probe_gets_longer_and_inner_states_go_on():
  make = lambda direction: estimators.bandit_spsa(
    0.5, 2, capacity=9, direction=direction
  )
  row = estimators.adaptive(make, directions.rademacher(), 0.9)
  update, params, key = quick(row.update), jnp.zeros(5), jax.random.key(0)
  state = row.init(params)
  for _ in range(2):
    grads, state = update(jnp.ones((2, 2)), params, state, key)
    assert not grads.any()
  np.testing.assert_array_equal(
    np.abs(update(2 * jnp.eye(2)[::-1] * jnp.eye(2, 1), params, state, key)[0]),
    np.ones(5),
  )
  assert int(state.inner.step) == 2 and int(state.inner.counts.sum()) == 4


def test_what_overflows_is_not_learned():
  row = adaptive(0.5, 1)
  update, params, key = quick(row.update), jnp.zeros(5), jax.random.key(0)
  state = row.init(params)
  _, state = update(jnp.asarray([[2.0, 1.0]]), params, state, key)
  grads, after = update(jnp.asarray([[1e20, 0.0]]), params, state, key)
  assert np.all(np.isfinite(grads)) and np.abs(grads).min() > 2e19
  np.testing.assert_array_equal(after.moment, state.moment)


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


# Forward mode.


@pytest.mark.parametrize("kind", ["rademacher", "normal", "low_rank"])
def test_forward_gradients_are_exact(kind):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(3, 2, 5)), rng.normal(size=(5, 4))
  direction, seen = getattr(directions, kind)(), []
  row = estimators.forward_gradient(
    3, direction=direction, batch_per_probe=True
  )

  def loss(params, batch):
    seen.append(isinstance(params["w"], perturbed.Perturbed))
    return jnp.sum(jnp.tanh(zorn_jax.matmul(batch, params["w"])) ** 2)

  params, key = {"w": jnp.float32(w)}, jax.random.key(0)

  @quick
  def step(batch):
    losses = row.query(loss, params, batch, (), key)
    update = lambda slopes: row.update(
      jnp.stack([slopes, slopes], 1), params, (), key
    )[0]["w"]
    return losses, update(losses[:, 1]), jax.vmap(update)(3 * jnp.eye(3))

  losses, grads, z = (np.asarray(y, np.float64) for y in step(jnp.float32(x)))
  assert set(seen) == {kind == "low_rank"}
  options = inspect.signature(estimators.forward_gradient).parameters
  assert "epsilon" not in options
  tanh = np.tanh(x @ w)
  gradients = x.swapaxes(1, 2) @ (2 * tanh * (1 - tanh**2))
  slopes = np.sum(gradients * z, (1, 2))
  np.testing.assert_allclose(losses[:, 0], np.sum(tanh**2, (1, 2)), rtol=1e-5)
  np.testing.assert_allclose(losses[:, 1], slopes, rtol=1e-4)
  close(grads, np.tensordot(slopes, z, 1) / 3)


# Directions made of directions.

BASE = directions.low_rank(2, "normal")  # The vector has a dense direction.
MIX = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
MADE = {  # And the directions [n, d] that they make of others.
  "l1": (
    directions.normalized(BASE, "l1"),
    lambda z: SIZE * z / np.abs(z).sum(1, keepdims=True),
  ),
  "l2": (
    directions.normalized(BASE),
    lambda z: z * np.sqrt(SIZE / np.sum(z**2, 1, keepdims=True)),
  ),
  "mapped": (
    directions.mapped(
      BASE, lambda z: {"matrix": MIX @ z["matrix"], "vector": z["vector"] / 2}
    ),
    lambda z: np.concatenate(
      [(MIX @ z[:, :12].reshape(-1, 4, 3)).reshape(-1, 12), z[:, 12:] / 2], 1
    ),
  ),
  "grouped": (directions.grouped(BASE, aggregators.mean(), 3), lambda z: z),
}


@pytest.mark.parametrize("name", MADE)
def test_a_combination_is_the_sum_of_the_samples(name):
  made, formula = MADE[name]
  params, keys = (
    params_of(np.zeros(SIZE)),
    jax.random.split(jax.random.key(0), 6),
  )
  coefficients = np.random.default_rng(1).normal(size=6)

  def samples(direction):
    one = lambda key: flat(
      direction.perturb(params, direction.sample(key, params), jnp.ones(()))
    )
    return jax.vmap(one)(keys)

  @quick
  def run(c):
    total = made.combine(keys, c, params, probe_map.sequential(4))
    return flat(total), samples(made), samples(BASE)

  total, z, base = run(jnp.float32(coefficients))
  close(z, formula(np.asarray(base, np.float64)))
  close(total, coefficients @ np.asarray(z, np.float64))


def test_a_contrary_group_is_dropped():
  signs, params = directions.rademacher(), jnp.zeros(32)
  gaf = directions.grouped(signs, aggregators.gaf(1.0), 3)
  keys = jax.random.split(jax.random.key(0))[np.array([0, 0, 0, 0, 1, 1])]
  z = np.asarray(quick(jax.vmap(lambda key: signs.sample(key, params)))(keys))
  # Groups of two: z, -z and what has a positive product with z.
  sign = np.sign(z[0] @ z[4])
  coefficients = jnp.float32(np.array([1, 1, -2, -1, sign, sign]) / 6)
  total = quick(gaf.combine)(keys, coefficients, params)
  np.testing.assert_allclose(total, (z[0] + sign * z[4]) / 2, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_directions_add_up(rank):
  direction, rng = directions.low_rank(rank, "normal"), np.random.default_rng(0)
  shapes = {"matrix": (4, 3), "stack": (2, 3, 4), "vector": (5,)}
  params = {name: jnp.float32(rng.normal(size=s)) for name, s in shapes.items()}

  @quick
  def run(params, x):
    z, u = (direction.sample(jax.random.key(i), params) for i in range(2))
    twice = direction.perturb(direction.perturb(params, z, 0.5), u, -2.0)
    assert twice["matrix"].left.shape == (2 * rank, 4)
    zeros = jax.tree.map(jnp.zeros_like, params)
    parts = [flat(direction.perturb(zeros, v, 1.0)) for v in (z, u)]
    return flat(twice), *parts, zorn_jax.matmul(x, twice["matrix"])

  x = rng.normal(size=(2, 4))
  total, z, u, product = run(params, jnp.float32(x))
  expected = np.asarray(flat(params)) + 0.5 * z - 2 * u
  close(total, expected)
  close(product, x @ np.float64(expected[:12]).reshape(4, 3))


# The exact readout.


@pytest.fixture(scope="module")
def copying():
  made = build.experiment(small.config(task__max_length=10, task__time_chunk=4))
  task, params = made.task, quick(made.model.init)(jax.random.key(0))
  assert task.num_chunks(task.max_length) == 6
  split = tasks.Split((), tasks.first_batch(task, ()), 6)
  return made.model, task, params, split


def test_the_readout_gradient_is_that_of_the_mean_loss(copying):
  model, task, params, split = copying
  readout = {name: params[name] for name in model.readout}
  assert readout and len(readout) < len(params)
  loss = lambda readout: metrics.mean_loss(model, task, params | readout, split)
  expected = quick(jax.grad(loss))(readout)
  grads = quick(
    lambda params: methods.readout_gradient(model, task, params, split)
  )(params)
  assert set(grads) == set(expected)
  for name, grad in expected.items():
    size = np.abs(grad).max()
    assert size > 1e-3
    np.testing.assert_allclose(grads[name], grad, rtol=1e-5, atol=1e-6 * size)


def test_the_readout_gradient_holds_one_chunk_of_time(copying):
  model, task, params, split = copying

  def temporary(gradient, chunks):
    longer = split._replace(num_chunks=chunks)
    program = jax.jit(lambda params: gradient(longer, params))
    compiled = program.lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  readout = lambda split, params: methods.readout_gradient(
    model, task, params, split
  )
  through_time = lambda split, params: jax.grad(
    lambda params: metrics.mean_loss(model, task, params, split)
  )(params)
  growth = lambda of: (temporary(of, 1100) - temporary(of, 100)) / 1000
  assert growth(readout) <= 4  # Bytes for each chunk: its number.
  assert growth(through_time) > 1000


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


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_wrong_decay_of_the_moment_is_refused(decay):
  with pytest.raises(ValueError, match=f"0, 1.*got {decay}. Choose 0.99"):
    estimators.adaptive(lambda direction: None, BASE, decay)


@pytest.mark.parametrize("shape", [(3, 9), (9, 3), (2, 3, 4)])
def test_a_rank_above_the_smaller_side_is_refused(shape):
  params = jax.ShapeDtypeStruct(shape, jnp.float32)
  init = lambda rank: jax.eval_shape(
    estimators.sanger_spsa(0.1, 1, rank=rank).init, params
  )
  assert init(3).factors.shape == (*shape[:-2], 3, 3)
  with pytest.raises(ValueError, match="got rank=4 and .* Choose at most 3"):
    init(4)


def test_wrong_options_of_directions_are_refused():
  with pytest.raises(ValueError, match="unknown norm 'l3'. Choose l1 or l2"):
    directions.normalized(BASE, "l3")
  with pytest.raises(ValueError, match="groups must be positive, got 0. Choo"):
    directions.grouped(BASE, aggregators.mean(), 0)
  keys, grouped = jax.random.split(jax.random.key(0), 7), MADE["grouped"][0]
  with pytest.raises(ValueError, match="groups=3 and 7 probes. Choose a div"):
    grouped.combine(keys, jnp.ones(7), jnp.zeros(3))
