"""What the first product of a layer reads, one step of time after the other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from zorn_jax import perturbed
from zorn_jax.models import population
from zorn_jax.models.population import Matrix, Trail

# Below this vocabulary size, embedding and input projection become one table.
MAX_TABLE_ROWS = 512


class Rows(NamedTuple):
  """What a layer reads in one step, before the perturbation is added.

  Attributes:
    value: [N, G, D, trail...].
    coefficients: Of the right factors, [r, trail...]; None without any.
  """

  value: jax.Array
  coefficients: jax.Array | None


class Fetch(NamedTuple):
  """The projected inputs of some heads.

  Attributes:
    at: (t) -> :class:`Rows`.
    right: The factors [r, N, G, D, trail...] of all steps, or None.
  """

  at: Any
  right: jax.Array | None

  def sum(self, rows: Rows) -> jax.Array:
    """The inputs [N, G, D, trail...]."""
    x = rows.value
    if self.right is None or rows.coefficients is None:
      return x
    for right, coefficient in zip(self.right, rows.coefficients, strict=True):
      x = x + right * perturbed.lift(coefficient, right.ndim)
    return x


class Feed(NamedTuple):
  """What a layer reads in a chunk of time.

  Attributes:
    length: Steps C.
    through: (w_in, its axes, (N, G, D)) -> :class:`Fetch`.
  """

  length: int
  through: Any


def of_outputs(layout: Trail, x: jax.Array) -> Feed:
  """Outputs [C, H, trail...] of the layer before."""

  def through(w_in, axes, shape):
    w = population.matrix(layout, w_in, axes)
    transposed = Matrix(w.value.mT, w.right, w.left)
    y = population.product(layout, transposed, x)
    y = y.reshape(len(x), *shape, *y.shape[2:])
    at = lambda t: Rows(
      jax.lax.dynamic_index_in_dim(y, t, keepdims=False), None
    )
    return Fetch(at, None)

  return Feed(len(x), through)


def of_tokens(layout: Trail, embed, axes, tokens, token_axes) -> Feed:
  """Tokens [B, C], of each member where they have axes.

  A row of the embedding times the input projection is, with E' = E + a bᵀ and
  W' = W + c dᵀ whose factors a and c hold the scales,

      e' W' = e W + a_e (bᵀ W) + (e c + a_e (b c)) dᵀ

  so that all members share e W. Few rows become one table.
  """
  batch, length = tokens.shape[-2:]
  tokens = layout.place(tokens, token_axes, batch=0)  # [C, trail...]
  e = population.matrix(layout, embed, axes)
  vocab = e.value.shape[0]
  step = lambda t: jax.lax.dynamic_index_in_dim(tokens, t, keepdims=False)

  def through(w_in, axes, shape):
    w = population.matrix(layout, w_in, axes)
    wide = lambda x: x.reshape(len(x), *shape, *x.shape[2:])
    cross, right = None, []
    if e.left is not None:
      # bᵀ W, [r, K, trail...].
      right.append(wide(population.multiply(layout, w.value.mT, e.right)))
    if w.left is not None:
      right.append(wide(w.right))
      if e.left is not None:
        at = population.inner
        cross = at(layout, w.left[:, None], e.right[None])  # [r of W, r of E]

    def coefficients(left, second):
      """Of the factors in `right`: of E's a_e, and of W's e c."""
      if left is not None and second is not None:
        for r in range(len(left)):
          x = cross[:, r]
          spare = (1,) * (second.ndim - x.ndim)
          x = x.reshape(len(x), *spare, *x.shape[1:])
          second = second + x * perturbed.lift(left[r], x.ndim)
      found = [x for x in (left, second) if x is not None]
      return jnp.concatenate(_same(found)) if found else None

    rights = jnp.concatenate(_same(right)) if right else None
    if vocab <= max(batch * length, MAX_TABLE_ROWS):
      table = perturbed.matmul(e.value, w.value).reshape(vocab, *shape)
      second = None
      if w.left is not None:
        second = population.multiply(layout, e.value, w.left)
      columns = coefficients(e.left, second)  # [r, V, trail...]

      def at(t):
        token = step(t)
        c = None if columns is None else _of_each(columns, token)
        return Rows(_of_all(table, token), c)
    else:

      def at(t):
        token = step(t)
        row = _of_all(e.value, token)  # [E, trail...]
        value = population.multiply(layout, w.value.mT, row)
        value = value.reshape(*shape, *value.shape[1:])
        left, second = None, None
        if e.left is not None:
          left = _of_each(e.left, token)
        if w.left is not None:
          second = population.inner(layout, w.left, row[None])
        return Rows(value, coefficients(left, second))

    return Fetch(at, rights)

  return Feed(length, through)


def _of_all(x, tokens):
  """Rows [features..., trail...] of x [V, features...] for tokens."""
  rows = jnp.take(x, tokens, axis=0, mode="clip")
  x = jnp.moveaxis(rows, range(tokens.ndim), range(-tokens.ndim, 0))
  # Not only in name: what reads it runs along the trail.
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _of_each(x, tokens):
  """Rows [r, trail...] of x [r, V, trail...] for tokens [trail...]."""
  tokens = tokens[None, None]
  return jnp.take_along_axis(x, tokens, axis=1, mode="clip")[:, 0]


def _same(arrays):
  """Arrays [r, ..., trail...] broadcast to one shape, apart from the first."""
  shape = jnp.broadcast_shapes(*(x.shape[1:] for x in arrays))
  return [jnp.broadcast_to(x, (len(x), *shape)) for x in arrays]
