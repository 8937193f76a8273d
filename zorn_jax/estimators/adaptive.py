"""Probes that are longer where the gradient has been small."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax import directions, types
from zorn_jax.estimators.types import Estimator


class AdaptiveState(NamedTuple):
  """The running second moment of the estimate.

  Attributes:
    moment: Moving average v of the squared estimate, float32, shaped as the
      parameters and not corrected for its start at zero.
    inner: State of the estimator whose probes are scaled.
  """

  moment: types.PyTree
  inner: types.PyTree


def adaptive(
  make: Callable[[directions.Direction], Estimator],
  direction: directions.Direction,
  decay: float = 0.99,
) -> Estimator:
  r"""Probes along z/√v, with v the running second moment of the estimate.

  .. math:: p = z \, \frac{(v + \delta \bar v)^{-1/2}}
    {\mathrm{rms}\,(v + \delta \bar v)^{-1/2}}, \quad \delta = 10^{-2}

  The bias-corrected v is damped by a share of its mean, and the scales have a
  root mean square of one over all parameters, so that epsilon and the first
  step mean what they mean without. Probes are formed as plain arrays.

  Args:
    make: Makes the estimator from a distribution of directions.
    direction: Distribution of z.
    decay: Of the moving average, in (0, 1).
  Returns:
    An :class:`Estimator` with an :class:`AdaptiveState`.
  Raises:
    ValueError: If `decay` is outside (0, 1).
  Guarantees: the mean of the estimate is D² times that of the estimator with
    z, where D are the scales: a preconditioned gradient.
  References: arXiv:2505.17852 ("probe preconditioning").
  """
  if not 0 < decay < 1:
    raise ValueError(f"decay must lie in (0, 1), got {decay}. Choose 0.99.")
  base = make(direction)

  def scaled(state):
    scales = _scales(state.moment)
    multiply = lambda z: jax.tree.map(jnp.multiply, scales, z)
    return make(directions.mapped(direction, multiply))

  def init(params):
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return AdaptiveState(zeros, base.init(params))

  def query(loss_fn, params, batch, state, key):
    return scaled(state).query(loss_fn, params, batch, state.inner, key)

  def update(losses, params, state, key):
    grads, inner = scaled(state).update(losses, params, state.inner, key)

    def averaged(v, g):
      new = decay * v + (1 - decay) * jnp.square(g.astype(jnp.float32))
      return jnp.where(jnp.isfinite(new), new, v)  # Not what overflows.

    moment = jax.tree.map(averaged, state.moment, grads)
    return grads, AdaptiveState(moment, inner)

  return base._replace(init=init, query=query, update=update, blocks=None)


def _scales(moment):
  """(v + δ v̄)^{-1/2}, over its root mean square.

  The correction for the start at zero is a common factor and cancels.
  """
  leaves = jax.tree.leaves(moment)
  size = max(1.0, float(sum(leaf.size for leaf in leaves)))
  mean = sum(jnp.sum(leaf) for leaf in leaves) / size
  damping = jnp.where(mean > 0, 1e-2 * mean, 1.0)
  inverse = jax.tree.map(lambda v: 1 / (v + damping), moment)
  total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(inverse))
  return jax.tree.map(lambda x: jnp.sqrt(x / (total / size)), inverse)
