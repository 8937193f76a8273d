"""What watches the loss: smaller steps on a plateau, a halt on an explosion."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Control(NamedTuple):
  """State of the watch, part of the training state.

  Attributes:
    scale: Multiplies the learning rate, float32; what the search found and the
      roll-backs left of it.
    average: Moving average of the loss, float32; NaN before the first.
    peak: Largest average so far, float32.
    exploded: Whether the loss exploded, after which the step is not to be
      trusted until the run is rolled back.
    plateau: State of optax's `reduce_on_plateau`; `()` without one.
  """

  scale: jax.Array
  average: jax.Array
  peak: jax.Array
  exploded: jax.Array
  plateau: Any


class Watch(NamedTuple):
  """How the loss is watched.

  Attributes:
    explosion: The loss has exploded above this multiple of its average, or of
      a tenth of the largest average where that is more; 0 to let it. A step
      without a finite loss or gradient has exploded in any case.
    max_rollbacks: Roll-backs in a row before the run gives up.
    plateau: optax's `reduce_on_plateau`; None for a scale that stays.
  """

  explosion: float = 0.0
  max_rollbacks: int = 5
  plateau: optax.GradientTransformationExtraArgs | None = None


_DECAY = 0.95  # Of the average; a jump is measured against some 20 steps.
_FLOOR = 0.1  # Losses near zero double often, and harmlessly.


def init(watch: Watch) -> Control:
  """The state before the first step."""
  return Control(
    jnp.ones((), jnp.float32),
    jnp.full((), jnp.nan, jnp.float32),
    jnp.zeros((), jnp.float32),
    jnp.zeros((), bool),
    watch.plateau.init(jnp.zeros(())) if watch.plateau else (),
  )


def scale(control: Control) -> jax.Array:
  """What the learning rate is multiplied with."""
  if not control.plateau:
    return control.scale
  return control.scale * control.plateau.scale


def observe(
  watch: Watch, control: Control, loss: jax.Array, grad_norm: jax.Array
) -> Control:
  """Takes a step's loss, NaN where no query was finite, and gradient norm."""
  known = jnp.isfinite(control.average)
  finite = jnp.isfinite(loss)
  exploded = control.exploded | ~finite | ~jnp.isfinite(grad_norm)
  if watch.explosion:
    usual = jnp.maximum(control.average, _FLOOR * control.peak)
    exploded = exploded | (loss > watch.explosion * usual)
  average = _DECAY * control.average + (1 - _DECAY) * loss
  average = jnp.where(known, average, loss)
  # What exploded is no measure of what comes.
  average = jnp.where(exploded, control.average, average)
  peak = jnp.fmax(control.peak, average)
  plateau = control.plateau
  if watch.plateau:
    value = jnp.where(finite, loss, jnp.inf)
    _, plateau = watch.plateau.update((), plateau, value=value)
  return Control(control.scale, average, peak, exploded, plateau)
