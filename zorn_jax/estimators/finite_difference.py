"""Gradient estimates from differences of losses along random directions."""

import jax
import jax.numpy as jnp

from zorn_jax import directions, probe_map as probe_maps, types
from zorn_jax.estimators import shaping as shapings
from zorn_jax.estimators.types import Estimator, LossFn


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

  return _finite_difference(
    epsilon,
    num_probes,
    direction,
    probe_map,
    shaping,
    batch_per_probe,
    scales=(epsilon, -epsilon),
    clean=False,
    slopes=slopes,
  )


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

  return _finite_difference(
    epsilon,
    num_probes,
    direction,
    probe_map,
    shaping,
    batch_per_probe,
    scales=(epsilon, -epsilon) if antithetic else (epsilon,),
    clean=True,
    slopes=slopes,
  )


def _finite_difference(
  epsilon,
  num_probes,
  direction,
  probe_map,
  shaping,
  batch_per_probe,
  *,
  scales,
  clean,
  slopes,
):
  """The spine: queries at `scales` along z, then slopes, then a sum of z."""
  if not epsilon > 0:
    raise ValueError(
      f"epsilon must be positive, got {epsilon}. Choose for example 1e-2."
    )
  if num_probes < 1:
    raise ValueError(
      f"num_probes must be at least 1, got {num_probes}. Choose for example 96."
    )
  shapings.check(shaping)
  direction = direction or directions.rademacher()
  probe_map = probe_map or probe_maps.sequential()

  def query(loss_fn, params, batch, state, key):
    del state
    loss_fn = _scalar(loss_fn)

    def probe_losses(probe_key, batch):
      z = direction.sample(probe_key, params)
      at = lambda scale: loss_fn(direction.perturb(params, z, scale), batch)
      return jax.vmap(at)(jnp.asarray(scales, jnp.float32))

    keys = probe_keys(key, num_probes)
    if batch_per_probe:
      _check_batch(batch, num_probes)
      losses = probe_map.map(lambda x: probe_losses(*x), (keys, batch))
      if clean:
        first = probe_map.map(lambda x: loss_fn(params, x[1]), (keys, batch))
    else:
      losses = probe_map.map(lambda key: probe_losses(key, batch), keys)
      if clean:
        first = jnp.full(num_probes, loss_fn(params, batch))
    return jnp.column_stack([first, losses]) if clean else losses

  def update(losses, params, state, key):
    losses = jnp.asarray(losses, jnp.float32)  # NumPy rounds otherwise.
    weights = shapings.coefficients(slopes(losses), shaping)
    keys = probe_keys(key, num_probes)
    return direction.combine(keys, weights, params, probe_map), state

  queries = num_probes * len(scales)
  if clean:
    queries += num_probes if batch_per_probe else 1
  return Estimator(lambda params: (), query, update, queries)


def probe_keys(key: types.Key, num_probes: int) -> types.Key:
  """One key per probe [n]; probe i has the same key whatever n is."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_probes))


def _scalar(loss_fn: LossFn) -> LossFn:
  """`loss_fn`, checked to return a scalar, as float32."""

  def checked(params, batch):
    loss = jnp.asarray(loss_fn(params, batch))
    if loss.shape:
      raise ValueError(
        f"loss_fn must return a scalar, got shape {loss.shape}. "
        "Take the mean of the losses of the batch."
      )
    return loss.astype(jnp.float32)

  return checked


def _check_batch(batch, num_probes):
  sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
  if not sizes <= {(num_probes,)}:
    raise ValueError(
      "with batch_per_probe every leaf of the batch has a leading axis of "
      f"{num_probes=}, got leading axes {sorted(sizes)}. Stack one batch for "
      "each probe, or drop batch_per_probe."
    )
