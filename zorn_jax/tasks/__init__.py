"""What models are trained to predict."""

from zorn_jax.tasks.copy_sequence import copy
from zorn_jax.tasks.random_tokens import random_tokens
from zorn_jax.tasks.text import from_file, language_model, shakespeare
from zorn_jax.tasks.types import Chunk, Split, Task, one_batch
from zorn_jax.tasks.vocabulary import Vocabulary

__all__ = [
  "Chunk",
  "Split",
  "Task",
  "Vocabulary",
  "copy",
  "from_file",
  "language_model",
  "one_batch",
  "random_tokens",
  "shakespeare",
]
