"""The readout of a population, and its logits compared with targets."""

import jax
import jax.numpy as jnp

from zorn_jax import perturbed
from zorn_jax.models import population
from zorn_jax.models.population import Trail

# Bytes of the rows of a readout that are formed, or whose logits are held, at
# once.
_BLOCK_BYTES = 2**24

# Bytes of a block that is formed and used while it is in the cache of one core.
_CACHED_BYTES = 2**20


def compare(logits: jax.Array, targets: jax.Array):
  """Cross-entropies in nats, and whether the target's logit is the largest.

  Args:
    logits: [C, V, trail...].
    targets: [C, trail...].
  Returns:
    Both [C, trail...].
  """
  tokens = _along_vocabulary(jnp.arange(logits.shape[1]), targets)
  peak = jax.lax.stop_gradient(logits.max(1))
  total = jnp.sum(jnp.exp(logits - peak[:, None]), axis=1)
  hit = tokens == targets[:, None]
  target = jnp.sum(jnp.where(hit, logits, 0.0), axis=1)
  right = jnp.argmax(logits, axis=1) == targets
  return peak + jnp.log(total) - target, right


def _along_vocabulary(tokens, targets):
  """Tokens [1, V, ...] beside targets [C, 1, trail...]."""
  return tokens.reshape(1, -1, *(1,) * (targets.ndim - 1))


def zeros(layout: Trail, length: int, weights):
  """The sums of :func:`adder` before the first of the heads."""
  leaf, axes = weights
  total = jnp.zeros((length, leaf.shape[0], *layout.shape), jnp.float32)
  if not perturbed.is_perturbed(leaf):
    return total, None
  shape = (length, leaf.right.shape[-2], *layout.shape)
  return total, jnp.zeros(shape, jnp.float32)


def adder(layout: Trail, weights, axes):
  """Adds what some outputs [N, D, trail...] contribute to step t.

  The sums are W h for all members and, for each rank, the inner product of its
  right factor and h.
  """
  w = population.matrix(layout, weights, axes)

  def add(total, t, h):
    logits, mixed = total
    flat = h.reshape(-1, *h.shape[2:])
    logits = _add_at(logits, t, population.multiply(layout, w.value, flat))
    if w.right is not None:
      right = w.right.reshape(len(w.right), *h.shape[:2], *w.right.shape[2:])
      parts = population.inner(layout, right, h[None])  # [r, N, trail...]
      mixed = _add_at(mixed, t, parts.sum(1))
    return logits, mixed

  return add


def _add_at(total, t, x):
  old = jax.lax.dynamic_index_in_dim(total, t)
  return jax.lax.dynamic_update_slice_in_dim(total, old + x[None], t, 0)


def is_large(layout: Trail, weights, width: int) -> bool:
  """Whether so many columns of a deferred W would not stay in a cache."""
  formed = perturbed.is_deferred(weights)
  return formed and weights.shape[0] > _rows(layout, width)


def _rows(layout, width):
  """How many rows of some columns are formed at once, and stay in a cache."""
  return max(1, _CACHED_BYTES // (4 * width * layout.beside))


def add_large(layout: Trail, weights, columns: perturbed.Part, total, x):
  """Adds what x [C, K, trail...] contributes by some columns of W.

  All steps of time are multiplied with a block of rows while it is there: one
  step after another would read the columns again and again.

  Args:
    layout: The trail.
    weights: W [V, H], deferred.
    columns: Which of them, K in number.
    total: As :func:`zeros` has it.
    x: Outputs.
  Returns:
    The new total.
  """
  vocab, width = weights.shape[0], columns.size
  blocks = -(-vocab // _rows(layout, width))
  size = -(-vocab // blocks)
  sums, _ = total

  def add(index, sums):
    # The last block begins earlier where the size does not divide.
    start = jnp.minimum(index * size, vocab - size)
    rows = perturbed.cut(weights, perturbed.Part(-2, start, size), columns)
    y = population.multiply(layout, rows, x)
    if vocab % size:
      fresh = start + jnp.arange(size) >= index * size
      y = jnp.where(fresh.reshape(1, size, *(1,) * (y.ndim - 2)), y, 0.0)
    old = jax.lax.dynamic_slice_in_dim(sums, start, size, 1)
    return jax.lax.dynamic_update_slice_in_dim(sums, old + y, start, 1)

  return jax.lax.fori_loop(0, blocks, add, sums), None


def logits(layout: Trail, weights, axes, total) -> jax.Array:
  """The logits [C, V, trail...] of the sums over all heads."""
  value, mixed = total
  if mixed is None:
    return value
  w = population.matrix(layout, weights, axes)
  return population.correct(layout, value, w.left, mixed)


def compare_blocks(layout: Trail, x, weights, axes, bias, targets):
  """:func:`compare` of W x + b, a block of the vocabulary at a time.

  Args:
    layout: The trail.
    x: [C, H, trail...].
    weights: W [V, H], an array, Perturbed or deferred.
    axes: Its axes.
    bias: b [V, trail...].
    targets: [C, trail...].
  """
  vocab, width = weights.shape
  formed = perturbed.is_deferred(weights)
  row = width if formed else len(x) * x[0, 0].size
  size = min(vocab, max(1, _BLOCK_BYTES // (4 * row)))
  blocks = -(-vocab // size)
  size = -(-vocab // blocks)

  mixed = None
  if perturbed.is_perturbed(weights):  # The same for all rows.
    right = layout.place(weights.right, axes.right)
    mixed = population.inner(layout, right, x[:, None])

  def of_rows(start):
    rows = weights
    if blocks > 1:
      rows = perturbed.cut(weights, perturbed.Part(-2, start, size))
    w = population.matrix(layout, rows, axes)
    y = population.multiply(layout, w.value, x)
    if mixed is not None:
      y = population.correct(layout, y, w.left, mixed)
    return y + jax.lax.dynamic_slice_in_dim(bias, start, size)[None]

  if blocks == 1:
    return compare(of_rows(0), targets)

  def reduce(state, index):
    peak, total, target, best = state
    # The last block begins earlier where the size does not divide.
    start = jnp.minimum(index * size, vocab - size)
    tokens = _along_vocabulary(start + jnp.arange(size), targets)
    values = jnp.where(tokens >= index * size, of_rows(start), -jnp.inf)
    highest = values.max(1)
    best = jnp.where(highest > peak, start + values.argmax(1), best)
    new = jnp.maximum(peak, highest)
    total = total * jnp.exp(peak - new)
    total = total + jnp.sum(jnp.exp(values - new[:, None]), axis=1)
    hit = (tokens == targets[:, None]) & (tokens >= index * size)
    target = target + jnp.sum(jnp.where(hit, values, 0.0), axis=1)
    return (new, total, target, best), None

  shape = (len(x), *jnp.broadcast_shapes(targets.shape[1:], x.shape[2:]))
  zero = jnp.zeros(shape, jnp.float32)
  start = (jnp.full(shape, -jnp.inf), zero, zero, jnp.zeros(shape, jnp.int32))
  body = jax.checkpoint(reduce)
  peak, total, target, best = jax.lax.scan(body, start, jnp.arange(blocks))[0]
  return peak + jnp.log(total) - target, best == targets
