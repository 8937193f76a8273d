"""Reports: runs, their rows, and files of benchmarks."""

import json
import math
import re

import pytest
import small
from reported import BPTT, BY_HEART, CONFIG, make_run, page_of, rows_of, write

from zorn_jax import workdir
from zorn_jax.report import benches, document, render, runs

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
