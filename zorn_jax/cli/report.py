"""Makes a page of runs and benchmarks, beside what the authors published.

python -m zorn_jax.cli.report --workdir=DIR[,DIR...] [--bench=FILE[,FILE...]] \\
  --output=FILE.html [--compare]

A directory is that of a run or of a sweep. Runs whose configs differ only in
the seed are one row, tasks have a table each. Beside the page, which needs no
other file, come FILE.md and its pictures.
"""

import pathlib
from importlib import metadata

from absl import flags

from zorn_jax.cli import _run
from zorn_jax.report import benches, claims, document, readings, render, runs

_WORKDIRS = flags.DEFINE_multi_string(
  "workdir", [], "Directories of runs or sweeps; may be repeated."
)
_BENCHES = flags.DEFINE_multi_string(
  "bench", [], "Files of zorn-bench and of scripts; may be repeated."
)
_OUTPUT = flags.DEFINE_string("output", None, "The page, FILE.html.")
_COMPARE = flags.DEFINE_bool(
  "compare", False, "One table of all runs; refused if their tasks differ."
)


def main(argv) -> int:
  del argv
  output = pathlib.Path(_OUTPUT.value)
  if output.suffix != ".html":
    raise ValueError(
      f"the output must be a .html file, got {str(output)!r}. Write "
      "--output=report.html."
    )
  paths = _paths(_WORKDIRS.value)
  if not paths and not _BENCHES.value:
    raise ValueError(
      "there is nothing to report: no --workdir and no --bench. Name the "
      "directory of a run."
    )
  found, idle = runs.find(paths)
  comparisons = runs.compare(found, _COMPARE.value)
  measured = [benches.read(path) for path in _paths(_BENCHES.value)]
  verdicts = claims.judge_all(readings.Evidence(comparisons, measured))
  page = document.write(comparisons, measured, verdicts, _made_by(), idle)
  for file in render.save(page, output):
    print(file)
  return 0


def _paths(values):
  """Paths separated by commas, which may themselves contain some."""
  paths = []
  for value in values:
    whole = pathlib.Path(value).exists()
    paths += [value] if whole else value.split(",")
  return [pathlib.Path(path) for path in paths if path]


def _made_by():
  version = metadata.version("zorn_jax")
  text = f"Made by `{_run.command()}`, zorn_jax {version}"
  commit = _run.commit()
  return f"{text}, commit {commit}." if commit else f"{text}."


def run() -> None:
  _run.run(main, "output")


if __name__ == "__main__":
  run()
