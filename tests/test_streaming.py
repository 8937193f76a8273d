"""Streaming estimators against derivatives of whole episodes in NumPy."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zorn_jax
from zorn_jax import (
  directions,
  estimators,
  methods,
  metrics,
  perturbed,
  probe_map,
  tasks,
)
from zorn_jax.estimators import streaming
from zorn_jax.models import Model

ROWS = {
  "reuse": streaming.noise_reuse_es,
  "persistent": streaming.persistent_es,
}
KINDS = {
  "rademacher": directions.rademacher(),
  "low_rank": directions.low_rank(),
}
K = 4  # Unrolls of an episode.
SIZE = 8  # Parameters of the network.
SIGMAS = 5.5  # Five standard errors over a dozen entries at once.


# A recurrent network with a trainable first state: two steps make an unroll.


def params_of(vector):
  vector = jnp.asarray(vector, jnp.float32)
  return {
    "matrix": vector[:4].reshape(2, 2),
    "start": vector[4:6],
    "vector": vector[6:],
  }


def flat(params):
  params = perturbed.materialize(params)
  return jnp.concatenate([x.ravel() for x in jax.tree.leaves(params)])


def problem():
  """Parameters [d], and inputs and targets [K, 2, 2] of an episode."""
  rng = np.random.default_rng(0)
  theta = np.array([0.9, 0.4, -0.3, 0.8, 0.3, -0.2, 0.1, 0.2])
  return theta, 0.3 * rng.normal(size=(K, 2, 2)), rng.normal(size=(K, 2, 2))


def unroll(params, carry, batch, first):
  carry = jnp.where(first, params["start"], carry)
  loss = jnp.zeros(())
  for x, y in zip(*batch, strict=True):
    hidden = zorn_jax.matmul(carry, params["matrix"])
    carry = jnp.tanh(hidden + x + params["vector"])
    loss += jnp.sum((carry - y) ** 2)
  return carry, loss


def episode(thetas):
  """Losses [K] and carries [K, 2] where unroll s has parameters thetas[s]."""
  _, inputs, targets = problem()
  h, losses, carries = thetas[0][4:6], [], []
  for theta, xs, ys in zip(thetas, inputs, targets, strict=True):
    carries.append(h)
    losses.append(0.0)
    for x, y in zip(xs, ys, strict=True):
      h = np.tanh(h @ theta[:4].reshape(2, 2) + x + theta[6:])
      losses[-1] += np.sum((h - y) ** 2)
  return np.array(losses), np.array(carries)


@functools.cache
def jacobian():
  """Of the loss of unroll t in the parameters of unroll s: [t, s, d]."""
  theta, _, _ = problem()
  result, step = np.zeros((K, K, SIZE)), 1e-5
  for s, j in np.ndindex(K, SIZE):
    delta = np.zeros((K, SIZE))
    delta[s, j] = step
    change = episode(theta + delta)[0] - episode(theta - delta)[0]
    result[:, s, j] = change / (2 * step)
  return result


def windows(age):
  """The batch of probes that read the windows `age` [n]."""
  _, inputs, targets = problem()
  return jnp.float32(inputs)[age], jnp.float32(targets)[age]


@functools.cache
def runs(row, kind):
  """A program: (state, root keys) -> estimates of two episodes."""
  estimator = ROWS[row](1e-2, K, K, direction=KINDS[kind])
  params = params_of(problem()[0])

  def checked_unroll(params, *args):
    is_factored = isinstance(params["matrix"], perturbed.Perturbed)
    assert is_factored == (kind == "low_rank")
    return unroll(params, *args)

  def run(state, root):
    def step(state_and_carries, index):
      state, carries = state_and_carries
      key, batch = jax.random.fold_in(root, index), windows(state.age)
      losses, carries = estimator.query(
        checked_unroll, params, batch, carries, state, key
      )
      grads, state = estimator.update(losses, params, state, key)
      return (state, carries), flat(grads)

    # The network must not read this carry.
    carries = estimator.init_carry(jnp.full(2, 9.0))
    return jax.lax.scan(step, (state, carries), jnp.arange(2 * K))[1]

  return jax.jit(jax.vmap(run, (None, 0)))


@functools.cache
def estimates(row, kind, stagger):
  """Of many runs with fixed parameters: [count, 2K, d] in float64."""
  estimator = ROWS[row](1e-2, K, K, stagger=stagger)
  keys = jax.random.split(jax.random.key(7), 4096)
  samples = runs(row, kind)(estimator.init(None), keys)
  return np.asarray(samples, np.float64)


def episodes(row, kind):
  """Estimates at every age without staggering: [2 count, K, d]."""
  return estimates(row, kind, stagger=False).reshape(-1, K, SIZE)


def check_mean(samples, expected, *rejected):
  """The mean is `expected` to within its standard error; others are not."""
  mean = samples.mean(0)
  error = samples.std(0) / np.sqrt(len(samples))
  distance = lambda point: np.max(np.abs(mean - point) / error)
  assert distance(expected) < SIGMAS, (mean, expected, error)
  for point in rejected:
    assert distance(point) > 2 * SIGMAS, (mean, point, error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_an_episode_has_the_mean_of_the_full_gradient(row, kind):
  samples = episodes(row, kind)
  full = jacobian().sum(1)  # [t, d]
  truncated = np.einsum("ttd->td", jacobian())
  total = full.sum(0)
  check_mean(samples.sum(1), total, truncated.sum(0), 1.25 * total, 0.8 * total)
  for age in range(K):
    check_mean(samples[:, age], full[age], *([truncated[age]] if age else []))


def test_truncated_unrolls_have_the_mean_of_the_truncated_gradient():
  # Plain ES: from the carry of the unperturbed parameters, in every unroll.
  estimator = streaming.noise_reuse_es(1e-2, 2, unrolls=1)
  theta, _, _ = problem()
  params = params_of(theta)
  _, carries = episode([theta] * K)
  state = estimator.init(params)

  @jax.jit
  @jax.vmap
  def run(root):
    def add(total, window):
      age, carry = window
      begins = lambda *args: unroll(*args[:3], first=age == 0)
      batch = windows(jnp.full(2, age))
      key, carries = jax.random.fold_in(root, age), estimator.init_carry(carry)
      losses, _ = estimator.query(begins, params, batch, carries, state, key)
      grads, _ = estimator.update(losses, params, state, key)
      return total + flat(grads), None

    each = jnp.arange(K), jnp.float32(carries)
    return jax.lax.scan(add, jnp.zeros(SIZE), each)[0]

  keys = jax.random.split(jax.random.key(7), 8192)
  samples = np.asarray(run(keys), np.float64)
  truncated = np.einsum("ttd->d", jacobian())
  check_mean(samples, truncated, jacobian().sum((0, 1)))


@pytest.mark.parametrize("row", ROWS)
def test_staggered_probes_have_the_mean_of_all_ages_in_every_step(row):
  samples = estimates(row, "rademacher", stagger=True)
  full = jacobian().sum(1)
  ages = [full[age] for age in range(K)]
  check_mean(samples[:, 0], full[0], full.mean(0))
  for step in range(K, 2 * K):
    check_mean(samples[:, step], full.mean(0), *ages)


def test_the_variance_follows_the_law_of_each():
  r"""Of one probe with signs z_s and gradients g_s in the parameters of s ≤ t.

  E[(Σ g_s·z_s)² |Σ z_s|²] = (t+1) d Σ|g_s|² + 4 Σ_{r<s} g_r·g_s.
  """
  variance = {}
  for row in ROWS:
    samples = episodes(row, "rademacher")
    for age in range(K):
      parts = jacobian()[age, : age + 1]
      full, squares = parts.sum(0), np.sum(parts**2)
      size = full @ full
      if row == "reuse":
        law = (SIZE - 1) * size
      else:
        law = ((age + 1) * SIZE - 2) * squares + size
      errors = K * np.sum((samples[:, age] - full) ** 2, axis=1)  # Of K probes.
      mean, error = errors.mean(), errors.std() / np.sqrt(len(errors))
      assert abs(mean - law) < 5 * error, (row, age)
      for wrong in (0.8 * law, 1.25 * law):
        assert abs(mean - wrong) > 5 * error, (row, age)
      variance[row, age] = mean
  assert variance["reuse", 0] == pytest.approx(variance["persistent", 0])
  for age in range(1, K):
    assert 1.2 * variance["reuse", age] < variance["persistent", age]


# The algorithm, step by step.


def spy(params, carry, batch, first):
  """A carry that tells where it was queried, how often, and with what."""
  point = flat(params)
  count = jnp.where(first, 0, carry["count"]) + 1
  carry = {"count": count, "point": point, "batch": batch}
  return carry, batch * jnp.sum(jnp.sin(point))


def spy_carry():
  return {
    "count": jnp.int32(99),
    "point": jnp.zeros(SIZE),
    "batch": jnp.zeros(()),
  }


ROOT = 3
STEPS, PROBES, UNROLLS = 8, 5, 3  # Of the runs below.


def step_keys():
  return [jax.random.fold_in(jax.random.key(ROOT), i) for i in range(STEPS)]


def data_of(tree):
  """The tree in NumPy, keys as their words."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  data = lambda x: np.array(jax.random.key_data(x) if is_key(x) else x)
  return jax.tree.map(data, tree)


def assert_equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one, other):
  close = functools.partial(
    np.testing.assert_allclose, rtol=1e-5, atol=1e-6
  )  # A few roundings.
  jax.tree.map(close, one, other)


def descend(params, grads):
  return jax.tree.map(lambda p, g: np.asarray(p - 0.03 * g), params, grads)


@functools.cache
def spied_run(row, batch_size=None, num_probes=PROBES):
  """What every step saw and made, while the parameters move."""
  estimator = ROWS[row](
    0.25,
    num_probes,
    UNROLLS,
    probe_map=probe_map.sequential(batch_size),
  )
  query = jax.jit(functools.partial(estimator.query, spy))
  update = jax.jit(estimator.update)
  params = data_of(params_of(np.linspace(-1, 1, SIZE)))
  state = jax.jit(estimator.init)(params)
  carries = jax.jit(estimator.init_carry)(spy_carry())
  record = []
  for index, key in enumerate(step_keys()):
    batch = np.sin(np.arange(num_probes, dtype=np.float32) + 1 + index)
    losses, carries = query(params, batch, carries, state, key)
    seen = {"params": params, "batch": batch, "before": data_of(state)}
    grads, state = update(losses, params, state, key)
    made = {"losses": losses, "carries": carries, "grads": grads}
    record.append({**seen, **data_of({**made, "after": state})})
    params = descend(params, record[-1]["grads"])
  # As many programs as functions: no later step compiles another.
  assert query._cache_size() == update._cache_size() == 1
  return record


@functools.cache
def expected_directions():
  """Words of the keys, and signs [d], of step t and probe i: [t, i, ...]."""
  zeros = params_of(np.zeros(SIZE))

  def at(key, probe):
    key = jax.random.fold_in(key, probe)
    z = flat(directions.rademacher().sample(key, zeros))
    return jax.random.key_data(key), z

  each = jax.vmap(jax.vmap(at, (None, 0)), (0, None))
  words, z = jax.jit(each)(jnp.stack(step_keys()), jnp.arange(PROBES))
  return np.asarray(words), np.asarray(z, np.float64)


@pytest.mark.parametrize("row", ROWS)
def test_every_step_is_that_of_a_plain_python_program(row):
  words, signs = expected_directions()
  ages, drawn = [0] * PROBES, [[]] * PROBES  # Steps of an episode's directions.
  lengths = [UNROLLS - i % UNROLLS for i in range(PROBES)]
  for t, step in enumerate(spied_run(row)):
    np.testing.assert_array_equal(step["before"].age, ages)
    theta = np.concatenate([x.ravel() for x in step["params"].values()])
    total = np.zeros(SIZE)
    for i in range(PROBES):
      if ages[i] == 0:
        drawn[i] = [t]
      elif row == "persistent":
        drawn[i] = [*drawn[i], t]
      np.testing.assert_array_equal(
        step["after"].keys[i, : len(drawn[i])], words[drawn[i], i]
      )
      points = theta + 0.25 * np.outer([1, -1], signs[drawn[i][-1], i])
      np.testing.assert_allclose(step["carries"]["point"][i], points, atol=1e-6)
      np.testing.assert_array_equal(step["carries"]["count"][i], ages[i] + 1)
      np.testing.assert_array_equal(
        step["carries"]["batch"][i], step["batch"][i]
      )
      losses = np.float64(step["batch"][i]) * np.sin(points).sum(1)
      np.testing.assert_allclose(step["losses"][i], losses, atol=1e-5)
      slope = (losses[0] - losses[1]) / 0.5
      total += slope * signs[drawn[i], i].sum(0) / PROBES
      ages[i] += 1
      if ages[i] == lengths[i]:
        ages[i], lengths[i] = 0, UNROLLS
    grads = np.concatenate([x.ravel() for x in step["grads"].values()])
    np.testing.assert_allclose(grads, total, atol=1e-4)
    np.testing.assert_array_equal(step["after"].age, ages)


@pytest.mark.parametrize("row", ROWS)
def test_a_run_is_replayed_from_the_saved_losses(row):
  live, file = spied_run(row), io.BytesIO()
  for step in live:
    np.save(file, step["losses"])
  file.seek(0)
  # Another program, which has never seen an unroll.
  estimator = ROWS[row](0.25, PROBES, UNROLLS)
  update, params = jax.jit(estimator.update), live[0]["params"]
  state = jax.jit(estimator.init)(params)
  for step, key in zip(live, step_keys(), strict=True):
    grads, state = update(np.load(file), params, state, key)
    assert_equal(data_of(grads), step["grads"])
    assert_equal(data_of(state), step["after"])
    params = descend(params, data_of(grads))


def test_results_do_not_depend_on_how_many_probes_run_at_once():
  runs = spied_run("persistent"), spied_run("persistent", batch_size=2)
  for all_at_once, two in zip(*runs, strict=True):
    assert_close(two, all_at_once)
    assert_equal(two["after"], all_at_once["after"])


def test_a_probe_does_not_depend_on_how_many_there_are():
  # The parameters differ from the second step on, as the gradients do.
  five, three = spied_run("reuse")[0], spied_run("reuse", num_probes=3)[0]
  for name in ("before", "losses", "carries", "after"):
    assert_equal(jax.tree.map(lambda x: x[:3], five[name]), three[name])


def test_one_unroll_per_episode_is_the_central_difference():
  options = {"shaping": "std"}
  central = estimators.central_difference(
    0.1, 3, batch_per_probe=True, **options
  )
  loss_fn = lambda params, batch: spy(params, spy_carry(), batch, True)[1]
  params, batch = params_of(problem()[0]), jnp.float32([1, -2, 3])

  estimator = streaming.persistent_es(0.1, 3, unrolls=1, **options)
  state = estimator.init(params)
  carries = estimator.init_carry(spy_carry())

  @jax.jit
  def both(key):
    losses, _ = estimator.query(spy, params, batch, carries, state, key)
    result = losses, estimator.update(losses, params, state, key)[0]
    losses = central.query(loss_fn, params, batch, (), key)
    return result, (losses, central.update(losses, params, (), key)[0])

  assert_close(*data_of(both(jax.random.key(2))))


def test_epsilon_can_be_traced():
  concrete = spied_run("persistent")[0]

  @jax.jit
  def step(epsilon, params, batch):
    estimator = streaming.persistent_es(epsilon, PROBES, UNROLLS)
    state, key = estimator.init(params), step_keys()[0]
    carries = estimator.init_carry(spy_carry())
    losses, _ = estimator.query(spy, params, batch, carries, state, key)
    return losses, estimator.update(losses, params, state, key)[0]

  traced = step(0.25, concrete["params"], concrete["batch"])
  assert_close(data_of(traced), (concrete["losses"], concrete["grads"]))


def test_a_loss_that_is_not_finite_drops_its_probe():
  estimator = streaming.persistent_es(0.5, 3, 4)
  params = params_of(np.zeros(SIZE))
  update, key = jax.jit(estimator.update), jax.random.key(0)
  _, state = update(np.zeros((3, 2)), params, estimator.init(params), key)
  losses = np.float32([[1, 2], [4, 4], [5, 3]])
  rest, after = data_of(update(losses, params, state, key))
  assert np.abs(rest["matrix"]).max() > 0
  for bad in (np.nan, np.inf):
    losses[1, 0] = bad
    grads, dropped = data_of(update(losses, params, state, key))
    assert_close(grads, jax.tree.map(lambda x: 3 / 2 * x, rest))
    assert_equal(dropped, after)


@pytest.mark.parametrize("row", ROWS)
def test_dtypes_are_kept_and_the_probe_map_is_used(row):
  used, everywhere = [], probe_map.sequential()

  def watching(name):
    mapped = getattr(everywhere, name)
    return lambda fn, xs: used.append(name) or mapped(fn, xs)

  watched = probe_map.ProbeMap(*map(watching, probe_map.ProbeMap._fields))
  estimator = ROWS[row](0.1, 3, 4, probe_map=watched)
  narrow = lambda x: x.astype(jnp.bfloat16)
  params = jax.tree.map(narrow, params_of(np.ones(SIZE)))
  total = lambda params, carry, batch, first: (carry, jnp.sum(flat(params)))

  def step(key):
    state, carries = estimator.init(params), estimator.init_carry(spy_carry())
    losses, carries = estimator.query(total, params, (), carries, state, key)
    return losses, *estimator.update(losses, params, state, key)

  losses, grads, state = jax.eval_shape(step, jax.random.key(0))
  assert (losses.shape, losses.dtype) == ((3, 2), jnp.float32)
  assert grads == jax.eval_shape(lambda: params)
  assert state == jax.eval_shape(estimator.init, params)
  assert estimator.queries_per_step == losses.size
  assert used == ["keep", "sum"]  # Carries stay where they were made.


# As a method of training.

CHUNKS = 7  # Of the longest copy below, of one token each.


def toy_model(vocab, bad=()):
  """Logits that change with time, not finite at the times `bad`."""

  def apply(params, carry, tokens):
    time, read = carry
    logits = (1 + time) * jax.nn.one_hot(tokens, vocab) @ params["w"]
    for one in bad:
      logits = jnp.where(time == one, jnp.nan, logits)
    return (time + tokens.shape[1], tokens[:, -1]), logits

  def initial_carry(params, rows):
    del params
    return jnp.zeros((), jnp.int32), jnp.full(rows, -1)

  init = lambda key: {"w": jax.random.normal(key, (vocab, vocab))}
  return Model(init, initial_carry, apply)


def method_run(row, model, task, data, unrolls, steps, **options):
  """Losses, states read to and gradients of each step; params stay."""
  probes = options.setdefault("num_probes", 3)
  make = lambda epsilon: ROWS[row](epsilon, unrolls=unrolls, **options)
  method = methods.streaming(
    model, task, make, num_probes=probes, unrolls=unrolls
  )
  params = jax.jit(model.init)(jax.random.key(0))

  @jax.jit
  def step(state, index):
    key = jax.random.fold_in(jax.random.key(1), index)
    now = methods.Now(index, key, jax.random.key(2), 0.5, task.max_length)
    losses, carries = method.query(params, state, data, now)
    grads, after = method.update(losses, carries, params, state, now)
    return after, (losses, carries, grads, state[0].age)

  return jax.lax.scan(step, method.init(params), jnp.arange(steps))[1]


@functools.cache
def copying(row, stagger, bad=()):
  """A run on copies, whose first token never tells what follows."""
  task = tasks.copy(2, 3, 1, num_evaluation=1)
  model = toy_model(len(task.vocabulary), bad)
  return data_of(
    method_run(row, model, task, (), CHUNKS, 2 * CHUNKS, stagger=stagger)
  )


@pytest.mark.parametrize("row", ROWS)
def test_a_part_that_scores_nothing_says_nothing(row):
  losses, _, grads, ages = copying(row, stagger=False)
  scored = (ages > 1) & (losses != 0).all(-1)
  assert np.isfinite(losses).all()
  # Strings have two letters or more, so that nothing counts before.
  np.testing.assert_array_equal(losses[ages < 2], 0)
  assert scored.any(0).all() and (np.ptp(losses[scored], axis=-1) > 0).all()
  silent = ~scored.any(1)
  assert silent[[0, 1, CHUNKS, CHUNKS + 1]].all()
  np.testing.assert_array_equal(grads["w"][silent], 0)
  assert np.all(np.abs(grads["w"][~silent]).max((1, 2)) > 0)


def test_a_loss_that_is_not_finite_is_dropped_wherever_it_is():
  bad = (1, 3)  # Where nothing is scored, and where something may be.
  losses, _, grads, ages = copying("reuse", stagger=True, bad=bad)
  for are_nan in (np.isnan(losses).all(-1), np.isnan(losses).any(-1)):
    np.testing.assert_array_equal(are_nan, np.isin(ages, bad))
  assert np.isfinite(grads["w"]).all()


def test_a_part_s_loss_is_the_mean_of_what_it_scores():
  task = tasks.copy(2, 3, 1, num_evaluation=1)
  model = toy_model(len(task.vocabulary))
  params = jax.jit(model.init)(jax.random.key(0))
  nowhere = directions.Direction(
    sample=lambda key, params: (),
    perturb=lambda params, z, scale: params,
    combine=lambda keys, weights, params, probe_map: params,
  )
  losses, *_ = method_run(
    "reuse", model, task, (), CHUNKS, CHUNKS, direction=nowhere
  )
  # The batch of the first episode of probe 0.
  key = jax.random.fold_in(jax.random.key(2), CHUNKS)
  key = jax.random.fold_in(key, 0)
  batch = task.sample((), tasks.Draw(key, 0, 0, task.max_length))
  carry, counts = model.initial_carry(params, 2), []
  for part in range(CHUNKS):
    split = tasks.Split((), batch, 1)
    carry, sums = metrics.stream(model, task, params, split, carry, part)
    counts.append(int(np.sum(sums.count)))
    expected = np.sum(sums.loss) / counts[-1] if counts[-1] else 0.0
    np.testing.assert_allclose(losses[part, 0], expected, rtol=1e-5)
  assert set(counts) == {0, 1, 2}


@pytest.mark.parametrize("stagger", [False, True])
def test_episodes_read_on_in_a_stream(stagger):
  size, length, unrolls, steps = 150, 8, 4, 60
  text = "ab" * (size // 2)
  corpus = tasks.Corpus(text, text, text)
  tokenizer = tasks.make_tokenizer("characters", text)
  task = tasks.language_model(
    corpus, tokenizer, 2, length, 1, evaluation_rows=2, order="streams"
  )
  # In a text of positions, what is read is its position.
  positions = jnp.arange(size)
  run = method_run(
    "reuse",
    toy_model(size),
    task,
    positions,
    unrolls,
    steps,
    stagger=stagger,
    num_probes=5,
  )
  _, (time, read), _, ages = data_of(run)
  np.testing.assert_array_equal(read[:, :, 0], read[:, :, 1])  # Of both signs.
  np.testing.assert_array_equal(time[:, :, 0], 2 * (ages + 1))  # Anew.
  wraps = 0
  for probe in range(5):
    first = unrolls - (probe % unrolls if stagger else 0)
    for last in read[:, probe, 0].T:
      jumps = np.diff(last)
      # Where the first episode ends, which may be before its window does.
      skipped = 2 * (unrolls - first)
      jumps[first - 1] -= skipped if jumps[first - 1] > 0 else 0
      begins = last[ages[:, probe] == 0] - 1
      wrapped = np.flatnonzero(jumps != 2)
      assert (jumps[wrapped] < 0).all()
      np.testing.assert_array_equal(ages[wrapped + 1, probe], 0)
      follows = begins[1:] == begins[:-1] + length
      np.testing.assert_array_equal(follows, begins[:-1] + 2 * length < size)
      np.testing.assert_array_equal(begins[1:][~follows], begins[0] % length)
      wraps += len(wrapped)
  assert 0 < wraps <= 10 and len(np.unique(read[0, :, 0])) > 3


# Mistakes.


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"epsilon": 0.0}, "epsilon must be positive, got 0.0"),
    ({"epsilon": float("nan")}, "epsilon must be positive, got nan"),
    ({"num_probes": 0}, "num_probes must be at least 1, got 0"),
    ({"unrolls": 0}, "unrolls must be at least 1, got 0"),
    ({"shaping": "rank"}, "unknown shaping 'rank'"),
  ],
)
@pytest.mark.parametrize("row", ROWS)
def test_a_wrong_option_is_named_with_its_remedy(row, options, message):
  with pytest.raises(ValueError, match=message):
    ROWS[row](**{"epsilon": 0.1, "num_probes": 2, "unrolls": 3, **options})


@pytest.mark.parametrize(
  ("size", "loss", "message"),
  [
    (3, 0.0, "num_probes=2, got leading axes.*Stack"),
    (2, np.zeros(3), r"scalar, got shape \(3,\).*mean"),
  ],
)
def test_a_wrong_batch_or_loss_is_refused(size, loss, message):
  estimator, params = streaming.noise_reuse_es(0.1, 2, 3), jnp.zeros(3)
  unroll_fn = lambda params, carry, batch, first: (carry, loss)
  batch, state = jnp.zeros(size), estimator.init(params)
  query = functools.partial(estimator.query, unroll_fn)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(query, params, batch, (), state, jax.random.key(0))
