"""A matrix plus a low-rank perturbation that is never formed.

A loss function receives its parameters as a tree in which matrices may be
:class:`Perturbed`. :func:`matmul` and :func:`take` work on the factors, so that
under `vmap` a whole population shares one product with the unperturbed matrix.
Code that needs the plain array calls :func:`materialize`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax import types
from zorn_jax.tiles import Window


class _Leaf:
  """What stands for an array: its shape and type are those of its `value`."""

  value: jax.Array
  __array_priority__ = 100  # NumPy's operators leave it to ours, as `jax` does.

  @property
  def shape(self):
    return self.value.shape

  @property
  def ndim(self):
    return self.value.ndim

  @property
  def dtype(self):
    return self.value.dtype

  def __getattr__(self, name):
    raise AttributeError(
      f"{type(self).__name__} has no attribute {name!r}: it stands for an "
      "array that is not formed. Call zorn_jax.materialize on it first."
    )


def _of_array(name):
  """An operator of what is formed, as functions of `jnp` are."""
  return lambda self, *others: getattr(self.__jax_array__(), name)(
    *materialize(others)
  )


for _name in (
  "add",
  "sub",
  "mul",
  "truediv",
  "floordiv",
  "mod",
  "pow",
  "matmul",
):
  for _method in (f"__{_name}__", f"__r{_name}__"):
    setattr(_Leaf, _method, _of_array(_method))
for _name in (
  *("eq", "ne", "lt", "le", "gt", "ge"),
  *("neg", "abs", "getitem", "iter", "len"),
):
  setattr(_Leaf, f"__{_name}__", _of_array(f"__{_name}__"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Perturbed(_Leaf):
  r"""The matrix :math:`W + s \sum_r a_r b_r^T`, kept as its parts.

  Operators and functions of `jnp` see the matrix, and functions of trees its
  parts: before a norm of all parameters, say, they are to be materialized.

  Attributes:
    value: The unperturbed matrix W, [..., m, k].
    left: The factors a, [..., r, m].
    right: The factors b, [..., r, k].
    scale: The scalar s.
  """

  value: jax.Array
  left: jax.Array
  right: jax.Array
  scale: jax.Array

  @property
  def mT(self):  # noqa: N802 (the name of `jax.Array.mT`)
    """The transpose of the last two axes."""
    return Perturbed(self.value.mT, self.right, self.left, self.scale)

  def __jax_array__(self):
    return _dense(self)


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["value", "keys", "scales"],
  meta_fields=["draw"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Deferred(_Leaf):
  r"""The array :math:`W + \sum_i s_i z_i`, formed a block at a time.

  Attributes:
    value: The unperturbed array W.
    keys: Keys of its directions z_i, [r].
    scales: Their multiples s_i, float32 [r].
    draw: (key, shape, window) -> a block of z, as
      :data:`zorn_jax.directions.Draw` has it.
  """

  value: jax.Array
  keys: types.Key
  scales: jax.Array
  draw: Callable[..., jax.Array]

  def __jax_array__(self):
    return _formed(self)


def _dense(w: Perturbed) -> jax.Array:
  delta = jnp.einsum("...rm,...rk->...mk", w.left, w.right)
  return (w.value + w.scale * delta).astype(w.dtype)


def _formed(w: Deferred, window=None) -> jax.Array:
  """The block of W + Σ s z that the window names, rounded once."""
  window = window or Window((0,) * w.ndim, w.shape)
  block = w.value
  if window.sizes != w.shape:
    block = jax.lax.dynamic_slice(w.value, window.starts, window.sizes)
  wide = block.astype(jnp.promote_types(w.dtype, jnp.float32))
  for index in range(len(w.scales)):
    z = w.draw(w.keys[index], w.shape, window)
    wide = wide + w.scales[index] * z
  return wide.astype(w.dtype)


def is_deferred(leaf) -> bool:
  """Whether a leaf is :class:`Deferred`."""
  return isinstance(leaf, Deferred)


def is_perturbed(leaf) -> bool:
  """Whether a leaf is :class:`Perturbed`."""
  return isinstance(leaf, Perturbed)


def is_any(leaf) -> bool:
  """Whether a leaf is :class:`Perturbed` or :class:`Deferred`."""
  return isinstance(leaf, (Perturbed, Deferred))


def materialize(tree: types.PyTree) -> types.PyTree:
  """Replaces every perturbed leaf of `tree` by its plain array."""

  def form(leaf):
    if is_deferred(leaf):
      return _formed(leaf)
    return _dense(leaf) if is_perturbed(leaf) else leaf

  return jax.tree.map(form, tree, is_leaf=is_any)


class Part(NamedTuple):
  """Which part of a matrix along one axis.

  Attributes:
    axis: Counted from the end of the matrix: negative.
    start: Index of the first; may be traced.
    size: How many there are.
    aligned: Whether `start`, if it is traced, is known to be a multiple of 32.
  """

  axis: int
  start: Any
  size: int
  aligned: bool = False


def cut(w, *parts: Part):
  """A part of a matrix; what is deferred is formed.

  Args:
    w: [..., m, k], an array, Perturbed or Deferred; perhaps with further axes
      of its factors in front.
    *parts: At most one for each axis.
  """
  if is_deferred(w):
    starts, sizes, aligned = [0] * w.ndim, list(w.shape), False
    for axis, start, size, known in parts:
      starts[axis], sizes[axis] = start, size
      aligned |= known and axis == -1
    return _formed(w, Window(tuple(starts), tuple(sizes), aligned))
  for part in parts:
    w = _cut(w, part)
  return w


def _cut(w, where):
  axis, start, size, _ = where
  part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim + axis)
  if not is_perturbed(w):
    return part(w)
  at_end = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim - 1)
  left, right = w.left, w.right
  if axis < -2:
    left, right = part(left), part(right)
  elif axis == -2:
    left = at_end(left)
  else:
    right = at_end(right)
  return Perturbed(part(w.value), left, right, w.scale)


def _sum_last(x: jax.Array) -> jax.Array:
  """Sums the last axis, kept, by halving it.

  XLA fuses these additions into their neighbours. On a CPU a batched dot of one
  row per probe, or a reduction, goes to a library call that takes four times
  as long.
  """
  while x.shape[-1] > 1:
    half = x.shape[-1] // 2
    odd = x[..., 2 * half :]
    x = x[..., :half] + x[..., half : 2 * half]
    x = jnp.concatenate([x[..., :1] + odd, x[..., 1:]], -1) if odd.size else x
  return x


def _matmul(x, w):
  accumulator = jnp.promote_types(jnp.result_type(x, w), jnp.float32)
  return jnp.matmul(x, w, preferred_element_type=accumulator)


def matmul(x, w):
  """Multiplies `x @ w`, where either side may be :class:`Perturbed`.

  Args:
    x: [..., B, m], an array or Perturbed.
    w: [..., m, k], an array or Perturbed; leading axes broadcast. Where both
      are Perturbed they are matrices and have the same scale.
  Returns:
    [..., B, k], accumulated in float32 or wider. Perturbed (of the summed
    rank) when `x` is Perturbed, otherwise an array.
  """
  x, w = (_formed(y) if is_deferred(y) else y for y in (x, w))
  if is_perturbed(x):
    return _matmul_perturbed(x, w)
  if not is_perturbed(w):
    return _matmul(x, w)
  if x.ndim == 1:
    return matmul(x[None], w)[..., 0, :]
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  total = _matmul(x, w.value)
  rank = total.ndim
  for index in range(w.left.shape[-2]):
    left = lift(w.left[..., index, None, :], rank)
    right = lift(w.right[..., index, None, :], rank)
    inner = _sum_last(lift(wide, rank) * left)
    total = total + (w.scale * inner) * right
  return total


def lift(x: jax.Array, rank: int) -> jax.Array:
  """Adds leading axes of size one."""
  return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _matmul_perturbed(x: Perturbed, w) -> Perturbed:
  """(X + s a bᵀ)(W + s c dᵀ) = XW + s [a (bᵀW + s (bᵀc) dᵀ) + (Xc) dᵀ]."""
  if not is_perturbed(w):
    return Perturbed(_matmul(x.value, w), x.left, _matmul(x.right, w), x.scale)
  left = jnp.concatenate([x.left, _matmul(w.left, x.value.mT)], axis=-2)
  cross = _matmul(x.right, w.left.mT)
  right = _matmul(x.right, w.value) + w.scale * _matmul(cross, w.right)
  right = jnp.concatenate([right, w.right], axis=-2)
  return Perturbed(_matmul(x.value, w.value), left, right, x.scale)


def take(w, indices: jax.Array) -> jax.Array:
  """Rows `w[indices]` of a matrix [m, k] that may be :class:`Perturbed`.

  Args:
    w: [m, k], an array or Perturbed.
    indices: Integers in [0, m), of any shape.
  Returns:
    Array of shape `indices.shape + (k,)`.
  Raises:
    ValueError: If `w` is Perturbed and not a matrix.
  """
  if is_deferred(w):
    w = _formed(w)
  if not is_perturbed(w):
    return jnp.take(w, indices, axis=0, mode="clip")
  if w.ndim != 2:
    raise ValueError(
      f"take reads rows of a perturbed matrix, got shape {w.shape}. "
      "Materialize it first."
    )
  rows = jnp.take(w.value, indices, axis=0, mode="clip")
  for left, right in zip(w.left, w.right, strict=True):
    coefficient = w.scale * jnp.take(left, indices, axis=0, mode="clip")
    rows = rows + coefficient[..., None] * lift(right, rows.ndim)
  return rows
