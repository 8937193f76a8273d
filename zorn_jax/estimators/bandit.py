"""Probes that come back when their slopes were steep."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax import directions, probe_map as probe_maps, types
from zorn_jax.estimators import stencil
from zorn_jax.estimators.types import Estimator


class BanditState(NamedTuple):
  """A reservoir of keys of probes that were tried.

  Attributes:
    step: Updates so far, int32.
    keys: Keys of the probes in the reservoir [capacity].
    values: Moving averages of the sizes of their slopes, float32 [capacity].
    counts: How often each was queried, int32 [capacity]; 0 marks a free slot.
  """

  step: jax.Array
  keys: types.Key
  values: jax.Array
  counts: jax.Array


def bandit_spsa(
  epsilon: float,
  num_probes: int,
  *,
  capacity: int = 4096,
  temperature: float = 1.0,
  decay: float = 0.99,
  exploit: tuple[float, float] = (0.2, 0.9),
  ramp: tuple[float, float] = (250.0, 75.0),
  direction: directions.Direction | None = None,
  probe_map: probe_maps.ProbeMap | None = None,
  shaping: str = "none",
  batch_per_probe: bool = False,
) -> Estimator:
  r"""Central differences along fresh directions and along steep known ones.

  A growing share of the probes is drawn, without replacement, from a reservoir
  of keys with probabilities in proportion to
  :math:`\exp(v_i / (\tau \max_j v_j))`, by Gumbel noise in the log domain:
  nothing can underflow. v is a moving average of the size of a probe's
  slope; it decays while the probe is not queried, and the smallest values
  leave a full reservoir.

  Args:
    epsilon: Smoothing radius, in units of the parameters; > 0.
    num_probes: Directions n per step, >= 1. Costs 2n forward passes.
    capacity: Size of the reservoir, at least n. Keys only: 16 bytes each.
    temperature: τ > 0; large values draw evenly.
    decay: Factor of the values of probes that are not queried, in (0, 1].
    exploit: Share of known probes in the first and in late steps, in [0, 1].
    ramp: Step in the middle of the change from one share to the other, and its
      width (a logistic curve).
    direction: As in :func:`zorn_jax.central_difference`, and so are the rest.
    probe_map: As there.
    shaping: As there.
    batch_per_probe: As there.
  Returns:
    An :class:`Estimator` with losses of shape [n, 2], ordered (+, -), and a
    :class:`BanditState`.
  Raises:
    ValueError: If a number is out of its range or `shaping` is unknown.
  Guarantees: the estimate is a mean over n directions, each of them a descent
    direction. Not unbiased: known directions are drawn for their slopes.
  References: the authors' code of arXiv:2505.17852.
  """
  if capacity < num_probes:
    raise ValueError(
      f"capacity must be at least num_probes, got {capacity=}, {num_probes=}. "
      "Choose a larger reservoir."
    )
  if not temperature > 0:
    raise ValueError(
      f"temperature must be positive, got {temperature}. Choose for example 1."
    )
  if not 0 < decay <= 1:
    raise ValueError(f"decay must lie in (0, 1], got {decay}. Choose 0.99.")
  if not all(0 <= share <= 1 for share in exploit):
    raise ValueError(
      f"exploit must hold shares in [0, 1], got {exploit}. Choose (0.2, 0.9)."
    )
  if not ramp[1] > 0:
    raise ValueError(
      f"the width in ramp must be positive, got {ramp}. Use (250, 75)."
    )

  probes = stencil.probes(
    epsilon,
    num_probes,
    ((1, 0), (-1, 0)),
    lambda losses: (losses[:, 0] - losses[:, 1]) / (2 * epsilon),
    clean=False,
    direction=direction,
    probe_map=probe_map,
    shaping=shaping,
    batch_per_probe=batch_per_probe,
  )

  def init(params):
    del params
    return BanditState(
      jnp.zeros((), jnp.int32),
      jax.vmap(jax.random.key)(jnp.zeros(capacity, jnp.uint32)),
      jnp.zeros(capacity),
      jnp.zeros(capacity, jnp.int32),
    )

  def propose(state, key):
    """Keys [n] of the probes, their slots [n], and which of them are known."""
    draw_key, fresh_key = jax.random.split(key)
    known = state.counts > 0
    # A reservoir without a value must not divide by zero.
    top = jnp.maximum(jnp.max(state.values), jnp.finfo(jnp.float32).tiny)
    logits = state.values / top / temperature
    noisy = logits + jax.random.gumbel(draw_key, (capacity,))
    _, slots = jax.lax.top_k(jnp.where(known, noisy, -jnp.inf), num_probes)
    middle, width = ramp
    share = exploit[0] + (exploit[1] - exploit[0]) * jax.nn.sigmoid(
      (state.step - middle) / width
    )
    wanted = jnp.arange(num_probes) < jnp.round(share * num_probes)
    chosen = wanted & known[slots]
    fresh = stencil.probe_keys(fresh_key, num_probes)
    return jnp.where(chosen, state.keys[slots], fresh), slots, chosen

  def query(loss_fn, params, batch, state, key):
    keys, _, _ = propose(state, key)
    return probes.query(loss_fn, params, batch, keys)

  def terms(losses, state, key):
    keys, slots, chosen = propose(state, key)
    reward = jnp.abs(probes.slopes(losses))
    reward = jnp.where(jnp.isfinite(reward), reward, 0.0)
    # A fresh probe writes to no slot of the reservoir: out of range.
    slots = jnp.where(chosen, slots, capacity)
    values = (
      (decay * state.values)
      .at[slots]
      .set((state.values[slots % capacity] + reward) / 2, mode="drop")
    )
    counts = state.counts.at[slots].add(1, mode="drop")
    # Fresh probes compete for the slots; known ones are there already.
    values = jnp.concatenate([values, jnp.where(chosen, -1.0, reward)])
    counts = jnp.concatenate([counts, jnp.where(chosen, 0, 1)])
    pool = jnp.concatenate([state.keys, keys])
    _, kept = jax.lax.top_k(jnp.where(counts > 0, values, -1.0), capacity)
    kept_counts = counts[kept]
    state = BanditState(
      state.step + 1,
      pool[kept],
      jnp.where(kept_counts > 0, values[kept], 0.0),
      kept_counts,
    )
    return keys, probes.weights(losses), state

  update, blocks = probes.sums(terms)
  return Estimator(init, query, update, probes.queries_per_step, 2, blocks)
