"""Reports: runs, rows, verdicts, and the page as a browser sees it."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small

from zorn_jax import build, diagnostics, journal, workdir
from zorn_jax.report import (
  benches,
  claims,
  curves,
  document,
  readings,
  render,
  runs,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

CONFIG = {
  "seed": 0,
  "steps": 30,
  "batch_size": 2,
  "num_probes": 8,
  "learning_rate": 0.02,
  "epsilon": 0.01,
  "mesh": {"probe": 1},
  "loggers": [],
  "task": {"name": "copy", "max_length": 3, "time_chunk": 7},
  "model": {"name": "lstm", "hidden_size": 4},
  "estimator": {"name": "central_difference", "shaping": "std"},
  "optimizer": {"name": "adam", "b1": 0.9},
}
LOSSES = (4.0, 1.0, 0.05)
BPTT = {"estimator": {"name": "bptt"}, "num_probes": 0}
BY_HEART = {"task": {"name": "random_tokens", "seq_length": 10}}


def make_run(path, losses=LOSSES, valid=None, pace=1.0, **fields):
  """A run directory that logged every tenth step."""
  path.mkdir(parents=True)
  config = CONFIG | fields
  (path / "config.json").write_text(json.dumps(config))
  (path / "text.sha256").write_text("")
  every = fields.pop("log_every", 10)
  with (path / "metrics.jsonl").open("w") as file:
    for i, loss in enumerate(losses):
      step = (i + 1) * every
      record = {"step": step, "loss": loss, "forward_tokens": 100 * step}
      record["seconds"] = pace * step + 5
      if valid:
        record |= {"valid_loss": valid[i], "train_loss": loss}
        record["signal_to_noise"] = 1.0 + i
      file.write(json.dumps(record) + "\n")
  return path


def rows_of(*paths):
  (comparison,) = runs.compare(runs.find(paths)[0])
  return comparison.rows


def evidence(paths=(), files=()):
  found = runs.find(paths)[0]
  return readings.Evidence(
    runs.compare(found), [benches.read(x) for x in files]
  )


def verdict(name, *args):
  (claim,) = [x for x in claims.CLAIMS if name in x.name]
  return claims.judge(claim, evidence(*args))


def write(path, content):
  path.write_text(json.dumps(content))
  return path


# Runs and rows.


def test_runs_that_differ_in_the_seed_are_one_row(tmp_path):
  paths = [make_run(tmp_path / f"a{seed}", seed=seed) for seed in (2, 0, 1)]
  paths.append(make_run(tmp_path / "b", learning_rate=0.03, mesh={"probe": 2}))
  paths.append(make_run(tmp_path / "c", seed=3, mesh={"probe": 4}))
  rows = rows_of(*paths)
  assert [[x.seed for x in row.runs] for row in rows] == [[0, 1, 2, 3], [0]]
  assert [row.label for row in rows] == [
    "central_difference @ 8, adam, rate 0.02",
    "central_difference @ 8, adam, rate 0.03",
  ]


def test_labels_name_what_differs(tmp_path):
  rows = rows_of(
    make_run(tmp_path / "a"),
    make_run(tmp_path / "b", epsilon=0.1),
    make_run(tmp_path / "c", **BPTT),
  )
  assert [row.label for row in rows] == [
    "central_difference @ 8, adam, rate 0.02, epsilon 0.01",
    "central_difference @ 8, adam, rate 0.02, epsilon 0.1",
    "BPTT, adam, rate 0.02",
  ]


def test_tasks_have_tables_of_their_own(tmp_path):
  other = {"task": CONFIG["task"] | {"max_length": 5}}
  chunks = {"task": CONFIG["task"] | {"time_chunk": 3}, "seed": 1}
  paths = [
    make_run(tmp_path / "a"),
    make_run(tmp_path / "b", **other),
    make_run(tmp_path / "c", **chunks),
  ]
  found, _ = runs.find(paths)
  comparisons = runs.compare(found)
  assert [x.title for x in comparisons] == [
    "copy (max_length 3)",
    "copy (max_length 5)",
  ]
  assert [len(x.rows) for x in comparisons] == [2, 1]
  with pytest.raises(ValueError, match=r"differ in task\.max_length\. Leave"):
    runs.compare(found, together=True)
  assert len(runs.compare(found[::2], together=True)) == 1


def test_the_batch_of_training_is_not_called_held_out(tmp_path):
  for fields, word in (({}, "held-out"), (BY_HEART, "clean")):
    path = make_run(tmp_path / word, valid=(3, 2, 1), **fields)
    text = render.as_html(page_of([path]))
    (head,) = re.findall(">best ([a-z-]+) loss<", text)
    assert head == word


def test_a_batch_by_heart_is_compared_with_those_of_its_size_alone(tmp_path):
  found, _ = runs.find(
    [
      make_run(tmp_path / "a", **BY_HEART),
      make_run(tmp_path / "b", batch_size=4, **BY_HEART),
    ]
  )
  assert len(runs.compare(found)) == 2
  with pytest.raises(ValueError, match="differ in task.batch_size|batch_size"):
    runs.compare(found, together=True)


def test_the_directory_of_a_sweep_is_its_runs(tmp_path):
  make_run(tmp_path / "seed=0")
  make_run(tmp_path / "seed=1", seed=1)
  make_run(tmp_path / "seed=2", losses=(), seed=2)
  found, idle = runs.find([tmp_path])
  assert [run.seed for run in found] == [0, 1]
  assert idle == [str(tmp_path / "seed=2")]


def test_medians_and_spread_by_hand(tmp_path):
  ends = {0: (4.0, 2.0), 1: (5.0, 0.05), 2: (3.0, 1.0), 3: (3.0, 0.02)}
  (row,) = rows_of(
    *(
      make_run(tmp_path / str(seed), losses, seed=seed, steps=20, pace=seed + 1)
      for seed, losses in ends.items()
    )
  )
  last = runs.over_seeds(row, lambda run: runs.last(run, "loss"))
  assert last == pytest.approx((0.525, 0.02, 2.0))
  below = runs.over_seeds(row, lambda run: runs.reached(run, "step"))
  assert below == (math.inf, 20, math.inf)
  # Seconds 15 and 25 at a pace of 1, less the start.
  assert runs.seconds_per_step(row.runs[0]) == 1
  assert runs.over_seeds(row, runs.seconds_per_step) == (2.5, 1, 4)
  assert runs.over_seeds(row, lambda run: runs.last(run, "none")) is None
  assert document.spread(last) == "0.525 (0.02 to 2)"
  assert document.spread(below) == "- (20 to -)"


@pytest.mark.parametrize(
  ("name", "step"), [("random_tokens", 20), ("copy", 30)]
)
def test_a_batch_is_known_by_its_clean_loss(tmp_path, name, step):
  """A perturbed loss is higher; one of other data says nothing."""
  losses, valid = (3.0, 0.4, 0.05, 0.01), (2.0, 0.09, 0.2, 0.01)
  task = CONFIG["task"] | {"name": name}
  path = make_run(tmp_path / "a", losses, valid, task=task)
  (row,) = rows_of(path)
  for unit, value in (("step", step), ("forward_tokens", 100 * step)):
    assert runs.reached(row.runs[0], unit) == value


def test_a_passage_is_known_by_its_clean_loss(tmp_path):
  task = CONFIG["task"] | {"name": "language_model", "one_batch": True}
  path = make_run(tmp_path / "a", (3.0, 2.0, 1.0), (4, 4, 4), task=task)
  run = runs.read(path)
  run.records[1]["train_loss"] = 0.05
  assert runs.reached(run, "step") == 20


def test_an_equal_cost_is_one_at_which_all_were_evaluated(tmp_path):
  late = make_run(tmp_path / "a", valid=(4, 3, 2))
  file = late / "metrics.jsonl"
  metrics = [json.loads(x) for x in file.read_text().splitlines()]
  del metrics[0]["valid_loss"]  # First at step 20.
  lines = "".join(json.dumps(x) + "\n" for x in metrics)
  file.write_text(lines)
  early = make_run(tmp_path / "b", (3.0,), (5,), steps=10, **BPTT)
  rows = rows_of(late, early)
  assert runs.shared_budget(rows, "step", "loss") == 10
  assert runs.shared_budget(rows, "step", "valid_loss") == 20
  assert runs.shared_budget(rows, "step", "none") is None
  _, table = document._budgets(dict(zip("AB", rows, strict=True)), "held-out")
  assert table.head[2:4] == ("loss at 10 steps", "held-out loss at 20 steps")
  assert [row[2:4] for row in table.rows] == [("4", "3"), ("3", "5")]


def test_budgets_are_what_all_have_spent(tmp_path):
  rows = rows_of(
    make_run(tmp_path / "a", valid=(4, 3, 2)),
    make_run(tmp_path / "b", (3.0, 2.0), steps=20, pace=0.5, **BPTT),
  )
  budgets = {x: runs.shared_budget(rows, x) for x in runs.UNITS}
  assert budgets == {"step": 20, "forward_tokens": 2000, "seconds": 15}
  first, second = rows[0].runs[0], rows[1].runs[0]
  assert runs.at(first, "seconds", 15, "loss") == 4.0
  assert runs.at(first, "forward_tokens", 2000, "valid_loss") == 3
  assert runs.at(second, "seconds", 15, "loss") == 2.0
  assert runs.at(first, "step", 9, "loss") is None


def test_an_interrupted_run_is_marked_and_does_not_count(tmp_path):
  whole = make_run(tmp_path / "a")
  cut = make_run(tmp_path / "b", (9.0,), seed=1)
  (row,) = rows_of(whole, cut)
  assert [run.complete for run in row.runs] == [True, False]
  assert runs.over_seeds(row, lambda x: runs.last(x, "loss")).median == 0.05
  (alone,) = rows_of(cut)
  assert runs.over_seeds(alone, lambda x: runs.last(x, "loss")).median == 9
  page = page_of([whole, cut])
  assert "complete; interrupted: seed 1" in render.as_html(page)
  assert ">interrupted</span>" in render.as_html(page_of([cut]))


def test_a_torn_last_line_is_left_out(tmp_path):
  path = make_run(tmp_path / "a")
  with (path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 40, "lo')
  assert runs.read(path).records[-1]["step"] == 30


def test_what_is_known_of_a_start(tmp_path):
  path = make_run(tmp_path / "a")
  assert runs.read(path).starts == []
  workdir.note_start(path, {"device": "V100", "commit": "xyz"})
  workdir.note_start(path, {"device": "A40", "commit": "abc"})
  page = render.as_html(page_of([path]))
  assert "A40" in page and "abc" in page and "xyz" not in page


def test_bad_directories_are_refused(tmp_path):
  for find, message in (
    ([tmp_path / "none"], "is no run directory"),
    ([make_run(tmp_path / "empty", ())], "has no metrics. Train"),
    ([tmp_path], "no run in .* has metrics yet"),
  ):
    with pytest.raises(ValueError, match=message):
      runs.find(find)
  a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
  with pytest.raises(ValueError, match="the same seed: they are one run"):
    runs.find([a, b])
  assert len(runs.find([a, a])[0]) == 1
  for name in ("learning_rate", "estimator", "optimizer", "model"):
    config = {k: v for k, v in CONFIG.items() if k != name}
    write(b / "config.json", config)
    with pytest.raises(ValueError, match="damaged or of another version"):
      runs.find([b])


# Benchmarks.


MACHINE = {"device": "a CPU", "jax": "0.10.2"}


def memory_file(tmp_path, zero=(100, 101), bptt=(100, 800), quick=False):
  rows = [
    {"case": "LSTM tiny", "length": 128, "zero_order_mb": 50, "bptt_mb": 20},
    {"case": "LSTM tiny", "length": 1024},
    {"case": "LSTM tiny", "length": 8192},
  ]
  for row, a, b in zip(rows[1:], zero, bptt, strict=True):
    row |= {"zero_order_mb": a, "bptt_mb": b}
  tables = {"context length": rows}
  content = {"suite": "memory", "machine": MACHINE, "tables": tables}
  content["quick"] = quick
  return write(tmp_path / "memory.json", content)


def test_files_of_the_repository_are_read():
  folder = small.ROOT / "benchmarks" / "results"
  found = benches.read(folder / "overfit_dnc.json")
  assert len(found.tables["rows"]) == 20 and found.machine["jax"] == "0.10.2"
  found = benches.read(folder / "overfit_smoke_large.json")
  assert found.tables["steps"][0]["loss"] == pytest.approx(6.38, abs=0.01)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "is not JSON"),
    ("[1]", "not a benchmark file of this version"),
    ('{"curves": []}', "not a benchmark file of this version"),
    ('{"suite": "step"}', "not a benchmark file of this version"),
    ('{"suite": "step", "tables": {"a": [1]}, "machine": {}}', "not a bench"),
    ('{"format": 2, "suite": "step"}', "has the format 2, .* reads format 1"),
  ],
)
def test_other_files_are_refused(tmp_path, content, message):
  path = tmp_path / "bench.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=message):
    benches.read(path)


# Claims.


def learning(tmp_path, ours, theirs, seeds=3, rates=(0.01, 0.02, 0.03)):
  """600 steps, below 0.1 after so many tens of steps, and BPTT's."""
  paths = []
  for name, count, fields in (("f", ours, {}), ("b", theirs, BPTT)):
    for i, rate in enumerate(rates):
      for seed in range(seeds):
        # The first rate is the best one.
        losses = [1.0] * (count + i - 1)
        losses += [0.05] * (60 - len(losses))
        path = tmp_path / f"{name}{rate}{seed}"
        options = {"steps": 600, "learning_rate": rate}
        options |= {"seed": seed, **fields, **BY_HEART}
        paths.append(make_run(path, losses, **options))
  return paths


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


def measured_file(tmp_path, *rows):
  content = {"suite": "paper", "machine": MACHINE, "tables": {"steps": rows}}
  return write(tmp_path / "steps.json", content)


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


# The page.


def page_of(paths, files=(), made_by="Made by hand."):
  found, idle = runs.find(paths)
  comparisons = runs.compare(found)
  measured = [benches.read(x) for x in files]
  verdicts = claims.judge_all(readings.Evidence(comparisons, measured))
  return document.write(comparisons, measured, verdicts, made_by, idle)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """One with everything: tasks, seeds, an interruption, files."""
  tmp_path = tmp_path_factory.mktemp("page")
  paths = learning(tmp_path, 2, 3, rates=(0.01, 0.02))
  paths += [make_run(tmp_path / "x<b>&", valid=(3, 2, 1))]
  paths += [make_run(tmp_path / "cut", (3.0,), seed=1)]
  return page_of(paths, [memory_file(tmp_path)], "Made by <script>x</script>.")


def tables_of(page):
  return [
    block
    for section in page.sections
    for block in section.blocks
    if isinstance(block, document.Table)
  ]


def test_rows_have_the_cells_of_their_head(page):
  tables = tables_of(page)
  assert len(tables) == 7
  for table in tables:
    assert {len(row) for row in table.rows} == {len(table.head)}
  words = {claims.CONFIRMED, claims.REFUTED, claims.UNTESTED}
  column = tables[0].head.index("verdict")
  assert {row[column] for row in tables[0].rows} <= words
  assert len(tables[0].rows) == len(claims.CLAIMS)


def test_the_page_is_a_function_of_what_it_is_made_of(page):
  text = render.as_html(page)
  assert "<script" not in text and "&lt;script&gt;" in text
  assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
  found = render.as_markdown(page, "report")
  assert found == render.as_markdown(page, "report")
  markdown, pictures = found
  assert re.findall(r"\]\((report-\d+\.svg)\)", markdown) == list(pictures)
  assert len(pictures) == 11  # Of losses, and one of noise.
  text, pictures = render.as_markdown(page, "my report")
  assert "](my%20report-1.svg)" in text and "my report-1.svg" in pictures
  for section in page.sections:
    assert f"## {section.title}" in markdown


def test_a_curve_of_one_point_is_seen():
  marks = lambda points: curves.picture(
    [curves.Curve("A", 0, points)], "x", "y"
  ).count(f"fill: {curves.COLORS[0]}")
  assert marks([(1.0, 2.0)]) > 0  # A line would have no length.
  assert marks([(1.0, 2.0), (2.0, 1.0)]) == 0


def test_of_many_rows_the_best_of_every_solver_is_drawn(tmp_path):
  """Rates of two solvers, the better of which have the letters B and I."""
  ends = {"A": 3.0, "B": 1.0, "C": 2.0, "D": math.nan, "E": 4.0, "F": 5.0}
  paths = [
    make_run(tmp_path / name, (5.0, end), learning_rate=0.1 * (i + 1))
    for i, (name, end) in enumerate(ends.items())
  ]
  paths += [
    make_run(tmp_path / str(i), (5.0, end), learning_rate=0.1 * (i + 1), **BPTT)
    for i, end in enumerate((2.0, 3.0, 1.0))
  ]
  rows = rows_of(*paths)
  assert run_labels(runs.best_of_solvers(rows)) == run_labels(
    [rows[1], rows[8]]
  )
  text = render.as_html(page_of(paths))
  assert "Drawn are B, I:" in text


def run_labels(rows):
  return [row.label for row in rows]


def test_models_share_a_table_but_no_budget(tmp_path):
  other = CONFIG["model"] | {"hidden_size": 999}
  paths = [
    make_run(tmp_path / "a", (4.0, 3.0, 2.0)),
    make_run(tmp_path / "b", (4.0, 3.0, 2.0), learning_rate=0.5),
    make_run(tmp_path / "c", (4.0,), model=other),
  ]
  text = render.as_html(page_of(paths))
  assert "Of one model: A, B." in text and "Of one model: C." in text
  assert "loss at 30 steps" in text and "loss at 10 steps" not in text


@pytest.mark.parametrize("unit", ["step", "forward_tokens"])
def test_a_line_without_the_unit_counts_from_the_next(tmp_path, unit):
  path = make_run(tmp_path / "a", (3.0, 2.0))
  line = {"step": 15, "valid_loss": 0.01}
  lines = (path / "metrics.jsonl").read_text().splitlines()
  lines.insert(1, json.dumps(line))
  (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  config = json.loads((path / "config.json").read_text())
  config["task"] |= {"name": "random_tokens"}
  (path / "config.json").write_text(json.dumps(config))
  (row,) = rows_of(path)
  expected = {"step": 15, "forward_tokens": 2000}[unit]
  assert runs.reached(row.runs[0], unit) == expected


def test_long_curves_are_thinned_and_keep_their_end():
  points = [(float(i), 1.0 / (i + 1)) for i in range(10_000)]
  assert len(curves._thinned(points)) <= 301
  assert curves._thinned(points)[-1] == points[-1]
  svg = curves.picture([curves.Curve("A", 0, points)], "x", "y")
  assert len(svg) < 100_000
  assert svg == curves.picture([curves.Curve("A", 0, points)], "x", "y")


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(curves, "available", lambda: False)
  text = render.as_html(page_of([make_run(tmp_path / "a")]))
  assert "<img" not in text and "pip install &#x27;zorn_jax[plot]" in text


# Looks at the page in a frame as wide as a telephone, and at itself.
_LOOK = """
<script>
addEventListener("load", () => {
  const frame = document.querySelector("iframe");
  const inner = frame.contentDocument, root = inner.documentElement;
  const images = [...inner.images];
  document.body.innerHTML = "<pre id=found>" + JSON.stringify({
    images: images.length,
    broken: images.filter(x => !x.complete || !x.naturalWidth).length,
    tables: inner.querySelectorAll("table tbody tr td").length,
    heads: inner.querySelectorAll("h2").length,
    width: root.scrollWidth,
    small: [...inner.querySelectorAll("td, p")].filter(
      x => parseFloat(inner.defaultView.getComputedStyle(x).fontSize) < 12
    ).length,
    scrolled: [...inner.querySelectorAll(".scroll")].filter(
      x => x.scrollWidth > x.clientWidth).length,
  }) + "</pre>";
});
</script>
"""


def look(text, folder, width):
  """What a real browser finds in a page, and what its console says."""
  if not CHROMIUM:
    pytest.skip("chromium is not installed")
  frame = (
    f'<iframe width="{width}" height="900" style="border:0" '
    f'srcdoc="{html.escape(text)}"></iframe>'
  )
  path = folder / "look.html"
  path.write_text(f"<!DOCTYPE html><body>{frame}{_LOOK}</body>")
  command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
  command += [
    "--enable-logging=stderr",
    f"--user-data-dir={folder / 'profile'}",
  ]
  command += ["--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  console = [x for x in done.stderr.splitlines() if "CONSOLE" in x]
  (found,) = re.findall("<pre id=.found.>(.*?)</pre>", done.stdout)
  return json.loads(html.unescape(found)), console


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it(page, tmp_path, width):
  text = render.as_html(page)
  found, console = look(text, tmp_path, width)
  assert not console
  assert found["images"] == 11 and found["broken"] == 0
  cells = sum(len(t.rows) * len(t.head) for t in tables_of(page))
  assert found["tables"] == cells and found["heads"] == len(page.sections)
  assert found["width"] <= width  # Tables scroll, the page does not.
  assert found["small"] == 0
  assert found["scrolled"] > 0 or width > 390


def test_the_look_would_notice(page, tmp_path):
  text = render.as_html(page)
  text = text.replace("svg+xml;base64,", "svg+xml;base64,AAAA", 1)
  text = text.replace("overflow-x: auto; margin", "margin")
  text = text.replace("</body>", "<script>throw 1</script></body>")
  found, console = look(text, tmp_path, 390)
  assert found["broken"] == 1 and found["width"] > 390 and console


# The command.


def report(*args):
  return small.run(*small.command("report", *args))


def test_the_command_writes_page_and_markdown(tmp_path):
  a = make_run(tmp_path / "a=1,b=2")
  b = make_run(tmp_path / "b", seed=1)
  c = make_run(tmp_path / "c", seed=2)
  output = tmp_path / "out.html"
  done = report(
    f"--workdir={a}",
    f"--workdir={b},{c}",
    f"--bench={memory_file(tmp_path)}",
    f"--output={output}",
  )
  assert done.returncode == 0, done.stderr
  written = [tmp_path / x for x in ("out.html", "out.md", "out-1.svg")]
  assert done.stdout.split()[:3] == list(map(str, written))
  text = output.read_text()
  assert "0, 1, 2" in text and "exponent of bytes" in text
  assert 'name="viewport"' in text and "zorn_jax.cli.report" in text


def test_a_real_run_says_what_it_is(tmp_path):
  done = small.run(*small.train_command(tmp_path))
  assert done.returncode == 0, done.stderr
  run = runs.read(tmp_path)
  (start,) = run.starts
  assert start["command"].startswith("python -m zorn_jax.cli.train --config=")
  assert {"device", "commit", "jax"} <= start.keys() and run.complete
  _, records = journal.read(tmp_path / workdir.JOURNAL_NAME)
  for line in run.records:
    losses = records[line["step"] - 1].losses
    ratio = diagnostics.signal_to_noise(losses)
    assert line["signal_to_noise"] == pytest.approx(float(ratio))


def test_the_command_refuses_in_one_sentence(tmp_path):
  a = make_run(tmp_path / "a")
  b = make_run(tmp_path / "b", task={"name": "sort"})
  output = f"--output={tmp_path / 'out.html'}"
  for args, message in (
    ([output], "there is nothing to report"),
    ([f"--workdir={a}", f"--output={tmp_path / 'x.pdf'}"], "must be a .html"),
    ([f"--workdir={a},{b}", "--compare", output], "different tasks"),
  ):
    done = report(*args)
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.count("\n") == 1
  assert not (tmp_path / "out.html").exists()


# The scripts that make what is reported.


def paper(name, folder, *args):
  environment = os.environ | {
    "ZORN_RUNS": str(folder),
    "PYTHON": sys.executable,
  }
  return subprocess.run(
    [small.ROOT / "scripts" / "paper" / f"{name}.sh", *args],
    env=environment,
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_the_scripts_of_the_paper_run_and_go_on(tmp_path):
  done = paper("all", tmp_path, "--size=smoke")
  assert done.returncode == 0, done.stderr
  assert "not all runs" not in done.stderr and "not meas" not in done.stderr
  known = {
    "table1": "LSTM tiny",
    "figure1": "spsa1_5 @ 2",
    "dnc_log": "Task: random_tokens",
    "table2": "Task: add",
    "smoke": "Task: random_tokens",
    "replication": "Task: copy",
    "smoothing": "Task: language_model",
  }
  whole = (tmp_path / "all-smoke" / "report.html").read_text()
  for name, words in known.items():
    text = (tmp_path / f"{name}-smoke" / "report.html").read_text()
    assert words in text and f"{name}-smoke" in whole
  again = paper("all", tmp_path, "--size=smoke")
  assert again.returncode == 0 and "started" not in again.stderr


@pytest.mark.parametrize("name", ["dnc", "lstm"])
def test_the_solvers_of_the_configs_differ_in_nothing_else(name):
  path = small.ROOT / "configs" / "paper" / f"{name}.py"
  arg = "scale=1,solver={}" if name == "dnc" else "tiny,{}"
  plain = small.config(path, arg.format("cd_rge")).to_dict()
  for solver in ("sgd", "adamw"):
    config = small.config(path, arg.format(solver))
    assert build.experiment(config).num_probes == 0
    config = config.to_dict()
    assert config["learning_rate"] == plain["learning_rate"]
    assert config["model"] == plain["model"]
    assert config["task"] == plain["task"]
  with pytest.raises(ValueError, match="unknown solver 'adam'. Choose one of"):
    small.config(path, arg.format("adam"))


def test_a_script_of_the_paper_knows_its_arguments(tmp_path):
  done = paper("figure1", tmp_path, "--size=small")
  assert done.returncode == 1
  assert done.stderr == (
    "error: unknown argument --size=small. Write --size=cpu, full or smoke.\n"
  )
  done = paper("smoke", tmp_path, "--ptb=FOLDER")
  assert done.returncode == 1 and "unknown argument --ptb. " in done.stderr
