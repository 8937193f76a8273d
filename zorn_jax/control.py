"""What the loss decides: smaller steps, a halt, or longer sequences."""

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
    lesson: Where the curriculum is; `()` without one.
  """

  scale: jax.Array
  average: jax.Array
  peak: jax.Array
  exploded: jax.Array
  plateau: Any
  lesson: Any


class Lesson(NamedTuple):
  """Where a curriculum is.

  Attributes:
    length: How long sequences may be, int32.
    good: Steps in a row with a loss below the threshold, int32.
    spent: Steps so far with sequences of each of the curriculum's lengths,
      int32 [K].
  """

  length: jax.Array
  good: jax.Array
  spent: jax.Array


class Curriculum(NamedTuple):
  """Sequences that grow as the model learns.

  Attributes:
    start: Length at first, in the unit of the task's `max_length`.
    maximum: Length at last.
    step: What is added at a time.
    threshold: Loss in nats that counts as learned.
    patience: Steps in a row below the threshold before sequences grow.
  """

  start: int
  maximum: int
  step: int
  threshold: float
  patience: int

  def lengths(self) -> list[int]:
    """The lengths that it goes through, K of them."""
    return [*range(self.start, self.maximum, self.step), self.maximum]


class Watch(NamedTuple):
  """How the loss is watched.

  Attributes:
    explosion: The loss has exploded above this multiple of its average, or of
      a tenth of the largest average where that is more; 0 to let it. A step
      without a finite loss or gradient has exploded in any case.
    max_rollbacks: Roll-backs in a row before the run gives up.
    plateau: optax's `reduce_on_plateau`; None for a scale that stays.
    curriculum: How sequences grow; None for a length that stays.
  """

  explosion: float = 0.0
  max_rollbacks: int = 5
  plateau: optax.GradientTransformationExtraArgs | None = None
  curriculum: Curriculum | None = None


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
    _first_lesson(watch.curriculum) if watch.curriculum else (),
  )


def _first_lesson(curriculum):
  zero = jnp.zeros((), jnp.int32)
  spent = jnp.zeros(len(curriculum.lengths()), jnp.int32)
  return Lesson(zero + curriculum.start, zero, spent)


def scale(control: Control) -> jax.Array:
  """What the learning rate is multiplied with."""
  if not control.plateau:
    return control.scale
  return control.scale * control.plateau.scale


def observe(
  watch: Watch,
  control: Control,
  loss: jax.Array,
  grad_norm: jax.Array,
  silent: Any = False,
) -> Control:
  """Takes a step's loss, NaN where no query was finite, and gradient norm.

  A `silent` step, in which nothing was predicted, changes nothing.
  """
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
  lesson = control.lesson
  if watch.curriculum:
    lesson = _next_lesson(watch.curriculum, lesson, loss)
    # Losses of longer sequences are measured against themselves.
    grown = lesson.length > control.lesson.length
    average = jnp.where(grown, jnp.nan, average)
    peak = jnp.where(grown, 0.0, peak)
    if watch.plateau:
      fresh = watch.plateau.init(jnp.zeros(()))._replace(scale=plateau.scale)
      choose = lambda new, old: jnp.where(grown, new, old)
      plateau = jax.tree.map(choose, fresh, plateau)
  after = Control(control.scale, average, peak, exploded, plateau, lesson)
  return jax.tree.map(lambda a, b: jnp.where(silent, a, b), control, after)


def _next_lesson(curriculum, lesson, loss):
  good = jnp.where(loss < curriculum.threshold, lesson.good + 1, 0)
  learned = good >= curriculum.patience
  longer = jnp.minimum(lesson.length + curriculum.step, curriculum.maximum)
  return Lesson(
    jnp.where(learned, longer, lesson.length),
    jnp.where(learned, 0, good),
    lesson.spent + (jnp.asarray(curriculum.lengths()) == lesson.length),
  )
