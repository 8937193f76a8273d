"""Lets the model of a run continue one text or several.

python -m zorn_jax.cli.sample --workdir=DIR --prompt="ROMEO" --length=400
"""

import collections
import pathlib
import sys

import jax
import numpy as np
from absl import flags

from zorn_jax import build
from zorn_jax.cli import _run
from zorn_jax.sample import Decoding, align, check, sample
from zorn_jax.train import restore_params

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_BEST = flags.DEFINE_bool("best", False, "The best checkpoint, not the newest.")
_PROMPT = flags.DEFINE_multi_string(
  "prompt", None, "Text to continue; may be repeated. Without any, a new line."
)
_PROMPTS_FILE = flags.DEFINE_string(
  "prompts_file", None, "Text file with one more prompt on each line."
)
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples", 1, "Continuations of each prompt."
)
_LENGTH = flags.DEFINE_integer("length", 400, "Tokens to write.")
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.8, "Divides the logits; 0 takes the likeliest token."
)
_TOP_K = flags.DEFINE_integer(
  "top_k", 0, "Draws among the k likeliest tokens only; 0 for all."
)
_TOP_P = flags.DEFINE_float(
  "top_p",
  1.0,
  "Draws among the fewest likeliest tokens that have probability p only; 1 "
  "for all.",
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the draws.", -(2**63), 2**63 - 1
)


def main(argv) -> int:
  del argv
  decoding = Decoding(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
  check(decoding)
  for flag in (_LENGTH, _NUM_SAMPLES):
    if flag.value < 1:
      raise ValueError(
        f"{flag.name} must be positive, got {flag.value}. Choose 1 or more."
      )
  if decoding.temperature == 0 and _NUM_SAMPLES.value > 1:
    raise ValueError(
      "at temperature 0 all continuations of a prompt are the same, got "
      f"num_samples={_NUM_SAMPLES.value}. Set it to 1, or choose a temperature."
    )
  prompts = _prompts()
  workdir = pathlib.Path(_WORKDIR.value)
  experiment = build.load(workdir)
  params, _ = restore_params(experiment, workdir, best=_BEST.value)
  vocabulary = experiment.task.vocabulary
  _warn_of_unknown(vocabulary, prompts)
  encoded = vocabulary.encode_all(prompts)
  tokens = sample(
    experiment.model,
    params,
    align(encoded),
    decoding,
    _LENGTH.value,
    jax.random.key(_SEED.value),
    _NUM_SAMPLES.value,
  )
  for row, prompt in enumerate(prompts):
    for number in range(_NUM_SAMPLES.value):
      _print_heading(row, number, len(prompts))
      print(
        prompt + _continuation(vocabulary, encoded[row], tokens[row, number])
      )
  return 0


def _continuation(vocabulary, prompt, tokens):
  """The text of tokens behind a prompt; alone, some tokenizers trim it."""
  read = vocabulary.decode(prompt)
  whole = vocabulary.decode(np.concatenate([prompt, tokens]))
  if not whole.startswith(read):  # It ends within a character, perhaps.
    return vocabulary.decode(tokens)
  return whole[len(read) :]


def _prompts():
  """The prompts of the flags, those of the file last."""
  prompts = list(_PROMPT.value or ())
  if _PROMPTS_FILE.value is not None:
    prompts += _lines(_PROMPTS_FILE.value)
  elif not prompts:
    prompts = ["\n"]
  if not all(prompts):
    raise ValueError("the prompt is empty. Give at least one character.")
  return prompts


def _lines(path):
  """The lines of a prompts file."""
  try:
    text = pathlib.Path(path).read_text("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"the prompts file {path!r} is not UTF-8 at byte {error.start}. Convert "
      "it first, for example with iconv."
    ) from error
  lines = text.removesuffix("\n").split("\n")
  for number, line in enumerate(lines, 1):
    if not line:
      raise ValueError(
        f"line {number} of the prompts file {path!r} is empty. Give at least "
        "one character on each line."
      )
  return lines


def _warn_of_unknown(vocabulary, prompts):
  missing = sum(map(vocabulary.missing, prompts), collections.Counter())
  if missing:
    print(
      f"warning: {missing.total()} characters of the "
      f"prompt{'s' if len(prompts) > 1 else ''} are not in the vocabulary "
      f"({' '.join(map(repr, missing))}); read as unknown.",
      file=sys.stderr,
    )


def _print_heading(row, number, num_prompts):
  """What stands above a text that is not the only one."""
  parts = [
    f"{what} {index + 1} of {count}"
    for what, index, count in (
      ("prompt", row, num_prompts),
      ("sample", number, _NUM_SAMPLES.value),
    )
    if count > 1
  ]
  if parts:
    print(f"{chr(10) if row or number else ''}=== {', '.join(parts)} ===")


def run() -> None:
  _run.run(main, "workdir")


if __name__ == "__main__":
  run()
