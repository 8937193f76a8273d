r"""Random directions z with E[z] = 0 and E[z zᵀ] = I, made from keys.

A :class:`Direction` is a policy: it draws a direction for a whole tree of
parameters, adds it to them, and sums many of them. Nothing is ever stored:
`combine` draws again what `sample` drew, because a direction is a pure function
of its probe's key. Every leaf folds its index into that key.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax import aggregators, perturbed, probe_map as probe_maps, types

# (key, shape) -> float32 array.
Draw = Callable[[types.Key, tuple[int, ...]], jax.Array]
SampleFn = Callable[[types.Key, types.Params], Any]
PerturbFn = Callable[[types.Params, Any, Any], types.Params]
CombineFn = Callable[..., types.Grads]


class Direction(NamedTuple):
  """A distribution of directions over trees of parameters.

  Attributes:
    sample: (key, params) -> z, a tree of arrays or factors. Depends only on
      the key and on the structure and shapes of `params`.
    perturb: (params, z, scale) -> params + scale z. Leaves may be
      :class:`zorn_jax.perturbed.Perturbed`.
    combine: (keys [n], coefficients [n], params, probe_map) -> the sum of
      coefficients[i] z_i, with the shapes and dtypes of `params`.
  """

  sample: SampleFn
  perturb: PerturbFn
  combine: CombineFn


class Factors(NamedTuple):
  """The direction Σ_r left_r right_rᵀ of a matrix leaf [..., m, k]."""

  left: jax.Array  # [..., r, m]
  right: jax.Array  # [..., r, k]


def signs(key: types.Key, shape: tuple[int, ...]) -> jax.Array:
  """Draws ±1 with one random bit for each.

  Each block along the last axis is padded to whole 32-bit words, so that a
  leading index (a head, a row) owns its words: word w of row i is word
  `i * words + w` of the key's threefry stream, and its bit j (least significant
  first) is the sign of column 32 w + j; a set bit means -1.

  Args:
    key: A typed threefry key.
    shape: Shape of the result.
  Returns:
    float32 array of +1 and -1.
  """
  *leading, size = shape or (1,)
  words = jax.random.bits(key, (*leading, -(-size // 32)), jnp.uint32)
  shifts = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, 32), words.ndim)
  bits = (words[..., None] >> shifts) & 1
  bits = bits.reshape(*leading, -1)[..., :size].reshape(shape)
  return 1 - 2 * bits.astype(jnp.float32)


def _unit_uniform(key, shape):
  return jax.random.uniform(
    key, shape, jnp.float32, minval=-(3.0**0.5), maxval=3.0**0.5
  )


def _normal(key, shape):
  return jax.random.normal(key, shape, jnp.float32)


def _leaf_keys(key, params):
  """One key per leaf, in tree order."""
  leaves, treedef = jax.tree.flatten(params)
  for dtype in map(jnp.result_type, leaves):
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"parameters must be floating-point, got a leaf of {dtype}. Keep other "
        "arrays out of the parameters."
      )
  keys = [jax.random.fold_in(key, index) for index in range(len(leaves))]
  return jax.tree.unflatten(treedef, keys)


def _add(leaf, z, scale):
  """leaf + scale z, rounded once."""
  wide = jnp.promote_types(leaf.dtype, jnp.float32)
  return (leaf.astype(wide) + scale * z).astype(leaf.dtype)


def _dense(draw: Draw) -> Direction:
  def sample(key, params):
    return jax.tree.map(
      lambda k, leaf: draw(k, leaf.shape), _leaf_keys(key, params), params
    )

  def perturb(params, z, scale):
    return jax.tree.map(lambda leaf, zi: _add(leaf, zi, scale), params, z)

  def combine(keys, coefficients, params, probe_map=None):
    probe_map = probe_map or probe_maps.sequential()

    def term(probe):
      key, coefficient = probe
      return jax.tree.map(lambda z: coefficient * z, sample(key, params))

    total = probe_map.sum(term, (keys, coefficients))
    return jax.tree.map(lambda x, p: x.astype(p.dtype), total, params)

  return Direction(sample, perturb, combine)


def rademacher() -> Direction:
  """Independent signs ±1 with equal probability, packed 32 to a word."""
  return _dense(signs)


def normal() -> Direction:
  """Independent standard normal entries."""
  return _dense(_normal)


def uniform() -> Direction:
  """Independent uniform entries on [-√3, √3], whose variance is 1."""
  return _dense(_unit_uniform)


_DRAWS: dict[str, Draw] = {
  "rademacher": signs,
  "normal": _normal,
  "uniform": _unit_uniform,
}


def _draw_of(base: str) -> Draw:
  if base not in _DRAWS:
    raise ValueError(
      f"unknown base of directions {base!r}. Choose one of {sorted(_DRAWS)}."
    )
  return _DRAWS[base]


def sparse(density: float, base: str = "rademacher") -> Direction:
  """Keeps each entry of a dense direction with probability `density`.

  Kept entries are divided by √density, so that E[z zᵀ] stays the identity.

  Args:
    density: Expected share of entries that are not zero, in (0, 1].
    base: Name of the dense direction.
  Returns:
    A :class:`Direction`.
  Raises:
    ValueError: If `density` is outside (0, 1] or `base` is unknown.
  """
  if not 0 < density <= 1:
    raise ValueError(
      f"density must lie in (0, 1], got {density}. Choose for example 0.5."
    )
  draw = _draw_of(base)

  def sparse_draw(key, shape):
    kept = jax.random.bernoulli(jax.random.fold_in(key, 1), density, shape)
    values = draw(jax.random.fold_in(key, 0), shape)
    return jnp.where(kept, values * density**-0.5, 0.0)

  return _dense(sparse_draw)


def low_rank(rank: int = 1, base: str = "rademacher") -> Direction:
  r"""Directions of low rank for matrices: z = r^{-1/2} Σ_r a_r b_rᵀ.

  Leaves with at least two axes are matrices [..., m, k], each leading index
  with factors of its own; other leaves get the dense direction. For matrices
  `perturb` returns :class:`zorn_jax.perturbed.Perturbed` leaves. With rank one
  and signs, every entry of z is ±1 and the relative squared error of the
  estimate is exactly that of dense signs.

  Args:
    rank: Number r of factor pairs, at least 1.
    base: Distribution of the factors' entries.
  Returns:
    A :class:`Direction`.
  Raises:
    ValueError: If `rank` is not positive or `base` is unknown.
  References: arXiv:2511.16652 (normal factors, evolution strategies).
  """
  if rank < 1:
    raise ValueError(f"rank must be positive, got {rank}. Choose 1 or more.")
  draw = _draw_of(base)

  def draw_leaf(key, leaf):
    if leaf.ndim < 2:
      return draw(key, leaf.shape)
    *leading, m, k = leaf.shape
    left = draw(jax.random.fold_in(key, 0), (*leading, rank, m))
    right = draw(jax.random.fold_in(key, 1), (*leading, rank, k))
    return Factors(left * rank**-0.5, right)

  def sample(key, params):
    return jax.tree.map(draw_leaf, _leaf_keys(key, params), params)

  def perturb(params, z, scale):
    def add(leaf, zi):
      if isinstance(leaf, perturbed.Perturbed):
        left = [leaf.scale * leaf.left, scale * zi.left]
        right = [leaf.right, zi.right]
        factors = (jnp.concatenate(pair, axis=-2) for pair in (left, right))
        return perturbed.Perturbed(leaf.value, *factors, jnp.ones(()))
      if isinstance(zi, Factors):
        return perturbed.Perturbed(leaf, zi.left, zi.right, jnp.asarray(scale))
      return _add(leaf, zi, scale)

    return jax.tree.map(add, params, z, is_leaf=perturbed.is_perturbed)

  def combine(keys, coefficients, params, probe_map=None):
    del probe_map  # The factors of all probes are small: one GEMM sums them.

    def add_up(leaf, z):
      if isinstance(z, Factors):
        weighted = jnp.einsum("n,n...->n...", coefficients, z.left)
        total = jnp.einsum("n...rm,n...rk->...mk", weighted, z.right)
      else:
        total = jnp.einsum("n,n...->...", coefficients, z)
      return total.astype(leaf.dtype)

    stacked = jax.vmap(lambda key: sample(key, params))(keys)
    return jax.tree.map(add_up, params, stacked)

  return Direction(sample, perturb, combine)


def _arrays(z):
  """A direction whose low-rank leaves are formed."""
  form = lambda zi: (
    jnp.einsum("...rm,...rk->...mk", *zi) if isinstance(zi, Factors) else zi
  )
  return jax.tree.map(form, z, is_leaf=lambda zi: isinstance(zi, Factors))


def mapped(
  direction: Direction, linear: Callable[[types.PyTree], types.PyTree]
) -> Direction:
  """The directions `linear(z)`, formed as plain arrays.

  Args:
    direction: Distribution of z.
    linear: A linear function of trees of float32 arrays shaped as the
      parameters. It may close over traced arrays.
  Returns:
    A :class:`Direction`; E[z zᵀ] is the identity only if `linear` is
    orthogonal.
  """

  def sample(key, params):
    return linear(_arrays(direction.sample(key, params)))

  def perturb(params, z, scale):
    return jax.tree.map(lambda leaf, zi: _add(leaf, zi, scale), params, z)

  def combine(keys, coefficients, params, probe_map=None):
    total = direction.combine(keys, coefficients, params, probe_map)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), total)
    return jax.tree.map(lambda x, p: x.astype(p.dtype), linear(wide), params)

  return Direction(sample, perturb, combine)


def normalized(direction: Direction, norm: str = "l2") -> Direction:
  """Gives every direction the same length, over all leaves together.

  With d parameters "l2" makes ‖z‖₂ = √d and "l1" makes ‖z‖₁ = d, so that
  epsilon keeps its meaning. `normalized(normal())` is uniform on a sphere;
  signs are normalised already.

  Args:
    direction: Distribution before normalisation. Low-rank directions are
      formed.
    norm: "l2" or "l1".
  Returns:
    A :class:`Direction`.
  Raises:
    ValueError: If `norm` is unknown.
  """
  if norm not in ("l1", "l2"):
    raise ValueError(f"unknown norm {norm!r}. Choose l1 or l2.")

  def stretch(z):
    leaves = jax.tree.leaves(_arrays(z))
    size = float(sum(leaf.size for leaf in leaves))
    if norm == "l1":
      ratio = sum(jnp.sum(jnp.abs(leaf)) for leaf in leaves) / size
    else:
      ratio = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in leaves) / size)
    # A sparse direction may be zero, and stays so.
    return jnp.where(ratio > 0, 1 / jnp.where(ratio > 0, ratio, 1.0), 0.0)

  def sample(key, params):
    z = direction.sample(key, params)
    scale = stretch(z)
    return jax.tree.map(lambda zi: scale * zi, _arrays(z))

  def perturb(params, z, scale):
    return jax.tree.map(lambda leaf, zi: _add(leaf, zi, scale), params, z)

  def combine(keys, coefficients, params, probe_map=None):
    probe_map = probe_map or probe_maps.sequential()
    scales = probe_map.map(
      lambda key: stretch(direction.sample(key, params)), keys
    )
    return direction.combine(keys, coefficients * scales, params, probe_map)

  return Direction(sample, perturb, combine)


def grouped(
  direction: Direction, aggregator: aggregators.Aggregator, groups: int
) -> Direction:
  """Sums the probes of each group, then aggregates the groups' means.

  Args:
    direction: Distribution of z.
    aggregator: Turns the groups' gradients into one.
    groups: Number of groups; it must divide the number of probes.
  Returns:
    A :class:`Direction`; with `aggregators.mean()` the same as `direction`.
  Raises:
    ValueError: If `groups` is not positive, or, in `combine`, does not divide
      the number of probes.
  """
  if groups < 1:
    raise ValueError(
      f"groups must be positive, got {groups}. Choose 1 or more."
    )

  def combine(keys, coefficients, params, probe_map=None):
    if len(coefficients) % groups:
      raise ValueError(
        f"groups must divide the number of probes, got {groups=} and "
        f"{len(coefficients)} probes. Choose a divisor."
      )

    def group(index):
      # The coefficients hold the 1/n of the mean over all probes.
      part = lambda x: x.reshape(groups, -1)[index]
      return direction.combine(
        part(keys), groups * part(coefficients), params, probe_map
      )

    return aggregator(group, jnp.arange(groups))

  return direction._replace(combine=combine)
