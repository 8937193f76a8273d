"""What models are trained to predict."""

from zorn_jax.tasks.algorithmic import (
  ALGORITHMIC,
  add,
  copy,
  repeat_copy,
  reverse,
  sort,
)
from zorn_jax.tasks.corpora import Corpus, load_corpus
from zorn_jax.tasks.random_tokens import random_tokens
from zorn_jax.tasks.text import language_model
from zorn_jax.tasks.tokenizers import make_tokenizer
from zorn_jax.tasks.types import (
  Chunk,
  Draw,
  Split,
  Task,
  first_batch,
  one_batch,
)
from zorn_jax.tasks.vocabulary import Tokenizer, Vocabulary

__all__ = [
  "ALGORITHMIC",
  "Chunk",
  "Corpus",
  "Draw",
  "Split",
  "Task",
  "Tokenizer",
  "Vocabulary",
  "add",
  "copy",
  "first_batch",
  "language_model",
  "load_corpus",
  "make_tokenizer",
  "one_batch",
  "random_tokens",
  "repeat_copy",
  "reverse",
  "sort",
]
