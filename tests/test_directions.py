"""Directions: their bits, their moments and their keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import KINDS, probe_keys, programs, signs, tree

from zorn_jax import directions, estimators, perturbed
from zorn_jax.estimators import stencil

SIGNS = ("rademacher", "low_rank_1")  # Every entry is +1 or -1.
# Five standard errors over some hundred entries at once.
SIGMAS = 5.5


def threefry(key, high, low):
  """Threefry-2x32 with 20 rounds (Salmon et al., 2011), in NumPy."""
  schedule = [np.uint32(word) for word in key]
  schedule.append(schedule[0] ^ schedule[1] ^ np.uint32(0x1BD11BDA))
  x = np.array(high, np.uint32) + schedule[0]
  y = np.array(low, np.uint32) + schedule[1]
  for group in range(5):
    for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
      x = x + y
      y = (y << np.uint32(turn)) | (y >> np.uint32(32 - turn))
      y = y ^ x
    x = x + schedule[(group + 1) % 3]
    y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
  return x, y


def words_of(key, count):
  """The first words of a key's stream."""
  counter = np.arange(count, dtype=np.uint64)
  high, low = counter >> np.uint64(32), counter & np.uint64(0xFFFFFFFF)
  x, y = threefry(key, high.astype(np.uint32), low.astype(np.uint32))
  return x ^ y


def fold_in(key, number):
  """The key of `number` under `key`."""
  x, y = threefry(key, np.zeros(1, np.uint32), np.array([number], np.uint32))
  return np.concatenate([x, y])


def signs_of(key, shape):
  """What `directions.signs` documents, one bit at a time."""
  *leading, size = shape or (1,)
  rows = int(np.prod(leading, dtype=int))
  per_row = (size + 31) // 32
  words = words_of(key, rows * per_row).tolist()
  result = [
    -1.0 if words[row * per_row + column // 32] >> (column % 32) & 1 else 1.0
    for row in range(rows)
    for column in range(size)
  ]
  return np.array(result, np.float32).reshape(shape)


def dense(direction, z, params):
  """The direction `z` as float32 arrays."""
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
  return perturbed.materialize(
    direction.perturb(zeros, z, jnp.ones((), jnp.float32))
  )


def flat_samples(direction, params, count, seed):
  """Many directions, flattened: [count, d] in float64."""
  sample = jax.vmap(lambda key: direction.sample(key, params))
  z = jax.jit(sample)(probe_keys(seed, count))
  arrays = jax.jit(jax.vmap(lambda z: dense(direction, z, params)))(z)
  leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(arrays)]
  return np.concatenate([x.reshape(count, -1) for x in leaves], axis=1)


# The bits.


@pytest.mark.parametrize(
  ("key", "counter", "expected"),
  [  # Known answers that come with the authors' Random123.
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
    (
      (0x13198A2E, 0x03707344),
      (0x243F6A88, 0x85A308D3),
      (0xC4923A9C, 0x483DF7A0),
    ),
  ],
)
def test_the_numpy_threefry_is_threefry(key, counter, expected):
  x, y = threefry(key, [counter[0]], [counter[1]])
  assert (int(x[0]), int(y[0])) == expected


def test_signs_have_a_known_answer():
  drawn = signs(jax.random.key(0), (40,))
  # Words 0xF29A4FA7 and 0xFA843692, least significant bit first, 1 is -1.
  expected = "---++-+-----++-++-+--++-+-++----+-++-++-"
  assert "".join("+" if sign > 0 else "-" for sign in drawn) == expected


@pytest.mark.parametrize(
  "shape",
  [(), (1,), (32,), (33,), (0,), (3, 64), (2, 3, 70)],
  ids=str,
)
@pytest.mark.parametrize("seed", [0, 123456789])
def test_signs_are_the_documented_bits(shape, seed):
  drawn = signs(jax.random.key(seed), shape)
  assert drawn.dtype == jnp.float32
  np.testing.assert_array_equal(drawn, signs_of((0, seed), shape))


def test_signs_of_a_row_begin_at_a_word_of_their_own():
  drawn = np.asarray(signs(jax.random.key(5), (4, 33)))
  words = words_of((0, 5), 8)
  for row in range(4):
    alone = words[2 * row : 2 * row + 2, None] >> np.arange(32, dtype=np.uint32)
    np.testing.assert_array_equal(
      drawn[row], 1.0 - 2.0 * (alone.ravel()[:33] & 1)
    )


def test_signs_do_not_depend_on_jit_or_vmap():
  keys = jax.random.split(jax.random.key(1), 3)
  batched = jax.jit(jax.vmap(lambda key: directions.signs(key, (2, 37))))(keys)
  for key, drawn in zip(keys, batched, strict=True):
    np.testing.assert_array_equal(drawn, signs(key, (2, 37)))
  np.testing.assert_array_equal(batched[0], directions.signs(keys[0], (2, 37)))


def test_a_direction_follows_from_root_step_probe_and_leaf_alone():
  """What another program must do to replay a run."""
  root, step, probe, leaf = 42, 3, 5, 1
  params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 40)), "c": jnp.zeros(())}

  @jax.jit
  def draw():
    key = jax.random.fold_in(jax.random.key(root), step)
    key = stencil.probe_keys(key, 8)[probe]
    dense = directions.rademacher().sample(key, params)
    return dense["b"], directions.low_rank().sample(key, params)["b"]

  signs, factors = draw()
  mine = fold_in(fold_in(fold_in((0, root), step), probe), leaf)
  np.testing.assert_array_equal(signs, signs_of(mine, (2, 40)))
  np.testing.assert_array_equal(
    factors.left, signs_of(fold_in(mine, 0), (1, 2))
  )
  np.testing.assert_array_equal(
    factors.right, signs_of(fold_in(mine, 1), (1, 40))
  )


# Randomness.


def scores(z):
  """How far ±1 samples [N, k] are from independent fair signs, in sigmas.

  The frequency of each variable and of all, the correlation of each pair, and
  the sum of the squares of those correlations. Under independence each is
  about standard normal, and the first and third are the largest of k and
  k (k-1) / 2.
  """
  count, variables = z.shape
  sums = z.sum(0) / np.sqrt(count)
  products = (z.T @ z / np.sqrt(count))[np.triu_indices(variables, 1)]
  return {
    "frequency": np.abs(sums).max(),
    "total": abs(z.sum()) / np.sqrt(z.size),
    "correlation": np.abs(products).max(),
    "spread": abs(np.sum(products**2) - products.size)
    / np.sqrt(2 * products.size),
  }


@functools.partial(jax.jit, static_argnums=0)
def packed_signs(what):
  """Signs as samples [4096, 64] of what must be independent."""
  key, draw = jax.random.key(11), lambda key: directions.signs(key, (4096,))
  keys = stencil.probe_keys(key, 64)
  if what == "columns":  # The bits of two words.
    return directions.signs(key, (4096, 64))
  if what == "rows":
    return directions.signs(key, (64, 4096)).T
  if what == "probes":
    return jax.vmap(draw)(keys).T
  if what == "steps":
    step_key = lambda step: jax.random.fold_in(key, step)
    first = lambda step: stencil.probe_keys(step_key(step), 1)[0]
    return jax.vmap(lambda step: draw(first(step)))(jnp.arange(64)).T
  if what == "leaves":
    leaf_keys = directions._leaf_keys(key, [jnp.zeros(())] * 64)
    return jax.vmap(draw)(jnp.stack(leaf_keys)).T
  assert what == "factors"  # Left and right factors of 32 probes.
  matrix = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
  sample = lambda key: directions.low_rank().sample(key, matrix)
  left, right = jax.vmap(sample)(keys[:32])
  return jnp.concatenate([left[:, 0], right[:, 0]]).T


@pytest.mark.parametrize(
  "what", ["columns", "rows", "probes", "steps", "leaves", "factors"]
)
def test_packed_signs_are_fair_and_independent(what):
  z = np.asarray(packed_signs(what), np.float64)
  assert z.shape == (4096, 64)
  # 2016 correlations: one in 30,000 exceeds 5.5 sigmas by chance.
  assert max(scores(z).values()) < SIGMAS, scores(z)


@pytest.mark.parametrize(
  ("flaw", "caught"),
  [("biased", "total"), ("coupled", "correlation"), ("wide", "spread")],
)
def test_the_same_check_rejects_a_flawed_sequence(flaw, caught):
  z = np.array(packed_signs("columns"), np.float64)
  chance = np.random.default_rng(0).random(z.shape)
  if flaw == "biased":  # One sign in fifty is set to +1.
    z = np.where(chance < 0.02, 1.0, z)
  elif flaw == "coupled":  # A column repeats its neighbour every tenth time.
    z[:, 1] = np.where(chance[:, 1] < 0.1, z[:, 0], z[:, 1])
  else:  # Every twelfth row, all columns share a sign half of the time.
    shared = (np.arange(len(z)) % 12 == 0)[:, None] & (chance < 0.5)
    z = np.where(shared, z[:, :1], z)
  assert scores(z)[caught] > SIGMAS, scores(z)


# Moments.


@pytest.mark.parametrize("kind", KINDS)
def test_mean_is_zero_and_second_moment_is_the_identity(kind):
  params = {"h": jnp.zeros((2, 2, 3)), "v": jnp.zeros(3)}
  z = flat_samples(KINDS[kind], params, 16384, seed=3)
  samples, size = z.shape
  assert size == 15
  error = np.sqrt(np.mean(z**2, 0) / samples)
  assert np.all(np.abs(z.mean(0)) < SIGMAS * error)

  def distance(z):
    """From the identity, in standard errors of each entry."""
    second = z.T @ z / samples
    variance = (z**2).T @ z**2 / samples - second**2
    # Products of signs have no variance: allow for rounding.
    error = np.sqrt(np.maximum(variance, 0) / samples) + 1e-6
    return np.max(np.abs(second - np.eye(15)) / error)

  assert distance(z) < SIGMAS < distance(1.25 * z)


@pytest.mark.parametrize("kind", SIGNS)
def test_entries_are_exactly_plus_or_minus_one(kind):
  params = {"m": jnp.zeros((2, 33, 7)), "v": jnp.zeros(65)}
  z = flat_samples(KINDS[kind], params, 5, seed=4)
  assert set(np.unique(z)) == {-1.0, 1.0}


def test_low_rank_factors_lie_along_the_last_two_axes():
  params = {"r": jnp.zeros((4, 2, 5, 3)), "b": jnp.zeros(6)}
  z = jax.jit(directions.low_rank(2).sample)(jax.random.key(0), params)
  assert z["r"].left.shape == (4, 2, 2, 5)
  assert z["r"].right.shape == (4, 2, 2, 3)
  assert set(np.unique(z["b"])) == {-1.0, 1.0}  # Vectors stay dense.
  heads = np.asarray(dense(directions.low_rank(2), z, params)["r"])
  ranks = np.linalg.matrix_rank(heads)
  assert ranks.shape == (4, 2) and ranks.max() == 2
  # Each head draws its own, on both sides.
  for x in (heads, z["r"].left, z["r"].right):
    assert len(np.unique(np.asarray(x).reshape(8, -1), axis=0)) == 8


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_sparse_keeps_the_given_share(density):
  draw = jax.jit(directions.sparse(density).sample)
  z = np.asarray(draw(jax.random.key(1), jnp.zeros(20000)))
  size = density**-0.5
  assert set(np.unique(z)) - {0.0} == {-size, size}
  # Five standard deviations of a binomial share; none at density 1.
  bound = 5 * np.sqrt(density * (1 - density) / 20000)
  assert abs(np.mean(z != 0) - density) <= bound


def test_the_rarest_entries_are_as_large_as_they_are_rare():
  """Of chances of 23 bits, 839 lie below a density of 1e-4, or 838.86."""
  draw = jax.jit(directions.sparse(1e-4).sample)
  z = np.asarray(draw(jax.random.key(1), jnp.zeros(10**6)))
  sizes = np.unique(np.abs(z[z != 0]))
  np.testing.assert_allclose(sizes**2, 2**23 / 839, rtol=2e-7)
  values, share = directions.sparse(1e-9), 2.0**-23
  keys = jax.random.split(jax.random.key(0), 20)
  square = jax.jit(
    lambda keys: jax.lax.map(
      lambda key: jnp.sum(values.sample(key, jnp.zeros(2**21)) ** 2), keys
    ).sum()
  )
  # About five are not zero.
  assert 0 < float(square(keys)) * share < 16


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_leaves_without_elements_have_directions(shape):
  leaf = jnp.zeros(shape)
  for name in KINDS:
    z = perturbed.materialize(
      KINDS[name].perturb(
        leaf, KINDS[name].sample(jax.random.key(0), leaf), 1.0
      )
    )
    assert z.shape == shape


# Purity and keys.


@pytest.mark.parametrize("kind", KINDS)
def test_sample_depends_on_key_and_shapes_alone(kind):
  draw, _, _ = programs(kind)
  expected = draw(probe_keys(8), tree(0))
  same = draw(probe_keys(8), tree(1))
  jax.tree.map(np.testing.assert_array_equal, same, expected)
  other = jax.tree.map(np.array_equal, draw(probe_keys(9), tree(0)), expected)
  assert not any(jax.tree.leaves(other))
  # Neither are values needed.
  shapes = jax.eval_shape(tree)
  jax.eval_shape(lambda key: KINDS[kind].sample(key, shapes), jax.random.key(8))


def test_no_two_draws_share_a_key():
  steps, probes, leaves = 32, 64, [jnp.zeros(2)] * 12
  root = jax.random.key(0)

  def keys_of(step):
    step_key = jax.random.fold_in(root, step)
    probe_keys = stencil.probe_keys(step_key, probes)
    leaf_keys = jax.vmap(
      lambda key: jnp.stack(directions._leaf_keys(key, leaves))
    )(probe_keys)
    factor_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
      leaf_keys.ravel(), jnp.arange(2)
    )
    return jnp.concatenate(
      [step_key[None], probe_keys, leaf_keys.ravel(), factor_keys.ravel()]
    )

  keys = jax.jit(jax.vmap(keys_of))(jnp.arange(steps))
  words = np.asarray(jax.random.key_data(keys)).reshape(-1, 2)
  assert len(words) == steps * (1 + probes * (1 + 12 * (1 + 2)))
  # The birthday bound for 75,000 fair 64-bit keys is 2e-10.
  assert len(np.unique(words, axis=0)) == len(words)


# Mistakes.


@pytest.mark.parametrize("window", [None, ((1,), (2,))])
@pytest.mark.parametrize(
  ("make", "found"),
  [
    (lambda: jax.random.key(0, impl="rbg"), "got one of rbg"),
    (lambda: jax.random.PRNGKey(0), "got an array of uint32"),
  ],
)
def test_keys_have_to_be_of_threefry(make, found, window):
  """Others draw otherwise under a map, as queries do, than one by one."""
  for draw in (directions.signs, directions.normals):
    with pytest.raises(ValueError, match=f"{found}. Make keys by"):
      draw(make(), (99,), window)
  estimator, params = estimators.central_difference(1e-2, 2), jnp.ones(3)
  with pytest.raises(ValueError, match=found):
    estimator.query(lambda p, _: p.sum(), params, (), (), make())


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: directions.low_rank(0), "rank must be positive, got 0"),
    (lambda: directions.low_rank(-1), "rank must be positive, got -1"),
    (
      lambda: directions.low_rank(1, "cauchy"),
      "unknown base.*'cauchy'.*normal",
    ),
    (lambda: directions.sparse(0), r"density must lie in \(0, 1\], got 0"),
    (lambda: directions.sparse(1.5), r"density must lie in \(0, 1\], got 1.5"),
    (lambda: directions.sparse(float("nan")), "density must lie in"),
    (
      lambda: directions.sparse(0.5, "sign"),
      "unknown base.*'sign'.*rademacher",
    ),
  ],
)
def test_a_mistake_is_named_with_its_remedy(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_integer_parameters_are_refused():
  with pytest.raises(ValueError, match="got a leaf of int32"):
    directions.rademacher().sample(jax.random.key(0), {"n": jnp.arange(3)})


def test_what_is_no_array_or_no_key_is_refused():
  draw = directions.rademacher().sample
  with pytest.raises(ValueError, match="must be arrays, got 0.5. Write jnp"):
    draw(jax.random.key(0), {"w": 0.5})
  with pytest.raises(ValueError, match="of threefry2x32, got 7. Make keys by"):
    directions.check_key(7)
