"""Grids over the fields of a config, read by the config's own flags."""

import difflib
import functools
import operator
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from zorn_jax import sweep
from zorn_jax.cli import _run


def text(value: Any) -> str:
  """A value of a field as its flag takes it."""
  return str(value.to_dict() if isinstance(value, ConfigDict) else value)


def run_at(
  path: str,
  overrides: dict[str, str],
  base: dict[str, Any],
  values: dict[str, Any],
) -> sweep.Run:
  """The run at one point of a grid; see :func:`resolve`."""
  changes = overrides | {field: text(x) for field, x in values.items()}
  args = [f"--config.{field}={x}" for field, x in changes.items()]
  return sweep.Run(
    sweep.name_of(values),
    values,
    (f"--config={path}", *args),
    values.get("steps", base["steps"]),
  )


def resolve(
  path: str,
  overrides: dict[str, str],
  base: dict[str, Any],
  texts: Sequence[str],
) -> dict[str, list[Any]]:
  """The values of each field of a grid, as `cli.train` would read them.

  Args:
    path: Of the config, perhaps with a variant.
    overrides: Flags of other fields, as text.
    base: The config with the overrides, as plain values.
    texts: The grids; see :func:`zorn_jax.sweep.parse_grid`.
  Raises:
    ValueError: If the config has no such field, a value is not of its type,
      or a field or a value is given twice.
  """
  grid = {}
  for each in texts:
    field, raw = sweep.parse_grid(each)
    if field in grid:
      raise ValueError(
        f"the field {field} is in two grids. Put all its values in one."
      )
    _check_field(base, field)
    if field in overrides:
      raise ValueError(
        f"the field {field} is in a grid and in --config.{field}. Give one of "
        "them."
      )
    values = [_parsed(path, overrides, base, field, x) for x in raw]
    twice = [x for i, x in enumerate(values) if x in values[:i]]
    if twice:
      raise ValueError(
        f"the grid of {field} has the value {twice[0]!r} twice. Name it once."
      )
    grid[field] = values
  for point in sweep.points(grid):  # Fields that are one are refused.
    changes = {field: text(value) for field, value in point.items()}
    _run.config_of(_flags(path, overrides | changes))
  return grid


def _check_field(base, field):
  """Refuses what is not a field with a single value."""
  names = sorted(_names(base))
  if field in names:
    return
  inner = [name for name in names if name.startswith(f"{field}.")]
  last = field.split(".")[-1]
  ends = [name for name in names if name.split(".")[-1] == last]
  near = inner or ends or difflib.get_close_matches(field, names, 3)
  fact = f"the config has no field {field!r} to make a grid of"
  if inner:
    fact = f"a grid needs a single field, and {field!r} is a group of them"
  remedy = "Look into the config for its fields."
  if near:
    remedy = f"Did you mean {' or '.join(near[:3])}?"
  raise ValueError(f"{fact}. {remedy}")


def _names(tree, prefix=""):
  """Dotted names of the fields."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _names(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}"


def _parsed(path, overrides, base, field, value):
  """A value of a field, read by the flags of a config."""
  read = lambda tree: functools.reduce(operator.getitem, field.split("."), tree)
  try:
    values = _flags(path, overrides | {field: value})
    found = read(values["config"].value.to_dict())
    return None if found == "None" else found
  except (flags.Error, SyntaxError, TypeError, ValueError) as error:
    kind = type(read(base)).__name__
    raise ValueError(
      f"the field {field} takes values of type {kind}, got {value!r}. Correct "
      "the grid."
    ) from error


def _flags(path, changes):
  """The flags of `cli.train` with these changes of its config."""
  argv = ["sweep", f"--config={path}"]
  argv += [f"--config.{name}={x}" for name, x in changes.items()]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", None, flag_values=values, sys_argv=argv
  )
  values(argv)
  return values
