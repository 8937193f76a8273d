"""What comes back from disk is what went there, or is said to be damaged."""

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import logging

from zorn_jax import checkpoint, control, train_state

pytestmark = pytest.mark.optimized

REPOSITORY = pathlib.Path(__file__).parents[1]


def make_state(step, size=4):
  """A state with every kind of leaf, different at every step."""
  key = jax.random.fold_in(jax.random.key(0), step)
  params = {
    "dense": {"kernel": jax.random.normal(key, (3, size)), "bias": {}},
    # Joined with dots, as orbax joins them, these two names would be one.
    "a.b": jnp.full((5,), step / 3, jnp.bfloat16),
    "a": {"b": jnp.full((2, 1), step, jnp.uint32), "empty": jnp.zeros((0, 2))},
  }
  weights = {"kernel": params["dense"]["kernel"], "half": params["a.b"]}
  optimizer = optax.chain(optax.clip(1.0), optax.adam(1e-3))
  return train_state.TrainState(
    step=jnp.int32(step),
    params=params,
    opt_state=optimizer.init(weights),
    method_state=((), None, [jnp.float32(-0.0), jnp.float32(jnp.nan)]),
    control=control.init(control.Watch()),
    probe_key=jax.random.fold_in(jax.random.key(1), step),
    data_key=jax.random.split(jax.random.key(step, impl="rbg"), 3),
  )


def save_steps(directory, losses, keep=2):
  """Saves steps 1, 2, ... with these losses; None for no loss."""
  checkpoints = checkpoint.Checkpoints(directory, keep=keep)
  for step, loss in enumerate(losses, start=1):
    metrics = {} if loss is None else {"loss": loss}
    checkpoints.save(step, make_state(step), metrics)
  return checkpoints


def assert_same(restored, expected):
  """Equal structure, kinds and bytes."""
  assert jax.tree.structure(restored) == jax.tree.structure(expected)
  pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True)
  for left, right in pairs:
    assert isinstance(left, jax.Array)
    assert (left.shape, left.dtype) == (right.shape, right.dtype)
    assert train_state.digest(left) == train_state.digest(right)


def warnings_of(caplog):
  return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


@pytest.fixture(name="template")
def fixture_template():
  return jax.eval_shape(lambda: make_state(0))


def test_digest_is_sha256_of_bytes_in_tree_order():
  # printf '\\x00\\x01\\x02\\xff\\xff\\xff\\xff' | sha256sum
  tree = {"b": jnp.int32(-1), "a": jnp.arange(3, dtype=jnp.uint8)}
  assert train_state.digest(tree) == (
    "4321021344fe2dfaf1a84ffbf0fa65c03114e6ab1fa613659341091bbe8ef049"
  )


@pytest.mark.parametrize("abstract", [True, False])
def test_round_trip_is_exact(tmp_path, abstract):
  state = make_state(7)
  checkpoints = checkpoint.Checkpoints(tmp_path / "run")
  checkpoints.save(7, state, {"loss": 0.1, "accuracy": jnp.float32(0.5)})
  make = lambda: make_state(0)
  template = jax.eval_shape(make) if abstract else make()
  # A new object, as after a crash.
  restored, step, metrics = checkpoint.Checkpoints(tmp_path / "run").restore(
    template
  )
  assert_same(restored, state)
  assert (step, metrics) == (7, {"loss": 0.1, "accuracy": 0.5})
  # Keys go on as they would have.
  for name in ("probe_key", "data_key"):
    old, new = getattr(state, name), getattr(restored, name)
    draw = jax.vmap(lambda k: jax.random.bits(k, (2,)))
    np.testing.assert_array_equal(
      draw(jnp.atleast_1d(old)), draw(jnp.atleast_1d(new))
    )


def test_leaves_go_where_the_template_is(tmp_path):
  mesh = jax.make_mesh(
    (jax.device_count(),),
    ("probe",),
    axis_types=(jax.sharding.AxisType.Auto,),
  )
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  checkpoints = save_steps(tmp_path, [1.0])
  template = jax.device_put(make_state(0), everywhere)
  restored, _, _ = checkpoints.restore(template)
  assert_same(restored, make_state(1))
  for leaf in jax.tree.leaves(restored):
    assert leaf.committed
    assert leaf.sharding.is_equivalent_to(everywhere, leaf.ndim)
  checkpoints.save(2, restored, {})
  # New arrays may follow others to a mesh; restored ones must not be pinned.
  restored, _, _ = checkpoints.restore(make_state(0))
  assert not any(leaf.committed for leaf in jax.tree.leaves(restored))
  add = jax.jit(lambda x, y: x + y, donate_argnums=0)
  total = add(restored.step, template.step)
  assert total.sharding.device_set == everywhere.device_set
  assert_same(checkpoints.restore(make_state(0))[0], make_state(1))


@pytest.mark.parametrize(
  "keep, losses, kept",
  [
    (2, [3, 1, 2, 4, 5], [2, 4, 5]),  # The best, and the newest though worst.
    (1, [1, 2, 3], [1, 3]),
    (2, [5, 4, 3, 2], [3, 4]),
    (1, [2, 1, 1, 3], [3, 4]),  # Of equals the later one.
    (1, [float("nan"), 2, float("nan"), None, 3], [2, 5]),
    (1, [-float("inf"), 2, float("inf"), 3], [2, 4]),
    (1, [None, None, float("nan")], [3]),
  ],
)
def test_keeps_the_latest_and_the_best(tmp_path, template, keep, losses, kept):
  for step, loss in enumerate(losses, start=1):
    if step % 2:  # As after a crash: the losses are those on disk.
      checkpoints = checkpoint.Checkpoints(tmp_path, keep=keep)
    checkpoints.save(
      step, make_state(step), {} if loss is None else {"loss": loss}
    )
    assert checkpoints.steps()[-1] == step
  assert checkpoints.steps() == kept
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(map(str, kept))
  assert checkpoints.restore(template)[1] == len(losses)
  finite = {s: x for s, x in enumerate(losses, 1) if x and np.isfinite(x)}
  if finite:
    best, best_step, metrics = checkpoints.restore_best(template)
    assert best_step in kept and metrics["loss"] == min(finite.values())
    assert_same(best, make_state(best_step))
  else:
    with pytest.raises(checkpoint.CheckpointError, match="finite loss"):
      checkpoints.restore_best(template)


def test_params_alone(tmp_path, template):
  checkpoints = save_steps(tmp_path, [1.0, 2.0])
  params, step, metrics = checkpoints.restore_params(template.params)
  assert_same(params, make_state(2).params)
  assert (step, metrics) == (2, {"loss": 2.0})
  params, step, _ = checkpoints.restore_params(template.params, "best")
  assert_same(params, make_state(1).params)
  params, step, _ = checkpoints.restore_params(template.params, step=1)
  assert_same(params, make_state(1).params)
  record = json.loads((tmp_path / "1/summary/metadata").read_text())
  expected = train_state.digest(make_state(1).params)
  assert record["summary"]["params_digest"] == expected
  assert record["summary"]["digest"] == train_state.digest(make_state(1))


def files_of(directory, step):
  root = directory / str(step)
  return sorted(p for p in root.rglob("*") if p.is_file())


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


DAMAGES = {
  "truncated": truncate,
  "emptied": lambda path: path.write_bytes(b""),
  "removed": pathlib.Path.unlink,
  "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_harmless_or_found(
  tmp_path, template, caplog, damage
):
  """A file orbax does not need may be damaged; no wrong byte comes back."""
  checkpoints = save_steps(tmp_path, [1.0, 2.0])
  found = set()
  for path in files_of(tmp_path, 2):
    before = path.read_bytes()
    caplog.clear()
    DAMAGES[damage](path)
    state, step, _ = checkpoints.restore(template)
    assert_same(state, make_state(step))
    if step == 1:
      name = path.relative_to(tmp_path / "2")
      found.add("data" if name.parent.name == "d" else name.name)
      (warning,) = warnings_of(caplog)
      assert "checkpoint of step 2" in warning and "\n" not in warning
      assert warning.endswith("skipped.")
      with pytest.raises(checkpoint.CheckpointError, match="step 2"):
        checkpoints.restore(template, step=2)
    else:
      assert not warnings_of(caplog)
    assert checkpoints.steps() == [1, 2]  # Nothing is deleted.
    path.write_bytes(before)
  assert found >= {"metadata", "data", "manifest.ocdbt"}


def test_flipped_bit_of_an_array_is_found(tmp_path, caplog):
  # Random floats do not compress, and orbax has no checksum of them.
  checkpoints = checkpoint.Checkpoints(tmp_path)
  for step in (1, 2):
    checkpoints.save(step, make_state(step, size=50_000), {})
  path = max(files_of(tmp_path, 2), key=lambda p: p.stat().st_size)
  assert path.stat().st_size > 400_000
  flip(path)
  template = jax.eval_shape(lambda: make_state(0, size=50_000))
  for restore, tree in (
    (checkpoints.restore, template),
    (checkpoints.restore_params, template.params),
  ):
    caplog.clear()
    assert restore(tree)[1] == 1
    assert len(warnings_of(caplog)) == 1


def test_intact_arrays_of_another_step_are_found(tmp_path, template):
  checkpoints = save_steps(tmp_path, [1.0, 2.0])
  shutil.rmtree(tmp_path / "2/state")
  shutil.copytree(tmp_path / "1/state", tmp_path / "2/state")
  assert checkpoints.restore(template)[1] == 1
  assert checkpoints.restore_params(template.params)[1] == 1


def test_same_bytes_of_another_shape_are_found(tmp_path, template):
  checkpoints = save_steps(tmp_path / "run", [1.0, 2.0])
  state = make_state(2)
  params = {**state.params, "a.b": state.params["a.b"].reshape(5, 1)}
  other = checkpoint.Checkpoints(tmp_path / "other")
  other.save(2, state._replace(params=params), {})
  shutil.rmtree(tmp_path / "run/2/state")
  shutil.copytree(tmp_path / "other/2/state", tmp_path / "run/2/state")
  assert checkpoints.restore(template)[1] == 1


@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_saving_beside_damaged_checkpoints(tmp_path, template, damage):
  save_steps(tmp_path, [1.0, 2.0])
  for path in files_of(tmp_path, 2) + files_of(tmp_path, 1):
    DAMAGES[damage](path)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(2, make_state(2), {"loss": 2.0})
  checkpoints.save(3, make_state(3), {"loss": 3.0})
  assert checkpoints.steps() == [2, 3]
  assert_same(checkpoints.restore_best(template)[0], make_state(2))


def test_changed_loss_is_found(tmp_path, template):
  checkpoints = save_steps(tmp_path, [1.0, 2.0])
  path = tmp_path / "2/summary/metadata"
  path.write_text(path.read_text().replace('"loss": 2.0', '"loss": 0.5'))
  assert checkpoints.restore(template)[1:] == (1, {"loss": 1.0})
  assert checkpoints.restore_best(template)[1:] == (1, {"loss": 1.0})


@pytest.mark.parametrize("item", ["summary", "state"])
def test_missing_item(tmp_path, template, caplog, item):
  """As when the removal of a checkpoint was cut short."""
  checkpoints = save_steps(tmp_path, [2.0, 1.0])
  shutil.rmtree(tmp_path / "2" / item)
  for restore in (checkpoints.restore, checkpoints.restore_best):
    caplog.clear()
    state, step, _ = restore(template)
    assert step == 1 and len(warnings_of(caplog)) == 1
    assert_same(state, make_state(1))
  # The damaged one gives way to a new one, and training goes on.
  checkpoints.save(2, make_state(2), {"loss": 3.0})
  checkpoints.save(3, make_state(3), {"loss": 4.0})
  checkpoints.save(4, make_state(4), {"loss": 5.0})
  assert checkpoints.steps() == [1, 3, 4]
  assert_same(checkpoints.restore(template)[0], make_state(4))


def test_nothing_there_and_nothing_intact(tmp_path, template):
  checkpoints = checkpoint.Checkpoints(tmp_path / "run")
  assert checkpoints.steps() == []
  assert checkpoints.restore(template) is None
  assert checkpoints.restore_best(template) is None
  assert checkpoints.restore_params(template.params) is None
  with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of st"):
    checkpoints.restore(template, step=3)
  assert not (tmp_path / "run").exists()  # Reading never writes.
  save_steps(tmp_path / "run", [1.0, 2.0])
  for step in (1, 2):
    truncate(tmp_path / f"run/{step}/summary/metadata")
  with pytest.raises(checkpoint.CheckpointError, match="step 2.*step 1"):
    checkpoints.restore(template)
  with pytest.raises(checkpoint.CheckpointError, match="step 2.*step 1"):
    checkpoints.restore_best(template)
  with pytest.raises(checkpoint.CheckpointError, match=r"step 9.*\[1, 2\]"):
    checkpoints.restore(template, step=9)
  with pytest.raises(ValueError, match="keep must be positive, got 0"):
    checkpoint.Checkpoints(tmp_path, keep=0)


def change_shape(state):
  return state._replace(params={**state.params, "a.b": jnp.zeros((6,))})


def change_dtype(state):
  half = state.params["a.b"].astype(jnp.float32)
  return state._replace(params={**state.params, "a.b": half})


def drop_leaf(state):
  return state._replace(params={k: state.params[k] for k in ("a", "dense")})


def add_leaf(state):
  return state._replace(params={**state.params, "new": jnp.zeros(3)})


@pytest.mark.parametrize(
  "change, name",
  [
    (change_shape, r"'a\.b'.*bfloat16\[5\].*float32\[6\]"),
    (change_dtype, r"'a\.b'.*bfloat16\[5\].*float32\[5\]"),
    (drop_leaf, r"'a\.b'.*bfloat16\[5\].*absent"),
    (add_leaf, r"'new'.*absent.*float32\[3\]"),
  ],
)
def test_other_templates_are_refused(tmp_path, caplog, change, name):
  checkpoints = save_steps(tmp_path, [1.0, 2.0])
  other = change(make_state(0))
  for restore, tree in (
    (checkpoints.restore, other),
    (checkpoints.restore_params, other.params),
  ):
    with pytest.raises(checkpoint.CheckpointError, match=name) as info:
      restore(tree)
    assert "step 2" in str(info.value) and "\n" not in str(info.value)
  assert not warnings_of(caplog)  # It is not damaged.


def test_saving_a_step_again_replaces_it(tmp_path, template):
  checkpoints = save_steps(tmp_path, [1.0, 2.0])
  checkpoints.save(2, make_state(22), {"loss": 0.5})
  state, step, metrics = checkpoints.restore(template)
  assert_same(state, make_state(22))
  assert (step, metrics) == (2, {"loss": 0.5})
  checkpoints.save(1, make_state(11), {"loss": 3.0})  # Also an older one.
  assert_same(checkpoints.restore(template, 1)[0], make_state(11))
  assert sorted(os.listdir(tmp_path)) == ["1", "2"]


@pytest.mark.parametrize("again", [False, True])
def test_failing_write_leaves_the_others(
  tmp_path, template, monkeypatch, again
):
  checkpoints = save_steps(tmp_path, [1.0, 2.0])

  def full_disk(self, step, **kwargs):
    (tmp_path / f"{step}.orbax-checkpoint-tmp").mkdir()
    raise OSError(errno.ENOSPC, "No space left on device")

  step = 2 if again else 3
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, "save", full_disk)
    with pytest.raises(checkpoint.CheckpointError) as info:
      checkpoints.save(step, make_state(step), {"loss": 3.0})
  assert f"step {step}" in str(info.value) and "space" in str(info.value)
  assert "\n" not in str(info.value)
  for reader in (checkpoints, checkpoint.Checkpoints(tmp_path)):
    assert reader.steps() == [1, 2]
    assert_same(reader.restore(template)[0], make_state(2))
  checkpoints.save(3, make_state(3), {"loss": 3.0})
  assert sorted(os.listdir(tmp_path)) == ["1", "2", "3"]
  assert_same(checkpoints.restore(template, 2)[0], make_state(2))


def test_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("in the way")
  checkpoints = checkpoint.Checkpoints(tmp_path / "file/run")
  with pytest.raises(checkpoint.CheckpointError, match="file/run.*permission"):
    checkpoints.save(1, make_state(1), {})


@pytest.mark.parametrize("complete", [False, True])
def test_replacement_cut_short(tmp_path, template, complete):
  """Killed before, or after, the new checkpoint was renamed into place."""
  save_steps(tmp_path, [1.0, 2.0])
  (tmp_path / "2").rename(tmp_path / "2.replaced")
  expected = make_state(2)
  if complete:
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    expected = make_state(1)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
  assert checkpoints.steps() == [1, 2]
  assert_same(checkpoints.restore(template, step=2)[0], expected)
  checkpoints.save(3, make_state(3), {})
  assert sorted(os.listdir(tmp_path)) == ["1", "2", "3"]
  assert_same(checkpoints.restore(template, step=2)[0], expected)


def test_reading_spares_what_another_process_writes(tmp_path, template):
  save_steps(tmp_path, [1.0])
  unfinished = tmp_path / "2.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "1", unfinished)
  reader = checkpoint.Checkpoints(tmp_path)
  assert reader.steps() == [1] and reader.restore(template)[1] == 1
  assert unfinished.exists()
  reader.save(3, make_state(3), {})  # Now it is the writer.
  assert sorted(os.listdir(tmp_path)) == ["1", "3"]


def test_closed_checkpoints_open_again(tmp_path, template):
  checkpoints = save_steps(tmp_path, [1.0])
  checkpoints.close()
  checkpoints.close()
  checkpoints.save(2, make_state(2), {})
  assert checkpoints.restore(template)[1] == 2


def test_orbax_is_not_heard(tmp_path, template, caplog, capfd):
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  try:
    checkpoints = save_steps(tmp_path, [1.0, 2.0, 3.0, 4.0])
    checkpoints.restore(template)
    checkpoints.close()
    assert not caplog.records
    logging.info("Others are heard.")
    assert len(caplog.records) == 1
  finally:
    logging.set_verbosity(verbosity)
  capfd.readouterr()


SAVE_FOREVER = """
import sys
sys.path[:0] = sys.argv[2:]
import test_checkpoint
from zorn_jax import checkpoint
checkpoints = checkpoint.Checkpoints(sys.argv[1])
for step in range(1, 10_000):
  for _ in range(2):  # The second time it replaces the first.
    state = test_checkpoint.make_state(step, size=20_000)
    checkpoints.save(step, state, {"loss": -step})
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay_ms", [3, 17, 31, 44])
def test_sigkill_while_saving(tmp_path, delay_ms):
  folders = [str(REPOSITORY), str(REPOSITORY / "tests")]
  command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path), *folders]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, text=True, env=environment
  ) as process:
    lines = [process.stdout.readline() for _ in range(7)]
    time.sleep(delay_ms / 1000)
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
  assert process.returncode == -signal.SIGKILL
  checkpoints = checkpoint.Checkpoints(tmp_path)
  template = jax.eval_shape(lambda: make_state(0, size=20_000))
  state, step, _ = checkpoints.restore(template)
  assert step >= int(lines[-1]) >= 4
  assert_same(state, make_state(step, size=20_000))
  checkpoints.save(step + 1, make_state(step + 1), {})
  assert all(p.name.isdecimal() for p in tmp_path.iterdir())


def test_what_was_set_aside_is_forgotten_too(tmp_path):
  """Killed after a replacement of step 3, before the old copy was removed."""
  save_steps(tmp_path, [1.0, 2.0, 3.0])
  shutil.copytree(tmp_path / "3", tmp_path / "3.replaced")
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
  checkpoints.forget(2)
  checkpoints.save(2, make_state(2), {})
  assert checkpoints.steps()[-1] == 2
  checkpoints.close()


def test_a_regular_checkpoint_outlives_those_between(tmp_path):
  """What a signal leaves does not push out what a run goes back to."""
  checkpoints = checkpoint.Checkpoints(tmp_path, every=10)
  for step in (10, 20, 23, 27, 29):
    checkpoints.save(step, make_state(step), {})
  assert checkpoints.steps() == [20, 27, 29]
  checkpoints.forget(20)
  assert checkpoints.steps() == [20]
  checkpoints.save(30, make_state(30), {})
  assert checkpoints.steps() == [20, 30]
  checkpoints.close()
