"""Reports: what is read for a claim, and its verdict."""

import json
import math

import numpy as np
import pytest
import small
from reported import (
  BPTT,
  BY_HEART,
  LOSSES,
  MACHINE,
  learning,
  make_run,
  memory_file,
  write,
)

from zorn_jax.report import benches, claims, document, readings, runs


def evidence(paths=(), files=()):
  found = runs.find(paths)[0]
  return readings.Evidence(
    runs.compare(found), [benches.read(x) for x in files]
  )


def verdict(name, *args):
  (claim,) = [x for x in claims.CLAIMS if name in x.name]
  return claims.judge(claim, evidence(*args))


def dnc(tmp_path, losses, **fields):
  fields = {x.replace("__", "."): y for x, y in fields.items()}
  config = {"log_every": 1, "steps": len(losses)}
  for name, value in fields.items():
    *parents, leaf = name.split(".")
    inner = config
    for parent in parents:
      inner = inner.setdefault(parent, {})
    inner[leaf] = value
  config.setdefault("optimizer", {"name": "sgd"})
  return [
    make_run(tmp_path / str(seed), x, seed=seed, **config)
    for seed, x in enumerate(zip(*losses, strict=True))
  ]


def measured_file(tmp_path, *rows):
  content = {"suite": "paper", "machine": MACHINE, "tables": {"steps": rows}}
  return write(tmp_path / "steps.json", content)


def test_fewer_steps_are_counted_at_the_best_rate_of_both(tmp_path):
  found = verdict("19 times", learning(tmp_path / "a", ours=2, theirs=32))
  assert found.ours == ((16.0, 16.0, 16.0),)
  assert found.word == claims.CONFIRMED  # 19 with a tolerance of 4.
  found = verdict("19 times", learning(tmp_path / "b", ours=4, theirs=20))
  assert found.ours[0].median == 5 and found.word == claims.REFUTED
  assert "rate 0.01 against BPTT, adam, rate 0.01" in found.why


def test_a_verdict_needs_seeds_and_rates(tmp_path):
  found = verdict("19 times", learning(tmp_path / "a", 2, 40, seeds=2))
  assert found.word == claims.UNTESTED and "2 of the 3 seeds" in found.why
  assert found.ours[0].median == 20  # Shown all the same.
  few = learning(tmp_path / "b", 2, 40, rates=(0.01, 0.02))
  found = verdict("19 times", few)
  assert found.word == claims.UNTESTED and "2 and 2 learning" in found.why
  assert verdict("19 times").word == claims.UNTESTED


def test_rates_of_other_probes_are_not_counted_together(tmp_path):
  paths = [
    make_run(
      tmp_path / f"{x}{rate}{seed}",
      losses,
      seed=seed,
      learning_rate=rate,
      **fields,
      **BY_HEART,
    )
    for seed in range(3)
    for rate in (0.01, 0.02, 0.03)
    for x, losses, fields in (
      ("f", LOSSES, {"num_probes": round(800 * rate)}),  # One rate each.
      ("b", LOSSES, BPTT),
    )
  ]
  found = verdict("19 times", paths)
  assert found.word == claims.UNTESTED and "1 and 3 learning" in found.why
  # Those that were swept decide, though others need fewer steps.
  slow = (4.0, 4.0, 0.05)
  for seed in range(3):
    for rate in (0.01, 0.02, 0.03):
      fields = {"learning_rate": rate, "seed": seed, "num_probes": 96}
      path = tmp_path / f"s{rate}{seed}"
      paths.append(make_run(path, slow, **fields, **BY_HEART))
  found = verdict("19 times", paths)
  assert found.word == claims.REFUTED and "@ 96" in found.why


@pytest.mark.parametrize(
  ("theirs", "word"), [(2, claims.REFUTED), (61, claims.UNTESTED)]
)
def test_what_never_arrives_needs_more_than_it_took(tmp_path, theirs, word):
  found = verdict("19 times", learning(tmp_path, ours=61, theirs=theirs))
  assert found.word == word
  if word == claims.REFUTED:
    assert found.ours[0].median == 20 / 600
    assert "not there in 600 steps, against BPTT" in found.why


def test_an_exact_readout_is_not_counted_as_cd_rge(tmp_path):
  rows = [
    {"solver": "central_difference, exact readout", "steps": 2},
    {"solver": "central_difference", "steps": 8},
    {"solver": "BPTT, AdamW", "steps": 4},
  ]
  content = {"rows": rows, "machine": "a CPU", "command": "python x.py"}
  found = verdict("19 times", (), [write(tmp_path / "rows.json", content)])
  assert found.ours[0].median == 0.5


def test_steps_that_a_script_counted_have_one_seed():
  file = small.ROOT / "benchmarks" / "results" / "overfit_dnc.json"
  found = verdict("19 times", (), [file])
  assert found.word == claims.UNTESTED
  assert found.ours[0].median == pytest.approx(5 / 56)


def test_the_same_batch_learned_by_both(tmp_path):
  name = "learns by heart what"
  assert verdict(name, learning(tmp_path / "a", 3, 2)).word == claims.CONFIRMED
  paths = [
    make_run(tmp_path / f"{x}{seed}", losses, seed=seed, **fields, **BY_HEART)
    for seed in range(3)
    for x, losses, fields in (("f", (3.0, 2, 1), {}), ("b", LOSSES, BPTT))
  ]
  found = verdict(name, paths)
  assert found.word == claims.REFUTED and found.ours[0].median == 0


@pytest.mark.parametrize(
  ("ours", "word"), [(1.04, claims.CONFIRMED), (1.06, claims.REFUTED)]
)
def test_matching_is_a_ratio_of_the_best_heldout_losses(tmp_path, ours, word):
  paths = [
    make_run(tmp_path / f"{x}{seed}", seed=seed, valid=valid, **fields)
    for seed in range(3)
    for x, valid, fields in (
      ("f", (3, ours * (2 + seed), 9), {}),
      ("b", (4, 2 + seed, 8), BPTT),
    )
  ]
  found = verdict("transduction", paths)
  # Medians of 3, 3, 4 ours and 2, 3, 4 theirs where ours stop at the first.
  best = sorted(min(3, ours * (2 + seed)) for seed in range(3))
  assert found.ours[0].median == pytest.approx(best[1] / 3)
  assert verdict("language", paths).word == claims.UNTESTED
  shifted = [
    make_run(tmp_path / f"x{x}{seed}", seed=seed, valid=valid, **fields)
    for seed in range(3)
    for x, valid, fields in (
      ("f", (9, ours * (2 + seed), 9), {}),
      ("b", (9, 2 + seed, 9), BPTT),
    )
  ]
  found = verdict("transduction", shifted)
  assert found.ours[0].median == pytest.approx(ours) and found.word == word


def test_heldout_loss_at_equal_training_loss(tmp_path):
  # Both come to 1.0: ours have 2.5 there, and BPTT, whose curve passes it five
  # sixths of the way from its first point to its second, 13/6 to 15/6.
  paths = [
    make_run(tmp_path / f"{x}{seed}", losses, valid, seed=seed, **fields)
    for seed in range(3)
    for x, losses, valid, fields in (
      ("f", (3.0, 2.0, 1.0), (4, 3, 2.5), {}),
      ("b", (1.5, 0.9, 0.1), (3, 2 + seed / 5, 1.5), BPTT),
    )
  ]
  found = verdict("regularises", paths)
  assert found.ours[0] == pytest.approx((1 / 6, 0, 1 / 3))
  assert found.word == claims.REFUTED and "loss of 1:" in found.why
  better = readings.middle([-0.1, -0.2, -0.3])
  (claim,) = [x for x in claims.CLAIMS if "regularises" in x.name]
  claim = claim._replace(read=lambda _: readings.Reading((better,), 3, ""))
  assert claims.judge(claim, evidence()).word == claims.CONFIRMED


def test_the_best_epsilon_is_that_at_the_equal_training_loss(tmp_path):
  """Not that with the lowest held-out loss before, nor one that learns less."""
  rows = (
    # Best before it overfits, worst where it does.
    ("f", (3.0, 2.0, 1.0), (4, 1, 9), {"epsilon": 0.01}),
    ("g", (3.0, 2.0, 1.0), (4, 3, 2), {"epsilon": 0.1}),
    ("h", (3.0, 2.9, 2.8), (4, 3, 0.5), {"epsilon": 0.2}),
    ("b", (3.0, 2.0, 1.0), (4, 2, 3), BPTT),
  )
  paths = [
    make_run(tmp_path / f"{x}{seed}", losses, valid, seed=seed, **fields)
    for seed in range(3)
    for x, losses, valid, fields in rows
  ]
  found = verdict("regularises", paths)
  assert found.ours[0].median == -1 and found.word == claims.CONFIRMED
  assert "epsilon 0.1 against" in found.why


def test_heldout_loss_is_read_where_the_training_loss_falls_to_a_level(
  tmp_path,
):
  run = runs.read(make_run(tmp_path / "a", (9.0, 9.0, 9.0, 9.0)))
  losses = ((4.0, 6.0), (math.nan, 5.0), (1.0, 4.0))
  for record, (train, valid) in zip(run.records[1:], losses, strict=True):
    record |= {"train_loss": train, "valid_loss": valid}
  assert runs.pairs(run) == [(4.0, 6.0), (1.0, 4.0)]
  levels = {5.0: 6.0, 4.0: 6.0, 2.5: 5.0, 1.0: 4.0, 0.9: None}
  assert {x: runs.heldout_at(run, x) for x in levels} == levels


def test_heldout_losses_stand_beside_each_other_at_equal_training_losses(
  tmp_path,
):
  paths = [
    make_run(tmp_path / f"{x}{seed}", losses, valid, seed=seed, **fields)
    for seed in range(2)
    for x, losses, valid, fields in (
      ("f", (4.0, 3.0, 2.0), (5, 4.5, 4), {}),
      ("g", (4.0, 3.5, 3.0), (5, 4.8, 4.6), {"epsilon": 0.1}),
      ("b", (5.0, 2.5, 0.0), (6, 3.5 + seed, 3), BPTT),
    )
  ]
  (comparison,) = runs.compare(runs.find(paths)[0])
  _, table = document._levels(dict(zip("ABC", comparison.rows, strict=True)))
  # From 4, where the second has begun, to 2, which two of the three come to.
  assert table.head[2:] == tuple(
    f"held-out loss at {x} nats" for x in ("3.5", "3", "2.5", "2")
  )
  assert [row[2:] for row in table.rows] == [
    ("4.75", "4.5", "4.25", "4"),
    ("4.8", "4.6", "-", "-"),
    ("4.8 (4.5 to 5.1)", "4.4 (4 to 4.8)", "4 (3.5 to 4.5)")
    + ("3.8 (3.4 to 4.2)",),
  ]
  made = document.write([comparison], [], [], "Made.")
  (section,) = [x for x in made.sections if x.title.startswith("Task")]
  alts = [
    picture.alt
    for block in section.blocks
    if isinstance(block, document.Pictures)
    for picture in block.pictures
  ]
  assert "held-out loss against training loss" in alts


def test_interrupted_runs_decide_nothing(tmp_path):
  paths = learning(tmp_path, 2, 20)
  for path in paths:
    config = json.loads((path / "config.json").read_text())
    write(path / "config.json", config | {"steps": 10**6})
  assert verdict("19 times", paths).word == claims.UNTESTED


def test_the_first_losses_of_the_log(tmp_path):
  theirs = np.array([5.299, 4.759, 4.348, 3.950])
  for shift, word in ((0.14, claims.CONFIRMED), (0.16, claims.REFUTED)):
    # Only the median counts: the others are far away.
    losses = np.stack([theirs - 9, theirs + shift, theirs + 9], axis=1)
    paths = dnc(tmp_path / word, losses, **readings.DNC_FORWARD)
    found = verdict("first losses", paths)
    assert found.word == word and len(found.ours) == 4
    assert found.ours[1].low == pytest.approx(4.759 - 9)
  seconds = verdict("seconds a step of that DNC", paths)
  assert seconds.word == claims.UNTESTED and seconds.ours[0].median == 1
  other = readings.DNC_FORWARD | {"num_probes": 96}
  paths = dnc(tmp_path / "other", losses, **other)
  assert verdict("first losses", paths).ours == ()


def test_the_slope_of_back_propagation(tmp_path):
  logged = np.array([5.484, 5.416, 5.349, 5.282])
  losses = np.stack([logged, logged + 1, logged + 2], axis=1)
  found = verdict(
    "a step of BPTT with SGD",
    dnc(tmp_path / "a", losses, **readings.DNC_BACKWARD),
  )
  assert found.ours[0].median == pytest.approx(-0.0673, abs=1e-4)
  assert found.word == claims.CONFIRMED
  flat = np.full((4, 3), 5.0)
  found = verdict(
    "a step of BPTT with SGD",
    dnc(tmp_path / "b", flat, **readings.DNC_BACKWARD),
  )
  assert found.word == claims.REFUTED


def test_growth_of_memory(tmp_path):
  file = memory_file(tmp_path)
  found = verdict("does not grow", (), [file])
  # Of the two longest, eight times apart.
  growth = math.log(1.01) / math.log(8)
  assert found.ours[0].median == pytest.approx(growth)
  assert found.word == claims.CONFIRMED
  assert verdict("linear", (), [file]).word == claims.CONFIRMED
  file = memory_file(tmp_path, quick=True)
  assert verdict("linear", (), [file]).word == claims.UNTESTED
  file = memory_file(tmp_path, zero=(100, 150), bptt=(100, 400))
  assert verdict("does not grow", (), [file]).word == claims.REFUTED
  assert verdict("linear", (), [file]).word == claims.REFUTED
  # What is farthest from the claim decides.
  content = json.loads(file.read_text())
  others = [
    dict(row, case="LSTM small") for row in content["tables"]["context length"]
  ]
  for row, bptt in zip(others, (1, 100, 100 * 8**1.05), strict=True):
    row["bptt_mb"] = bptt
  content["tables"]["context length"] += others
  assert verdict("linear", (), [write(file, content)]).word == claims.REFUTED


def test_steps_of_the_smoke_test():
  file = small.ROOT / "benchmarks" / "results" / "overfit_smoke_large.json"
  found = verdict("ten tokens by heart in five", (), [file])
  assert found.ours[0] == (5, 5, 5) and found.word == claims.CONFIRMED


@pytest.mark.parametrize(
  ("probes", "losses", "word"),
  [
    (96, [9.0, 5.0], claims.UNTESTED),  # It may still learn them.
    (2, [9.0] * 9, claims.UNTESTED),
    (96, [9.0] * 9, claims.REFUTED),
    (96, [9.0] * 6 + [0.05], claims.CONFIRMED),
  ],
)
def test_a_smoke_test_that_ended_early_tells_nothing(
  tmp_path, probes, losses, word
):
  rows = [{"loss": loss} for loss in losses]
  content = {"size": "smoke_7b", "probes": probes, "steps": rows}
  file = write(tmp_path / "overfit.json", content | {"machine": MACHINE})
  found = verdict("6.9 billion", (), [file])
  assert found.word == word
  if word == claims.UNTESTED:
    assert f"{len(losses)} steps of {probes} probes" in found.why


def test_runs_of_the_smoke_test(tmp_path):
  task = {"name": "random_tokens", "seq_length": 10}
  model = {"name": "lstm", "hidden_size": 66000}

  def smoke(name, losses, rate=0.01, probes=96, seed=0):
    fields = {"learning_rate": rate, "num_probes": probes, "log_every": 1}
    fields |= {"task": task, "model": model, "steps": 9, "seed": seed}
    return make_run(tmp_path / name, losses, **fields)

  name = "ten tokens by heart in five"
  others = [
    smoke("cut", (9.0, 8.0)),
    smoke("few", [9.0] * 9, probes=2),
  ]
  found = verdict(name, others)
  assert found.word == claims.UNTESTED and "has 2 steps" in found.why
  others.append(smoke("slow", [9.0] * 9, rate=1e-5))
  assert verdict(name, others).word == claims.REFUTED
  good = smoke("good", [9.0] * 4 + [0.05], rate=0.02)
  found = verdict(name, [*others, good])
  assert found.word == claims.CONFIRMED and found.ours[0] == (5, 5, 5)
  # Three seeds say more than a better one.
  for seed in range(3):
    fields = {"rate": 0.03, "seed": seed}
    others.append(smoke(f"three{seed}", [9.0] * (5 + seed) + [0.05], **fields))
  assert verdict(name, [*others, good]).ours[0] == (7, 6, 8)


def test_times_of_other_devices_are_shown_and_not_judged(tmp_path):
  row = {"case": "LSTM tiny", "batch": 64, "probes": 96, "program": "CD-RGE"}
  row |= {"devices": 1, "ms": 376.0, "ms_quartiles": [370.0, 380.0]}
  other = row | {"devices": 2, "ms": 1.0}
  name = "a step of LSTM tiny by CD-RGE with 96"
  found = verdict(name, (), [measured_file(tmp_path, other)])
  assert found.ours == ()
  file = measured_file(tmp_path, other, row)
  found = verdict(name, (), [file])
  assert found.word == claims.UNTESTED and "a CPU" in found.why
  assert found.ours[0] == pytest.approx((0.376, 0.37, 0.38))
  row["ms"] = None  # It did not fit.
  file = measured_file(tmp_path, row)
  assert verdict(name, (), [file]).ours == ()
  row |= {"program": "BPTT", "probes": 0, "ms": 25.0}
  file = measured_file(tmp_path, row | {"ms_quartiles": [24.0, 26.0]})
  assert verdict("tiny by BPTT", (), [file]).ours[0].median == 0.025


def test_the_overhead_that_is_saved(tmp_path):
  for ours, word in ((26, claims.CONFIRMED), (30, claims.REFUTED)):
    rows = [
      {"case": "replication", "program": program, "overhead_mb": x}
      for program, x in (("BPTT", 100), ("CD-RGE", ours))
    ]
    found = verdict("73.5", (), [measured_file(tmp_path, *rows)])
    assert found.ours[0].median == pytest.approx(100 - ours)
    assert found.word == word
    file = measured_file(tmp_path, rows[0])
    assert verdict("73.5", (), [file]).word == claims.UNTESTED


def test_every_claim_says_its_rule():
  for claim in claims.CLAIMS:
    bounds = claim.bounds or claim.theirs
    assert bounds and claim.tolerance >= 0
    assert f"{bounds[0]:g}" in claims.rule_of(claim)
  assert len({claim.name for claim in claims.CLAIMS}) == len(claims.CLAIMS)
