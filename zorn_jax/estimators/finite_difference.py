"""Gradient estimates from differences of losses along random directions."""

from zorn_jax import directions, probe_map as probe_maps
from zorn_jax.estimators import stencil
from zorn_jax.estimators.types import Estimator


def central_difference(
  epsilon: float,
  num_probes: int,
  *,
  direction: directions.Direction | None = None,
  probe_map: probe_maps.ProbeMap | None = None,
  shaping: str = "none",
  batch_per_probe: bool = False,
) -> Estimator:
  r"""Estimates the gradient from antithetic pairs (CD-RGE).

  .. math:: g = \frac{1}{n}\sum_i
    \frac{f(\theta+\epsilon z_i) - f(\theta-\epsilon z_i)}{2\epsilon} z_i

  Args:
    epsilon: Smoothing radius, in units of the parameters; > 0.
    num_probes: Directions n per step, >= 1. Costs 2n forward passes.
    direction: Distribution of z; dense signs unless given.
    probe_map: How many probes run at once; all of them unless given.
    shaping: Name of a function of the slopes, "none" for the formula above.
    batch_per_probe: Whether every leaf of the batch has a leading axis n and
      pair i sees only batch[i]; otherwise all pairs see the whole batch.
  Returns:
    An :class:`Estimator` with losses of shape [n, 2], ordered (+, -).
  Raises:
    ValueError: If `epsilon` or `num_probes` is not positive, or `shaping` is
      unknown.
  Guarantees: exact slopes on quadratics for every epsilon, and so unbiased
    there; `params` are never changed.
  References: Spall (1992); Nesterov and Spokoiny (2017); arXiv:2505.17852.
  """

  def slopes(losses):
    return (losses[:, 0] - losses[:, 1]) / (2 * epsilon)

  probes = stencil.probes(
    epsilon,
    num_probes,
    ((1, 0), (-1, 0)),
    slopes,
    clean=False,
    direction=direction,
    probe_map=probe_map,
    shaping=shaping,
    batch_per_probe=batch_per_probe,
  )
  return stencil.fresh(probes, num_probes)._replace(pairs=True)


def forward_difference(
  epsilon: float,
  num_probes: int,
  *,
  antithetic: bool = False,
  direction: directions.Direction | None = None,
  probe_map: probe_maps.ProbeMap | None = None,
  shaping: str = "none",
  batch_per_probe: bool = False,
) -> Estimator:
  r"""Estimates the gradient from differences to the clean loss (FDRAS).

  .. math:: g = \frac{1}{n}\sum_i
    \frac{f(\theta+\epsilon z_i) - f(\theta)}{\epsilon} z_i

  Args:
    epsilon: Smoothing radius, in units of the parameters; > 0.
    num_probes: Directions n per step, >= 1. Costs n + 1 forward passes (2n
      with a batch per probe).
    antithetic: Whether each direction is also queried at -z; the two forward
      differences are averaged, which makes a central difference of them. Costs
      n more forward passes.
    direction: Distribution of z; dense signs unless given.
    probe_map: How many probes run at once; all of them unless given.
    shaping: Name of a function of the slopes, "none" for the formula above.
    batch_per_probe: As in :func:`central_difference`; then each probe has a
      clean loss of its own.
  Returns:
    An :class:`Estimator` with losses of shape [n, 2], ordered (clean, +), or
    [n, 3], ordered (clean, +, -).
  Raises:
    ValueError: If `epsilon` or `num_probes` is not positive, or `shaping` is
      unknown.
  Guarantees: `params` are never changed. The bias is of order epsilon, unless
    antithetic.
  References: Nesterov and Spokoiny (2017); arXiv:2505.17852.
  """

  def slopes(losses):
    forward = (losses[:, 1] - losses[:, 0]) / epsilon
    if not antithetic:
      return forward
    backward = (losses[:, 2] - losses[:, 0]) / epsilon
    return (forward - backward) / 2

  probes = stencil.probes(
    epsilon,
    num_probes,
    ((1, 0), (-1, 0)) if antithetic else ((1, 0),),
    slopes,
    clean=True,
    direction=direction,
    probe_map=probe_map,
    shaping=shaping,
    batch_per_probe=batch_per_probe,
  )
  return stencil.fresh(probes, num_probes)
