"""How good an estimate is: smoothing, agreement, signal and noise.

What needs only the losses of a step, [n, 2] in the order (+, -), can be taken
from a journal.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from zorn_jax import directions, probe_map as probe_maps, types
from zorn_jax.estimators import Estimator, central_difference
from zorn_jax.estimators.types import LossFn


class Estimate(NamedTuple):
  """A mean over probes.

  Attributes:
    value: The mean, float32.
    standard_error: Its own, from the spread of the probes, float32.
  """

  value: jax.Array
  standard_error: jax.Array


class Agreement(NamedTuple):
  """How estimates compare with the exact gradient g; float32.

  Attributes:
    cosine: Mean cosine of an estimate and g.
    standard_error: Of that mean; NaN for a single estimate.
    signal_to_noise: ‖g‖² over the mean of ‖ĝ - g‖².
  """

  cosine: jax.Array
  standard_error: jax.Array
  signal_to_noise: jax.Array


def smoothing_gap(
  loss_fn: LossFn,
  params: types.Params,
  batch: types.Batch,
  key: types.Key,
  *,
  epsilon: Any,
  num_probes: int,
  direction: directions.Direction | None = None,
  probe_map: probe_maps.ProbeMap | None = None,
) -> Estimate:
  r"""How far the smoothed loss lies above the loss: L_ε - L.

  .. math:: L_\epsilon(\theta) = E_z\, f(\theta + \epsilon z)
    = f + \frac{\epsilon^2}{2} \mathrm{tr} \nabla^2 f + O(\epsilon^4)

  Pairs cancel the slope: what is left of the spread is curvature.

  Args:
    loss_fn: (params, batch) -> scalar.
    params: Where.
    batch: What the loss is of; the same for all probes.
    key: Random numbers of the directions.
    epsilon: Smoothing radius, in units of the parameters; > 0.
    num_probes: Directions n >= 2. Costs 2n + 1 forward passes.
    direction: Distribution of z; dense signs unless given.
    probe_map: How many probes run at once; all of them unless given.
  Returns:
    An :class:`Estimate` of the gap, in units of the loss.
  Raises:
    ValueError: If `epsilon` is not positive or there are fewer than 2 probes.
  Guarantees: unbiased for every epsilon and loss. On a quadratic whose Hessian
    is diagonal, signs have no spread.
  """
  _check_probes(num_probes)
  estimator = central_difference(
    epsilon, num_probes, direction=direction, probe_map=probe_map
  )
  losses = estimator.query(loss_fn, params, batch, (), key)
  clean = jnp.asarray(loss_fn(params, batch)).astype(jnp.float32)
  # Differences first: the gap is small beside the losses.
  return _mean(jnp.mean(losses - clean, axis=-1))


def agreement(
  estimator: Estimator,
  loss_fn: LossFn,
  params: types.Params,
  batch: types.Batch,
  keys: types.Key,
  state: Any = (),
) -> Agreement:
  """Compares estimates with the exact gradient, which is back-propagated.

  Args:
    estimator: Whose estimates; its probes share the batch.
    loss_fn: (params, batch) -> scalar, differentiable by `jax.grad`.
    params: Where; small enough for back-propagation.
    batch: What the loss is of.
    keys: One for each estimate [k].
    state: The estimator's, the same for all of them.
  Returns:
    An :class:`Agreement` over the k estimates. Where the gradient or an
    estimate is zero there is no cosine, but NaN.
  """
  exact = _wide(jax.grad(loss_fn)(params, batch))
  power = optax.tree.vdot(exact, exact)

  def compare(key):
    losses = estimator.query(loss_fn, params, batch, state, key)
    grads, _ = estimator.update(losses, params, state, key)
    grads = _wide(grads)
    error = optax.tree.sub(grads, exact)
    return cosine(grads, exact), optax.tree.vdot(error, error)

  cosines, errors = jax.lax.map(compare, keys)
  mean = _mean(cosines)
  return Agreement(mean.value, mean.standard_error, power / jnp.mean(errors))


def cosine(a: types.PyTree, b: types.PyTree) -> jax.Array:
  """Cosine of the angle between two trees, over all leaves, in float32."""
  a, b = _wide(a), _wide(b)
  return optax.tree.vdot(a, b) / (optax.tree.norm(a) * optax.tree.norm(b))


def signal_to_noise(losses: jax.Array) -> jax.Array:
  r"""Slope against all else that tells probes apart, from their losses alone.

  .. math:: \frac{\frac{1}{n} \sum_i d_i^2}
    {\frac{1}{n-1} \sum_i (m_i - \bar m)^2},
    \quad d_i = \frac{f_i^+ - f_i^-}{2}, \quad m_i = \frac{f_i^+ + f_i^-}{2}

  The power of d is ε²‖g‖². What m varies with is curvature, and the data where
  every pair has its own: it is the noise that a one-sided difference has and a
  pair cancels. On a quadratic with one batch and signs the ratio is
  2‖g‖² / (ε² Σ_{i≠j} H_ij²). Much below 1 epsilon is large for the curvature,
  or the data are few for the slope.

  That of the combined gradient follows from it only through the number of
  parameters: with one batch for all n probes it is n / (d - 1), whatever the
  losses are.

  Args:
    losses: [..., n, 2], ordered (+, -), n >= 2; leading axes such as steps.
  Returns:
    The ratio [...], float32, over the pairs that are finite; infinite where
    nothing but the slope differs.
  """
  _check_probes(jnp.shape(losses)[-2])
  losses = jnp.asarray(losses, jnp.float32)
  keep = jnp.isfinite(losses).all(-1)
  half = (losses[..., 0] - losses[..., 1]) / 2
  # Beside one of the losses: the squares of all would not be exact.
  base = jnp.where(keep, losses[..., 1], 0.0)
  base = jnp.sum(base, -1) / jnp.maximum(jnp.sum(keep, -1), 1)
  middle = losses.mean(-1) - base[..., None]
  return jnp.mean(jnp.square(half), axis=-1, where=keep) / _variance(
    middle, keep
  )


def expected_cosine(
  num_probes: int,
  size: int,
  noise: float = 0.0,
  batch_per_probe: bool = True,
) -> float:
  r"""Cosine of estimate and gradient that dense signs lead to.

  .. math:: \cos \approx \sqrt{\frac{n}{n + d (1 + b)}}, \quad
    \text{with one batch for all} \quad \frac{1}{\sqrt{1 + d/n + b}}

  Args:
    num_probes: Directions n >= 1.
    size: Parameters d >= 1 that they perturb.
    noise: b = tr Σ / (B ‖g‖²): how far the gradient of one batch lies from
      that of all data, squared and relative; 0 for one fixed batch.
    batch_per_probe: Whether every probe sees a batch of its own.
  Raises:
    ValueError: If a number is out of its range.
  References: E‖ĝ - g‖² = (d - 1)/n ‖g‖² for a linear loss.
  """
  _check_law(size, noise)
  if num_probes < 1:
    raise ValueError(
      f"num_probes must be at least 1, got {num_probes}. Choose for example 96."
    )
  ratio = size / num_probes
  excess = ratio * (1 + noise) if batch_per_probe else ratio + noise
  return 1 / math.sqrt(1 + excess)


def probes_needed(
  cosine: float,
  size: int,
  noise: float = 0.0,
  batch_per_probe: bool = True,
) -> int:
  """The fewest probes whose :func:`expected_cosine` is at least `cosine`.

  Args:
    cosine: In (0, 1).
    size: As there, and so are the rest.
    noise: As there.
    batch_per_probe: As there.
  Raises:
    ValueError: If a number is out of its range, or the data are so noisy that
      no number of probes on one batch suffices.
  """
  _check_law(size, noise)
  if not 0 < cosine < 1:
    raise ValueError(
      f"cosine must lie between 0 and 1, got {cosine}. Choose for example 0.1."
    )
  excess = 1 / cosine**2 - 1
  if batch_per_probe:
    probes = size * (1 + noise) / excess
  elif excess > noise:
    probes = size / (excess - noise)
  else:
    most = 1 / math.sqrt(1 + noise)
    raise ValueError(
      f"no number of probes on one batch reaches a cosine of {cosine}: with "
      f"{noise=} it stays below {most:.3g}. Use a larger batch, or a batch for "
      "each probe."
    )
  # What the rounding of the division would add is not needed.
  return max(1, math.ceil(probes * (1 - 1e-12)))


def _check_law(size, noise):
  if size < 1 or not noise >= 0:
    raise ValueError(
      f"size must be at least 1 and noise at least 0, got {size=}, {noise=}. "
      "Count the parameters that are perturbed."
    )


def _check_probes(num_probes):
  if num_probes < 2:
    raise ValueError(
      f"a spread needs at least 2 probes, got {num_probes}. Use more probes."
    )


def _mean(values):
  """The mean of finite values [n], and its standard error."""
  keep = jnp.isfinite(values)
  count = jnp.sum(keep, dtype=jnp.float32)
  error = jnp.sqrt(_variance(values, keep) / count)
  return Estimate(jnp.mean(values, where=keep), error)


def _variance(values, keep):
  """Of a sample, along the last axis."""
  return jnp.var(values, axis=-1, ddof=1, where=keep)


def _wide(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
