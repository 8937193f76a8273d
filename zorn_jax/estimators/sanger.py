"""Steps that are longer within a learned subspace (Sanger-SPSA)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax import directions, probe_map as probe_maps, types
from zorn_jax.estimators.finite_difference import central_difference
from zorn_jax.estimators.types import Estimator


class SangerState(NamedTuple):
  """A subspace for the smaller side of every matrix.

  Attributes:
    step: Updates so far, int32.
    factors: For each leaf [..., m, k] columns W [..., min(m, k), r] of unit
      length, float32; [0] for leaves with fewer than two axes.
  """

  step: jax.Array
  factors: types.PyTree


def sanger_spsa(
  epsilon: float,
  num_probes: int,
  *,
  rank: int = 1,
  rate: float = 0.1,
  identity: float = 1.0,
  warmup: int = 100,
  subspace_probes: bool = False,
  direction: directions.Direction | None = None,
  probe_map: probe_maps.ProbeMap | None = None,
  shaping: str = "none",
  batch_per_probe: bool = False,
) -> Estimator:
  r"""Central differences, amplified in a subspace that Sanger's rule learns.

  A matrix leaf with estimate G (transposed where it is wide) contributes

  .. math:: \alpha G + \min(t/t_w, 1)\, W W^T G, \quad
    W \leftarrow W + \beta\,(C W - W\,\mathrm{triu}(W^T C W)), \quad
    C = G G^T / \|G\|^2

  whose columns of W are then scaled to unit length; other leaves keep their
  estimate. Leading axes are separate matrices. With `subspace_probes` half of
  the squared length of a matrix's direction lies in the subspace, where s is
  its smaller side:

  .. math:: \frac{z + (\sqrt{s/r} - 1)\, W W^T z}{\sqrt{2 - r/s}}

  What lies outside is still explored, or the subspace could not be learned.

  Args:
    epsilon: Smoothing radius, in units of the parameters; > 0.
    num_probes: Directions n per step, >= 1. Costs 2n forward passes.
    rank: Columns r of W, from 1 to the smaller side of every matrix.
    rate: β of Sanger's rule, in (0, 1].
    identity: α, not negative.
    warmup: Steps t_w until the subspace counts in full, not negative.
    subspace_probes: Whether the directions are stretched along the subspace.
    direction: As in :func:`zorn_jax.central_difference`, and so are the rest.
    probe_map: As there.
    shaping: As there.
    batch_per_probe: As there.
  Returns:
    An :class:`Estimator` with losses of shape [n, 2], ordered (+, -), and a
    :class:`SangerState`.
  Raises:
    ValueError: If a number is out of its range, `shaping` is unknown or, in
      `init`, `rank` exceeds the smaller side of a matrix.
  Guarantees: the step has a positive product with the central difference's
    estimate, for α > 0. Not unbiased.
  References: Sanger (1989); the authors' code of arXiv:2505.17852.
  """
  if rank < 1:
    raise ValueError(f"rank must be positive, got {rank}. Choose 1 or more.")
  if not 0 < rate <= 1:
    raise ValueError(f"rate must lie in (0, 1], got {rate}. Choose 0.1.")
  if not identity >= 0 or not warmup >= 0:
    raise ValueError(
      f"identity and warmup must not be negative, got {identity}, {warmup}. "
      "Choose for example 1 and 100."
    )
  direction = direction or directions.rademacher()

  def make(direction):
    return central_difference(
      epsilon,
      num_probes,
      direction=direction,
      probe_map=probe_map,
      shaping=shaping,
      batch_per_probe=batch_per_probe,
    )

  base = make(direction)

  def probing(state):
    if not subspace_probes:
      return base
    project = lambda z: jax.tree.map(_probe_within, z, state.factors)
    return make(directions.mapped(direction, project))

  def init(params):
    key = jax.random.key(0)  # Any start will do: the rule forgets it.
    leaves, treedef = jax.tree.flatten(params)
    keys = [jax.random.fold_in(key, index) for index in range(len(leaves))]
    factors = [
      _init_factors(key, leaf, rank)
      for key, leaf in zip(keys, leaves, strict=True)
    ]
    return SangerState(
      jnp.zeros((), jnp.int32), jax.tree.unflatten(treedef, factors)
    )

  def query(loss_fn, params, batch, state, key):
    return probing(state).query(loss_fn, params, batch, (), key)

  def update(losses, params, state, key):
    estimate, _ = probing(state).update(losses, params, (), key)
    weight = jnp.minimum((state.step + 1) / max(warmup, 1), 1.0)

    def amplify(g, w):
      wide = g.astype(jnp.float32)
      return (identity * wide + weight * _within(wide, w)).astype(g.dtype)

    def keep(g, w):
      return amplify(g, w) if w.ndim > 1 else g

    grads = jax.tree.map(keep, estimate, state.factors)
    learn = lambda g, w: _sanger(g.astype(jnp.float32), w, rate)
    factors = jax.tree.map(learn, estimate, state.factors)
    return grads, SangerState(state.step + 1, factors)

  return base._replace(init=init, query=query, update=update, blocks=None)


def _init_factors(key, leaf, rank):
  if leaf.ndim < 2:
    return jnp.zeros(0)
  *leading, m, k = leaf.shape
  if rank > min(m, k):
    raise ValueError(
      f"rank must not exceed the smaller side of a matrix, got {rank=} and a "
      f"leaf of shape {leaf.shape}. Choose at most {min(m, k)}."
    )
  gaussian = jax.random.normal(key, (*leading, min(m, k), rank))
  return jnp.linalg.qr(gaussian)[0]


def _upright(g: jax.Array) -> jax.Array:
  """The matrix with its smaller side first."""
  return g.mT if g.shape[-2] > g.shape[-1] else g


def _within(g, w):
  """The part of a matrix in the subspace of its smaller side."""
  part = w @ (w.mT @ _upright(g))
  return part.mT if g.shape[-2] > g.shape[-1] else part


def _probe_within(z, w):
  if w.ndim < 2:
    return z
  side, rank = w.shape[-2:]
  stretched = z + (math.sqrt(side / rank) - 1) * _within(z, w)
  return stretched / math.sqrt(2 - rank / side)


def _sanger(g: jax.Array, w: jax.Array, rate: float) -> Any:
  """One step of Sanger's rule with C = G Gᵀ / ‖G‖²."""
  if w.ndim < 2:
    return w
  g = _upright(g)
  peak = jnp.max(jnp.abs(g))  # Its square may be too large.
  g = g / jnp.where(peak > 0, peak, 1.0)
  energy = jnp.sum(jnp.square(g), axis=(-2, -1), keepdims=True)
  image = g @ (g.mT @ w) / jnp.where(energy > 0, energy, 1.0)
  w = w + rate * (image - w @ jnp.triu(w.mT @ image))
  return w / jnp.linalg.norm(w, axis=-2, keepdims=True)
