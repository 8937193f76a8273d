"""The shape that every task has."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from zorn_jax import types
from zorn_jax.tasks.vocabulary import Vocabulary

Data = types.PyTree  # Arrays that stay on the device, such as the corpus.


class Chunk(NamedTuple):
  """What a model reads and must predict in one chunk of time, [B, C] each.

  Attributes:
    inputs: Token ids.
    targets: Token ids that follow them.
    weights: float32, 1 where the prediction counts and 0 elsewhere.
  """

  inputs: jax.Array
  targets: jax.Array
  weights: jax.Array


class Split(NamedTuple):
  """A fixed set of sequences to evaluate on.

  Attributes:
    data: What `Task.chunk` reads.
    batch: Which sequences.
    num_chunks: Number of chunks until their end.
  """

  data: Data
  batch: types.Batch
  num_chunks: int


class Task(NamedTuple):
  """What a model is trained to predict.

  A batch only says where its sequences are; `chunk` cuts them out of the data
  one chunk of time after the other, so that memory does not grow with their
  length.

  Attributes:
    vocabulary: Translates between text and token ids.
    data: The training data.
    sample: (data, key) -> batch.
    chunk: (data, batch, index) -> the chunk number `index`.
    num_chunks: Number of chunks in a training sequence.
    tokens_per_batch: Predictions in a batch, at most.
    splits: "valid" and "test", each made when it is called.
  """

  vocabulary: Vocabulary
  data: Data
  sample: Callable[[Data, types.Key], types.Batch]
  chunk: Callable[[Data, types.Batch, jax.Array], Chunk]
  num_chunks: int
  tokens_per_batch: int
  splits: Mapping[str, Callable[[], Split]]


def one_batch(task: Task) -> Task:
  """The task whose every training batch is the same, to be learned by heart."""
  sample = lambda data, key: task.sample(data, jax.random.key(0))
  return task._replace(sample=sample)
