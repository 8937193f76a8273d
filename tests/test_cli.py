"""The commands: interruption, resumption, and mistakes of the user."""

import json
import os
import shutil
import signal
import stat
import subprocess
import time

import pytest
import small

from zorn_jax.lock import LOCK_NAME


def read_metrics(workdir):
  path = workdir / "metrics.jsonl"
  return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("uninterrupted")
  done = small.run(*small.train_command(workdir))
  assert done.returncode == 0, done.stderr
  return workdir, small.evaluate(workdir)


def start_until(workdir, lines):
  """Starts a run and returns its process once it has logged enough lines."""
  process = subprocess.Popen(
    small.train_command(workdir),
    cwd=small.ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )
  deadline = time.monotonic() + 120
  while len(read_metrics(workdir)) < lines:
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.005)
  return process


def comparable(workdir):
  """The metrics of a run, without those that measure time."""
  records = [json.loads(line) for line in read_metrics(workdir)]
  timed = ("seconds", "tokens_per_second")
  return [{k: v for k, v in r.items() if k not in timed} for r in records]


@pytest.mark.slow  # tests/test_chaos.py has more, in one process.
def test_killed_run_ends_like_an_uninterrupted_one(uninterrupted, tmp_path):
  workdir = tmp_path / "killed"
  for lines in (1, 6, 12):
    process = start_until(workdir, lines)
    process.kill()
    process.communicate()
  done = small.run(*small.train_command(workdir))
  assert done.returncode == 0, done.stderr
  reference, scores = uninterrupted
  assert small.evaluate(workdir) == scores
  assert comparable(workdir) == comparable(reference)


def test_sigterm_saves_and_exits_cleanly(uninterrupted, tmp_path):
  workdir = tmp_path / "terminated"
  process = start_until(workdir, 4)
  process.send_signal(signal.SIGTERM)
  process.communicate()
  assert process.returncode == 0
  saved = small.evaluate(workdir)["step"]
  assert 40 <= saved < small.OVERRIDES["steps"]
  assert small.run(*small.train_command(workdir)).returncode == 0
  assert small.evaluate(workdir) == uninterrupted[1]


def test_finished_run_starts_again_without_a_change(uninterrupted):
  workdir, scores = uninterrupted
  before = comparable(workdir)
  assert small.run(*small.train_command(workdir)).returncode == 0
  assert small.evaluate(workdir) == scores
  assert comparable(workdir) == before
  assert (workdir / "loss.png").stat().st_size > 1000


def test_digest_is_a_function_of_the_config(uninterrupted, tmp_path):
  workdir = tmp_path / "other"
  args = ("--config.seed=1",)
  assert small.run(*small.train_command(workdir, *args)).returncode == 0
  other = small.evaluate(workdir)["params_digest"]
  assert other != uninterrupted[1]["params_digest"]


def test_sample_is_a_function_of_its_seed(uninterrupted):
  def sample(*args):
    command = small.command(
      "sample", f"--workdir={uninterrupted[0]}", "--length=30", *args
    )
    done = small.run(*command)
    assert done.returncode == 0, done.stderr
    return done

  first = sample("--prompt=ab ", "--temperature=2", "--seed=1")
  assert first.stdout.startswith("ab ") and len(first.stdout) == 34
  again = sample("--prompt=ab ", "--temperature=2", "--seed=1")
  other = sample("--prompt=ab ", "--temperature=2", "--seed=2")
  assert first.stdout == again.stdout != other.stdout
  several = sample("--prompt=ab", "--prompt=aé", "--best", "--top_p=0.9")
  assert "not in the vocabulary" in several.stderr
  assert several.stdout.startswith("=== prompt 1 of 2 ===\nab")
  assert "\n\n=== prompt 2 of 2 ===\na" in several.stdout


@pytest.mark.parametrize(
  "args, fact",
  [
    (["--top_p=0"], "top_p must be above 0 and at most 1, got 0.0"),
    (["--prompts_file=nowhere.txt"], "cannot use nowhere.txt"),
  ],
)
def test_sample_refuses_in_one_sentence(uninterrupted, args, fact):
  command = small.command("sample", f"--workdir={uninterrupted[0]}", *args)
  done = small.run(*command)
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.startswith(f"error: {fact}")
  assert done.stderr.count("\n") == 1


def test_evaluate_runs_free(uninterrupted):
  workdir, scores = uninterrupted
  command = small.command(
    "evaluate", f"--workdir={workdir}", "--free_running", "--json"
  )
  done = small.run(*command)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  accuracy = result.pop("free_running_accuracy")
  exact = result.pop("free_running_sequence_accuracy")
  assert result == scores
  assert 0 < accuracy < 1
  assert exact == scores["sequence_accuracy"]
  done = small.run(*command, "--split=train")
  assert done.returncode == 1
  assert "no split 'train': it draws its training data" in done.stderr


@pytest.mark.parametrize(
  "args, fact",
  [
    (["--config.nonsense=1"], "nonsense"),
    (["--config.steps=many"], "many"),
    (["--config.model.hidden_size=7"], "hidden_size must be a multiple"),
  ],
)
def test_mistakes_are_one_sentence_before_anything_is_written(
  tmp_path, args, fact
):
  done = small.run(*small.train_command(tmp_path / "run", *args))
  assert done.returncode != 0
  assert fact in done.stderr
  assert "Traceback" not in done.stderr
  assert not (tmp_path / "run").exists()


def test_workdir_of_another_config_is_refused_and_kept(uninterrupted):
  workdir, _ = uninterrupted
  contents = lambda: {
    path: path.read_bytes()
    for path in workdir.rglob("*")
    if path.is_file() and path.name != LOCK_NAME  # Held while it is read.
  }
  before = contents()
  done = small.run(*small.train_command(workdir, "--config.learning_rate=1"))
  assert done.returncode == 1
  assert "learning_rate (0.02 there, 1.0 here)" in done.stderr
  assert contents() == before


def test_damaged_checkpoint_falls_back_to_the_one_before(
  uninterrupted, tmp_path
):
  workdir, (original, scores) = tmp_path / "damaged", uninterrupted
  shutil.copytree(original, workdir)
  last = workdir / "checkpoints" / "160"
  for path in last.rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:7])
  done = small.run(*small.train_command(workdir))
  assert done.returncode == 0, done.stderr
  assert "160" in done.stderr and "damaged" in done.stderr
  assert small.evaluate(workdir) == scores


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_workdir(tmp_path):
  tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
  done = small.run(*small.train_command(tmp_path / "run"))
  assert done.returncode == 1 and "cannot write" in done.stderr


@pytest.mark.parametrize("name", ["evaluate", "sample"])
def test_commands_need_a_run(tmp_path, name):
  done = small.run(*small.command(name, f"--workdir={tmp_path}"))
  assert done.returncode == 1
  assert "there is no run" in done.stderr
