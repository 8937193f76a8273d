"""Plans: the paper's sizes, and costs against independent counts."""

import json
import math
import resource

import jax
import jax.numpy as jnp
import pytest
import small
from devices import collective_bytes

from zorn_jax import build
from zorn_jax.plan import (
  DEVICES,
  LINKS,
  Transfer,
  cost,
  memory,
  plan,
  seconds,
)
from zorn_jax.step import programs

pytestmark = pytest.mark.optimized

DNC = small.ROOT / "configs" / "paper" / "dnc.py"
LSTM = small.ROOT / "configs" / "paper" / "lstm.py"
# reference: arXiv:2505.17852, and the printed counts of its authors' runs.
COUNTS = {
  "tiny": 150740,
  "small": 1139700,
  "medium": 10627700,
  "large": 112606100,
  "xlarge": 1162045100,
  "xxlarge": 4506010100,
  "smoke_7b": 6914405668,
}


@pytest.mark.parametrize("size", COUNTS)
def test_paper_sizes_without_allocating(size):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  result = plan(build.experiment(small.config(LSTM, size)))
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert result["parameters"] == COUNTS[size]
  assert result["forward_passes_per_step"] == 192
  expected = math.sqrt(96 / (96 + COUNTS[size]))
  assert math.isclose(result["expected_cosine"], expected)
  # Parameters, directions or a gradient would show: 400 MB from "large" on.
  assert grown < 300_000  # KiB


def test_forward_flops_are_those_of_the_matrix_products():
  config = small.config(
    LSTM, "tiny", batch_size=3, num_probes=2, task__time_chunk=21
  )
  result = plan(build.experiment(config))
  heads, head, embed, vocab, tokens = 12, 20, 100, 100, 3 * 21
  hidden = heads * head
  # Fewer than MAX_TABLE_ROWS tokens: embedding and projection are one table.
  table = vocab * embed * 4 * hidden
  per_token = 4 * heads * head * head + hidden * vocab
  expected = 2 * 4 * (table + tokens * per_token)
  assert result["forward_flops_per_step"] == expected


def test_low_rank_probes_share_the_table():
  """2n copies of the shared product would cost 2n times as much."""
  config = lambda n: small.config(
    num_probes=n, estimator__batch_per_probe=False
  )
  flops = [
    plan(build.experiment(config(n)))["forward_flops_per_step"] for n in (4, 8)
  ]
  assert flops[1] < 2 * flops[0]


def test_cost_of_a_loop():
  a, b = jnp.ones((4, 8)), jnp.ones((8, 8))

  def looped(a):
    return jax.lax.scan(lambda x, _: (x @ b, None), a, length=10)[0]

  assert cost(jax.make_jaxpr(looped)(a).jaxpr).flops == 10 * 2 * 4 * 8 * 8


def test_peak_estimate_is_of_the_compilers_order():
  """Within a factor of three of what XLA allocates for the recipe's step."""
  from test_step import compiled_step

  experiment = build.experiment(
    small.config(batch_size=8, num_probes=64, model__hidden_size=64)
  )
  memory = compiled_step(experiment).memory_analysis()
  actual = memory.temp_size_in_bytes + memory.argument_size_in_bytes
  estimate = plan(experiment)["peak_bytes_estimate"]
  assert actual / 3 < estimate < 3 * actual


def test_command_prints_json():
  command = small.command("plan", f"--config={LSTM}:large", "--json")
  done = small.run(*command)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)["parameters"] == COUNTS["large"]


# With the 22 symbols of the sums, by the formula for the same models.
ADD_COUNTS = {
  "tiny": 124142,
  "small": 1007022,
  "medium": 9871022,
  "large": 107450222,
  "xlarge": 1138832222,
  "xxlarge": 4428002222,
}
DNC_COUNTS = {
  "scale=1": 134053,
  "scale=8": 6553893,
  "scale=2,controller=lstm": 880677,
  "scale=16,controller=lstm,input=scale": 67782757,
}
BY_PLAN = ("tiny", "medium", "scale=1", "scale=8")


@pytest.mark.parametrize("arg", [*ADD_COUNTS, *DNC_COUNTS])
def test_counts_of_sums_and_of_the_dnc(arg):
  if arg in ADD_COUNTS:
    config = small.config(LSTM, arg, task__name="add")
  else:
    config = small.config(DNC, arg, num_probes=8)
  experiment = build.experiment(config)
  if arg in BY_PLAN:
    count = plan(experiment)["parameters"]
  else:
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  assert count == (ADD_COUNTS | DNC_COUNTS)[arg]


TINY = {
  "num_probes": 16,
  "batch_size": 4,
  "model__embedding_size": 64,
  "model__hidden_size": 64,
  "model__num_heads": 2,
  "estimator__direction": {"name": "rademacher"},
}
LOW_RANK = {"name": "low_rank", "rank": 1, "base": "rademacher"}
MESHES = {
  "probes": {"mesh__probe": 8},
  "slices": {"mesh__probe": 8, "mesh__updates": "sharded"},
  "rows": {"mesh__probe": 4, "mesh__data": 2},
  "heads": {"mesh__probe": 4, "mesh__head": 2},
}


@pytest.mark.parametrize("name", MESHES)
def test_planned_bytes_are_those_of_the_compiled_step(name):
  config = small.config(**TINY | MESHES[name])
  planned = plan(build.experiment(config, num_devices=8))
  parts = programs(build.experiment(config))
  data = jax.eval_shape(lambda: build.experiment(config).task.data)
  losses, _, aside = jax.eval_shape(parts.query, parts.template, data)
  lowered = (
    parts.query.lower(parts.template, data),
    parts.update.lower(parts.template, losses, aside),
  )
  moved = sum(collective_bytes(x.compile().as_text()) for x in lowered)
  assert planned["collective_bytes_per_step"] == moved
  assert planned["updates"][config.mesh.updates]["bytes"] == moved
  if name == "probes":
    assert moved == 4 * 16 * 2


def test_with_a_curriculum_products_are_those_of_the_longest_sequences():
  start = {"curriculum__start": 2, "curriculum__maximum": 3}
  both = (
    planned(curriculum__enabled=x, task__time_chunk=2, **start)
    for x in (False, True)
  )
  fixed, growing = (found["forward_flops_per_step"] for found in both)
  assert fixed == growing > 0


def planned(devices=8, path=small.COPY, arg=None, **overrides):
  overrides = {"mesh__probe": 0} | overrides
  if path == small.COPY:
    overrides = TINY | overrides
  config = small.config(path, arg, **overrides)
  return plan(build.experiment(config, num_devices=devices))


def test_collectives_in_a_loop_count_every_time():
  heads = MESHES["heads"]
  chunk, tokens = planned(**heads), planned(**heads, task__time_chunk=1)
  name = "collective_bytes_per_step"
  assert chunk[name] == tokens[name] > 1000
  times = [
    x["updates"]["replicated"]["transfer_seconds"] for x in (tokens, chunk)
  ]
  assert all(times[0][link] > times[1][link] for link in LINKS)


def test_a_device_has_its_part_of_the_passes_and_of_the_model():
  one, eight = planned(1), planned(8)
  assert one["forward_flops_per_step"] == 8 * eight["forward_flops_per_step"]
  assert one["parameters"] == eight["parameters"]
  assert eight["mesh"] == {"probe": 8, "data": 1, "head": 1}
  whole, half = (
    memory(
      build.experiment(
        small.config(LSTM, "medium", batch_size=4, mesh__head=heads)
      )
    )
    for heads in (1, 2)
  )
  saved = whole.held - half.held
  assert math.isclose(saved, 4 * COUNTS["medium"] / 2, rel_tol=0.01)


def test_memory_of_an_update_in_place_and_of_a_loop_s_carry():
  x, row = jnp.ones((64, 1024)), jnp.ones((1, 1024))
  step = lambda i, x: jax.lax.dynamic_update_slice_in_dim(
    x, 2 * jax.lax.dynamic_slice_in_dim(x, i, 1) + row, i, 0
  )
  loop = jax.make_jaxpr(lambda x: jax.lax.fori_loop(0, 64, step, x))(x).jaxpr
  assert cost(loop, in_place=True).peak_bytes < x.nbytes / 2
  # What is not given away has to be copied, once.
  assert x.nbytes <= cost(loop).peak_bytes < 1.5 * x.nbytes
  # So does what is still read behind.
  late = jax.make_jaxpr(lambda x: (step(0, x), jnp.sin(x).sum()))(x).jaxpr
  assert cost(late).peak_bytes >= x.nbytes


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_memory_of_the_update_is_near_the_compilers(optimizer):
  options = {"name": "sgd", "momentum": 0.0}
  if optimizer == "adam":
    options = {"name": "adam", "b1": 0.9, "b2": 0.99}
  options |= {"schedule": "constant", "warmup_steps": 0}
  config = small.config(
    LSTM, "small", batch_size=2, num_probes=16, optimizer=options
  )
  experiment = build.experiment(config)
  parts = programs(experiment)
  losses = jax.ShapeDtypeStruct((16, 2), jnp.float32)
  actual = parts.update.lower(parts.template, losses, ()).compile()
  temporary = actual.memory_analysis().temp_size_in_bytes
  assert temporary / 2 < memory(experiment).update < 2 * temporary


def test_expected_times_are_monotone():
  # Among more devices fewer leaves can be sliced.
  plans = [planned(k)["updates"] for k in (1, 2, 4)]
  for update in ("replicated", "sharded"):
    for link in LINKS:
      times = [x[update]["transfer_seconds"][link] for x in plans]
      assert times[0] == 0 and times == sorted(set(times))
    times = [*plans[-1][update]["transfer_seconds"].values()]
    assert times == sorted(set(times))
  for device in DEVICES:
    fixed, falling = (
      [x[update]["arithmetic_seconds"][device] for x in plans]
      for update in ("replicated", "sharded")
    )
    assert len(set(fixed)) == 1
    assert falling[0] == fixed[0]
    assert falling == sorted(set(falling), reverse=True)
    assert falling[-1] < fixed[0] / 3
  more = planned(num_probes=32)["updates"]["replicated"]
  less = planned(num_probes=16)["updates"]["replicated"]
  for row in ("transfer_seconds", "arithmetic_seconds"):
    assert all(more[row][x] > less[row][x] for x in less[row])


def test_arithmetic_is_that_of_signs_or_of_products():
  dense, products = (
    planned(1, LSTM, "medium", estimator__direction=direction)["updates"][
      "replicated"
    ]["arithmetic_seconds"]
    for direction in ({"name": "rademacher"}, LOW_RANK)
  )
  for name, device in DEVICES.items():
    # Plain descent: gradient and parameters, each written and read.
    fixed = 16 * COUNTS["medium"] / device.rate
    work = 96 * COUNTS["medium"]
    expected = work * device.sign + fixed
    assert math.isclose(dense[name], expected, rel_tol=1e-6)
    expected = 2 * work / device.flops + fixed
    assert math.isclose(products[name], expected, rel_tol=0.02)


def test_a_large_collective_takes_its_bytes_and_a_small_one_its_hops():
  link = LINKS["InfiniBand"]
  gather = Transfer("all_gather", 10**12, 4)
  assert math.isclose(seconds(gather, link), 0.75e12 / 50e9, rel_tol=1e-4)
  twice = seconds(gather._replace(name="psum"), link)
  assert math.isclose(twice, 2 * seconds(gather, link), rel_tol=1e-4)
  tiny = [Transfer("all_gather", 0, count) for count in (2, 65)]
  first, last = (seconds(x, link) for x in tiny)
  assert math.isclose(last - first, 63 * 2.7e-6)
  # Eight devices are one node, and sixteen are two.
  node = [Transfer("all_gather", 0, count) for count in (8, 16)]
  first, last = (seconds(x, link, per_node=8) for x in node)
  assert first == seconds(node[0], LINKS["NVLink"])
  assert math.isclose(last - first, 7 * 0.5e-6 + 2.7e-6)


def test_back_propagation_is_planned_for_one_device():
  result = planned(
    8, small.ROOT / "configs" / "shakespeare.py", "bptt", mesh__probe=0
  )
  assert result["mesh"] == {"probe": 1, "data": 1, "head": 1}
  assert result["collective_bytes_per_step"] == 0


@pytest.mark.parametrize("devices", [3, 6])
def test_devices_that_do_not_divide_the_probes(devices):
  config = small.config(**TINY, mesh__probe=devices)
  with pytest.raises(ValueError, match="cannot share 16 probes") as real:
    build.experiment(config)
  with pytest.raises(ValueError) as abstract:
    planned(devices, mesh__probe=devices)
  assert str(abstract.value) == str(real.value)
  with pytest.raises(ValueError, match="needs 16 devices, but there are 8"):
    planned(8, mesh__probe=16)


def test_command_plans_for_devices_that_are_not_there():
  """The command has one device."""
  command = small.command("plan", f"--config={small.COPY}")
  done = small.run(*command, "--config.mesh.probe=8", "--config.mesh.data=2")
  assert done.returncode == 0, done.stderr
  assert "8 probe x 2 data x 1 head" in done.stdout
  assert {"replicated", "sharded"} < {
    line.split()[0] for line in done.stdout.splitlines() if line
  }
  done = small.run(*command, "--devices=8", "--json")
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert result["mesh"]["probe"] == 8
  assert result["collective_bytes_per_step"] == 4 * 2 * 256
  done = small.run(*command, "--devices=0")
  assert done.returncode == 1
  assert done.stderr == (
    "error: devices must be at least 1, got 0. Choose how many to plan for.\n"
  )
