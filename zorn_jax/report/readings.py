"""What the runs and benchmarks given to a report say about a claim.

A reader makes a :class:`Reading` of the :class:`Evidence`, or says in a
sentence what it would need.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from zorn_jax.report import runs as run_dirs
from zorn_jax.report.benches import Bench
from zorn_jax.report.runs import Comparison, Middle, Row

SEEDS = 3  # That a verdict needs.
RATES = 3  # Learning rates that a verdict on the best of them needs.


class Evidence(NamedTuple):
  """All that was given to a report."""

  comparisons: Sequence[Comparison]
  benches: Sequence[Bench]


class Reading(NamedTuple):
  """What is found here.

  Attributes:
    ours: Figures, each the median and the spread of its seeds.
    seeds: How many there are; None where the figure depends on none.
    where: In words.
    obstacle: Why no verdict can be had all the same; empty if it can.
  """

  ours: tuple[Middle, ...]
  seeds: int | None
  where: str
  obstacle: str = ""


def _rows(evidence, **fields) -> list[Row]:
  """Rows whose configs have these values; `__` is a dot."""
  wanted = {name.replace("__", "."): x for name, x in fields.items()}
  return [
    row
    for comparison in evidence.comparisons
    for row in comparison.rows
    if all(run_dirs.flat(row.config).get(k) == x for k, x in wanted.items())
  ]


# The model and the batch of the authors' logs: 6,553,893 parameters.
_DNC = {
  "task__name": "random_tokens",
  "task__source_length": 100,
  "task__seq_length": 100,
  "task__vocab_size": 100,
  "model__name": "dnc",
  "model__controller": "rnn",
  "model__hidden_size": 1024,
  "model__memory_slots": 1024,
  "model__slot_size": 1024,
  "model__embedding_size": 32,
  "batch_size": 1,
}
DNC_FORWARD = _DNC | {
  "estimator__name": "central_difference",
  "num_probes": 512,
  "learning_rate": 0.01,
  "epsilon": 0.01,
}
DNC_BACKWARD = _DNC | {
  "estimator__name": "bptt",
  "optimizer__name": "sgd",
  "learning_rate": 0.001,
}


def first_losses(count: int, **fields) -> Callable[[Evidence], Reading | str]:
  """The training losses of the first steps."""

  def read(evidence):
    for row in _rows(evidence, **fields):
      losses = [_first(run, count) for run in row.runs]
      losses = [x for x in losses if x]
      if losses:
        ours = tuple(map(middle, zip(*losses, strict=True)))
        return Reading(ours, len(losses), row.label)
    return f"no run of that config has logged its first {count} steps"

  return read


def _first(run, count):
  losses = {r["step"]: r["loss"] for r in run.records if "loss" in r}
  steps = range(1, count + 1)
  return [losses[i] for i in steps] if all(i in losses for i in steps) else None


def middle(values) -> Middle:
  """The median of some figures, and their spread."""
  values = list(values)
  return Middle(statistics.median(values), min(values), max(values))


def first_slope(count: int, **fields) -> Callable[[Evidence], Reading | str]:
  """What the training loss loses in a step, over the first ones."""
  losses_of = first_losses(count, **fields)

  def read(evidence):
    found = losses_of(evidence)
    if isinstance(found, str):
      return found
    slopes = [
      (losses[-1] - losses[0]) / (count - 1)
      for row in _rows(evidence, **fields)
      if row.label == found.where
      for losses in (_first(run, count) for run in row.runs)
      if losses
    ]
    return found._replace(ours=(middle(slopes),))

  return read


_SMOKE_PROBES = 96


def smoke(
  size: str, hidden_size: int, most: int
) -> Callable[[Evidence], Reading | str]:
  """Steps until ten random tokens are known by heart, at the best rate.

  Of another number of probes nothing is said, nor of what ended before `most`
  steps without knowing them.
  """

  def read(evidence):
    found, short = [], ""
    for row in _rows(
      evidence,
      task__name="random_tokens",
      task__seq_length=10,
      model__name="lstm",
      model__hidden_size=hidden_size,
      estimator__name="central_difference",
      num_probes=_SMOKE_PROBES,
    ):
      known = [
        (run_dirs.reached(run, "step"), run.records[-1]["step"])
        for run in row.runs
      ]
      steps = [x for x, ran in known if math.isfinite(x) or ran >= most]
      if steps:
        found.append((middle(steps), len(steps), row.label))
      else:
        short = f"{row.label} has {max(ran for _, ran in known)} steps"
    for bench in evidence.benches:
      if bench.content.get("size") == size:
        losses = [row["loss"] for row in bench.tables["steps"]]
        below = [i for i, x in enumerate(losses) if x < run_dirs.TARGET]
        ran = bench.content.get("probes", _SMOKE_PROBES)
        if ran != _SMOKE_PROBES or not below and len(losses) < most:
          short = f"{bench.name} has {len(losses)} steps of {ran} probes"
          continue
        steps = 1 + below[0] if below else math.inf
        found.append((middle([steps]), 1, bench.name))
    if not found:
      return short or (
        f"no run of {size} was given: scripts/overfit_large.py makes one"
      )
    # The fewest of those with enough seeds, if there are any.
    steps, seeds, where = min(found, key=lambda x: (x[1] < SEEDS, x[0].median))
    return Reading((steps,), seeds, where)

  return read


_MEMORIES = ("zero_order_mb", "bptt_mb", "checkpointed_bptt_mb")


def memory_growth(
  name: str, claimed: float
) -> Callable[[Evidence], Reading | str]:
  """Exponent of a step's memory in the length, of the two longest contexts.

  The one that is farthest from what is claimed.
  """
  assert name in _MEMORIES

  def read(evidence):
    growth = {}
    for bench in evidence.benches:
      if bench.content.get("suite") != "memory" or bench.content.get("quick"):
        continue
      rows = bench.tables.get("context length", [])
      for case in dict.fromkeys(row["case"] for row in rows):
        points = sorted(
          (r["length"], r[name]) for r in rows if r["case"] == case
        )
        if len(points) > 1:
          (a, low), (b, high) = points[-2:]
          exponent = math.log(high / low) / math.log(b / a)
          growth[exponent] = f"{case}, length {a:,} to {b:,}, {bench.name}"
    if not growth:
      return "no zorn-bench --suite=memory was given"
    worst = max(growth, key=lambda x: abs(x - claimed))
    return Reading(
      (Middle(worst, min(growth), max(growth)),), None, growth[worst]
    )

  return read


def _measured(bench):
  """Rows of scripts/paper/measure.py, if the file has them."""
  paper = bench.content.get("suite") == "paper"
  return bench.tables.get("steps", []) if paper else []


def overhead_reduction(evidence: Evidence) -> Reading | str:
  """Percent of BPTT's memory beside the parameters that is not needed."""
  for bench in evidence.benches:
    beside = {
      row["program"]: row["overhead_mb"]
      for row in _measured(bench)
      if row["case"] == "replication"
    }
    if {"BPTT", "CD-RGE"} <= beside.keys():
      saved = 100 * (1 - beside["CD-RGE"] / beside["BPTT"])
      return Reading((Middle(saved, saved, saved),), None, bench.name)
  return "scripts/paper/replication.sh measures it, and no file of it is here"


def step_seconds(
  case: str, program: str, probes: int
) -> Callable[[Evidence], Reading | str]:
  """Our time of a step; other devices and batches than theirs forbid more."""
  names = ("case", "program", "probes", "devices")
  wanted = (case, program, probes, 1)

  def read(evidence):
    for bench in evidence.benches:
      for row in _measured(bench):
        if tuple(map(row.get, names)) != wanted or not row["ms"]:
          continue
        low, high = row["ms_quartiles"]
        seconds = Middle(row["ms"] / 1e3, low / 1e3, high / 1e3)
        where = f"batch {row['batch']}, {bench.name}"
        device = bench.machine.get("device", "an unknown device")
        obstacle = f"their time is that of an A40 GPU, ours of {device}"
        return Reading((seconds,), None, where, obstacle)
    of = f"{program} at {probes} probes" if probes else program
    return f"no step of {case} by {of}: scripts/paper/table1.sh"

  return read


def dnc_seconds(evidence: Evidence) -> Reading | str:
  """Our time of a step of the DNC of the logs."""
  for row in _rows(evidence, **DNC_FORWARD):
    paces = [run_dirs.seconds_per_step(run) for run in row.runs]
    known = [x for x in paces if x is not None]
    if known:
      devices = {x.get("device") for run in row.runs for x in run.starts}
      device = ", ".join(sorted(filter(None, devices))) or "an unknown device"
      obstacle = f"their time is that of an A40 GPU, ours of {device}"
      return Reading((middle(known),), len(known), row.label, obstacle)
  return "no run of that config has logged two steps"


def _is_bptt(row):
  return run_dirs.solver(row.config) == "BPTT"


def _is_cd_rge(row):
  estimator = row.config["estimator"]
  estimated = estimator.get("readout", "estimated") == "estimated"
  return estimator["name"] == "central_difference" and estimated


def _sides(evidence: Evidence, wanted: Callable[[dict[str, Any]], bool]):
  """Complete rows of CD-RGE and of BPTT with the same task and model."""
  for comparison in evidence.comparisons:
    if not wanted(comparison.task):
      continue
    whole = [row for row in comparison.rows if row.complete]
    for model in dict.fromkeys(str(row.config["model"]) for row in whole):
      rows = [row for row in whole if str(row.config["model"]) == model]
      forward = [row for row in rows if _is_cd_rge(row)]
      backward = [row for row in rows if _is_bptt(row)]
      if forward and backward:
        yield comparison, forward, backward


def _rates(rows):
  return len({row.config["learning_rate"] for row in rows})


def by_heart(task):
  return task["name"] == "random_tokens" or bool(task.get("one_batch"))


_NO_PAIR = "no complete CD-RGE and BPTT runs of one model on {} were given"


def _fewest(rows):
  """Steps to the target of the row that needs the fewest, and that row."""
  of = lambda row: middle(run_dirs.reached(x, "step") for x in row.counted)
  return min(((of(row), row) for row in rows), key=lambda x: x[0].median)


def _swept(rows):
  """The rows of methods that have seen enough rates; all if none has."""
  of = lambda row: _rates(_alike(rows, row))
  return [row for row in rows if of(row) >= RATES] or rows


def _alike(rows, row):
  """Those of the same method, probes and optimiser."""
  head = run_dirs.head_of(row.config)
  return [x for x in rows if run_dirs.head_of(x.config) == head]


def fewer_steps(evidence: Evidence) -> Reading | str:
  """How many times fewer steps CD-RGE needs, at the best rate of both.

  The most favourable of the models. Where CD-RGE does not arrive, it needs more
  steps than it took.
  """
  found = []
  for comparison, forward, backward in _sides(evidence, by_heart):
    forward, backward = map(_swept, (forward, backward))
    (ours, row), (theirs, other) = map(_fewest, (forward, backward))
    rates = [
      _rates(_alike(rows, x)) for rows, x in ((forward, row), (backward, other))
    ]
    where, obstacle = f"{comparison.title}: {row.label}", ""
    if math.isinf(ours.median):
      ran = min(run.records[-1]["step"] for x in forward for run in x.counted)
      where += f", not there in {ran} steps,"
      ours = Middle(ran, ran, ran)
      if theirs.median > ran:
        obstacle = f"no CD-RGE run came below the target in {ran} steps"
    where += f" against {other.label}"
    if math.isinf(theirs.median):
      obstacle = "no BPTT run came below the target"
    elif min(rates) < RATES:
      obstacle = (
        f"{rates[0]} and {rates[1]} learning rates of CD-RGE and BPTT, of "
        f"{RATES} each that a verdict needs"
      )
    ratio = theirs.median / ours.median
    seeds = min(len(row.counted), len(other.counted))
    spread = Middle(ratio, theirs.low / ours.high, theirs.high / ours.low)
    found.append(Reading((spread,), seeds, where, obstacle))
  found += _counted_steps(evidence.benches)
  if not found:
    return _NO_PAIR.format("a batch to be learned by heart")
  usable = [x for x in found if not x.obstacle and x.seeds >= SEEDS]
  return max(usable or found, key=lambda x: x.ours[0].median)


def _counted_steps(benches):
  """The same of scripts that sweep rates and count steps."""
  for bench in benches:
    rows = bench.tables.get("rows", [])
    if not all({"solver", "steps"} <= row.keys() for row in rows):
      continue
    steps = {"BPTT": [], "central_difference": []}
    for row in rows:
      for name, known in steps.items():
        exact = "exact readout" in row["solver"]
        if row["solver"].startswith(name) and row["steps"] and not exact:
          known.append((row["steps"], row["solver"]))
    if not all(steps.values()):
      continue
    (theirs, other), (ours, solver) = (min(x) for x in steps.values())
    ratio = theirs / ours
    where = f"{bench.name}: {solver} against {other}"
    yield Reading((Middle(ratio, ratio, ratio),), 1, where)


def both_learn(evidence: Evidence) -> Reading | str:
  """The share of models that CD-RGE learns by heart, of those BPTT does."""
  learned, seeds = [], []
  for comparison, forward, backward in _sides(evidence, by_heart):
    (ours, row), (theirs, _) = map(_fewest, (forward, backward))
    if math.isfinite(theirs.median):
      where = f"{comparison.title}: {row.label}"
      learned.append((math.isfinite(ours.median), where))
      seeds.append(len(row.counted))
  if not learned:
    return _NO_PAIR.format("a batch to be learned by heart") + (
      f" of which BPTT came below {run_dirs.TARGET:g}"
    )
  share = statistics.mean(x for x, _ in learned)
  where = ", ".join(dict.fromkeys(title for _, title in learned))
  return Reading((Middle(share, share, share),), min(seeds), where)


def heldout_ratio(
  wanted: Callable[[dict[str, Any]], bool], what: str
) -> Callable[[Evidence], Reading | str]:
  """CD-RGE's best held-out loss over BPTT's; the worst of the models."""

  def read(evidence):
    found = []
    for comparison, forward, backward in _sides(evidence, wanted):
      best = [_lowest(rows) for rows in (forward, backward)]
      if all(best):
        (ours, row), (theirs, other) = best
        ratio = Middle(
          ours.median / theirs.median,
          ours.low / theirs.high,
          ours.high / theirs.low,
        )
        where = f"{comparison.title}: {row.label} against {other.label}"
        seeds = min(len(row.counted), len(other.counted))
        found.append(Reading((ratio,), seeds, where))
    if not found:
      return _NO_PAIR.format(what)
    return max(found, key=lambda x: x.ours[0].median)

  return read


def _lowest(rows):
  """The row with the lowest held-out loss, and that loss."""
  figures = [
    (run_dirs.over_seeds(r, lambda run: run_dirs.best(run, "valid_loss")), r)
    for r in rows
  ]
  figures = [x for x in figures if x[0]]
  return min(figures, key=lambda x: x[0].median) if figures else None


def heldout_at_equal_loss(evidence: Evidence) -> Reading | str:
  """Held-out loss of CD-RGE less BPTT's, where both train to the same loss.

  Both without a perturbation, at the lowest training loss that half of CD-RGE's
  rows come to with all seeds, and a row of BPTT; of those that do, the lowest
  held-out loss. The least favourable of the models.
  """
  found = []
  for comparison, *sides in _sides(evidence, lambda task: not by_heart(task)):
    ends = [[(_end(row), row) for row in rows] for rows in sides]
    forward, backward = (
      [end for end, _ in side if end is not None] for side in ends
    )
    if not (forward and backward):
      continue
    level = max(statistics.median_high(forward), min(backward))
    (ours, row), (theirs, other) = (
      min(
        (
          (middle(run_dirs.heldout_at(run, level) for run in x.counted), x)
          for end, x in side
          if end is not None and end <= level
        ),
        key=lambda x: x[0].median,
      )
      for side in ends
    )
    gap = Middle(
      ours.median - theirs.median,
      ours.low - theirs.high,
      ours.high - theirs.low,
    )
    where = (
      f"{comparison.title}, at a training loss of {level:.3g}: "
      f"{row.label} against {other.label}"
    )
    seeds = min(len(row.counted), len(other.counted))
    found.append(Reading((gap,), seeds, where))
  if not found:
    return _NO_PAIR.format("a task with held-out data") + (
      " with the clean training loss in their metrics"
    )
  return max(found, key=lambda x: x.ours[0].median)


def _end(row):
  """The lowest clean training loss that all seeds come to; None without."""
  curves = [run_dirs.pairs(run) for run in row.counted]
  if not all(curves):
    return None
  return max(min(loss for loss, _ in curve) for curve in curves)
