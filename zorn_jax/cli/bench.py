"""Measures what a step costs, by itself or beside what others would take.

python -m zorn_jax.cli.bench --suite=step [--peers] [--json] [--output=FILE]

step     whole training steps: milliseconds, share of the peak of the machine's
         matrix products, share of the directions and the update; with --peers
         those of torch, JAX and evosax, of which the extra `peers` installs
         the first and the last
memory   bytes of a step beside those of a forward pass, and by length of the
         sequences; compiled only, so that models may be larger than memory
scaling  time by size of the model, length, probes and batch
kernels  the pieces: signs, updates, a layer

Nothing else should run on the machine meanwhile. Times are medians of programs
that take turns, in brackets their quartiles.
"""

import json
import os
import pathlib

from absl import flags

from zorn_jax import cores
from zorn_jax.bench import report
from zorn_jax.cli import _run

_SUITE = flags.DEFINE_enum("suite", None, report.SUITES, "What is measured.")
_PEERS = flags.DEFINE_bool("peers", False, "Also run the peers of the steps.")
_QUICK = flags.DEFINE_bool(
  "quick", False, "Small cases, once each: whether all runs, not how fast."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
_OUTPUT = flags.DEFINE_string("output", None, "File for the JSON object.")


def main(argv) -> int:
  del argv
  path = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None
  if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
    raise ValueError(
      f"cannot write to the output {str(path)!r}. Name a file in a folder that "
      "is there and can be written to."
    )
  cores.use()
  result = report.measure(_SUITE.value, _PEERS.value, _QUICK.value)
  result["machine"]["command"] = _run.command()
  text = json.dumps(result)
  if path:
    path.write_text(f"{text}\n")
  print(text if _JSON.value else report.as_text(result))
  return 0


def run() -> None:
  _run.run(main, "suite")


if __name__ == "__main__":
  run()
