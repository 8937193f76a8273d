"""How a function is mapped over probes: how many at once, and where."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax import types

MapFn = Callable[[Callable[[Any], types.PyTree], Any], types.PyTree]
SumFn = Callable[[Callable[[Any], types.PyTree], Any], types.PyTree]


class ProbeMap(NamedTuple):
  """A policy for evaluating a function of one probe for all probes.

  Attributes:
    map: (fn, xs) -> the stacked results fn(xs[i]).
    sum: (fn, xs) -> the sum of fn(xs[i]), never stacked, in a fixed order.
  """

  map: MapFn
  sum: SumFn


def sequential(batch_size: int | None = None) -> ProbeMap:
  """Evaluates `batch_size` probes at once, one batch after the other.

  Args:
    batch_size: Probes that share one vectorised forward pass; None for all of
      them. Memory grows with it, results do not depend on it beyond rounding.
  Returns:
    A :class:`ProbeMap` for one device.
  Raises:
    ValueError: If `batch_size` is not positive.
  """
  if batch_size is not None and batch_size < 1:
    raise ValueError(
      f"batch_size of a probe map must be positive, got {batch_size}. "
      "Choose at least 1, or None for all probes at once."
    )

  def map_(fn, xs):
    num_probes = jax.tree.leaves(xs)[0].shape[0]
    if batch_size is None or batch_size >= num_probes:
      return jax.vmap(fn)(xs)
    return jax.lax.map(fn, xs, batch_size=batch_size)

  def sum_(fn, xs):
    first = jax.tree.map(lambda x: x[0], xs)
    zeros = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn, first)
    )

    def add(total, x):
      return jax.tree.map(jnp.add, total, fn(x)), None

    return jax.lax.scan(add, zeros, xs)[0]

  return ProbeMap(map_, sum_)
