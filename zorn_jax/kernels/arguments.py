"""What a layer over time takes: checked, and with one axis of members."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

GATES = 4
_DTYPES = ("float32", "bfloat16")


class Dense(NamedTuple):
  """R + scale S, with the signs S of `directions.signs(key, R.shape)`.

  Attributes:
    key_data: `jax.random.key_data` of the threefry keys of P directions,
      uint32 [P, 2].
    scales: float32 [S], for the S members of each direction.
  """

  key_data: jax.Array
  scales: jax.Array


class LowRank(NamedTuple):
  """R + scale Σ_k left_k right_kᵀ, which is never formed.

  Attributes:
    left: [P, G, N, k, D].
    right: [P, G, N, k, D].
    scales: float32 [S], for the S members of each of P directions.
  """

  left: jax.Array
  right: jax.Array
  scales: jax.Array


class Lookup(NamedTuple):
  """Projected inputs that are rows of a table, which the kernel fetches.

  Each member may have a table of its own, or it is table + Σ_k left_k right_kᵀ
  with factors of its own, which is never formed.

  Attributes:
    table: [V, N, G, D], or each member's own [P, S, V, N, G, D].
    tokens: int32 [B, T] in [0, V), or each member's own [P, S, B, T].
    left: [P, S, k, V], or None.
    right: [P, S, k, N, G, D], or None.
  """

  table: jax.Array
  tokens: jax.Array
  left: jax.Array | None = None
  right: jax.Array | None = None


class Arguments(NamedTuple):
  """Of M = P S members; those of a direction are neighbours.

  Attributes:
    x: [M, B, T, N, G, D], or with tokens the table [M or 1, V, N, G, D].
    tokens: int32 [M or 1, B, T], or None.
    factors: Of the table, [M, k, V] and [M, k, N, G, D], or None.
    r: [G, N, D, D], out by in.
    b: [M or 1, G, N, D].
    h: float32 [M, B, N, D].
    c: float32 [M, B, N, D].
    perturbation: Dense, LowRank or None.
  """

  x: jax.Array
  tokens: jax.Array | None
  factors: tuple[jax.Array, jax.Array] | None
  r: jax.Array
  b: jax.Array
  h: jax.Array
  c: jax.Array
  perturbation: Dense | LowRank | None

  @property
  def length(self) -> int:
    return (self.x if self.tokens is None else self.tokens).shape[2]

  @property
  def padded_factors(self) -> int:
    """Of all gates and of the table, padded to what a product takes."""
    given = self.perturbation
    count = 0 if self.factors is None else self.factors[0].shape[1]
    if isinstance(given, LowRank):
      count += GATES * given.left.shape[3]
    return max(16, 1 << (count - 1).bit_length()) if count else 0


def check(x_proj, r, b, carry, perturbation) -> Arguments:
  """Checks what `lstm` was given, and merges the axes of its members."""
  if r.ndim != 4 or r.shape[0] != GATES or r.shape[2] != r.shape[3]:
    raise ValueError(
      f"r must have the shape [{GATES}, N, D, D], got {r.shape}. Give one "
      "matrix for each gate and head."
    )
  gates, heads, head = r.shape[:3]
  lead = () if perturbation is None else _members(r, perturbation)

  def merged(name, array, *shape, shared=True):
    """[M or 1, shape...]; None stands for any size."""
    fits = lambda want: (
      len(want) == array.ndim
      and all(
        size in (None, had) for size, had in zip(want, array.shape, strict=True)
      )
    )
    if lead and fits((*lead, *shape)):
      return array.reshape(-1, *array.shape[len(lead) :])
    if (shared or not lead) and fits(shape):
      return array[None]
    text = lambda sizes: (
      f"[{', '.join('?' if x is None else str(x) for x in sizes)}]"
    )
    known = text((*lead, *shape))
    known += f" or {text(shape)}" if lead and shared else ""
    raise ValueError(
      f"{name} must have the shape {known} to agree with r {r.shape}"
      f"{f' and {lead} members' if lead else ''}, got {array.shape}. Order the "
      "axes as `lstm` says."
    )

  factors = None
  if isinstance(x_proj, Lookup):
    x = merged("table", x_proj.table, None, heads, gates, head)
    if x_proj.left is not None and x_proj.right is not None:
      rank = x_proj.left.shape[-2]
      factors = (
        merged("left", x_proj.left, rank, x.shape[1], shared=False),
        merged("right", x_proj.right, rank, heads, gates, head, shared=False),
      )
    tokens = merged("tokens", x_proj.tokens, None, None)
    if tokens.dtype != jnp.int32:
      raise ValueError(f"tokens must be int32, got {tokens.dtype}. Cast them.")
    batch, length = tokens.shape[1:]
  else:
    shape = (None, None, heads, gates, head)
    x, tokens = merged("x_proj", x_proj, *shape, shared=False), None
    batch, length = x.shape[1:3]
  _check_floating(x_proj=x, r=r)
  if not batch or not length:
    raise ValueError(
      f"x_proj must have rows and tokens, got {batch} rows of {length}. Give "
      "at least one of each."
    )
  states = [
    merged(name, state, batch, heads, head, shared=False)
    for name, state in zip("hc", carry, strict=True)
  ]
  for name, state in zip("hc", states, strict=True):
    if state.dtype != jnp.float32:
      raise ValueError(
        f"{name} of the carry must be float32, got {state.dtype}. Cast it."
      )
  b = merged("b", b, gates, heads, head)
  return Arguments(x, tokens, factors, r, b, *states, perturbation)


def _check_floating(**arrays):
  for name, array in arrays.items():
    if array.dtype.name not in _DTYPES:
      raise ValueError(
        f"{name} must be one of {', '.join(_DTYPES)}, got {array.dtype}. Cast "
        "it."
      )


def _members(r, perturbation) -> tuple[int, int]:
  """The numbers of directions and of their members, of what agrees with r."""
  scales = perturbation.scales
  if scales.ndim != 1 or not scales.size or scales.dtype != jnp.float32:
    raise ValueError(
      f"scales must be float32 [S], got {scales.dtype} {scales.shape}. Give "
      "one for each member of a direction."
    )
  if isinstance(perturbation, Dense):
    keys = perturbation.key_data
    if keys.ndim != 2 or keys.shape[1] != 2 or keys.dtype != jnp.uint32:
      raise ValueError(
        f"key_data must be uint32 [P, 2], got {keys.dtype} {keys.shape}. Take "
        "`jax.random.key_data` of threefry keys."
      )
    return len(keys), len(scales)
  gates, heads, head = r.shape[:3]
  left, right = perturbation.left, perturbation.right
  if (
    left.ndim != 5
    or left.shape != right.shape
    or left.shape[1:3] != (gates, heads)
    or left.shape[4] != head
  ):
    raise ValueError(
      f"left and right must have the shape [P, {gates}, {heads}, k, {head}] to "
      f"agree with r {r.shape}, got {left.shape} and {right.shape}. Give "
      "factors of each gate and head."
    )
  return len(left), len(scales)
