"""The hash behind the signs, in operations that a kernel's compiler knows."""

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def threefry2x32(key, counter) -> tuple[jax.Array, jax.Array]:
  """Threefry-2x32 with 20 rounds.

  Args:
    key: Two uint32 arrays or scalars.
    counter: Two uint32 arrays of one shape.
  Returns:
    The two words of every counter.
  References: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2,
    3".
  """
  key = [jnp.asarray(part, jnp.uint32) for part in key]
  schedule = (*key, key[0] ^ key[1] ^ _PARITY)

  def four_rounds(group, carry):
    x, y, schedule, (now, other) = carry
    for rotation in now:
      x = x + y
      y = (y << rotation) | (y >> (np.uint32(32) - rotation))
      y = y ^ x
    first, second, third = schedule
    x, y = x + second, y + third + (group + 1).astype(jnp.uint32)
    return x, y, (second, third, first), (other, now)

  x, y = counter[0] + schedule[0], counter[1] + schedule[1]
  rotations = jax.tree.map(jnp.uint32, _ROTATIONS)
  # A loop, because compilers of kernels take hours over rounds in a row.
  x, y, *_ = jax.lax.fori_loop(0, 5, four_rounds, (x, y, schedule, rotations))
  return x, y


def word(key, index) -> jax.Array:
  """Word `index` (uint32) of what `jax.random.bits` draws from a key."""
  high, low = threefry2x32(key, (jnp.zeros_like(index), index))
  return high ^ low


def sign_bits(words: jax.Array) -> jax.Array:
  """[U, W] words -> uint32 [U, 32 W]: each bit where a float32 has its sign."""
  rows, columns = words.shape
  shape = (rows, columns, 32)
  shifts = np.uint32(31) - jax.lax.broadcasted_iota(jnp.uint32, shape, 2)
  spread = jnp.broadcast_to(words[:, :, None], shape) << shifts
  return (spread & np.uint32(1 << 31)).reshape(rows, 32 * columns)


def flipped(x: jax.Array, bits: jax.Array) -> jax.Array:
  """float32 [U, 1], negated where :func:`sign_bits` [U, K] are set, [U, K]."""
  known = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jax.lax.bitcast_convert_type(known ^ bits, jnp.float32)
