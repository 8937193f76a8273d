"""Random texts, tasks of them, and the warnings about them."""

import numpy as np
from absl import logging as absl_logging

from zorn_jax import tasks


def corpus_of(train, valid=100, test=100):
  """Texts of given lengths over a few letters."""
  rng = np.random.default_rng(train)
  draw = lambda size: "".join(rng.choice(list("abcde \n"), size))
  return tasks.Corpus(draw(train), draw(valid), draw(test))


def model_text(corpus, *args, tokenizer="characters", **options):
  """The task, with the characters of the training text."""
  made = tasks.make_tokenizer(tokenizer, corpus.train)
  return tasks.language_model(corpus, made, *args, **options)


class Warnings:
  """Collects what absl logs."""

  def __init__(self, monkeypatch):
    self.lines = []
    monkeypatch.setattr(
      absl_logging,
      "warning",
      lambda message, *args: self.lines.append(message % args),
    )
