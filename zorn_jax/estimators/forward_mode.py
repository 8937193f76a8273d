"""Exact directional derivatives by forward-mode differentiation."""

import jax
import jax.numpy as jnp

from zorn_jax import directions, probe_map as probe_maps
from zorn_jax.estimators import shaping as shapings, stencil
from zorn_jax.estimators.types import Estimator


def forward_gradient(
  num_probes: int,
  *,
  direction: directions.Direction | None = None,
  probe_map: probe_maps.ProbeMap | None = None,
  shaping: str = "none",
  batch_per_probe: bool = False,
) -> Estimator:
  r"""Estimates the gradient from exact derivatives along directions.

  .. math:: g = \frac{1}{n}\sum_i (\nabla f(\theta) \cdot z_i) z_i

  The loss must be differentiable by `jax.jvp`, which costs about as much time
  and memory as a pair of forward passes, and stores nothing over time.

  Args:
    num_probes: Directions n per step, >= 1. Counted as 2n forward passes.
    direction: As in :func:`zorn_jax.central_difference`, and so are the rest.
    probe_map: As there.
    shaping: As there.
    batch_per_probe: As there.
  Returns:
    An :class:`Estimator` with "losses" of shape [n, 2]: the clean loss and the
    derivative along the direction.
  Raises:
    ValueError: If `num_probes` is not positive or `shaping` is unknown.
  Guarantees: unbiased; there is no epsilon.
  References: Baydin et al. (2022), arXiv:2202.08587.
  """
  stencil.check(1.0, num_probes, shaping)
  direction = direction or directions.rademacher()
  probe_map = probe_map or probe_maps.sequential()

  def query(loss_fn, params, batch, state, key):
    del state
    loss_fn = stencil.scalar(loss_fn)

    def probe(key, batch):
      z = direction.sample(key, params)
      along = lambda s: loss_fn(direction.perturb(params, z, s), batch)
      return jnp.stack(jax.jvp(along, (jnp.zeros(()),), (jnp.ones(()),)))

    keys = stencil.probe_keys(key, num_probes)
    if not batch_per_probe:
      return probe_map.map(lambda key: probe(key, batch), keys)
    stencil.check_batch(batch, num_probes)
    return probe_map.map(lambda x: probe(*x), (keys, batch))

  def terms(losses, state, key):
    weights = shapings.coefficients(losses[:, 1], shaping)
    return stencil.probe_keys(key, num_probes), weights, state

  update, blocks = stencil.sums(direction, probe_map, terms)
  return Estimator(lambda params: (), query, update, 2 * num_probes, 1, blocks)
