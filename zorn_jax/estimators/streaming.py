"""Evolution strategies that update in the middle of long sequences.

An episode is a sequence of `unrolls` truncated unrolls. Every probe carries the
recurrent states of its antithetic pair from unroll to unroll, so that losses
late in an episode know of perturbations early in it: truncation adds no bias.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax import directions, probe_map as probe_maps, types
from zorn_jax.estimators import shaping as shapings, stencil
from zorn_jax.estimators.stencil import probe_keys

Carry = types.PyTree
# (params, carry, batch, first) -> (carry, loss) of one truncated unroll.
UnrollFn = Callable[[types.Params, Carry, types.Batch, jax.Array], Any]


class StreamingState(NamedTuple):
  """Where every probe is in its episode, and its directions there.

  Attributes:
    age: int32 [n], unrolls done in the present episode. An unroll at age zero
      begins an episode; it reads the window `age` of the probe's sequence.
    left: int32 [n], unrolls still to do in the present episode.
    keys: typed keys [n, s] of the directions of the present episode in the
      order of their unrolls; those of unrolls to come mean nothing.
  """

  age: jax.Array
  left: jax.Array
  keys: types.Key


class StreamingEstimator(NamedTuple):
  """A gradient estimate from truncated unrolls, as pure functions.

  Attributes:
    init: (params) -> state.
    init_carry: (carry) -> carries; one initial carry, stacked to [n, 2, ...].
    query: (unroll_fn, params, batch, carries, state, key) -> (losses [n, 2],
      carries). `unroll_fn(params, carry, batch, first) -> (carry, loss)` runs
      one truncated unroll from the initial carry where the boolean `first` is
      true, and otherwise from `carry`. The initial carry is its own choice, as
      it may depend on the perturbed parameters; choose with `jnp.where`, which
      forgets a carry that is not finite. Every leaf of the batch has a leading
      axis n, and both signs of pair i see batch[i].
    update: (losses, params, state, key) -> (grads, state). Needs neither batch
      nor carries. `query` and `update` of a step get the same state and key.
    queries_per_step: Number of unrolls that `query` runs.
    blocks: As :class:`zorn_jax.Estimator` has it.
  """

  init: Callable[[types.Params], StreamingState]
  init_carry: Callable[[Carry], Carry]
  query: Callable[..., tuple[jax.Array, Carry]]
  update: Callable[..., tuple[types.Grads, StreamingState]]
  queries_per_step: int
  blocks: Callable[..., tuple[types.PyTree, StreamingState]] | None = None


def noise_reuse_es(
  epsilon: float,
  num_probes: int,
  unrolls: int,
  *,
  direction: directions.Direction | None = None,
  probe_map: probe_maps.ProbeMap | None = None,
  shaping: str = "none",
  stagger: bool = True,
) -> StreamingEstimator:
  r"""Estimates with one direction per probe and episode (NRES).

  .. math:: g = \frac{1}{n}\sum_i \frac{L_i^+ - L_i^-}{2\epsilon} z_i

  Args:
    epsilon: Smoothing radius, in units of the parameters; > 0. May be traced.
    num_probes: Directions n per step, >= 1. Costs 2n unrolls.
    unrolls: Truncated unrolls K per episode, >= 1.
    direction: Distribution of z; dense signs unless given.
    probe_map: How many probes run at once; all of them unless given.
    shaping: Name of a function of the slopes, "none" for the formula above.
    stagger: Whether the first episode of probe i ends i mod K unrolls early, so
      that from then on a step sees all ages (equally often, if K divides n).
      Otherwise every step sees one age, and K steps make an episode.
  Returns:
    A :class:`StreamingEstimator` with losses ordered (+, -).
  Raises:
    ValueError: If `epsilon`, `num_probes` or `unrolls` is not positive, or
      `shaping` is unknown.
  Guarantees: while `params` stay, a probe's estimate has the mean of the full
    gradient of its unroll's loss, through all unrolls of the episode so far,
    up to O(epsilon^2); a step's variance is at most that of
    :func:`persistent_es`. Carries made with older `params` add a bias of the
    order of their change.
  References: Li et al. (2023), arXiv:2304.12180.
  """
  slots = 1
  return _streaming(
    epsilon, num_probes, unrolls, direction, probe_map, shaping, stagger, slots
  )


def persistent_es(
  epsilon: float,
  num_probes: int,
  unrolls: int,
  *,
  direction: directions.Direction | None = None,
  probe_map: probe_maps.ProbeMap | None = None,
  shaping: str = "none",
  stagger: bool = True,
) -> StreamingEstimator:
  r"""Estimates with a fresh direction in every unroll (PES).

  .. math:: g = \frac{1}{n}\sum_i
    \frac{L_i^+ - L_i^-}{2\epsilon} \sum_{s \le t_i} z_{i,s}

  where t_i is the age of probe i. An update draws nK directions (low-rank
  ones at the same time), those of unrolls to come with coefficient zero.
  Arguments, result and errors are those of :func:`noise_reuse_es`.

  References: Vicol, Metz and Sohl-Dickstein (2021), arXiv:2112.13835.
  """
  slots = unrolls
  return _streaming(
    epsilon, num_probes, unrolls, direction, probe_map, shaping, stagger, slots
  )


def _streaming(
  epsilon, num_probes, unrolls, direction, probe_map, shaping, stagger, slots
):
  """The spine: unroll s of an episode draws a direction if s < `slots`."""
  stencil.check(epsilon, num_probes, shaping)
  if unrolls < 1:
    raise ValueError(
      f"unrolls must be at least 1, got {unrolls}. Choose for example 16."
    )
  direction = direction or directions.rademacher()
  probe_map = probe_map or probe_maps.sequential()

  def init(params):
    del params
    probes = jnp.arange(num_probes, dtype=jnp.int32)
    early = probes % unrolls if stagger else jnp.zeros_like(probes)
    keys = probe_keys(jax.random.key(0), num_probes)  # Replaced at age zero.
    keys = jnp.broadcast_to(keys[:, None], (num_probes, slots))
    return StreamingState(jnp.zeros_like(probes), unrolls - early, keys)

  def init_carry(carry):
    stack = lambda x: jnp.broadcast_to(x, (num_probes, 2, *jnp.shape(x)))
    return jax.tree.map(stack, carry)

  def keys_now(state, key):
    """The keys of the episode so far, [n, slots]."""
    drawn = probe_keys(key, num_probes)[:, None]
    new = jnp.arange(slots)[None] == state.age[:, None]
    return jnp.where(new, drawn, state.keys)

  def query(unroll_fn, params, batch, carries, state, key):
    stencil.check_batch(batch, num_probes)
    scales = jnp.asarray([epsilon, -epsilon], jnp.float32)
    latest = jnp.minimum(state.age, slots - 1)
    keys = keys_now(state, key)[jnp.arange(num_probes), latest]

    def unroll_pair(probe):
      key, carries, batch, first = probe
      z = direction.sample(key, params)

      def at(scale, carry):
        point = direction.perturb(params, z, scale)
        carry, loss = unroll_fn(point, carry, batch, first)
        return stencil.as_scalar(loss), carry

      return jax.vmap(at)(scales, carries)

    return probe_map.keep(unroll_pair, (keys, carries, batch, state.age == 0))

  def terms(losses, state, key):
    slopes = (losses[:, 0] - losses[:, 1]) / (2 * epsilon)
    weights = shapings.coefficients(slopes, shaping)[:, None]
    past = jnp.arange(slots)[None] <= state.age[:, None]
    weights = jnp.where(past, weights, 0.0).ravel()
    keys = keys_now(state, key)
    last = state.left == 1
    age = jnp.where(last, 0, state.age + 1)
    left = jnp.where(last, unrolls, state.left - 1)
    return keys.ravel(), weights, StreamingState(age, left, keys)

  update, blocks = stencil.sums(direction, probe_map, terms)
  return StreamingEstimator(
    init, init_carry, query, update, 2 * num_probes, blocks
  )
