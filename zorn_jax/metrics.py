"""Losses and accuracies of a model that streams through its sequences."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zorn_jax import probe_map, types
from zorn_jax.models import Model
from zorn_jax.tasks import Split, Task


class Sums(NamedTuple):
  """Sums over the counted predictions of each sequence, float32 [B].

  Attributes:
    loss: Cross-entropy in nats.
    correct: Predictions whose likeliest token is the target.
    count: Predictions.
  """

  loss: jax.Array
  correct: jax.Array
  count: jax.Array


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross-entropy [...] in nats of logits [..., V] and tokens [...]."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def score(model: Model, params, carry, chunk: Any):
  """The state after a chunk, its losses [B, C] and what was predicted right."""
  if model.score:
    return model.score(params, carry, chunk.inputs, chunk.targets)
  carry, logits = model.apply(params, carry, chunk.inputs)
  losses = cross_entropy(logits, chunk.targets)
  return carry, losses, logits.argmax(-1) == chunk.targets


def stream(
  model: Model,
  task: Task,
  params,
  split: Split,
  carry: Any,
  first_chunk: Any = 0,
  checkpoint: bool = False,
  truncation: int = 0,
) -> tuple[Any, Sums]:
  """Runs the model through a part of the sequences of a split.

  Only one chunk of time is held at once, whatever the length.

  Args:
    model: The model.
    task: Cuts the chunks.
    params: The model's parameters, perhaps perturbed.
    split: The sequences, B of them, and the number of chunks to read.
    carry: The state before the first of them.
    first_chunk: Its index.
    checkpoint: Whether a gradient computes each chunk again.
    truncation: Chunks after which a gradient through time ends; 0 for none.
  Returns:
    The state after the last chunk, and :class:`Sums` per sequence.
  """
  data, batch, num_chunks = split
  zeros = jnp.zeros(rows(task, split), jnp.float32)

  def body(state, index):
    carry, sums = state
    if truncation:
      ends = (index > 0) & (index % truncation == 0)
      carry = jax.tree.map(
        lambda x: jnp.where(ends, jax.lax.stop_gradient(x), x), carry
      )
    chunk = task.chunk(data, batch, first_chunk + index)
    carry, losses, correct = score(model, params, carry, chunk)
    new = Sums(losses, correct, jnp.ones_like(losses))
    add = lambda total, x: total + jnp.sum(x * chunk.weights, axis=-1)
    return carry, jax.tree.map(add, sums, new)

  if checkpoint:
    body = jax.checkpoint(body)
  return loop(body, (carry, Sums(zeros, zeros, zeros)), num_chunks)


def loop(body, state, num_chunks):
  """`state = body(state, index)` for every chunk; differentiable if static."""
  if isinstance(num_chunks, int):
    step = lambda state, index: (body(state, index), None)
    return jax.lax.scan(step, state, jnp.arange(num_chunks))[0]
  step = lambda index, state: body(state, index)
  return jax.lax.fori_loop(0, num_chunks, step, state)


def rows(task: Task, split: Split) -> int:
  """Number of sequences B in a split."""
  chunk = jax.eval_shape(lambda: task.chunk(split.data, split.batch, 0))
  return chunk.inputs.shape[0]


def stream_sums(
  model: Model,
  task: Task,
  params,
  split: Split,
  checkpoint: bool = False,
  truncation: int = 0,
) -> Sums:
  """:func:`stream` from the first chunk on, without the state it ends in."""
  carry = model.initial_carry(params, rows(task, split))
  return stream(model, task, params, split, carry, 0, checkpoint, truncation)[1]


def mean_loss(
  model: Model,
  task: Task,
  params,
  split: Split,
  parts: int = 1,
  part_map: probe_map.ProbeMap | None = None,
) -> jax.Array:
  """Mean cross-entropy of some sequences, in nats per counted token.

  Args:
    model: The model.
    task: Cuts the chunks.
    params: The model's parameters, perhaps perturbed.
    split: The sequences, B of them.
    parts: In how many parts the sequences are read; a divisor of B.
    part_map: Where the parts are read.
  """

  def totals(part, params, data, batch, num_chunks=split.num_chunks):
    rows = _rows_of(task, part, parts)
    sums = stream_sums(model, rows, params, Split(data, batch, num_chunks))
    return jnp.sum(sums.loss), jnp.sum(sums.count)

  # A number of chunks that is known stays known.
  known = isinstance(split.num_chunks, int)
  shared = (params, *(split[:2] if known else split))
  if parts == 1:
    loss, count = totals(0, *shared)
    return loss / count
  part_map = part_map or probe_map.sequential()
  loss, count = part_map.map(totals, jnp.arange(parts), *shared)
  return jnp.sum(loss) / jnp.sum(count)


def _rows_of(task, part, parts):
  """The task whose chunks hold one part of the rows alone."""
  if parts == 1:
    return task

  def chunk(*args):
    def cut(x):
      rows = x.shape[0] // parts
      return jax.lax.dynamic_slice_in_dim(x, part * rows, rows)

    return jax.tree.map(cut, task.chunk(*args))

  return task._replace(chunk=chunk)


def summary(sums: Sums) -> dict[str, float]:
  """Loss in nats and bits, accuracy of tokens and of whole sequences."""
  # Counts of many sequences are not exact in float32.
  sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
  total = jax.tree.map(lambda x: float(x.sum()), sums)
  right = sums.correct == sums.count
  return {
    "loss": total.loss / total.count,
    "bits": total.loss / total.count / math.log(2),
    "accuracy": total.correct / total.count,
    "sequence_accuracy": float(np.mean(right, where=sums.count > 0)),
    "tokens": int(total.count),
  }


def norm(tree: types.PyTree) -> jax.Array:
  """Euclidean norm over all leaves, in float32."""
  return optax.tree.norm(
    jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
  )
