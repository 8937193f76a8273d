"""Losses and accuracies of a model that streams through its sequences."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from zorn_jax import types
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


def stream_sums(model: Model, task: Task, params, split: Split) -> Sums:
  """Runs the model through the sequences of a split.

  Only one chunk of time is held at once, whatever the length.

  Args:
    model: The model.
    task: Cuts the chunks.
    params: The model's parameters, perhaps perturbed.
    split: The sequences, B of them.
  Returns:
    :class:`Sums` per sequence.
  """
  data, batch, num_chunks = split
  first = jax.eval_shape(lambda: task.chunk(data, batch, 0))
  rows = first.inputs.shape[0]
  zeros = jnp.zeros(rows, jnp.float32)

  def body(state, index):
    carry, sums = state
    chunk = task.chunk(data, batch, index)
    carry, logits = model.apply(params, carry, chunk.inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, chunk.targets
    )
    correct = logits.argmax(-1) == chunk.targets
    new = Sums(losses, correct, jnp.ones_like(losses))
    add = lambda total, x: total + jnp.sum(x * chunk.weights, axis=-1)
    return (carry, jax.tree.map(add, sums, new)), None

  state = (model.initial_carry(params, rows), Sums(zeros, zeros, zeros))
  (_, sums), _ = jax.lax.scan(body, state, jnp.arange(num_chunks))
  return sums


def mean_loss(model: Model, task: Task, data, params, batch) -> jax.Array:
  """Mean cross-entropy of a training batch, in nats per counted token."""
  split = Split(data, batch, task.num_chunks)
  sums = stream_sums(model, task, params, split)
  return jnp.sum(sums.loss) / jnp.sum(sums.count)


def summary(sums: Sums) -> dict[str, float]:
  """Loss in nats and bits, accuracy of tokens and of whole sequences."""
  total = jax.tree.map(lambda x: float(jnp.sum(x)), sums)
  right = sums.correct == sums.count
  return {
    "loss": total.loss / total.count,
    "bits": total.loss / total.count / math.log(2),
    "accuracy": total.correct / total.count,
    "sequence_accuracy": float(jnp.mean(right, where=sums.count > 0)),
    "tokens": int(total.count),
  }


def norm(tree: types.PyTree) -> jax.Array:
  """Euclidean norm over all leaves, in float32."""
  return optax.tree.norm(
    jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
  )
