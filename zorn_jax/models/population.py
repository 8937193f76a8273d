"""A population's arrays in a layout where its members share every product.

Under `vmap`, members would come first and every product with a shared matrix
would be transposed around it. Here the axes of members and the batch come last,
[features..., trail...], the largest of them at the very end: a product with a
shared matrix takes the whole trail as its columns, and elementwise code runs
along it. An array that is the same for all members has size 1 there.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from zorn_jax import perturbed

BATCH = -1  # The number of the axis of the batch.

# Axes of members are numbered from the innermost map outwards; an array has
# those of its set at its front, the outermost first.
Axes = frozenset
NONE = Axes()


class Trail(NamedTuple):
  """The last axes of all arrays.

  Attributes:
    sizes: Axis number -> its size.
    order: The numbers in the order in which the axes lie.
    beside: How many such a map has side by side, each formed on its own.
  """

  sizes: dict[int, int]
  order: tuple[int, ...]
  beside: int = 1

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.sizes[axis] for axis in self.order)

  def place(self, x, axes=NONE, batch: int | None = None) -> jax.Array:
    """[members..., features...] -> [features..., trail...].

    Args:
      x: The array.
      axes: The numbers of its axes of members.
      batch: Which of its features is the batch, if any.
    """
    where = {axis: i for i, axis in enumerate(sorted(axes, reverse=True))}
    if batch is not None:
      where[BATCH] = len(axes) + batch
    features = [i for i in range(x.ndim) if i not in where.values()]
    last = [where[axis] for axis in self.order if axis in where]
    shape = [x.shape[i] for i in features]
    shape += [self.sizes[i] if i in where else 1 for i in self.order]
    return x.transpose(features + last).reshape(shape)

  def restore(self, x, batch: int) -> jax.Array:
    """[features..., trail...] -> [members..., features...] with the batch."""
    count = x.ndim - len(self.order)
    x = jnp.broadcast_to(x, x.shape[:count] + self.shape)
    where = {axis: count + i for i, axis in enumerate(self.order)}
    features = list(range(count))
    features.insert(batch, where.pop(BATCH))
    return x.transpose(
      [where[i] for i in sorted(where, reverse=True)] + features
    )


def trail(batch: int, sizes: tuple[int, ...] = (), beside: int = 1) -> Trail:
  """The trail of a batch and of axes of members, the innermost first."""
  by_number = dict(enumerate(sizes)) | {BATCH: batch}
  order = sorted(by_number, key=lambda axis: (by_number[axis], -axis))
  return Trail(by_number, tuple(order), beside)


class Matrix(NamedTuple):
  """The matrices W + Σ_r left_r right_rᵀ of all members, in a trail's layout.

  Attributes:
    value: W, shared by all, [..., M, K].
    left: [..., r, M, trail...], with the scale; None for W alone.
    right: [..., r, K, trail...].
  """

  value: jax.Array
  left: jax.Array | None = None
  right: jax.Array | None = None


def matrix(layout: Trail, leaf, axes) -> Matrix:
  """A parameter with at least two axes, an array or Perturbed."""
  if not perturbed.is_perturbed(leaf):
    return Matrix(perturbed.materialize(leaf))
  scale = layout.place(leaf.scale, axes.scale)
  left = layout.place(leaf.left, axes.left)
  left = perturbed.lift(scale, left.ndim) * left
  return Matrix(leaf.value, left, layout.place(leaf.right, axes.right))


def array(layout: Trail, leaf, axes) -> jax.Array:
  """A parameter [features..., trail...] formed for each member."""
  if perturbed.is_deferred(leaf):
    return layout.place(perturbed.materialize(leaf))
  if not perturbed.is_perturbed(leaf):
    return layout.place(leaf, axes)
  value, left, right = matrix(layout, leaf, axes)
  value = layout.place(value).astype(jnp.float32)
  at = -2 - len(layout.order)  # The axis of the rank.
  for r in range(left.shape[at]):
    a = jax.lax.index_in_dim(left, r, at, keepdims=False)
    b = jax.lax.index_in_dim(right, r, at, keepdims=False)
    value = value + jnp.expand_dims(a, at + 1) * jnp.expand_dims(b, at)
  return value.astype(leaf.dtype)


def multiply(layout: Trail, w, x: jax.Array) -> jax.Array:
  """w [..., M, K] times x [..., K, trail...], without the perturbation.

  A matrix takes all other axes of x as columns.
  """
  size = len(layout.order)
  steps = w.ndim == 2 and x.ndim > size + 1
  if steps:
    x = x.swapaxes(0, 1)  # [K, C, trail...]
    size += 1
  shape = x.shape[-size:]
  flat = x.reshape(*x.shape[:-size], -1)
  if flat.shape[-1] == 1:
    # A CPU takes five times as long for one column in bfloat16.
    wide = jnp.promote_types(jnp.result_type(w, x), jnp.float32)
    w, flat = w.astype(wide), flat.astype(wide)
  y = perturbed.matmul(w, flat)
  y = y.reshape(*y.shape[:-1], *shape)
  return y.swapaxes(0, 1) if steps else y


def inner(layout: Trail, right: jax.Array, x: jax.Array) -> jax.Array:
  """Σ_k right [..., k, trail...] x [..., k, trail...], term by term.

  XLA keeps these additions along the trail. A reduction or a batched product
  would go to a library that transposes first.
  """
  axis = -1 - len(layout.order)
  rank = max(right.ndim, x.ndim)
  right, x = perturbed.lift(right, rank), perturbed.lift(x, rank)
  shape = jnp.broadcast_shapes(right.shape, x.shape)
  zero = jnp.zeros(shape[:axis] + shape[axis + 1 :], jnp.float32)

  def add(k, total):
    at = lambda y: jax.lax.dynamic_index_in_dim(
      y, k, y.ndim + axis, keepdims=False
    )
    return total + at(right) * at(x).astype(jnp.float32)

  return jax.lax.fori_loop(0, x.shape[axis], add, zero, unroll=_UNROLL)


_UNROLL = 2


def correct(layout: Trail, y, left, coefficients) -> jax.Array:
  """y + Σ_r left_r coefficients_r.

  Args:
    layout: The trail.
    y: [..., M, trail...].
    left: [..., r, M, trail...].
    coefficients: [..., r, trail...].
  """
  at = -2 - len(layout.order)
  for r in range(left.shape[at]):
    a = jax.lax.index_in_dim(left, r, left.ndim + at, keepdims=False)
    c = jax.lax.index_in_dim(
      coefficients, r, coefficients.ndim + at + 1, keepdims=False
    )
    c = jnp.expand_dims(c, c.ndim - len(layout.order))
    y = y + perturbed.lift(a, y.ndim) * perturbed.lift(c, y.ndim)
  return y


def product(layout: Trail, w: Matrix, x: jax.Array) -> jax.Array:
  """w [..., M, K] times x [..., K, trail...], for all members."""
  y = multiply(layout, w.value, x)
  if w.left is None or w.right is None:
    return y
  x = jnp.expand_dims(x, x.ndim - len(layout.order) - 1)  # Over the rank.
  return correct(layout, y, w.left, inner(layout, w.right, x))


def mapped(
  plain: Callable[..., Any], together: Callable[..., Any], *args: Any
) -> Any:
  """`plain(*args)`, for which a population calls `together`.

  Args:
    plain: A function of trees of arrays.
    together: (sizes of the axes of members, `args` with the set of axes in
      place of every array, *args) -> the results with all axes of members.
    *args: Its arguments.
  """
  leaves, treedef = jax.tree.flatten(args)
  axes = (NONE,) * len(leaves)
  return _call(plain, together, treedef, (), axes)(*leaves)


def _call(plain, together, treedef, sizes, axes):
  @custom_vmap
  def call(*leaves):
    args = treedef.unflatten(leaves)
    if not sizes:
      return plain(*args)
    return together(sizes, treedef.unflatten(axes), *args)

  @call.def_vmap
  def rule(size, batched, *leaves):
    number = len(sizes)
    wider = tuple(
      old | {number} if b else old for old, b in zip(axes, batched, strict=True)
    )
    result = _call(plain, together, treedef, (*sizes, size), wider)(*leaves)
    return result, jax.tree.map(lambda _: True, result)

  return call


def one_by_one(plain, sizes, axes, *args) -> Any:
  """What `together` can do where members share nothing."""
  for number in range(len(sizes)):
    front = functools.partial(_front, number)
    plain = jax.vmap(plain, in_axes=jax.tree.map(front, axes))
  return plain(*args)


def _front(number, axes):
  return 0 if number in axes else None


def alone(tree) -> Any:
  """The sets of axes of a tree whose arrays have none of members."""
  return jax.tree.map(lambda _: NONE, tree, is_leaf=perturbed.is_deferred)
