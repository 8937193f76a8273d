"""The shape that every task has."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax import types
from zorn_jax.tasks.vocabulary import Tokenizer

Data = types.PyTree  # Arrays that stay on the device, such as the corpus.


class Draw(NamedTuple):
  """Which batch of a run is wanted.

  Attributes:
    key: Random numbers of this batch alone.
    step: Training step, or number of an episode of many steps, int32.
    index: Number of the batch within its step, int32.
    length: How long sequences may be at present, in the unit of
      `Task.min_length` and `max_length`.
  """

  key: types.Key
  step: jax.Array
  index: jax.Array
  length: jax.Array | int


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
    sample: (data, draw) -> batch.
    chunk: (data, batch, index) -> the chunk number `index`.
    max_length: Longest `draw.length`; what it counts is the task's choice.
    num_chunks: (length) -> number of chunks that hold every sequence of at most
      that length.
    tokens_per_batch: (length) -> predictions in a batch, at most.
    splits: "valid" and "test", and "train" where that is another, each made
      when it is called.
    min_length: Shortest `draw.length`.
    refresh: (part) -> the data of its steps, a function of its number alone,
      where they do not all fit on the device; `data` is part 0.
    refresh_every: Steps of a part.
    fingerprint: Digest of the tokens of the texts and of their tokenizer;
      "" where the config alone determines the data.
  """

  vocabulary: Tokenizer
  data: Data
  sample: Callable[[Data, Draw], types.Batch]
  chunk: Callable[[Data, types.Batch, jax.Array], Chunk]
  max_length: int
  num_chunks: Callable[[Any], Any]
  tokens_per_batch: Callable[[int], int]
  splits: Mapping[str, Callable[[], Split]]
  min_length: int = 1
  refresh: Callable[[int], Data] | None = None
  refresh_every: int = 0
  fingerprint: str = ""


def one_batch(task: Task) -> Task:
  """The task whose every training batch is the same, to be learned by heart."""
  sample = lambda data, draw: first_batch(task, data)
  return task._replace(
    sample=sample, min_length=task.max_length, refresh=None, refresh_every=0
  )


def first_batch(task: Task, data: Data) -> types.Batch:
  """A batch of full length that no key of a run chooses."""
  key, zero = jax.random.key(0), jnp.zeros((), jnp.int32)
  return task.sample(data, Draw(key, zero, zero, task.max_length))
