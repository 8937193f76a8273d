"""How well a model predicts a split."""

from collections.abc import Callable
from functools import partial

import jax

from zorn_jax import metrics, types
from zorn_jax.models import Model
from zorn_jax.tasks import Split, Task


def evaluator(
  model: Model, task: Task
) -> Callable[[types.Params, Split], dict[str, float]]:
  """A function (params, split) -> :func:`zorn_jax.metrics.summary`."""

  @partial(jax.jit, static_argnums=3)
  def sums(params, data, batch, num_chunks):
    split = Split(data, batch, num_chunks)
    return metrics.stream_sums(model, task, params, split)

  return lambda params, split: metrics.summary(sums(params, *split))
