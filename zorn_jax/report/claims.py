"""What the authors claim, what is found here, and how the two compare.

Their figures are those of the paper's repository (arXiv:2505.17852); the body
of the paper's tables and figures is not published as numbers. Tolerances are
ours.
"""

from collections.abc import Callable
from typing import NamedTuple

from zorn_jax.report import readings
from zorn_jax.report.readings import Evidence, Reading
from zorn_jax.report.runs import Middle

CONFIRMED = "confirmed"
REFUTED = "not confirmed"
UNTESTED = "cannot be tested here"


class Claim(NamedTuple):
  """One claim.

  Attributes:
    name: The claim in a few words.
    theirs: The authors' figures; empty where they published none.
    unit: Of these figures.
    rule: "within", "at least" or "at most": how ours have to lie.
    bounds: What the rule compares with; `theirs` unless given.
    tolerance: Added to the bounds, in the same unit.
    source: Where the claim stands.
    read: What is found here, or why there is nothing, in words.
    seeds: How many of them a verdict needs.
  """

  name: str
  theirs: tuple[float, ...]
  unit: str
  rule: str
  tolerance: float
  source: str
  read: Callable[[Evidence], Reading | str]
  bounds: tuple[float, ...] = ()
  seeds: int = readings.SEEDS


class Verdict(NamedTuple):
  """What became of a claim.

  Attributes:
    claim: Which.
    word: CONFIRMED, REFUTED or UNTESTED.
    ours: Our figures; empty if there are none.
    why: In words.
  """

  claim: Claim
  word: str
  ours: tuple[Middle, ...]
  why: str


def judge(claim: Claim, evidence: Evidence) -> Verdict:
  """Compares a claim with what is found here."""
  reading = claim.read(evidence)
  if isinstance(reading, str):
    return Verdict(claim, UNTESTED, (), reading)
  ours, seeds, where, obstacle = reading
  if obstacle:
    return Verdict(claim, UNTESTED, ours, f"{obstacle}; {where}")
  if seeds is not None and seeds < claim.seeds:
    why = f"{seeds} of the {claim.seeds} seeds that a verdict needs; {where}"
    return Verdict(claim, UNTESTED, ours, why)
  bounds = claim.bounds or claim.theirs
  pairs = zip(ours, bounds, strict=True)
  kept = all(_keeps(claim, x.median, bound) for x, bound in pairs)
  return Verdict(claim, CONFIRMED if kept else REFUTED, ours, where)


def _keeps(claim, ours, bound):
  if claim.rule == "at least":
    return ours >= bound - claim.tolerance
  if claim.rule == "at most":
    return ours <= bound + claim.tolerance
  return abs(ours - bound) <= claim.tolerance


def rule_of(claim: Claim) -> str:
  """The rule in words."""
  bounds = ", ".join(f"{x:g}" for x in claim.bounds or claim.theirs)
  if claim.rule == "within":
    return f"within {claim.tolerance:g} of {bounds}"
  tolerance = f", tolerance {claim.tolerance:g}" if claim.tolerance else ""
  return f"{claim.rule} {bounds}{tolerance}"


_TRANSDUCTION = ("copy", "reverse", "sort", "repeat_copy", "add")

# Seconds of a step, by size; BPTT ran out of memory from large on.
_SERIES = (
  ("BPTT", 0, {"tiny": 0.1, "small": 0.17, "medium": 33.7}),
  (
    "CD-RGE",
    96,
    {"tiny": 5.7, "small": 6.0, "medium": 7.8, "large": 24.3, "xlarge": 145.0},
  ),
  (
    "CD-RGE",
    512,
    {"tiny": 30.0, "small": 31.1, "medium": 40.7, "large": 132.0}
    | {"xlarge": 777.0},
  ),
)


def _named(program, probes):
  return f"{program} with {probes} probes" if probes else program


CLAIMS = (
  Claim(
    "CD-RGE needs 19 times fewer steps than BPTT to learn a batch by heart",
    (19.0,),
    "times fewer steps",
    "at least",
    4.0,
    "abstract; figure 1 (no values published)",
    readings.fewer_steps,
  ),
  Claim(
    "memory does not grow with the context",
    (),
    "exponent of bytes in length",
    "at most",
    0.05,
    "abstract (no values published)",
    readings.memory_growth("zero_order_mb", 0.0),
    bounds=(0.0,),
  ),
  Claim(
    "BPTT's memory is linear in the context",
    (),
    "exponent of bytes in length",
    "within",
    0.1,
    "abstract (no values published)",
    readings.memory_growth("bptt_mb", 1.0),
    bounds=(1.0,),
  ),
  Claim(
    "CD-RGE saves 73.5 % of BPTT's memory overhead (hidden 512, length 32)",
    (73.5,),
    "percent",
    "at least",
    1.0,
    "a replication's report, not the authors'",
    readings.overhead_reduction,
  ),
  Claim(
    "the smoothed loss regularises: held-out loss at equal training loss",
    (),
    "nats, CD-RGE less BPTT",
    "at most",
    0.0,
    "abstract (no values published)",
    readings.heldout_at_equal_loss,
    bounds=(0.0,),
  ),
  Claim(
    "CD-RGE learns by heart what BPTT does",
    (),
    "share of models",
    "at least",
    0.0,
    "abstract: overfitting (no values published)",
    readings.both_learn,
    bounds=(1.0,),
  ),
  Claim(
    "CD-RGE matches BPTT on transduction",
    (),
    "held-out loss over BPTT's",
    "at most",
    0.05,
    "table 2 (no values published)",
    readings.heldout_ratio(
      lambda task: (
        task["name"] in _TRANSDUCTION and not readings.by_heart(task)
      ),
      "a transduction task",
    ),
    bounds=(1.0,),
  ),
  Claim(
    "CD-RGE matches BPTT on language",
    (),
    "held-out loss over BPTT's",
    "at most",
    0.05,
    "table 2 (no values published)",
    readings.heldout_ratio(
      lambda task: task["name"] == "language_model", "a text"
    ),
    bounds=(1.0,),
  ),
  Claim(
    "first losses of the DNC of scale 8, 512 probes",
    (5.299, 4.759, 4.348, 3.950),
    "nats",
    "within",
    0.15,
    "README, 4.3 (log)",
    readings.first_losses(4, **readings.DNC_FORWARD),
  ),
  Claim(
    "a step of BPTT with SGD at 0.001 on the same DNC",
    (-0.0673,),
    "nats a step",
    "within",
    0.02,
    "README, 4.3 (log: 5.484, 5.416, 5.349, 5.282)",
    readings.first_slope(4, **readings.DNC_BACKWARD),
  ),
  Claim(
    "seconds a step of that DNC, 512 probes",
    (81.0,),
    "s",
    "at most",
    0.0,
    "README, 4.3 (log, A40)",
    readings.dnc_seconds,
  ),
  Claim(
    "the large LSTM learns ten tokens by heart in five steps",
    (5.0,),
    "steps",
    "within",
    2.0,
    "README of May 2025 (log: 7.537, 3.641, 1.755, 0.334, 0.0954)",
    readings.smoke("smoke_large", 66000, most=7),
    seeds=1,
  ),
  Claim(
    "an LSTM of 6.9 billion parameters does in seven",
    (7.0,),
    "steps",
    "within",
    2.0,
    "README (log: 15.95 to 0.0469)",
    readings.smoke("smoke_7b", 2**17, most=9),
    seeds=1,
  ),
  *(
    Claim(
      f"a step of LSTM {size} by {_named(program, probes)}, in series",
      (seconds,),
      "s",
      "at most",
      0.0,
      "README, 5 (A40; replaces table 1)",
      readings.step_seconds(f"LSTM {size}", program, probes),
    )
    for program, probes, times in _SERIES
    for size, seconds in times.items()
  ),
)


def judge_all(evidence: Evidence) -> list[Verdict]:
  """The verdicts on all claims, in the order of `CLAIMS`."""
  return [judge(claim, evidence) for claim in CLAIMS]
