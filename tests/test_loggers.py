"""Metrics on disk and on the terminal, and the plot drawn from them."""

import json
import shutil
import sys
import types

import jax.numpy as jnp
import pytest

from zorn_jax import loggers, plots, train, workdir


def write(workdir, first_step, steps):
  logger = loggers.JsonlLogger(workdir, first_step)
  for step in steps:
    logger.log(step, {"loss": 1.0 / step, "seconds": 2.0 * step})
  logger.close()


def steps_in(workdir):
  return [r["step"] for r in loggers.read_jsonl(workdir / "metrics.jsonl")]


def test_resumed_run_writes_later_steps_again(tmp_path):
  write(tmp_path, 0, [1, 2, 3, 4])
  write(tmp_path, 2, [3, 4, 5])
  assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
  assert loggers.last_seconds(tmp_path) == 10.0


def test_torn_last_line_is_dropped(tmp_path):
  write(tmp_path, 0, [1, 2])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 3, "lo')
  write(tmp_path, 2, [3])
  assert steps_in(tmp_path) == [1, 2, 3]


def test_plain_lines_without_a_terminal(capsys):
  logger = loggers.TerminalLogger(0, 100)
  logger.log(5, {"valid_loss": 2.5})
  logger.log(10, {"loss": 3.25, "tokens_per_second": 12_000.0})
  logger.close()
  line = capsys.readouterr().out
  for part in ("step 10/100", "3.2500", "2.5000", "12k tokens/s", "ETA"):
    assert part in line


def test_tensorboard_gets_every_value(tmp_path):
  logs = loggers.make(("tensorboard",), tmp_path, {}, 0, 10)
  for logger in logs:
    logger.log(1, {"loss": 1.0, "tokens_per_second": 1.0})
    logger.close()
  (file,) = (tmp_path / "tensorboard").iterdir()
  assert b"tokens_per_second" in file.read_bytes()


def test_a_directory_is_one_run_of_wandb(tmp_path, monkeypatch):
  """Another of the same name is another run; so is one that was emptied."""
  begun = []
  wandb = types.SimpleNamespace(init=lambda **options: begun.append(options))
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  folders = [tmp_path / x / "seed=0" for x in ("a", "b")]
  for folder in (folders[0], *folders):
    folder.mkdir(parents=True, exist_ok=True)
    loggers.WandbLogger(folder, {})
  shutil.rmtree(folders[0])
  folders[0].mkdir()
  loggers.WandbLogger(folders[0], {})
  a, again, b, emptied = (options["id"] for options in begun)
  assert a == again and len({a, b, emptied}) == 3
  assert {options["name"] for options in begun} == {"seed=0"}


def test_unknown_logger_is_named_before_anything_is_made(tmp_path):
  with pytest.raises(ValueError, match="unknown logger 'paper'"):
    loggers.check(("paper",))
  with pytest.raises(ValueError, match="unknown logger 'paper'"):
    train.train(None, tmp_path / "run", {}, ("paper",))
  assert not (tmp_path / "run").exists()


def test_only_training_takes_time(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(
    train, "_tokens", lambda experiment, state, step: 8 * step
  )
  meter, state = train._Meter(None, (), 0, 5.0), jnp.zeros(())

  def train_for(seconds):
    now[0] += seconds

  train_for(2.0)
  assert meter.read(state, 1)["seconds"] == 7.0
  train_for(1.0)
  with meter.paused(state):
    now[0] += 50.0  # An evaluation, before a line or after it.
  train_for(3.0)
  read = meter.read(state, 3)
  assert read["seconds"] == 11.0 and read["tokens_per_second"] == 16 / 4
  with meter.paused(state):
    now[0] += 9.0
  meter.restart(state, 2)
  now[0] += 1.0
  assert meter.read(state, 3)["seconds"] == 12.0


def test_a_logger_without_its_package_is_refused(monkeypatch):
  loggers.check(("tensorboard",))
  monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="needs the package tensorboardX"):
    loggers.check(("tensorboard",))


def test_a_run_may_go_on_with_other_loggers(tmp_path):
  config = {"seed": 0, "loggers": ["wandb"], "mesh": {"probe": 1}}
  other = config | {"loggers": [], "mesh": {"probe": 2}}
  workdir.claim(tmp_path, config)
  workdir.claim(tmp_path, other)
  assert workdir.fingerprint(config, "") == workdir.fingerprint(other, "")
  with pytest.raises(ValueError, match="differs in seed"):
    workdir.claim(tmp_path, config | {"seed": 1})


def test_plot_shows_both_curves(tmp_path):
  assert plots.plot_losses(tmp_path) is None
  records = [{"step": 1, "loss": 2.0}, {"step": 2, "valid_loss": 1.5}]
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (tmp_path / "metrics.jsonl").write_text(lines)
  path = plots.plot_losses(tmp_path)
  assert path.read_bytes().startswith(b"\x89PNG")
