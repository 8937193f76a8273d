"""Configs: every mistake is named before anything is compiled."""

import json

import pytest
import small

from zorn_jax import build, directions, probe_map

SHAKESPEARE = small.ROOT / "configs" / "shakespeare.py"
PAPER = small.ROOT / "configs" / "paper" / "lstm.py"


@pytest.mark.parametrize(
  "field, value, fact",
  [
    ("steps", 0, "steps must be positive, got 0"),
    ("seed", 2**63, "seed must have 64 bits at most, got 9223372036854775808"),
    ("batch_size", -1, "batch_size must be positive, got -1"),
    ("num_probes", 0, "num_probes must be positive, got 0"),
    ("epsilon", 0.0, "epsilon must be positive, got 0.0"),
    ("epsilon", float("nan"), "epsilon must be positive, got nan"),
    ("learning_rate", -0.1, "learning_rate must be positive, got -0.1"),
    ("evaluate_every", 0, "evaluate_every must be positive, got 0"),
    ("task__time_chunk", 0, "task.time_chunk must be positive, got 0"),
    ("task__max_length", 1, "max_length must be at least 2, got 1"),
    ("task__num_evaluation", 0, "task.num_evaluation must be positive, got 0"),
    ("task__name", "chess", "unknown task 'chess'"),
    ("model__name", "gru2", "unknown model 'gru2'"),
    ("model__hidden_size", 5, "multiple of num_heads"),
    ("model__num_heads", 0, "num_heads must be positive, got 0"),
    ("model__readout_scale", "big", "unknown readout_scale 'big'"),
    ("model__initial_state", "cold", "unknown initial_state 'cold'"),
    ("model__dtype", "int7", "dtype"),
    ("estimator__name", "guess", "unknown estimator 'guess'"),
    ("estimator__shaping", "squash", "unknown shaping 'squash'"),
    ("estimator__probe_batch", -1, "batch_size of a probe map"),
    ("estimator__direction__rank", 0, "rank must be positive, got 0"),
    ("estimator__direction__base", "odd", "unknown base"),
    ("estimator__direction__name", "up", "unknown estimator.direction 'up'"),
    ("optimizer__name", "magic", "unknown optimizer 'magic'"),
    ("optimizer__schedule", "zigzag", "unknown optimizer.schedule 'zigzag'"),
    ("optimizer__warmup_steps", 160, "warmup_steps must be below steps"),
  ],
)
def test_wrong_values_are_named(field, value, fact):
  with pytest.raises(ValueError, match=fact) as raised:
    build.experiment(small.config(**{field: value}))
  assert str(raised.value).count("\n") == 0


@pytest.mark.parametrize(
  "variant, overrides, fact",
  [
    ("bptt", {}, "of no use to bptt"),
    (
      "recipe",
      {"estimator__name": "forward_gradient", "epsilon": 0.0},
      "of no use to forward_gradient",
    ),
    ("recipe", {"mesh__head": 2}, "of no use on a mesh with mesh.head=2"),
  ],
)
def test_the_kernel_is_refused_where_nothing_is_left_to_it(
  variant, overrides, fact
):
  config = small.config(SHAKESPEARE, variant, **overrides)
  build.experiment(config)
  config.model.implementation = "triton"
  with pytest.raises(ValueError, match=fact):
    build.experiment(config)


def test_fields_that_nothing_reads_are_refused():
  config = small.config()
  with config.unlocked():
    config.model.depth = 3
  with pytest.raises(ValueError, match="depth"):
    build.experiment(config)


def test_missing_field_is_named():
  config = small.config()
  del config.model.num_heads
  with pytest.raises(ValueError, match="num_heads"):
    build.experiment(config)


@pytest.mark.parametrize(
  "content, fact",
  [
    (None, "cannot read the text file"),
    (b"", "is empty"),
    (b"too short", "tokens, but"),
    (b"\xff\xfe bad", "not UTF-8 at byte 0"),
  ],
)
def test_texts_that_cannot_be_used(tmp_path, content, fact):
  path = tmp_path / "text.txt"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=fact):
    build.experiment(small.config(SHAKESPEARE, task__source=str(path)))


@pytest.mark.parametrize(
  "path",
  sorted((small.ROOT / "configs").rglob("*.py")),
  ids=lambda path: path.stem,
)
def test_every_config_builds_and_says_its_command(path, tmp_path):
  config = small.config(path)
  if config.task.get("source", "shakespeare") != "shakespeare":
    # What the docstring says how to fetch.
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 5000)
    config.task.source, config.task.cache = str(text), str(tmp_path / "ids")
    for name in {"data_dir", "feature"} & set(config.task):
      config.task[name] = ""
  build.experiment(config)
  command = (
    f"python -m zorn_jax.cli.train --config={path.relative_to(small.ROOT)}"
  )
  assert command in path.read_text()


def test_epsilon_of_the_paper_follows_the_learning_rate():
  path = small.ROOT / "configs" / "paper" / "lstm.py"
  assert small.config(path, "tiny", learning_rate=0.5).epsilon == 0.5


def changed(variant, field, value, **estimator):
  config = small.config(SHAKESPEARE, variant)
  with config.unlocked():
    config[field] = value
    config.estimator.update(estimator)
  return config


@pytest.mark.parametrize(
  ("variant", "field", "value", "estimator", "fact"),
  [
    ("bptt", "epsilon", 0.1, {}, "bptt has no epsilon.*Set it to 0"),
    ("bptt", "num_probes", 8, {}, "bptt has no num_probes.*Set it to 0"),
    ("bptt", "seed", 0, {"shaping": "std"}, "'bptt' does not take shaping"),
    (
      "recipe",
      "seed",
      0,
      {"name": "forward_gradient"},
      "forward_gradient has no epsilon, got epsilon=0.01",
    ),
    ("bptt", "epsilon_schedule", "learning_rate", {}, "bptt has no epsilon"),
    ("recipe", "seed", 0, {"antithetic": True}, "antithetic. Drop it"),
    ("recipe", "seed", 0, {"readout": "fast"}, "unknown estimator.readout"),
    ("recipe", "seed", 0, {"readout_batches": 0}, "needs readout_batches"),
    ("pure", "seed", 0, {"readout_batches": 4}, "Set readout_batches to 0"),
    ("recipe", "seed", 0, {"adaptive": 1.5}, "decay must lie in"),
    (
      "recipe",
      "seed",
      0,
      {"name": "no"},
      "bandit_spsa, bptt, central_difference, forward_difference",
    ),
  ],
)
def test_options_that_contradict_each_other(
  variant, field, value, estimator, fact
):
  with pytest.raises(ValueError, match=fact):
    build.experiment(changed(variant, field, value, **estimator))


@pytest.mark.parametrize("variant", ["recipe", "pure", "plain", "nres", "bptt"])
def test_variants_build(variant):
  build.experiment(small.config(SHAKESPEARE, variant))


def test_groups_of_probes_can_be_filtered():
  build.experiment(
    changed(
      "recipe",
      "seed",
      0,
      aggregator={"name": "gaf", "threshold": 1.0, "groups": 4},
    )
  )


@pytest.mark.parametrize(
  ("path", "variant", "changes", "deferred"),
  [
    (PAPER, "tiny", {}, True),
    (PAPER, "tiny", {"estimator.name": "spsa2"}, True),
    (PAPER, "tiny", {"estimator.adaptive": 0.9}, False),
    (PAPER, "tiny", {"estimator.direction.norm": "l2"}, False),
    (SHAKESPEARE, "recipe", {}, False),  # Of low rank.
    (
      SHAKESPEARE,
      "nres",
      {"estimator.direction": {"name": "rademacher"}},
      True,
    ),
    (
      SHAKESPEARE,
      "recipe",
      {
        "estimator.name": "forward_gradient",
        "estimator.direction": {"name": "rademacher"},
        "epsilon": 0.0,
      },
      False,
    ),
  ],
)
def test_directions_are_deferred_where_nothing_else_forms_them(
  path, variant, changes, deferred, monkeypatch
):
  config = small.config(path, variant)
  with config.unlocked():
    for name, value in changes.items():
      *groups, field = name.split(".")
      group = config
      for part in groups:
        group = group[part]
      group[field] = value
  model, seen = build._model, []
  for knows in (True, False):
    taking = lambda *args, knows=knows: model(*args)._replace(deferred=knows)
    monkeypatch.setattr(build, "_model", taking)
    spy = lambda deferred=False: (
      seen.append(deferred) or directions.rademacher(deferred)
    )
    monkeypatch.setitem(build._DIRECTIONS, "rademacher", spy)
    build.experiment(config)
  assert seen == ([deferred, False] if seen else [])
  assert bool(seen) == (config.estimator.direction.name == "rademacher")


def test_a_run_is_loaded_with_the_number_of_probes_that_it_noted(
  tmp_path, monkeypatch
):
  config = small.config(estimator__probe_batch=0)
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  sizes, sharded = [], probe_map.sharded

  def spy(mesh, batch_size=None, **options):
    if "axis" not in options:  # Probes, not rows.
      sizes.append(batch_size)
    return sharded(mesh, batch_size, **options)

  monkeypatch.setattr(probe_map, "sharded", spy)
  build.load(tmp_path)
  assert sizes[-1] is None
  build.load(tmp_path, 2)
  assert sizes[-1] == 2
