"""Finite differences whose steps shrink where the loss bends (SPSA)."""

import jax
import jax.numpy as jnp

from zorn_jax import directions, probe_map as probe_maps
from zorn_jax.estimators import stencil
from zorn_jax.estimators.types import Estimator


def spsa1_5(
  epsilon: float,
  num_probes: int,
  *,
  exponent: float = 0.1,
  floor: float = 1.0,
  direction: directions.Direction | None = None,
  probe_map: probe_maps.ProbeMap | None = None,
  shaping: str = "none",
  batch_per_probe: bool = False,
) -> Estimator:
  r"""Divides each slope by a power of the curvature along it (1.5-SPSA).

  .. math:: g = \frac{1}{n}\sum_i \frac{f_i^+ - f_i^-}{2\epsilon
    \max(\kappa_i^\alpha, \lambda)} z_i,
    \quad \kappa_i = \frac{|f_i^+ - 2 f + f_i^-|}{\epsilon^2}

  In float32 the curvature has an error of about 1e-7 f / ε².

  Args:
    epsilon: Smoothing radius, in units of the parameters; > 0.
    num_probes: Directions n per step, >= 1. Costs 2n + 1 forward passes (3n
      with a batch per probe).
    exponent: Power α of the curvature, >= 0; 0 gives the central difference
      where `floor` is at most 1, and 1 a Newton step along every direction.
    floor: Smallest divisor λ, > 0.
    direction: As in :func:`zorn_jax.central_difference`, and so are the rest.
    probe_map: As there.
    shaping: As there.
    batch_per_probe: As there; then each probe has a clean loss of its own.
  Returns:
    An :class:`Estimator` with losses of shape [n, 3], ordered (clean, +, -).
  Raises:
    ValueError: If `epsilon`, `num_probes` or `floor` is not positive,
      `exponent` is negative, or `shaping` is unknown.
  Guarantees: every coefficient has the sign of its slope. Not unbiased.
  References: arXiv:2609.38095.
  """
  _check(exponent, floor)

  def slopes(losses):
    clean, plus, minus = losses.T
    curvature = jnp.abs((plus - clean) - (clean - minus)) / epsilon**2
    slope = (plus - minus) / (2 * epsilon)
    return _divided(losses, slope, curvature, exponent, floor)

  probes = stencil.probes(
    epsilon,
    num_probes,
    ((1, 0), (-1, 0)),
    slopes,
    clean=True,
    direction=direction,
    probe_map=probe_map,
    shaping=shaping,
    batch_per_probe=batch_per_probe,
  )
  return stencil.fresh(probes, num_probes)


def spsa2(
  epsilon: float,
  num_probes: int,
  *,
  exponent: float = 1.0,
  floor: float = 1.0,
  direction: directions.Direction | None = None,
  probe_map: probe_maps.ProbeMap | None = None,
  shaping: str = "none",
  batch_per_probe: bool = False,
) -> Estimator:
  r"""Divides each slope by a mixed curvature |zᵀHu| (2-SPSA, six queries).

  .. math:: g = \frac{1}{n}\sum_i \frac{f(+z_i) - f(-z_i)}{2\epsilon
    \max(|h_i|^\alpha, \lambda)} z_i, \quad h_i =
    \frac{f(z_i+u_i) - f(z_i-u_i) - f(u_i-z_i) + f(-z_i-u_i)}{4\epsilon^2}

  where f(v) stands for the loss at θ + ε v and u_i is a second direction.

  Args:
    epsilon: Smoothing radius, in units of the parameters; > 0.
    num_probes: Directions n per step, >= 1. Costs 6n forward passes.
    exponent: Power α of the curvature, >= 0.
    floor: Smallest divisor λ, > 0; it damps the step where the curvature is
      small.
    direction: As in :func:`zorn_jax.central_difference`, and so are the rest.
    probe_map: As there.
    shaping: As there.
    batch_per_probe: As there.
  Returns:
    An :class:`Estimator` with losses of shape [n, 6], ordered z, -z, z+u, z-u,
    -z+u, -z-u.
  Raises:
    ValueError: If `epsilon`, `num_probes` or `floor` is not positive,
      `exponent` is negative, or `shaping` is unknown.
  Guarantees: every coefficient has the sign of its slope, also where the
    curvature is negative. Not unbiased.
  References: Spall (2000), arXiv:2505.17852.
  """
  _check(exponent, floor)

  def slopes(losses):
    plus, minus, both, less_u, less_z, neither = losses.T
    mixed = jnp.abs((both - less_u) - (less_z - neither)) / (4 * epsilon**2)
    slope = (plus - minus) / (2 * epsilon)
    return _divided(losses, slope, mixed, exponent, floor)

  probes = stencil.probes(
    epsilon,
    num_probes,
    ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)),
    slopes,
    clean=False,
    direction=direction,
    probe_map=probe_map,
    shaping=shaping,
    batch_per_probe=batch_per_probe,
  )
  return stencil.fresh(probes, num_probes)


def _divided(losses, slope, curvature, exponent, floor) -> jax.Array:
  """The slopes, shortened; NaN where any loss of a probe is not finite."""
  slope = slope / jnp.maximum(curvature**exponent, floor)
  return jnp.where(jnp.isfinite(losses).all(-1), slope, jnp.nan)


def _check(exponent, floor):
  if not exponent >= 0:
    raise ValueError(
      f"exponent must not be negative, got {exponent}. Choose for example 0.1."
    )
  if not floor > 0:
    raise ValueError(
      f"floor must be positive, got {floor}. Choose for example 1."
    )
