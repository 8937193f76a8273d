"""Files of benchmarks and of scripts that count steps."""

import json
import pathlib
from typing import Any, NamedTuple

FORMAT = 1  # Of the files that are read; those without a number are the first.


class Bench(NamedTuple):
  """One file.

  Attributes:
    name: As the user named it.
    title: What was measured.
    machine: Where and with what, by name.
    tables: Rows of plain values, by title.
    content: All of the file.
  """

  name: str
  title: str
  machine: dict[str, Any]
  tables: dict[str, list[dict[str, Any]]]
  content: dict[str, Any]


def read(path: pathlib.Path) -> Bench:
  """Reads what zorn-bench, or a script of this repository, has written.

  Raises:
    ValueError: If the file is none of these, or of another version.
  """
  try:
    content = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(
      f"the benchmark file {str(path)!r} is not JSON: {error}. Make it with "
      "zorn-bench --output=FILE."
    ) from error
  found = content.get("format", 1) if isinstance(content, dict) else None
  if found is not None and found != FORMAT:
    raise ValueError(
      f"the benchmark file {str(path)!r} has the format {found}, this version "
      f"of zorn_jax reads format {FORMAT}. Measure again, or use the version "
      "that wrote it."
    )
  try:
    title, machine, tables = _parts(content)
  except (AttributeError, KeyError, TypeError) as error:
    raise ValueError(
      f"{str(path)!r} is not a benchmark file of this version: it has neither "
      "the tables of zorn-bench, nor rows, nor the steps of a smoke test, each "
      "with their machine. Measure again with zorn-bench --output=FILE."
    ) from error
  return Bench(str(path), title, machine, tables, content)


def _parts(content):
  """Title, machine and tables of the three kinds of files."""
  if "suite" in content:
    tables = content["tables"]
    paper = content["suite"] == "paper"
    title = "steps" if paper else f"zorn-bench --suite={content['suite']}"
    if content.get("quick"):
      title += " --quick"
    machine = dict(content["machine"])
  elif "size" in content:
    tables = {"steps": content["steps"]}
    title = f"overfit_{content['size']}"
    machine = dict(content["machine"])
  else:
    tables = {"rows": content["rows"]}
    title = content["command"]
    machine = {"device": content["machine"], **content.get("versions", {})}
    machine["command"] = content["command"]
  for rows in tables.values():
    for row in rows:
      row.keys()  # Whatever has none is no table.
  return title, machine, tables
