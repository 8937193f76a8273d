"""Products with perturbed matrices against the matrices themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from zorn_jax import directions, perturbed, plan
from zorn_jax.perturbed import Perturbed

ROUNDING = 2.0**-24  # Half a unit in the last place of float32.

matmul = jax.jit(perturbed.matmul)
take = jax.jit(perturbed.take)


def array(seed, shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def perturb(seed, shape, rank, scale=0.3, dtype=jnp.float32):
  """A matrix with factors as `directions.low_rank` makes them."""
  rng = np.random.default_rng(seed)
  *leading, m, k = shape
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return Perturbed(
    draw(*shape).astype(dtype),
    draw(*leading, rank, m),
    draw(*leading, rank, k),
    jnp.float32(scale),
  )


def exact(w):
  """The array and a bound on its summands' sizes, in float64."""
  if not isinstance(w, Perturbed):
    return np.asarray(w, np.float64), np.abs(np.asarray(w, np.float64))
  value, left, right, scale = (
    np.asarray(part, np.float64) for part in (w.value, w.left, w.right, w.scale)
  )
  delta = np.einsum("...rm,...rk->...mk", left, right)
  size = np.einsum("...rm,...rk->...mk", np.abs(left), np.abs(right))
  return value + scale * delta, np.abs(value) + np.abs(scale) * size


def check_product(got, x, w, rank):
  """Each of the m terms of a sum is rounded at most m + a few times."""
  (x, x_size), (w, w_size) = exact(x), exact(w)
  expected = np.matmul(x, w)
  got = np.asarray(got, np.float64)
  assert got.shape == expected.shape
  roundings = (x.shape[-1] + 4 * rank + 8) * ROUNDING
  bound = roundings * np.matmul(x_size, w_size)
  assert np.all(np.abs(got - expected) <= bound)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
  ("x_shape", "w_shape"),
  [
    ((4, 5), (5, 6)),
    ((2, 4, 5), (5, 6)),
    ((2, 4, 5), (2, 5, 6)),
    ((4, 5), (2, 5, 6)),
    ((2, 1, 3, 1, 5), (4, 3, 5, 6)),  # Of the LSTM's heads and gates.
  ],
  ids=str,
)
def test_array_times_perturbed(x_shape, w_shape, rank):
  x, w = array(0, x_shape), perturb(1, w_shape, rank)
  got = matmul(x, w)
  assert got.dtype == jnp.float32
  check_product(got, x, w, rank)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 6, 7, 33])
def test_every_width_is_summed_whole(m):
  x, w = array(0, (2, m)), perturb(1, (m, 3), 1)
  check_product(matmul(x, w), x, w, 1)
  # Integers: the sum is exact, so that no term can hide in a tolerance.
  x = jnp.arange(1.0, m + 1)[None]
  w = Perturbed(jnp.zeros((m, 1)), x**2, jnp.ones((1, 1)), jnp.float32(1))
  assert matmul(x, w).item() == sum(i**3 for i in range(1, m + 1))


@pytest.mark.parametrize("rank", [1, 2])
def test_perturbed_times_array(rank):
  x, w = perturb(1, (4, 5), rank), array(2, (5, 6))
  got = matmul(x, w)
  assert isinstance(got, Perturbed) and got.left.shape == (rank, 4)
  check_product(perturbed.materialize(got), x, w, rank)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("leading", [(), (2,)], ids=str)
def test_perturbed_times_perturbed(ranks, leading):
  # One probe has one scale.
  x = perturb(1, (*leading, 4, 5), ranks[0])
  w = perturb(2, (*leading, 5, 6), ranks[1])
  got = matmul(x, w)
  assert got.left.shape == (*leading, sum(ranks), 4)
  assert got.right.shape == (*leading, sum(ranks), 6)
  check_product(perturbed.materialize(got), x, w, sum(ranks))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_arrays_accumulate_in_float32(dtype):
  x, w = array(0, (3, 65), dtype), array(1, (65, 4), dtype)
  got = matmul(x, w)
  assert got.dtype == jnp.float32
  check_product(got, x, w, 0)


def test_bfloat16_values_accumulate_in_float32():
  # The bound is float32's: one sum in bfloat16 misses it a thousandfold.
  x = array(0, (3, 65), jnp.bfloat16)
  w = perturb(1, (65, 4), 2, dtype=jnp.bfloat16)
  got = matmul(x, w)
  assert got.dtype == jnp.float32
  check_product(got, x, w, 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4, 5)], ids=str)
def test_materialize_rounds_once_and_leaves_arrays_alone(shape, dtype):
  w, other = perturb(1, shape, 2, dtype=dtype), array(3, (2,))
  tree = perturbed.materialize({"w": w, "other": [other, None]})
  assert tree["other"][0] is other
  assert tree["w"].dtype == dtype and tree["w"].shape == shape
  expected, size = exact(w)
  bound = float(jnp.finfo(dtype).eps) / 2 * np.abs(expected)
  bound += 8 * ROUNDING * size
  assert np.all(np.abs(np.asarray(tree["w"], np.float64) - expected) <= bound)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("indices_shape", [(), (4,), (2, 3)], ids=str)
def test_take_reads_perturbed_rows(indices_shape, rank):
  w = perturb(1, (7, 5), rank)
  indices = jax.random.randint(jax.random.key(2), indices_shape, 0, 7)
  got = np.asarray(take(w, indices), np.float64)
  expected, size = exact(w)
  assert got.shape == (*indices_shape, 5)
  bound = (2 * rank + 2) * ROUNDING * size[indices]
  assert np.all(np.abs(got - expected[indices]) <= bound)
  np.testing.assert_array_equal(
    take(w.value, indices), np.asarray(w.value)[indices]
  )


def test_transpose_is_that_of_the_matrix():
  w = perturb(1, (2, 4, 5), 2)
  assert w.mT.shape == (2, 5, 4)
  np.testing.assert_array_equal(
    perturbed.materialize(w.mT), perturbed.materialize(w).mT
  )
  x = array(0, (3, 5))
  check_product(matmul(x, w.mT), x, perturbed.materialize(w).mT, 6)


def test_a_perturbed_matrix_passes_for_an_array():
  w = perturb(1, (4, 5), 2)
  plain = perturbed.materialize(w)
  assert (w.shape, w.ndim, w.dtype) == ((4, 5), 2, jnp.float32)
  np.testing.assert_array_equal(jnp.asarray(w), plain)
  # XLA fuses the two differently, and so rounds differently.
  np.testing.assert_allclose(
    jnp.dot(jnp.ones(4), w), jnp.ones(4) @ plain, rtol=0, atol=32 * ROUNDING
  )


OPERATORS = {
  "sums": lambda w, x: 1 + w - x,
  "products": lambda w, x: 2 * w / x + w * x,
  "matrix products": lambda w, x: (x.T @ w, w @ x.T),
  "both perturbed": lambda w, x: w * w - w,
  "powers": lambda w, x: (w**2, abs(w), abs(x) ** w, w // 0.5, w % 0.5),
  "comparisons": lambda w, x: (w == x, w != 0, w > x, w <= x),
  "parts": lambda w, x: (w[1], w[:, 2:], w[..., None], list(w), -w, len(w)),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kind", ["low rank", "deferred"])
@pytest.mark.parametrize("other", [jnp.asarray, np.asarray])
def test_operators_see_an_array(name, kind, other):
  w = perturb(4, (3, 5), 1)
  if kind == "deferred":
    direction = directions.rademacher(deferred=True)
    key = jax.random.key(0)
    w = direction.perturb(w.value, direction.sample(key, w.value), 0.3)
    assert perturbed.is_deferred(w)
  x = other(array(1, (3, 5)))
  found, wanted = (
    OPERATORS[name](leaf, x) for leaf in (w, perturbed.materialize(w))
  )
  for got, want in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_array_equal(got, want)


def test_what_an_unformed_array_lacks_is_said():
  w = perturb(4, (3, 5), 1)
  with pytest.raises(AttributeError, match="'sum'.*zorn_jax.materialize"):
    w.sum()
  assert not hasattr(w, "T")


def test_a_perturbed_matrix_is_a_tree_of_its_parts():
  w = perturb(1, (4, 5), 2)
  assert len(jax.tree.leaves(w)) == 4
  doubled = jax.tree.map(lambda x: 2 * x, w)
  assert isinstance(doubled, Perturbed)
  np.testing.assert_array_equal(doubled.left, 2 * w.left)


# Cost: the reason for all this.


def equations(jaxpr):
  """All equations, those of inner programs too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for part in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(part, core.ClosedJaxpr):
          yield from equations(part.jaxpr)
        elif isinstance(part, core.Jaxpr):
          yield from equations(part)


@pytest.mark.parametrize("batched_input", [False, True])
def test_a_population_shares_one_product(batched_input):
  n, b, m, k = 5, 3, 8, 6
  w = array(0, (m, k))
  population = lambda x, left, right: jax.vmap(
    lambda x, a, b: perturbed.matmul(x, Perturbed(w, a, b, jnp.float32(0.1))),
    in_axes=(0 if batched_input else None, 0, 0),
  )(x, left, right)
  x = array(1, (n, b, m) if batched_input else (b, m))
  program = jax.make_jaxpr(population)(
    x, array(2, (n, 1, m)), array(3, (n, 1, k))
  )
  found = list(equations(program.jaxpr))
  (product,) = [e for e in found if e.primitive.name == "dot_general"]
  assert any(v.aval.shape == (m, k) for v in product.invars)
  _, batch_axes = product.params["dimension_numbers"]
  assert batch_axes == ((), ())  # `w` is read once for all probes.
  rows = n * b if batched_input else b
  assert plan.cost(program.jaxpr).flops == 2 * rows * m * k
  # Nothing is as large as the matrices of all probes.
  assert all(v.aval.size < n * m * k for e in found for v in e.outvars)


def test_a_population_agrees_with_its_members():
  w = array(0, (8, 6))
  x, left, right = array(1, (5, 3, 8)), array(2, (5, 2, 8)), array(3, (5, 2, 6))
  member = lambda x, a, b: perturbed.matmul(
    x, Perturbed(w, a, b, jnp.float32(0.1))
  )
  got = jax.jit(jax.vmap(member))(x, left, right)
  for i in range(5):
    check_product(
      got[i], x[i], Perturbed(w, left[i], right[i], jnp.float32(0.1)), 2
    )


def test_a_vector_gives_a_vector():
  value, left, right = jnp.eye(3), jnp.ones((1, 3)), jnp.full((1, 3), 2.0)
  w = perturbed.Perturbed(value, left, right, jnp.float32(0.5))
  x = jnp.array([1.0, 2.0, 3.0])
  np.testing.assert_allclose(perturbed.matmul(x, w), [7.0, 8.0, 9.0])


def test_take_refuses_what_is_not_a_matrix():
  ones = jnp.ones((2, 1, 3))
  w = perturbed.Perturbed(jnp.ones((2, 3, 3)), ones, ones, jnp.float32(1))
  with pytest.raises(ValueError, match=r"got shape \(2, 3, 3\)"):
    perturbed.take(w, jnp.array([0]))


@pytest.mark.parametrize("kind", ["array", "low rank", "deferred"])
def test_a_part_is_that_of_the_whole(kind):
  value = jnp.asarray(
    np.random.default_rng(0).normal(size=(5, 70)), jnp.float32
  )
  direction = {
    "low rank": directions.low_rank(2),
    "deferred": directions.rademacher(deferred=True),
  }.get(kind)
  leaf = value
  if direction:
    z = direction.sample(jax.random.key(1), value)
    leaf = direction.perturb(value, z, 0.5)
  whole = np.asarray(perturbed.materialize(leaf))

  @jax.jit
  def cut(row, column):
    rows, columns = perturbed.Part(-2, row, 2), perturbed.Part(-1, column, 33)
    some = (perturbed.cut(leaf, *x) for x in ((rows, columns), (rows,), ()))
    aligned = perturbed.cut(leaf, perturbed.Part(-1, 32 * row, 6, True))
    return [perturbed.materialize(x) for x in (*some, aligned)]

  for row, column in ((0, 0), (2, 37), (1, 32)):
    expected = (
      whole[row : row + 2, column : column + 33],
      whole[row : row + 2],
      whole,
      whole[:, 32 * row : 32 * row + 6],
    )
    for got, want in zip(cut(row, column), expected, strict=True):
      np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
