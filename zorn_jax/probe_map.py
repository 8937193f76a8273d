"""How a function is mapped over probes: how many at once, and where."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from zorn_jax import types

MapFn = Callable[..., types.PyTree]
SumFn = Callable[[Callable[[Any], types.PyTree], Any], types.PyTree]


class ProbeMap(NamedTuple):
  """A policy for evaluating a function of one probe for all probes.

  Attributes:
    map: (fn, xs, *shared) -> the stacked results fn(xs[i], *shared), on every
      device. `fn` may close over the shared values, unless it runs in another
      map already.
    keep: The same, but a result stays on the device that made it.
    sum: (fn, xs) -> the sum of fn(xs[i]), never stacked, in a fixed order.
  """

  map: MapFn
  keep: MapFn
  sum: SumFn


def sequential(batch_size: int | None = None) -> ProbeMap:
  """Evaluates `batch_size` probes at once, one batch after the other.

  Args:
    batch_size: Probes that share one vectorised forward pass; None for all of
      them. Memory grows with it, results do not depend on it beyond rounding.
      If it does not divide the probes, the last one runs again to fill up.
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

  def map_(fn, xs, *shared):
    num_probes = jax.tree.leaves(xs)[0].shape[0]
    one = lambda x: fn(x, *shared)
    if batch_size is None or batch_size >= num_probes:
      return jax.vmap(one)(xs)
    missing = -num_probes % batch_size
    # One body: another for the rest would be compiled and round otherwise.
    results = jax.lax.map(one, _padded(xs, missing), batch_size=batch_size)
    return jax.tree.map(lambda x: x[:num_probes], results)

  def sum_(fn, xs):
    first = jax.tree.map(lambda x: x[0], xs)
    zeros = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn, first)
    )

    def add(total, x):
      return jax.tree.map(jnp.add, total, fn(x)), None

    return jax.lax.scan(add, zeros, xs)[0]

  return ProbeMap(map_, map_, sum_)


def _padded(xs, missing):
  """The stacked values with the last one repeated at the end."""
  if not missing:
    return xs

  def pad(x):
    last = jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))
    return jnp.concatenate([x, last])

  return jax.tree.map(pad, xs)


def spread(fn, mesh: Mesh, axis: str, in_specs, out_specs):
  """`fn` on every device of one axis of a mesh; the other axes are left alone.

  Args:
    fn: What a device does with its parts of the arguments.
    mesh: The devices.
    axis: Name of the axis, which `fn` may gather and sum over.
    in_specs: As `jax.shard_map` has them, and so are `out_specs`.
  """
  # Within the map of another axis, that one is manual already.
  around = jax.sharding.get_abstract_mesh()
  return jax.shard_map(
    fn,
    mesh=mesh if around.empty else around,
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names={axis},
    check_vma=False,  # It takes what was gathered for different everywhere.
  )


def sharded(
  mesh: Mesh, batch_size: int | None = None, axis: str = "probe"
) -> ProbeMap:
  """Spreads probes over an axis of a mesh; only results move.

  Every device evaluates its part of `xs` as :func:`sequential` does, and the
  results of `map` are gathered in the order of the probes, so that what is
  computed from them does not depend on the number of devices. `sum` runs on
  every device.

  Args:
    mesh: The devices; other axes than `axis` are left to what `fn` does.
    batch_size: Probes at once on one device; None for all that it has.
    axis: Name of the mesh axis.
  Returns:
    A :class:`ProbeMap`; it raises a ValueError for a number of probes that the
    axis does not divide.
  """
  inner = sequential(batch_size)
  shards = mesh.shape[axis]
  if shards == 1:
    return inner

  def each(fn, xs, shared, out_specs):
    num_probes = jax.tree.leaves(xs)[0].shape[0]
    if num_probes % shards:
      raise ValueError(
        f"{shards} devices cannot share {num_probes} probes evenly. Choose a "
        f"multiple of {shards}."
      )
    in_specs = (PartitionSpec(axis), *[PartitionSpec()] * len(shared))
    return spread(fn, mesh, axis, in_specs, out_specs)(xs, *shared)

  def map_(fn, xs, *shared):
    def local(xs, *shared):
      gather = lambda x: jax.lax.all_gather(x, axis, tiled=True)
      return jax.tree.map(gather, inner.map(fn, xs, *shared))

    return each(local, xs, shared, PartitionSpec())

  def keep(fn, xs, *shared):
    return each(partial(inner.map, fn), xs, shared, PartitionSpec(axis))

  return ProbeMap(map_, keep, inner.sum)
