"""Grids: their texts, their values and the runs at their points."""

import re
import sys

import pytest
import small

from zorn_jax import sweep
from zorn_jax.cli import _grid, _run

# ml_collections loads configs in a way that Python deprecates.
old_loader = pytest.mark.filterwarnings("ignore:the load_module:")


def grid_of(*texts, overrides=None):
  overrides = overrides or {}
  base = small.config().to_dict()
  return _grid.resolve(str(small.COPY), overrides, base, texts)


@pytest.mark.parametrize(
  ("text", "field", "values"),
  [
    ("seed=0,1", "seed", ["0", "1"]),
    ("task.cache=", "task.cache", [""]),
    ("task.source=a=b", "task.source", ["a=b"]),
    ("loggers=(),('a','b')", "loggers", ["()", "('a','b')"]),
  ],
)
def test_grid_is_parsed(text, field, values):
  assert sweep.parse_grid(text) == (field, values)


def test_points_are_the_product():
  grid = {"a": [1, 2], "b": ["x"], "c": [3, 4]}
  assert sweep.points(grid) == [
    {"a": a, "b": "x", "c": c} for a in (1, 2) for c in (3, 4)
  ]


def test_names_are_those_of_files_and_differ():
  plain = {"learning_rate": 1e-5, "estimator.direction.rank": 2}
  name = "learning_rate=1e-05,estimator.direction.rank=2"
  assert sweep.name_of(plain) == name
  values = ["/a b", "_a_b", "/a_b", "../x", "ü", "x" * 250, "x" * 251, "\n"]
  names = [sweep.name_of({"task.source": value}) for value in values]
  assert len(set(names)) == len(values)
  for name in names:
    assert re.fullmatch(r"[A-Za-z0-9_.,=+-]{1,255}", name)


@old_loader
def test_values_have_the_types_of_their_fields():
  grid = grid_of(
    "learning_rate=1,2e-2",
    "estimator.direction.rank=1,2",
    "loggers=(),('wandb','tensorboard')",
    "search.enabled=true,false",
  )
  assert grid == {
    "learning_rate": [1.0, 0.02],
    "estimator.direction.rank": [1, 2],
    "loggers": [(), ("wandb", "tensorboard")],
    "search.enabled": [True, False],
  }
  assert type(grid["learning_rate"][0]) is float
  # The children read the text of each value as the same value.
  for field, values in grid.items():
    again = f"{field}={','.join(map(_grid.text, values))}"
    assert grid_of(again) == {field: values}


@old_loader
@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (["lerning_rate=1"], "no field 'lerning_rate'.*mean learning_rate\\?"),
    (["rank=1"], "mean estimator.direction.rank\\?"),
    (["xyzzy=1"], "no field 'xyzzy'.*Look into the config"),
    (["model=1"], "group of them. Did you mean model.dtype or"),
    (["seed=0,many"], "seed takes values of type int, got 'many'"),
    (["seed=0,1.5"], "seed takes values of type int, got '1.5'"),
    (["seed=1,"], "seed takes values of type int, got ''"),
    (["learning_rate=1e-2,3,0.01"], "learning_rate has the value 0.01 twice"),
    (["seed=1", "seed=2"], "seed is in two grids"),
    (["steps=1"], "steps is in a grid and in --config.steps"),
    (["seed"], "a grid is a field and its values, got 'seed'"),
  ],
)
def test_wrong_grids_are_refused(texts, message):
  with pytest.raises(ValueError, match=message) as refusal:
    grid_of(*texts, overrides={"steps": "4"})
  assert "\n" not in str(refusal.value)


@old_loader
def test_fields_that_stand_for_one_value_are_refused():
  path = f"{small.ROOT / 'configs' / 'paper' / 'lstm.py'}:tiny"
  base = small.config(small.ROOT / "configs" / "paper" / "lstm.py").to_dict()
  resolve = lambda overrides, *texts: _grid.resolve(
    path, overrides, base, texts
  )
  given = "learning_rate=0.1,0.2"
  assert resolve({}, given)["learning_rate"] == [0.1, 0.2]
  for overrides, texts in (
    ({}, (given, "epsilon=0.1")),
    ({"epsilon": "0.01"}, (given,)),
    ({"learning_rate": "0.01"}, ("epsilon=0.1",)),
  ):
    with pytest.raises(ValueError, match="they stand for one value. Give one"):
      resolve(overrides, *texts)
  config = _run.config_of(_grid._flags(path, {"epsilon": "0.3"}))
  assert config.learning_rate == config.epsilon == 0.3


@old_loader
def test_none_is_a_value_of_a_field_that_may_lack_one():
  changes = {"model.implementation": "None"}
  config = _run.config_of(_grid._flags(str(small.COPY), changes))
  assert config.model.implementation is None
  grid = grid_of("model.implementation=None,xla")
  assert grid == {"model.implementation": [None, "xla"]}


@old_loader
def test_what_is_no_config_is_refused(tmp_path):
  path = tmp_path / "config.py"
  path.write_text("def get_config():\n  return {'seed': 0}\n")
  with pytest.raises(ValueError, match="returns a dict. Return an ml_coll"):
    _run.config_of(_grid._flags(str(path), {}))


def test_the_command_is_that_of_a_single_run(tmp_path):
  base = small.config().to_dict()
  run = _grid.run_at("c.py:x", {"steps": "9"}, base, {"seed": 3, "loggers": ()})
  assert run.name == sweep.name_of(run.values)
  assert run.steps == base["steps"]
  assert sweep.train_command(run, tmp_path / "d") == [
    *(sys.executable, "-m", "zorn_jax.cli.train", "--config=c.py:x"),
    *("--config.steps=9", "--config.seed=3", "--config.loggers=()"),
    f"--workdir={tmp_path / 'd'}",
  ]
  assert _grid.run_at("c.py", {}, base, {"steps": 7}).steps == 7
