"""Reports: the page as a browser sees it, its command and scripts."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import small
from reported import (
  BPTT,
  CONFIG,
  learning,
  make_run,
  memory_file,
  page_of,
  rows_of,
)

from zorn_jax import build, diagnostics, journal, workdir
from zorn_jax.report import claims, curves, document, render, runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

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


def run_labels(rows):
  return [row.label for row in rows]


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


def report(*args):
  return small.run(*small.command("report", *args))


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


# The page.


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
