"""How the gradients of micro-batches become one gradient.

An :class:`Aggregator` makes them one at a time and folds them, so that they
are never stacked: beside its inputs it holds two trees of the size of a
gradient, whatever their number. Gradients that are stacked already are
aggregated with the identity as `fn`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zorn_jax import types

# (fn, xs, has_aux=False) -> one gradient, with the shapes and dtypes of the
# micro-gradients fn(xs[i]). Leaves of xs have a leading axis m >= 1. With
# has_aux, as in jax.grad, fn returns (grads, aux), and the aggregator the
# gradient and the stacked aux.
Aggregator = Callable[..., Any]
# (sum of those kept, their number, the next one) -> whether to keep it.
KeepFn = Callable[[types.Grads, jax.Array, types.Grads], jax.Array]


def mean() -> Aggregator:
  """The plain mean of the micro-gradients, summed in float32.

  Returns:
    An :class:`Aggregator`.
  """
  return _mean_of_kept(lambda total, count, grads: jnp.array(True), fewest=1)


def gaf(threshold: float) -> Aggregator:
  r"""Averages only the micro-gradients that agree (GAF).

  The first micro-gradient starts a mean. Each later one joins it if

  .. math:: 1 - \frac{\langle g_i, \bar g \rangle}{|g_i| |\bar g|}
    \le \mathrm{threshold},

  over all leaves together, and is dropped otherwise. If none joins the first,
  the result is zero: the step is to be skipped. With m = 1 there is nothing to
  agree with, and the result is the micro-gradient itself.

  The order is that of `xs`; batches are drawn at random, so that the first is
  a random one. Micro-gradients that are zero or not finite are dropped before
  they can start or join a mean. A mean that has cancelled to zero is
  orthogonal to everything.

  Args:
    threshold: Largest cosine distance to the running mean, in (0, 2]: 1 drops
      what points backwards, 2 keeps everything.
  Returns:
    An :class:`Aggregator`.
  Raises:
    ValueError: If `threshold` is outside (0, 2].
  Guarantees: the result is finite. It scales with the micro-gradients while
    float32 can hold the squares of their norms; one whose squared norm it
    cannot hold counts as zero or as not finite.
  References: Chaubard et al. (2024), arXiv:2412.18052.
  """
  if not 0 < threshold <= 2:
    raise ValueError(
      f"threshold of gaf must lie in (0, 2], got {threshold}. Choose a cosine "
      "distance, for example 0.97."
    )

  def keep(total, count, grads):
    norm = _norm(grads)
    norms = norm * _norm(total)
    cosine = _dot(total, grads) / jnp.where(norms > 0, norms, 1.0)
    # Rounding may take it below -1, which a threshold of 2 is to keep.
    agrees = 1 - jnp.maximum(cosine, -1.0) <= threshold
    return (agrees | (count == 0)) & (norm > 0) & jnp.isfinite(norm)

  return _mean_of_kept(keep, fewest=2)


AGGREGATORS = {"mean": mean, "gaf": gaf}


def _mean_of_kept(keep: KeepFn, fewest: int) -> Aggregator:
  """The mean of what is kept; zero if that is fewer than min(fewest, m)."""

  def aggregate(fn, xs, has_aux=False):
    micro = fn if has_aux else lambda x: (fn(x), None)
    length = jax.tree.leaves(xs)[0].shape[0]
    if not length:
      raise ValueError(
        "there must be a micro-gradient to aggregate, got a leading axis of "
        "length 0. Give at least one micro-batch."
      )
    like, _ = jax.eval_shape(micro, jax.tree.map(lambda x: x[0], xs))

    def add(carry, x):
      total, count = carry
      grads, aux = micro(x)
      grads = optax.tree.cast(grads, jnp.float32)
      kept = keep(total, count, grads)
      total = jax.tree.map(lambda t, g: jnp.where(kept, t + g, t), total, grads)
      return (total, count + kept), aux

    zeros = optax.tree.zeros_like(like, dtype=jnp.float32)
    start = (zeros, jnp.zeros((), jnp.int32))
    (total, count), aux = jax.lax.scan(add, start, xs)
    enough = count >= min(fewest, length)
    divide = lambda t, x: jnp.where(
      enough, t / jnp.maximum(count, 1), 0.0
    ).astype(x.dtype)
    grads = jax.tree.map(divide, total, like)
    return (grads, aux) if has_aux else grads

  return aggregate


def _dot(a, b):
  """The scalar product of two trees."""
  return optax.tree.sum(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))


def _norm(tree):
  return jnp.sqrt(_dot(tree, tree))
