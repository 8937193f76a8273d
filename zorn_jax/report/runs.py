"""Run directories: read, grouped by config, summed up over seeds."""

import functools
import itertools
import json
import math
import operator
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from zorn_jax import loggers, workdir as workdirs

TARGET = 0.1  # Loss, in nats, from which a batch is known by heart.


class Run(NamedTuple):
  """One run directory.

  Attributes:
    name: As the user named it.
    config: Plain values.
    text: Fingerprint of the task's text.
    records: Lines of metrics, in the order of their steps; at least one.
    starts: What is known of the processes that trained it, perhaps nothing.
  """

  name: str
  config: dict[str, Any]
  text: str
  records: list[dict[str, Any]]
  starts: list[dict[str, Any]]

  @property
  def complete(self) -> bool:
    """Whether it logged its last step."""
    return self.records[-1]["step"] >= self.config["steps"]

  @property
  def seed(self) -> int:
    return self.config["seed"]


class Row(NamedTuple):
  """Runs whose configs differ in nothing but the seed.

  Attributes:
    label: What tells it from the other rows of its table.
    runs: By their seeds.
  """

  label: str
  runs: tuple[Run, ...]

  @property
  def config(self) -> dict[str, Any]:
    """That of the first seed."""
    return self.runs[0].config

  @property
  def counted(self) -> tuple[Run, ...]:
    """Those whose ends are compared: the complete ones, if there are any."""
    return tuple(run for run in self.runs if run.complete) or self.runs

  @property
  def complete(self) -> bool:
    return self.counted[0].complete


class Comparison(NamedTuple):
  """Rows on the same task, which can be compared.

  Attributes:
    title: The task, in a few words.
    task: Its fields.
    rows: In the order in which their first runs were named.
  """

  title: str
  task: dict[str, Any]
  rows: tuple[Row, ...]


class Middle(NamedTuple):
  """A figure of several seeds: median, smallest and largest."""

  median: float
  low: float
  high: float


def middle(values: Iterable[float | None]) -> Middle | None:
  """The median and the spread; None if a value is missing or there is none.

  A value of infinity stands for what was not reached.
  """
  known = list(values)
  if not known or any(value is None or math.isnan(value) for value in known):
    return None
  return Middle(statistics.median(known), min(known), max(known))


def find(paths: Sequence[pathlib.Path]) -> tuple[list[Run], list[str]]:
  """The runs in some directories, and those that have not begun.

  Args:
    paths: Each the directory of a run, or one whose folders are: a sweep's.
  Raises:
    ValueError: If a directory is no run's, has no metrics, is damaged, or is
      the second with the same config and seed.
  """
  runs, idle = [], []
  for path in dict.fromkeys(paths):
    if (path / workdirs.CONFIG_NAME).exists():
      runs.append(read(path))
      continue
    inner = sorted(x.parent for x in path.glob(f"*/{workdirs.CONFIG_NAME}"))
    if not inner:
      raise ValueError(
        f"{str(path)!r} is no run directory: it has no {workdirs.CONFIG_NAME}, "
        "and no folder in it has. Name the --workdir of zorn-train or "
        "zorn-sweep."
      )
    begun = [x for x in inner if _has_metrics(x)]
    idle += [str(x) for x in inner if x not in begun]
    if not begun:
      raise ValueError(
        f"no run in {str(path)!r} has metrics yet. Train until log_every steps "
        "are done."
      )
    runs += [read(x) for x in begun]
  known = {}
  for run in runs:
    first = known.setdefault((_key(run), run.seed), run)
    if first is not run:
      raise ValueError(
        f"the runs in {first.name!r} and {run.name!r} have the same config and "
        "the same seed: they are one run, not two. Name only one of them."
      )
  return runs, idle


def _has_metrics(path):
  return bool(loggers.read_jsonl(path / loggers.JSONL_NAME))


# Without these a config is none of this version.
_NEEDED = (
  "seed",
  "steps",
  "num_probes",
  "learning_rate",
  "task.name",
  "model",
  "estimator.name",
  "optimizer.name",
)


def read(path: pathlib.Path) -> Run:
  """One run directory; see :func:`find`."""
  try:
    config = json.loads((path / workdirs.CONFIG_NAME).read_text())
    for name in _NEEDED:
      functools.reduce(operator.getitem, name.split("."), config)
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise ValueError(
      f"the config in {str(path)!r} is damaged or of another version of "
      "zorn_jax. Bring the file back from a copy, or leave the run out."
    ) from error
  records = loggers.read_jsonl(path / loggers.JSONL_NAME)
  if not records:
    raise ValueError(
      f"the run in {str(path)!r} has no metrics. Train until log_every steps "
      "are done, or leave it out."
    )
  text = path / workdirs.TEXT_NAME
  return Run(
    str(path),
    config,
    text.read_text() if text.exists() else "",
    records,
    loggers.read_jsonl(path / workdirs.STARTS_NAME),
  )


def task_of(config: dict[str, Any]) -> dict[str, Any]:
  """The fields of the task that losses depend on."""
  task = config["task"]
  kept = {k: v for k, v in task.items() if k not in ("time_chunk", "cache")}
  # One batch to be learned by heart is harder the more rows it has.
  if task.get("one_batch") or task["name"] == "random_tokens":
    kept["batch_size"] = config.get("batch_size")
  return kept


def compare(runs: Sequence[Run], together: bool = False) -> list[Comparison]:
  """Runs as rows of tables, a table for each task.

  Args:
    runs: Of any tasks.
    together: Whether all of them are to be in one table.
  Raises:
    ValueError: If they are to be, but their tasks differ.
  """
  tasks: dict[str, list[Run]] = {}
  for run in runs:
    key = json.dumps([task_of(run.config), run.text], sort_keys=True)
    tasks.setdefault(key, []).append(run)
  groups = list(tasks.values())
  if together and len(groups) > 1:
    first, second = groups[0][0], groups[1][0]
    raise ValueError(
      f"runs of different tasks cannot be compared in one table: "
      f"{first.name!r} and {second.name!r} differ in "
      f"{_difference(first, second)}. Leave out --compare, which gives every "
      "task a table of its own."
    )
  fields = [task_of(group[0].config) for group in groups]
  return [
    Comparison(_title(task, fields), task, _rows(group))
    for task, group in zip(fields, groups, strict=True)
  ]


def _difference(first, second):
  a, b = task_of(first.config), task_of(second.config)
  names = [f"task.{x}" for x in {**a, **b} if a.get(x) != b.get(x)]
  names = ["batch_size" if x == "task.batch_size" else x for x in names]
  return ", ".join(names) or "the text"


def _title(task, tasks):
  """The name of a task, and what tells it from others of that name."""
  same = [other for other in tasks if other["name"] == task["name"]]
  different = [k for k in task if any(x.get(k) != task[k] for x in same)]
  details = ", ".join(f"{k} {task[k]}" for k in different)
  return f"{task['name']} ({details})" if details else task["name"]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Dotted names and their values."""
  result = {}
  for key, value in tree.items():
    name = f"{prefix}{key}"
    inner = isinstance(value, dict) and value
    result |= flat(value, f"{name}.") if inner else {name: value}
  return result


# Where a run runs and where its numbers go changes none of them.
_ASIDE = ("seed", "mesh", "loggers")


def _key(run):
  config = {k: v for k, v in run.config.items() if k not in _ASIDE}
  return json.dumps([config, run.text], sort_keys=True)


def _rows(runs):
  groups: dict[str, list[Run]] = {}
  for run in runs:
    groups.setdefault(_key(run), []).append(run)
  rows = [sorted(group, key=lambda run: run.seed) for group in groups.values()]
  labels = _labels([group[0].config for group in rows])
  return tuple(map(Row, labels, map(tuple, rows)))


_HEAD = ("num_probes", "learning_rate", "estimator.name", "optimizer.name")


def _labels(configs):
  """The method, its probes and rate, and what else tells rows apart."""
  heads = [head_of(config) for config in configs]
  flats = [flat(config) for config in configs]
  labels = []
  for head, mine in zip(heads, flats, strict=True):
    alike = [x for h, x in zip(heads, flats, strict=True) if h == head]
    skipped = (*_ASIDE, *_HEAD)
    different = [
      name
      for name in dict.fromkeys(itertools.chain(*alike))
      if name not in skipped
      and name.split(".")[0] not in skipped
      and any(x.get(name) != mine.get(name) for x in alike)
    ]
    label = f"{head}, rate {mine.get('learning_rate'):g}"
    for name in different[:4]:
      label += f", {name} {_short(mine.get(name))}"
    if different[4:]:
      label += f" and {len(different) - 4} more"
    labels.append(label)
  return labels


def _short(value):
  return f"{value:g}" if isinstance(value, float) else str(value)


def solver(config: dict[str, Any]) -> str:
  """The name of the method."""
  name = config["estimator"]["name"]
  return "BPTT" if name == "bptt" else name


def head_of(config: dict[str, Any]) -> str:
  """The method, its probes and its optimiser."""
  probes = "" if solver(config) == "BPTT" else f" @ {config['num_probes']}"
  return f"{solver(config)}{probes}, {config['optimizer']['name']}"


def best_of_solvers(rows: Sequence[Row]) -> list[Row]:
  """Of every method, with its probes and optimiser, the row that ended lowest.

  By the median of its validation loss, or of the training loss without one.
  """
  best: dict[str, tuple[float, Row]] = {}
  for row in rows:
    end = over_seeds(row, lambda run: last(run, "valid_loss"))
    end = end or over_seeds(row, lambda run: last(run, "loss"))
    height = end.median if end else math.inf
    head = head_of(row.config)
    if head not in best or height < best[head][0]:
      best[head] = (height, row)
  return [row for _, row in best.values()]


# What a run says.


def last(run: Run, name: str) -> float | None:
  """The last value of a metric; None if the run has none."""
  return next((r[name] for r in reversed(run.records) if name in r), None)


def best(run: Run, name: str) -> float | None:
  """The smallest value of a metric."""
  values = [r[name] for r in run.records if name in r]
  return min((x for x in values if math.isfinite(x)), default=None)


def validates_clean(task: dict[str, Any]) -> bool:
  """Whether the validation split is the batch of training itself."""
  return task["name"] == "random_tokens"


def reached(run: Run, unit: str, target: float = TARGET) -> float:
  """Where the loss was first below a target; infinity if nowhere.

  That is the training loss or, where it is logged, the clean one: a zero-order
  method's training loss is of perturbed parameters, and may stay above the
  target although those that it has found lie below. A line has the training
  loss before its update, and the clean one after it.

  Args:
    run: Of which only logged steps are seen. Where a line does not have the
      unit, the next that does counts.
    unit: "step", "forward_tokens" or "seconds".
    target: In nats.
  """
  clean = validates_clean(run.config["task"])
  names = ["loss", "valid_loss" if clean else "train_loss"]
  met = False
  for record in run.records:
    met = met or any(record.get(name, target) < target for name in names)
    if met and unit in record:
      return record[unit]
  return math.inf


def at(run: Run, unit: str, budget: float, name: str) -> float | None:
  """The last value of a metric within a budget.

  Args:
    run: Its lines without the unit do not count.
    unit: As in :func:`reached`.
    budget: In that unit.
    name: Of the metric.
  """
  found = None
  for record in run.records:
    if unit in record and record[unit] <= budget and name in record:
      found = record[name]
  return found


def pairs(run: Run) -> list[tuple[float, float]]:
  """Training and held-out loss at every evaluation that has both.

  Both are of the parameters as they are: a zero-order method's losses in
  training are of perturbed ones, and the smoothed loss is another function.
  """
  found = [
    (record["train_loss"], record["valid_loss"])
    for record in run.records
    if {"train_loss", "valid_loss"} <= record.keys()
  ]
  return [pair for pair in found if all(map(math.isfinite, pair))]


def heldout_at(run: Run, level: float) -> float | None:
  """The held-out loss where the training loss first falls to a level.

  Args:
    run: Of which :func:`pairs` are joined by straight lines.
    level: In nats. None if the run did not come so low.
  """
  before = None
  for loss, heldout in pairs(run):
    if loss <= level:
      if before is None:
        return heldout
      share = (before[0] - level) / (before[0] - loss)
      return before[1] + share * (heldout - before[1])
    before = loss, heldout
  return None


def seconds_per_step(run: Run) -> float | None:
  """The median over the logged steps, the first of which were compiled."""
  points = [(r["step"], r["seconds"]) for r in run.records if "seconds" in r]
  paces = [
    (t - s) / (j - i)
    for (i, s), (j, t) in itertools.pairwise(points)
    if j > i and t >= s
  ]
  return statistics.median(paces) if paces else None


UNITS = ("step", "forward_tokens", "seconds")


def shared_budget(
  rows: Sequence[Row], unit: str, name: str = "loss"
) -> float | None:
  """The most that every row has spent, and enough for a value of a metric.

  Where the first value of a row comes only after another has ended, that row
  has spent less, and its last value counts. None if a row lacks the metric.
  """
  runs = [run for row in rows for run in row.counted]
  lines = [[r[unit] for r in run.records if unit in r] for run in runs]
  valued = [
    [r[unit] for r in run.records if unit in r and name in r] for run in runs
  ]
  if not all(valued):
    return None
  # Every seed has to have come so far.
  return max(min(x[-1] for x in lines), max(x[0] for x in valued))


def over_seeds(
  row: Row, figure: Callable[[Run], float | None]
) -> Middle | None:
  """A figure of the runs of a row that count."""
  return middle(figure(run) for run in row.counted)
