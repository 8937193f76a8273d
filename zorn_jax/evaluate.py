"""How well a model predicts a split."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from zorn_jax import metrics, types
from zorn_jax.models import Model
from zorn_jax.tasks import Split, Task


def evaluator(
  model: Model, task: Task
) -> Callable[[types.Params, Split], dict[str, float]]:
  """A function (params, split) -> :func:`zorn_jax.metrics.summary`.

  A split on the host is copied to the device in every call.
  """

  @partial(jax.jit, static_argnums=3)
  def sums(params, data, batch, num_chunks):
    split = Split(data, batch, num_chunks)
    return metrics.stream_sums(model, task, params, split)

  return lambda params, split: metrics.summary(sums(params, *split))


def free_runner(
  model: Model, task: Task
) -> Callable[[types.Params, Split], dict[str, float]]:
  """The same for a model that reads its own answers.

  Behind a prediction that counts the model reads the token that it found
  likeliest, and elsewhere the true one: it reads the question as it is, and
  goes on alone. One token at a time, with a chunk of time held at once.

  Args:
    model: The model.
    task: Cuts the chunks.
  Returns:
    A function (params, split) -> :func:`zorn_jax.metrics.summary`, which raises
    a ValueError if the first prediction of a sequence counts, since nothing is
    read before it goes on alone.
  Guarantees: but for rounding where two logits nearly tie,
    `sequence_accuracy` is that of :func:`evaluator`, because up to a first
    mistake both read the same; the other figures differ.
  """

  @partial(jax.jit, static_argnums=3)
  def sums(params, data, batch, num_chunks):
    rows = metrics.rows(task, Split(data, batch, num_chunks))

    def read(state, column):
      carry, own, counted, sums = state
      token = jnp.where(counted, own, column.inputs)
      carry, logits = model.apply(params, carry, token[:, None])
      logits = logits[:, 0]
      own = logits.argmax(-1).astype(own.dtype)
      loss = metrics.cross_entropy(logits, column.targets)
      correct = own == column.targets
      new = metrics.Sums(loss, correct, jnp.ones_like(loss))
      add = lambda total, x: total + x * column.weights
      sums = jax.tree.map(add, sums, new)
      return (carry, own, column.weights > 0, sums), None

    def body(state, index):
      columns = jax.tree.map(jnp.transpose, task.chunk(data, batch, index))
      return jax.lax.scan(read, state, columns)[0]

    zeros = jnp.zeros(rows, jnp.float32)
    state = (
      model.initial_carry(params, rows),
      jnp.zeros(rows, jnp.int32),
      jnp.zeros(rows, bool),
      metrics.Sums(zeros, zeros, zeros),
    )
    return metrics.loop(body, state, num_chunks)[-1]

  def run(params, split):
    if task.chunk(split.data, split.batch, jnp.int32(0)).weights[:, 0].any():
      raise ValueError(
        "free running needs sequences that begin with a part that is only "
        "read, but here the first prediction counts already. Evaluate without "
        "it."
      )
    return metrics.summary(sums(params, *split))

  return run
