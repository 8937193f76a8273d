"""What a report says: tables, pictures and sentences, in no format yet."""

import functools
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from zorn_jax.report import claims, curves, runs as run_dirs
from zorn_jax.report.benches import Bench
from zorn_jax.report.claims import Verdict
from zorn_jax.report.runs import Comparison, Middle

INTERRUPTED = "interrupted"
_MOST_ROWS = len(curves.COLORS)  # In a picture.
_UNITS = {"step": "steps", "forward_tokens": "tokens", "seconds": "s"}
_AXES = {
  "step": "steps",
  "forward_tokens": "forward tokens",
  "seconds": "seconds",
}


class Text(NamedTuple):
  """A paragraph."""

  text: str


class Table(NamedTuple):
  """Cells are texts; the first column names the row."""

  head: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


class Picture(NamedTuple):
  """An SVG document, and what it shows in words."""

  alt: str
  svg: str


class Pictures(NamedTuple):
  """Pictures that belong side by side."""

  pictures: tuple[Picture, ...]


class Fold(NamedTuple):
  """Preformatted text that only some want to see."""

  summary: str
  text: str


Block = Text | Table | Pictures | Fold


class Section(NamedTuple):
  """A heading and what is below it."""

  title: str
  blocks: tuple[Block, ...]


class Document(NamedTuple):
  """A whole report."""

  title: str
  lead: str
  sections: tuple[Section, ...]


def write(
  comparisons: Sequence[Comparison],
  benches: Sequence[Bench],
  verdicts: Sequence[Verdict],
  made_by: str,
  idle: Sequence[str] = (),
) -> Document:
  """Puts together what a report says.

  Args:
    comparisons: Of runs, one for each task.
    benches: Files of benchmarks.
    verdicts: On the claims.
    made_by: Command and version, in words.
    idle: Runs that have not begun.
  """
  sections = [_verdicts(verdicts)]
  sections += [_comparison(x) for x in comparisons]
  sections += [_bench(x) for x in benches]
  if comparisons:
    sections.append(_what_ran(comparisons, idle))
  counts = {
    word: sum(x.word == word for x in verdicts)
    for word in (claims.CONFIRMED, claims.REFUTED, claims.UNTESTED)
  }
  summary = ", ".join(f"{n} {word}" for word, n in counts.items())
  lead = (
    f"{made_by} Of {len(verdicts)} claims: {summary}. Figures of several seeds "
    "are medians, in brackets the smallest and the largest."
  )
  return Document("Zero-order training, reproduced", lead, tuple(sections))


# Claims.


def _verdicts(verdicts):
  rows = tuple(
    (
      x.claim.name,
      x.word,
      ", ".join(figure(v) for v in x.claim.theirs) or "none published",
      "; ".join(map(spread, x.ours)) or "-",
      x.claim.unit,
      x.why,
      claims.rule_of(x.claim),
      x.claim.source,
    )
    for x in verdicts
  )
  head = (
    "claim",
    "verdict",
    "authors",
    "here",
    "unit",
    "why",
    "rule",
    "source",
  )
  return Section(
    "Claims",
    (
      Text(
        "The authors' figures are those of their repository and its logs; the "
        "values behind the paper's figure 1 and table 2 are not published. "
        "Tolerances are ours. A verdict needs three seeds, unless the figure "
        "depends on none or the claim is a single log."
      ),
      Table(head, rows),
    ),
  )


# Runs.


def _comparison(comparison):
  rows, valid = comparison.rows, _valid(comparison)
  letters = [_letter(i) for i in range(len(rows))]
  blocks: list[Block] = [_ends(rows, letters, valid)]
  models: dict[str, dict[str, run_dirs.Row]] = {}
  for letter, row in zip(letters, rows, strict=True):
    models.setdefault(str(row.config.get("model")), {})[letter] = row
  for some in models.values():
    if len(models) > 1:
      blocks.append(Text(f"Of one model: {', '.join(some)}."))
    blocks += _budgets(some, valid)
    blocks += _levels(some)
    blocks += _pictures(some, comparison)
  if not all(run.complete for row in rows for run in row.runs):
    blocks.append(
      Text(
        "Dashed curves are those of interrupted runs. They count only in rows "
        "that have no complete run, which are marked."
      )
    )
  return Section(f"Task: {comparison.title}", tuple(blocks))


def _valid(comparison):
  """What a loss on the validation split is."""
  clean = run_dirs.validates_clean(comparison.task)
  return "clean" if clean else "held-out"


def _letter(index):
  return chr(ord("A") + index) if index < 26 else str(index + 1)


def _ends(rows, letters, valid):
  """Where the runs of every row came to."""
  target = f"{run_dirs.TARGET:g}"
  has_validation = any(
    run_dirs.last(run, "valid_loss") is not None
    for row in rows
    for run in row.runs
  )
  head = ["", "run", "seeds", "state", "steps", "loss"]
  if has_validation:
    head += [f"best {valid} loss", f"last {valid} loss", f"{valid} accuracy"]
  head += [f"{name} to {target}" for name in ("steps", "tokens", "seconds")]
  head += ["seconds a step", "forward tokens", "seconds"]
  lines = []
  for row, letter in zip(rows, letters, strict=True):
    of = lambda name, pick=run_dirs.last, row=row: run_dirs.over_seeds(
      row, lambda run: pick(run, name)
    )
    cells = [letter, row.label, _seeds(row), _state(row), spread(of("step"))]
    cells.append(spread(of("loss")))
    if has_validation:
      cells += [
        spread(of("valid_loss", run_dirs.best)),
        spread(of("valid_loss")),
        spread(of("valid_accuracy")),
      ]
    cells += [spread(of(unit, run_dirs.reached)) for unit in run_dirs.UNITS]
    cells.append(spread(run_dirs.over_seeds(row, run_dirs.seconds_per_step)))
    cells += [spread(of("forward_tokens")), spread(of("seconds"))]
    lines.append(tuple(cells))
  return Table(tuple(head), tuple(lines))


def _seeds(row):
  return ", ".join(str(run.seed) for run in row.counted)


def _state(row):
  cut = [run for run in row.runs if not run.complete]
  if not cut:
    return "complete"
  if not row.complete:
    return INTERRUPTED
  return f"complete; {INTERRUPTED}: seed " + ", ".join(str(x.seed) for x in cut)


def _budgets(rows, valid):
  """Losses at the same number of steps, of tokens and of seconds."""
  if len(rows) < 2:
    return []
  words = {"loss": "loss", "valid_loss": f"{valid} loss"}
  columns = [
    (unit, name, budget)
    for unit in _UNITS
    for name in words
    if (budget := run_dirs.shared_budget(list(rows.values()), unit, name))
  ]
  head = ["", "run"]
  head += [
    f"{words[name]} at {figure(budget)} {_UNITS[unit]}"
    for unit, name, budget in columns
  ]
  lines = []
  for letter, row in rows.items():
    cells = [letter, row.label]
    for unit, name, budget in columns:
      at = functools.partial(run_dirs.at, unit=unit, budget=budget, name=name)
      cells.append(spread(run_dirs.over_seeds(row, at)))
    lines.append(tuple(cells))
  return [
    Text(
      "At equal cost: the most that every seed of every row has spent, or what "
      "the last of them needs for its first value; a row that ended before has "
      "its last. A backward pass counts as two forward ones. The loss of a "
      "zero-order method is the mean of its perturbed losses, BPTT's is clean."
    ),
    Table(tuple(head), tuple(lines)),
  ]


_LEVELS = 4  # Training losses at which held-out losses are compared.


def _levels(rows):
  """Held-out losses where training losses are the same."""
  pairs = {
    letter: [run_dirs.pairs(run) for run in row.counted]
    for letter, row in rows.items()
  }
  pairs = {letter: x for letter, x in pairs.items() if all(x)}
  if len(pairs) < 2:
    return []
  loss = lambda pair: pair[0]
  lowest = [max(min(map(loss, run)) for run in x) for x in pairs.values()]
  first = [min(run[0][0] for run in x) for x in pairs.values()]
  # From where all have begun to what the second best comes to.
  low, high = sorted(lowest)[1], min(first)
  if low >= high:
    return []
  levels = [
    low + (high - low) * (_LEVELS - 1 - i) / _LEVELS for i in range(_LEVELS)
  ]
  lines = []
  for letter in pairs:
    cells = [letter, rows[letter].label]
    for level in levels:
      at = lambda run, level=level: run_dirs.heldout_at(run, level)
      cells.append(spread(run_dirs.over_seeds(rows[letter], at)))
    lines.append(tuple(cells))
  head = ["", "run", *(f"held-out loss at {figure(x)} nats" for x in levels)]
  return [
    Text(
      "At an equal training loss: the held-out loss where the training loss, "
      "both without a perturbation, is first so low, to the lowest that two "
      "rows come to. A dash: not every seed of the row does."
    ),
    Table(tuple(head), tuple(lines)),
  ]


def _pictures(rows, comparison):
  """Curves of rows by letter."""
  if not curves.available():
    return [
      Text(
        "There are no curves: matplotlib is not installed. Run: pip install "
        "'zorn_jax[plot]'."
      )
    ]
  drawn_rows = rows
  if len(rows) > _MOST_ROWS:
    best = run_dirs.best_of_solvers(list(rows.values()))[:_MOST_ROWS]
    drawn_rows = {x: row for x, row in rows.items() if row in best}
  blocks: list[Block] = []
  for name, words in (
    ("loss", "training loss"),
    ("valid_loss", f"{_valid(comparison)} loss"),
  ):
    drawn = []
    for unit, axis in _AXES.items():
      lines = _curves(drawn_rows, unit, name)
      if lines:
        lowest = min(y for curve in lines for _, y in curve.points)
        counts = name == "loss" or run_dirs.validates_clean(comparison.task)
        near = counts and lowest < 2 * run_dirs.TARGET
        line = run_dirs.TARGET if near else None
        svg = curves.picture(lines, axis, f"{words}, nats", line)
        drawn.append(Picture(f"{words} against {axis}", svg))
    if name == "valid_loss":
      lines = _lines(drawn_rows, run_dirs.pairs)
      if lines:
        svg = curves.picture(lines, "training loss, nats", f"{words}, nats")
        drawn.append(Picture(f"{words} against training loss", svg))
    if drawn:
      blocks.append(Pictures(tuple(drawn)))
  ratios = _curves(drawn_rows, "step", "signal_to_noise")
  if ratios:
    svg = curves.picture(ratios, "steps", "signal to noise of the pairs", 1.0)
    blocks += [
      Text(
        "Signal to noise: the power of the slopes in the losses of the probes, "
        "over that of all else that these losses differ in (curvature, and "
        "data where every pair has its own). Central differences cancel that "
        "noise, one-sided ones do not."
      ),
      Pictures((Picture("signal to noise against steps", svg),)),
    ]
  if len(drawn_rows) < len(rows):
    blocks.append(
      Text(
        f"Drawn are {', '.join(drawn_rows)}: of every solver, with its number "
        "of probes, the row that ended lowest."
      )
    )
  return blocks


def _curves(rows, unit, name):
  return _lines(
    rows,
    lambda run: [
      (record[unit], record[name])
      for record in run.records
      if unit in record and math.isfinite(record.get(name, math.nan))
    ],
  )


def _lines(rows, points_of):
  """A curve for each run of the rows by letter that has points."""
  return [
    curves.Curve(letter, index, points, not run.complete)
    for index, (letter, row) in enumerate(rows.items())
    for run in row.runs
    if (points := points_of(run))
  ]


# Benchmarks.


def _bench(bench):
  blocks: list[Block] = [Text(f"From {bench.name}."), _facts(bench.machine)]
  for title, rows in bench.tables.items():
    if rows:
      blocks += [Text(f"{title}:"), _plain(rows)]
  return Section(f"Measured: {bench.title}", tuple(blocks))


def _facts(machine):
  known = ((k, _cell(v)) for k, v in machine.items() if v is not None)
  return Table(("machine", ""), tuple(known))


def _plain(rows):
  names = dict.fromkeys(name for row in rows for name in row)
  hidden = ("_quartiles", "_spread")
  names = [x for x in names if not x.endswith(hidden) and x != "tried_ms"]
  return Table(
    tuple(name.replace("_", " ") for name in names),
    tuple(tuple(_spread_cell(row, name) for name in names) for row in rows),
  )


def _spread_cell(row, name):
  text = _cell(row.get(name))
  for suffix in ("_quartiles", "_spread"):
    if row.get(name + suffix):
      text += f" ({' to '.join(map(_cell, row[name + suffix]))})"
  return text


def _cell(value):
  if value is None:
    return "-"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, (list, tuple)):
    return ", ".join(map(_cell, value))
  return figure(value) if isinstance(value, (int, float)) else str(value)


# What ran.


def _what_ran(comparisons, idle):
  rows = [row for comparison in comparisons for row in comparison.rows]
  lines = []
  for row in rows:
    for run in row.runs:
      facts = run.starts[-1] if run.starts else {}
      steps = f"{run.records[-1]['step']:,} of {run.config['steps']:,}"
      lines.append(
        (
          run.name,
          str(run.seed),
          steps,
          "complete" if run.complete else INTERRUPTED,
          *(
            _cell(facts.get(x)) for x in ("device", "commit", "jax", "command")
          ),
        )
      )
  head = ("directory", "seed", "steps", "state", "device", "commit", "jax")
  blocks: list[Block] = [Table((*head, "command"), tuple(lines))]
  if not any(run.starts for row in rows for run in row.runs):
    blocks.append(
      Text(
        "Device, commit and command are not known: the run directories do not "
        "say."
      )
    )
  if idle:
    blocks.append(Text(f"Not begun: {', '.join(idle)}."))
  for comparison in comparisons:
    for index, row in enumerate(comparison.rows):
      config = {k: v for k, v in row.config.items() if k != "seed"}
      name = f"Config of {comparison.title}, {_letter(index)}: {row.label}"
      blocks.append(Fold(name, json.dumps(config, indent=2)))
  return Section("What was run", tuple(blocks))


# Figures.


def figure(value: float) -> str:
  """A number for people: four digits, whole numbers whole."""
  if math.isinf(value):
    return "-"
  if isinstance(value, int) or float(value).is_integer():
    return f"{int(value):,}"
  if abs(value) >= 1e4:
    return f"{value:,.0f}"
  return f"{value:.4g}"


def spread(values: Middle | None) -> str:
  """The median and, of figures that differ, the smallest and the largest."""
  if values is None:
    return "-"
  text = figure(values.median)
  if values.low == values.high:
    return text
  return f"{text} ({figure(values.low)} to {figure(values.high)})"
