"""Lets the model of a run continue a text.

python -m zorn_jax.cli.sample --workdir=DIR --prompt="ROMEO" --length=400
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import flags

from zorn_jax import build
from zorn_jax.cli import _run
from zorn_jax.sample import sample
from zorn_jax.train import restore_params

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_PROMPT = flags.DEFINE_string("prompt", "\n", "Text to continue.")
_LENGTH = flags.DEFINE_integer("length", 400, "Characters to write.")
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.8, "Divides the logits; 0 takes the likeliest character."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")


def main(argv) -> int:
  del argv
  if not _PROMPT.value:
    raise ValueError("the prompt is empty. Give at least one character.")
  if _LENGTH.value < 1:
    raise ValueError(
      f"length must be positive, got {_LENGTH.value}. Choose 1 or more."
    )
  if _TEMPERATURE.value < 0:
    raise ValueError(
      f"temperature must not be negative, got {_TEMPERATURE.value}. Choose 0 "
      "for the likeliest characters."
    )
  workdir = pathlib.Path(_WORKDIR.value)
  experiment = build.load(workdir)
  params, _ = restore_params(experiment, workdir)
  vocabulary = experiment.task.vocabulary
  missing = vocabulary.missing(_PROMPT.value)
  if missing:
    print(
      f"warning: {missing.total()} characters of the prompt are not in the "
      f"vocabulary ({' '.join(map(repr, missing))}); read as unknown.",
      file=sys.stderr,
    )
  tokens = sample(
    experiment.model,
    params,
    jnp.asarray(vocabulary.encode(_PROMPT.value)),
    _LENGTH.value,
    jnp.float32(_TEMPERATURE.value),
    jax.random.key(_SEED.value),
  )
  print(_PROMPT.value + vocabulary.decode(tokens))
  return 0


def run() -> None:
  _run.run(main, "workdir")


if __name__ == "__main__":
  run()
