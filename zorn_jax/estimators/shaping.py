r"""Turns estimated slopes into the coefficients of their directions.

A slope is the estimated derivative of the loss along one direction. Every
function here maps slopes [n] to coefficients [n], without the 1/n of the mean.
"none" keeps the estimate unbiased; the others trade the scale of the gradient
for robustness, and want an optimiser that sets its own scale.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (slopes [n], which of them count [n]) -> coefficients [n]. Slopes that do not
# count are zero.
Shaping = Callable[[jax.Array, jax.Array], jax.Array]


def none(slopes, counts):
  """The slopes themselves."""
  del counts
  return slopes


def std(slopes, counts, clip: float = 3.0):
  """Slopes in units of their standard deviation, clipped to ±`clip`.

  A slope and its negative are equally likely draws, so that the deviation is
  measured about zero. References: FZOO, arXiv:2506.09034.
  """
  variance = jnp.sum(jnp.square(slopes)) / jnp.maximum(jnp.sum(counts), 1)
  deviation = jnp.sqrt(variance)
  return jnp.clip(slopes / jnp.where(deviation > 0, deviation, 1), -clip, clip)


def ranks(slopes, counts):
  """The sign of each slope times the rank of its size, in (0, 1]."""
  size = jnp.where(counts, jnp.abs(slopes), -1)  # Those that do not come first.
  rank = jnp.argsort(jnp.argsort(size)) + 1 - jnp.sum(~counts)
  return jnp.sign(slopes) * rank * _share(counts)


def sign(slopes, counts):
  """The sign of each slope."""
  del counts
  return jnp.sign(slopes)


SHAPINGS: dict[str, Shaping] = {
  "none": none,
  "std": std,
  "ranks": ranks,
  "sign": sign,
}


def coefficients(slopes: jax.Array, shaping: str) -> jax.Array:
  """Shapes the slopes and averages over the probes with a finite slope.

  Args:
    slopes: float32 [n]; a probe whose slope is not finite gets weight zero.
    shaping: A name in `SHAPINGS`.
  Returns:
    float32 [n], such that the gradient estimate is the sum of
    coefficients[i] z_i; all zero where no slope is finite.
  """
  finite = jnp.isfinite(slopes)
  shaped = SHAPINGS[shaping](jnp.where(finite, slopes, 0.0), finite)
  return jnp.where(finite, shaped, 0.0) * _share(finite)


def _share(counts):
  """One over how many count; 1 where none does.

  XLA divides by it, or multiplies, as it finds best: on one device otherwise
  than on several.
  """
  return 1.0 / jnp.maximum(jnp.sum(counts), 1)


def check(shaping: str) -> None:
  """Raises ValueError if `shaping` is unknown."""
  if shaping not in SHAPINGS:
    raise ValueError(
      f"unknown shaping {shaping!r}. Choose one of {sorted(SHAPINGS)}."
    )
