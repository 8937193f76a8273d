"""Several devices: the same numbers, and nothing but losses between them."""

import functools
from typing import NamedTuple

import h200
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from devices import collective_bytes
from jax.sharding import AxisType, Mesh, NamedSharding

from zorn_jax import build, memory, mesh
from zorn_jax.data import Feed
from zorn_jax.estimators import shaping as shapings
from zorn_jax.step import init_state, programs
from zorn_jax.train_state import digest

pytestmark = pytest.mark.optimized

SLOW = pytest.mark.slow
SIZES = {
  "num_probes": 24,  # No power of two: it matters what a mean is divided by.
  "batch_size": 4,
  "model__embedding_size": 8,
  "model__hidden_size": 32,
  "model__num_heads": 2,
  # Another number at once may round otherwise.
  "estimator__probe_batch": 2,
}


class Trained(NamedTuple):
  losses: np.ndarray  # [steps, n, 2]
  params: dict[str, np.ndarray]
  digest: str


@functools.cache
def trained(**overrides) -> Trained:
  """Ten steps."""
  overrides = {
    name: dict(x) if isinstance(x, tuple) else x
    for name, x in overrides.items()
  }
  experiment = build.experiment(small.config(**SIZES | overrides))
  parts = programs(experiment)
  feed = Feed(experiment.task, experiment.layout.everywhere)
  state, losses = parts.init(), []
  for step in range(10):
    queried, _, aside = parts.query(state, feed.at(step))
    state, _ = parts.update(state, queried, aside)
    losses.append(np.asarray(queried))
  feed.close()
  params = jax.tree.map(np.asarray, state.params)
  return Trained(np.stack(losses), params, digest(state.params))


@pytest.mark.parametrize("shaping", sorted(shapings.SHAPINGS))
def test_coefficients_are_the_same_on_any_number_of_devices(shaping):
  for probes in (3, 6, 16, 96):
    slopes = np.random.default_rng(probes).normal(size=probes)
    found = []
    for count in (1, 2, 8):
      devices = np.array(jax.devices()[:count])
      there = NamedSharding(Mesh(devices, ("probe",)), jax.P())
      program = jax.jit(
        functools.partial(shapings.coefficients, shaping=shaping),
        out_shardings=there,
      )
      found.append(program(jax.device_put(np.float32(slopes), there)))
    for other in found[1:]:
      np.testing.assert_array_equal(found[0], other)


@pytest.mark.parametrize(
  "count", [*(pytest.param(k, marks=SLOW) for k in (2, 4)), 8]
)
def test_every_loss_is_the_same_on_any_number_of_devices(count):
  one, many = trained(), trained(mesh__probe=count)
  np.testing.assert_array_equal(one.losses, many.losses)
  assert one.digest == many.digest
  assert len(np.unique(one.losses)) > 450  # Of 10 steps x 24 x 2.


def test_so_are_those_of_dense_directions():
  dense = (("name", "rademacher"),)
  one = trained(estimator__direction=dense)
  many = trained(estimator__direction=dense, mesh__probe=8)
  np.testing.assert_array_equal(one.losses, many.losses)
  assert one.digest == many.digest != trained().digest


@pytest.mark.parametrize(
  "overrides",
  [
    {"mesh__probe": 2, "mesh__data": 4},
    {"mesh__probe": 4, "mesh__head": 2},
    {"mesh__probe": 8, "mesh__updates": "sharded"},
  ],
)
def test_other_axes_agree_up_to_the_order_of_sums(overrides, monkeypatch):
  """The rounding of the first sums, 1e-7, grows a little with every step."""
  monkeypatch.setattr(mesh, "_SMALLEST_SLICED", 1)
  one, many = trained(), trained(**overrides)
  assert one.digest != many.digest
  np.testing.assert_allclose(one.losses, many.losses, rtol=2e-6)
  for name, leaf in one.params.items():
    np.testing.assert_allclose(leaf, many.params[name], rtol=0, atol=1e-4)


class Moved(NamedTuple):
  query: int
  update: int


def moved(size, **overrides):
  """Bytes between eight devices in a step, and the experiment."""
  path = small.ROOT / "configs" / "paper" / "lstm.py"
  config = small.config(path, size, **{"mesh__probe": 8} | overrides)
  experiment = build.experiment(config)
  parts = programs(experiment)
  data = jax.eval_shape(lambda: experiment.task.data)
  losses, _, aside = jax.eval_shape(parts.query, parts.template, data)
  lowered = (
    parts.query.lower(parts.template, data),
    parts.update.lower(parts.template, losses, aside),
  )
  texts = (x.compile().as_text() for x in lowered)
  return Moved(*map(collective_bytes, texts)), experiment


@pytest.mark.parametrize("size", ["tiny", pytest.param("medium", marks=SLOW)])
def test_only_losses_move(size):
  step, experiment = moved(size)
  assert 0 < step.query + step.update <= 8 * experiment.num_probes + 64


@pytest.mark.parametrize("size", ["tiny", "medium"])
def test_only_losses_move_between_gpus(size, monkeypatch):
  grid = np.array(h200.devices(8)).reshape(8, 1, 1)
  layout = mesh.Layout(Mesh(grid, mesh.AXES, axis_types=(AxisType.Auto,) * 3))
  monkeypatch.setattr(build, "_layout", lambda *args: layout)
  step, experiment = moved(size)
  assert 0 < step.query + step.update <= 8 * experiment.num_probes + 64


def test_a_sharded_update_gathers_the_parameters_once():
  step, experiment = moved(
    "tiny",
    mesh__updates="sharded",
    model__num_heads=8,
    model__hidden_size=256,
    model__embedding_size=64,
  )
  assert step.query == 8 * experiment.num_probes
  params = jax.eval_shape(experiment.model.init, jax.random.key(0))
  size = sum(4 * x.size for x in jax.tree.leaves(params))
  assert 0.8 * size < step.update < size + 64


def test_a_gradient_that_moves_is_noticed():
  def summed(w):
    gradient = jax.grad(lambda w: jnp.sum(jnp.tanh(w) ** 2))(w)
    return jax.lax.psum(gradient, "probe")

  everywhere = jax.P()
  program = jax.shard_map(
    summed,
    mesh=mesh.make(8),
    in_specs=everywhere,
    out_specs=everywhere,
    check_vma=False,
  )
  compiled = jax.jit(program).lower(jnp.ones((8, 8))).compile()
  assert collective_bytes(compiled.as_text()) == 4 * 64


def test_collectives_are_counted_in_all_their_forms():
  count = collective_bytes
  assert count("  %a = f32[8,2]{1,0} all-gather(%b), dimensions={0}") == 64
  pair = "  %a = (f32[2,2]{1,0}, f32[8,2]{1,0}) all-gather-start(%b)"
  assert count(pair) == 64
  assert count("  %a = (f32[], bf16[3]) all-reduce(%b, %c)") == 10
  assert count("  %a = f32[4] add(%all-gather.1, %b)") == 0
  loop = "%body (p: f32[2]) -> f32[2] {\n  %a = f32[2] all-reduce(%p)\n}\n"
  with pytest.raises(AssertionError):
    count(loop + "%w = f32[2] while(%a), condition=%c, body=%body")


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (
      {"mesh__probe": 8, "num_probes": 12},
      "8 devices cannot share 12 probes evenly. Set num_probes to 8 or 16, or "
      "mesh.probe to 6.",
    ),
    (
      {"mesh__probe": 8, "num_probes": 3},
      "Set num_probes to 8, or mesh.probe to 3.",
    ),
    (
      {"mesh__data": 4, "batch_size": 6},
      "4 devices cannot share 6 rows evenly. Set batch_size to a multiple of 4",
    ),
    (
      {"mesh__head": 4},
      "4 devices cannot share 2 heads evenly",
    ),
    ({"mesh__probe": 16}, "needs 16 devices, but there are 8"),
    ({"mesh__data": 0}, "mesh.data must be at least 1, got 0"),
    ({"mesh__probe": -1}, "mesh.probe must be at least 0, got -1"),
    (
      {"mesh__updates": "sharded", "mesh__probe": 8},
      "8 devices can cut no parameter evenly",
    ),
    ({"mesh__updates": "odd"}, "unknown mesh.updates 'odd'"),
  ],
)
def test_bad_meshes_are_refused(overrides, message):
  with pytest.raises(ValueError, match=message):
    programs(build.experiment(small.config(**SIZES | overrides)))


@pytest.mark.parametrize(("num_probes", "used"), [(96, 8), (12, 6), (7, 7)])
def test_as_many_devices_as_divide_the_probes(num_probes, used):
  assert dict(mesh.make(num_probes).shape)["probe"] == used
  assert dict(mesh.make(num_probes, num_devices=8).shape)["probe"] == used


def test_a_cpu_is_not_filled_with_copies(monkeypatch):
  config = small.config(mesh__probe=0, num_probes=8)
  made = build.experiment(config)
  state = jax.eval_shape(functools.partial(init_state, made))
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  for host, used in ((16 * held, 8), (16 * held - 1, 1), (None, 8)):
    monkeypatch.setattr(memory, "host", lambda host=host: host)
    assert build.experiment(config).layout.mesh.size == used
  config.mesh.probe = 8
  monkeypatch.setattr(memory, "host", lambda: 0)
  assert build.experiment(config).layout.mesh.size == 8


def test_back_propagation_runs_on_one_device():
  assert mesh.make(0).size == 1
  with pytest.raises(ValueError, match="no probes to spread"):
    mesh.make(0, data=2)


def test_the_layout_is_described():
  text = mesh.describe(mesh.Layout(mesh.make(8, probe=2, data=4)))
  assert text == (
    "8 of 8 devices (cpu) in 1 processes as 2 probe x 4 data x 1 head, update "
    "replicated"
  )
