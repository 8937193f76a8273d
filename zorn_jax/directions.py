r"""Random directions z with E[z] = 0 and E[z zᵀ] = I, made from keys.

A :class:`Direction` is a policy: it draws a direction for a whole tree of
parameters, adds it to them, and sums many of them. Nothing is ever stored:
`combine` draws again what `sample` drew, because a direction is a pure function
of its probe's key. Every leaf folds its index into that key.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from zorn_jax import aggregators, perturbed, probe_map as probe_maps, types
from zorn_jax.tiles import BlockFn, Window

# (key, shape, window=None) -> float32 array: the block of the array of `shape`
# that the window, (starts, sizes) or a `Window`, names; all of it without one.
# Every element is the same, to the bit, in every window.
Draw = Callable[..., jax.Array]
SampleFn = Callable[[types.Key, types.Params], Any]
PerturbFn = Callable[[types.Params, Any, Any], types.Params]
CombineFn = Callable[..., types.Grads]
BlocksFn = Callable[..., types.PyTree]

# Directions that are added at once, so that the sum passes through memory less
# often. With small sums this saves less than it takes to compile.
_AT_ONCE = (4, 3, 2, 1)
_SMALL = 2**14


class Direction(NamedTuple):
  """A distribution of directions over trees of parameters.

  Attributes:
    sample: (key, params) -> z, a tree of arrays or factors. Depends only on
      the key and on the structure and shapes of `params`.
    perturb: (params, z, scale) -> params + scale z. Leaves may be
      :class:`zorn_jax.perturbed.Perturbed`.
    combine: (keys [n], coefficients [n], params, probe_map) -> the sum of
      coefficients[i] z_i, with the shapes and dtypes of `params`.
    blocks: The same arguments -> the same sum in parts: a tree of functions,
      one for each leaf, (window) -> a float32 block of it. None where the sum
      cannot be had in parts.
  """

  sample: SampleFn
  perturb: PerturbFn
  combine: CombineFn
  blocks: BlocksFn | None = None


class Factors(NamedTuple):
  """The direction Σ_r left_r right_rᵀ of a matrix leaf [..., m, k]."""

  left: jax.Array  # [..., r, m]
  right: jax.Array  # [..., r, k]


def check_key(key: types.Key) -> None:
  """Raises ValueError unless a key is a typed one of threefry.

  Other generators draw otherwise under `vmap`: queries and update, of which one
  maps over probes and the other goes through them, would not agree.
  """
  dtype = getattr(key, "dtype", None)
  if dtype is None:
    found = repr(key)
  elif not jnp.issubdtype(dtype, jax.dtypes.prng_key):
    found = f"an array of {dtype}"
  elif (name := str(jax.random.key_impl(key))) != "threefry2x32":
    found = f"one of {name}"
  else:
    return
  raise ValueError(
    f"a key has to be a typed one of threefry2x32, got {found}. Make keys by "
    "jax.random.key(seed), with the option jax_default_prng_impl as it is."
  )


def _whole(window, shape) -> bool:
  """Whether a window is known to be all of an array."""
  if window is None:
    return True
  return tuple(window[1]) == tuple(shape) and all(
    isinstance(start, int) for start in window[0]
  )


def _bits(key: types.Key, shape, window=None) -> jax.Array:
  """A block of `jax.random.bits(key, shape)`, uint32.

  Without the option `jax_threefry_partitionable`, which is on by default, bits
  depend on the number of those that are drawn.
  """
  check_key(key)
  if _whole(window, shape):
    return jax.random.bits(key, shape, jnp.uint32)
  if not jax.config.jax_threefry_partitionable:
    raise ValueError(
      "parts of a direction need the option jax_threefry_partitionable, which "
      "is off. Leave it on."
    )
  starts, sizes, *_ = window
  # XLA would not vectorise over short rows.
  high, low = (x.ravel() for x in _counters(shape, starts, sizes))
  words = jax.random.key_data(key)
  high, low = threefry2x32_p.bind(words[0], words[1], high, low)
  return (high ^ low).reshape(sizes)


def _counters(shape, starts, sizes):
  """Both words of the flat indices of a block, uint32."""
  high = low = jnp.zeros(sizes, jnp.uint32)
  small = math.prod(shape) <= 2**32
  for axis, start in enumerate(starts):
    stride = np.uint32(math.prod(shape[axis + 1 :]))
    place = jax.lax.broadcasted_iota(jnp.uint32, sizes, axis)
    place = place + jnp.asarray(start).astype(jnp.uint32)
    added = low + place * stride
    if not small:
      high = high + _high_word(place, stride) + (added < low)
    low = added
  return high, low


def _high_word(x, y):
  """The upper half of the product of two uint32."""
  (x0, x1), (y0, y1) = ((z & 0xFFFF, z >> 16) for z in (x, y))
  middle = (x0 * y0 >> 16) + (x0 * y1 & 0xFFFF) + (x1 * y0 & 0xFFFF)
  return x1 * y1 + (x0 * y1 >> 16) + (x1 * y0 >> 16) + (middle >> 16)


def signs(key: types.Key, shape: tuple[int, ...], window=None) -> jax.Array:
  """Draws ±1 with one random bit for each.

  Each block along the last axis is padded to whole 32-bit words, so that a
  leading index (a head, a row) owns its words: word w of row i is word
  `i * words + w` of the key's threefry stream, and its bit j (least significant
  first) is the sign of column 32 w + j; a set bit means -1.

  Args:
    key: A typed threefry key.
    shape: Shape of the whole.
    window: The block that is wanted, (starts, sizes) or a
      :class:`zorn_jax.tiles.Window`; None for all.
  Returns:
    float32 array of +1 and -1.
  Raises:
    ValueError: If the key is not one of threefry.
  """
  *leading, size = shape or (1,)
  stored = (*leading, -(-size // 32))
  if _whole(window, shape):
    return _signs_of(_bits(key, stored), size).reshape(shape)
  starts, sizes, aligned = Window(*window)
  first, shift, columns = starts[-1] // 32, starts[-1] % 32, sizes[-1]
  # Every 32 columns lie in two words.
  split = shift != 0 if isinstance(shift, int) else not aligned
  block = (*sizes[:-1], -(-columns // 32))
  words = _bits(key, stored, ((*starts[:-1], first), block))
  if split:  # Drawn twice: XLA would take a word from its neighbour slowly.
    above = _bits(key, stored, ((*starts[:-1], first + 1), block))
    shift = jnp.asarray(shift).astype(jnp.uint32)
    words = (words >> shift) | ((above << (31 - shift)) << 1)
  return _signs_of(words, columns)


def _signs_of(words: jax.Array, size: int) -> jax.Array:
  """The first signs of every row of words."""
  shifts = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, 32), words.ndim)
  bits = (words[..., None] >> shifts) & 1
  bits = bits.reshape(*words.shape[:-1], 32 * words.shape[-1])[..., :size]
  return 1 - 2 * bits.astype(jnp.float32)


def _between(key, shape, window, low, high):
  """As `jax.random.uniform` with these bounds, float32."""
  low, high = np.float32(low), np.float32(high)
  bits = _bits(key, shape, window)
  ones = np.float32(1).view(np.uint32)  # The exponent of [1, 2).
  floats = jax.lax.bitcast_convert_type((bits >> 9) | ones, jnp.float32) - 1
  return jnp.maximum(low, floats * (high - low) + low)


def _unit_uniform(key, shape, window=None):
  return _between(key, shape, window, -(3.0**0.5), 3.0**0.5)


def normals(key: types.Key, shape: tuple[int, ...], window=None) -> jax.Array:
  """As `jax.random.normal`, all of it or a block; see :func:`signs`."""
  above = np.nextafter(np.float32(-1), np.float32(0))
  uniform = _between(key, shape, window, above, 1)
  return np.float32(2**0.5) * jax.lax.erf_inv(uniform)


def _flatten(params):
  """The leaves in tree order, and the tree's structure."""
  leaves, treedef = jax.tree.flatten(params)
  for leaf in leaves:
    if not hasattr(leaf, "shape"):
      raise ValueError(
        f"parameters must be arrays, got {leaf!r}. Write jnp.asarray of it."
      )
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f"parameters must be floating-point, got a leaf of {dtype}. Keep other "
        "arrays out of the parameters."
      )
  return leaves, treedef


def _leaf_keys(key, params):
  """One key per leaf, in tree order."""
  leaves, treedef = _flatten(params)
  keys = [jax.random.fold_in(key, index) for index in range(len(leaves))]
  return jax.tree.unflatten(treedef, keys)


def _blocks(make: Callable[[types.Key, Any], BlockFn], keys, params):
  """The tree of make(the keys of a leaf [n], the leaf's shape)."""
  leaves, treedef = _flatten(params)
  fold_in = jax.vmap(jax.random.fold_in, (0, None))
  return jax.tree.unflatten(
    treedef,
    [make(fold_in(keys, i), leaf.shape) for i, leaf in enumerate(leaves)],
  )


def _weighted_sum(sample, keys, coefficients, add_up):
  """The sum of coefficients[i] sample(keys[i]), some of them at once."""
  leaves = jax.tree.leaves(jax.eval_shape(sample, keys[0]))
  small = sum(leaf.size for leaf in leaves) < _SMALL
  small &= jax.default_backend() != "gpu"  # There, a launch costs more.
  sizes = _AT_ONCE[-1:] if small else _AT_ONCE
  group = next(size for size in sizes if len(coefficients) % size == 0)

  def term(probes):
    keys, coefficients = probes
    weighted = lambda i: jax.tree.map(
      lambda z: coefficients[i] * z, sample(keys[i])
    )
    total = weighted(0)
    for i in range(1, group):
      total = jax.tree.map(jnp.add, total, weighted(i))
    return total

  groups = lambda x: x.reshape(-1, group)
  return add_up(term, (groups(keys), groups(coefficients)))


def _block_of(draw: Draw, keys, coefficients, shape) -> BlockFn:
  """The sum of dense directions of a leaf, streamed over the probes."""
  add_up = probe_maps.sequential().sum
  return lambda window: _weighted_sum(
    lambda key: draw(key, shape, window), keys, coefficients, add_up
  )


def _cast(total, params):
  return jax.tree.map(lambda x, p: x.astype(p.dtype), total, params)


def _add(leaf, z, scale):
  """leaf + scale z, rounded once."""
  wide = jnp.promote_types(leaf.dtype, jnp.float32)
  return (leaf.astype(wide) + scale * z).astype(leaf.dtype)


def _dense(draw: Draw, deferred: bool = False) -> Direction:
  def form(key, params):
    return jax.tree.map(
      lambda k, leaf: draw(k, leaf.shape), _leaf_keys(key, params), params
    )

  def perturb(params, z, scale):
    return jax.tree.map(lambda leaf, zi: _add(leaf, zi, scale), params, z)

  def defer(params, z, scale):
    scale = jnp.asarray(scale, jnp.float32)

    def add(leaf, key):
      keys, scales = key[None], scale[None]
      if not perturbed.is_deferred(leaf):
        return perturbed.Deferred(leaf, keys, scales, draw)
      keys = jnp.concatenate([leaf.keys, keys])
      scales = jnp.concatenate([leaf.scales, scales])
      return perturbed.Deferred(leaf.value, keys, scales, draw)

    return jax.tree.map(add, params, z, is_leaf=perturbed.is_deferred)

  def combine(keys, coefficients, params, probe_map=None):
    probe_map = probe_map or probe_maps.sequential()
    sample = lambda key: form(key, params)
    total = _weighted_sum(sample, keys, coefficients, probe_map.sum)
    return _cast(total, params)

  def blocks(keys, coefficients, params, probe_map=None):
    del probe_map
    make = lambda keys, shape: _block_of(draw, keys, coefficients, shape)
    return _blocks(make, keys, params)

  if deferred:
    return Direction(_leaf_keys, defer, combine, blocks)
  return Direction(form, perturb, combine, blocks)


def rademacher(deferred: bool = False) -> Direction:
  """Independent signs ±1 with equal probability, packed 32 to a word.

  Args:
    deferred: Whether `sample` draws nothing but the leaves' keys, and `perturb`
      returns :class:`zorn_jax.perturbed.Deferred` leaves, for a model that
      forms its parameters block by block; any other sees plain arrays.
  Returns:
    A :class:`Direction`.
  """
  return _dense(signs, deferred)


def normal(deferred: bool = False) -> Direction:
  """Independent standard normal entries; `deferred` as in `rademacher`."""
  return _dense(normals, deferred)


def uniform(deferred: bool = False) -> Direction:
  """Independent uniform entries on [-√3, √3], whose variance is 1.

  Args:
    deferred: As in :func:`rademacher`.
  Returns:
    A :class:`Direction`.
  """
  return _dense(_unit_uniform, deferred)


_DRAWS: dict[str, Draw] = {
  "rademacher": signs,
  "normal": normals,
  "uniform": _unit_uniform,
}


def _draw_of(base: str) -> Draw:
  if base not in _DRAWS:
    raise ValueError(
      f"unknown base of directions {base!r}. Choose one of {sorted(_DRAWS)}."
    )
  return _DRAWS[base]


def sparse(
  density: float, base: str = "rademacher", deferred: bool = False
) -> Direction:
  """Keeps each entry of a dense direction with probability `density`.

  Kept entries are divided by √density, so that E[z zᵀ] stays the identity.

  Args:
    density: Expected share of entries that are not zero, in (0, 1]; rounded up
      to a multiple of 2^-23.
    base: Name of the dense direction.
    deferred: As in :func:`rademacher`.
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
  # A chance has 23 bits: this is the share of those below the density.
  share = math.ceil(float(np.float32(density)) * 2**23) / 2**23

  def sparse_draw(key, shape, window=None):
    chance = _between(jax.random.fold_in(key, 1), shape, window, 0, 1)
    values = draw(jax.random.fold_in(key, 0), shape, window)
    kept = chance < np.float32(density)
    return jnp.where(kept, values * share**-0.5, 0.0)

  return _dense(sparse_draw, deferred)


def low_rank(rank: int = 1, base: str = "rademacher") -> Direction:
  r"""Directions of low rank for matrices: z = r^{-1/2} Σ_r a_r b_rᵀ.

  Leaves with at least two axes are matrices [..., m, k], each leading index
  with factors of its own; other leaves get the dense direction. For matrices
  `perturb` returns :class:`zorn_jax.perturbed.Perturbed` leaves, whose parts
  are what functions of trees see: a norm of all parameters takes
  :func:`zorn_jax.materialize` first. With rank one and signs, every entry of z
  is ±1 and the relative squared error of the estimate is exactly that of dense
  signs.

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

  def factors(key, shape, window=None):
    """Those of a matrix, or only what a window of it needs."""
    *leading, m, k = shape
    rows = columns = None
    if window is not None:
      starts, sizes, aligned = Window(*window)
      *before, row, column = starts
      *blocks, height, width = sizes
      rows = Window((*before, 0, row), (*blocks, rank, height))
      columns = Window((*before, 0, column), (*blocks, rank, width), aligned)
    left = draw(jax.random.fold_in(key, 0), (*leading, rank, m), rows)
    right = draw(jax.random.fold_in(key, 1), (*leading, rank, k), columns)
    return Factors(left * rank**-0.5, right)

  def draw_leaf(key, leaf):
    return (draw if leaf.ndim < 2 else factors)(key, leaf.shape)

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

  def blocks(keys, coefficients, params, probe_map=None):
    del probe_map  # The factors of all probes are small: one GEMM sums them.

    def of_leaf(keys, shape):
      if len(shape) < 2:
        return _block_of(draw, keys, coefficients, shape)

      def block(window):
        z = jax.vmap(lambda key: factors(key, shape, window))(keys)
        weighted = jnp.einsum("n,n...->n...", coefficients, z.left)
        return jnp.einsum("n...rm,n...rk->...mk", weighted, z.right)

      return block

    return _blocks(of_leaf, keys, params)

  def combine(keys, coefficients, params, probe_map=None):
    sums = blocks(keys, coefficients, params, probe_map)
    return _cast(jax.tree.map(lambda block: block(None), sums), params)

  return Direction(sample, perturb, combine, blocks)


def _arrays(z):
  """A direction whose low-rank leaves are formed."""
  if any(
    jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(z)
  ):
    raise ValueError(
      "a deferred direction is never formed, which this needs. Leave out "
      "deferred=True."
    )
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
    return _cast(linear(wide), params)

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
    size = max(1.0, float(sum(leaf.size for leaf in leaves)))
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

  def scaled(add_up):
    def add(keys, coefficients, params, probe_map=None):
      probe_map = probe_map or probe_maps.sequential()
      scales = probe_map.map(
        lambda key: stretch(direction.sample(key, params)), keys
      )
      return add_up(keys, coefficients * scales, params, probe_map)

    return add

  return Direction(
    sample,
    perturb,
    scaled(direction.combine),
    scaled(direction.blocks) if direction.blocks else None,
  )


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

  return direction._replace(combine=combine, blocks=None)
