"""Heads spread over devices: the same losses, and little that moves."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from zorn_jax import directions, estimators, metrics, models, probe_map

# configs/paper/lstm.py:medium.
MEDIUM = models.Recurrent("lstm", 100, 100, 9600, 64, initial_state="trainable")
# All that moves, and heads and units that fill no word of signs.
LAYERS = models.Recurrent(
  "gru",
  12,
  64,
  64,
  4,
  num_layers=2,
  layer_norm=True,
  residual=True,
  initial_state="trainable",
)
# Whose signs are whole words.
WORDS = models.Recurrent("lstm", 12, 64, 128, 32, initial_state="trainable")
DIRECTIONS = {
  "rademacher": directions.rademacher,
  "low_rank": directions.low_rank,
}
EPSILON = 0.01


def mesh_of(probe, data, head):
  devices = np.array(jax.devices()[: probe * data * head])
  return Mesh(
    devices.reshape(probe, data, head),
    ("probe", "data", "head"),
    axis_types=(AxisType.Auto,) * 3,
  )


def places(model, mesh):
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return {
    name: NamedSharding(mesh, model.specs.get(name, PartitionSpec()))
    for name in shapes
  }


def params_of(module, mesh):
  """Parameters that are nowhere zero, whole and placed."""
  model = models.shard_heads(module, mesh)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  draw = lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32)
  whole = jax.tree.map(draw, shapes)
  return whole, jax.device_put(whole, places(model, mesh))


def loss_fn(model, chunk, part_map, parts):
  """The mean loss of rows that are read in parts, chunk after chunk."""

  def part_loss(index, params, tokens):
    batch, length = tokens.shape
    rows = batch // parts
    tokens = jax.lax.dynamic_slice_in_dim(tokens, index * rows, rows)

    def step(state, t):
      carry, total = state
      part = jax.lax.dynamic_slice_in_dim(tokens, t * chunk, chunk, 1)
      carry, logits = model.apply(params, carry, part)
      return (carry, total + metrics.cross_entropy(logits, part).sum()), None

    start = (model.initial_carry(params, rows), jnp.zeros(()))
    state, _ = jax.lax.scan(step, start, jnp.arange(length // chunk))
    return state[1] / (batch * length)

  def loss(params, tokens):
    if parts == 1:
      return part_loss(0, params, tokens)
    return part_map.map(part_loss, jnp.arange(parts), params, tokens).sum()

  return loss


def query_of(model, mesh, direction, num_probes, chunk):
  """(params, tokens, key) -> losses [n, 2]."""
  on_probes, on_rows = (
    probe_map.sharded(mesh, axis=axis) for axis in ("probe", "data")
  )
  parts = mesh.shape["data"]
  estimator = estimators.central_difference(
    EPSILON, num_probes, direction=direction, probe_map=on_probes
  )
  loss = loss_fn(model, chunk, on_rows, parts)

  def query(params, tokens, key):
    state = estimator.init(params)
    return estimator.query(loss, params, tokens, state, key)

  return query


BITS = {"f32": 32, "u32": 32, "s32": 32, "pred": 8, "bf16": 16}
COLLECTIVE = re.compile(
  r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute"
  r"|collective-broadcast|ragged-all-to-all|reduce-scatter)(?:-start)?\("
)


def size_of(shape):
  return sum(
    BITS[kind] // 8 * math.prod(int(n) for n in sizes.split(",") if n)
    for kind, sizes in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
  )


def collectives(program):
  """Kind and bytes of what moves in a program, by depth of its loop."""
  inside, lines, entry = {}, [], None
  for line in program.as_text().splitlines():
    start = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
    if start:
      lines = inside.setdefault(start[2], [])
      entry = start[2] if start[1] else entry
    lines.append(line)
  found = {}

  def visit(name, depth):
    for line in inside[name]:
      match = COLLECTIVE.search(line)
      if match:
        found.setdefault(depth, []).append((match[2], size_of(match[1])))
      for role, callee in re.findall(
        r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line
      ):
        visit(callee, depth + (role in ("body", "condition")))

  visit(entry, 0)
  return {depth: sorted(moved) for depth, moved in found.items()}


def words_of(program):
  """The shapes of all arrays of random words, as text."""
  return set(re.findall(r"u32\[([\d,]*)\]", program.as_text()))


def test_the_medium_lstm_on_eight_devices_moves_one_sum_of_logits():
  batch, chunk, vocab = 2, 3, MEDIUM.vocab_size
  mesh = mesh_of(1, 1, 8)
  whole, placed = params_of(MEDIUM, mesh)
  tokens = np.random.default_rng(1).integers(0, vocab, (batch, 2 * chunk))
  key = jax.random.key(7)
  compiled = []
  for model, params in (
    (models.from_linen(MEDIUM), jax.device_put(whole)),
    (models.shard_heads(MEDIUM, mesh), placed),
  ):
    query = query_of(model, mesh, directions.rademacher(), 1, chunk)
    program = jax.jit(query).lower(params, tokens, key).compile()
    compiled.append((program, np.asarray(program(params, tokens, key))))
  (one, expected), (eight, losses) = compiled
  # A mean of two rows and six tokens.
  np.testing.assert_allclose(losses, expected, rtol=5e-7 * math.sqrt(12))
  # Another direction would show: it changes the loss by more.
  assert abs(expected[0, 0] / expected[0, 1] - 1) > 1e-4
  assert collectives(one) == {}
  # Both signs are evaluated at once.
  logits = 2 * batch * chunk * vocab * 4
  assert collectives(eight) == {1: [("all-reduce", logits)]}
  # The signs of r [4, N, D, D] are 5 words a row: 64 heads, or 8 of them.
  rows = {"64": [], "8": []}
  for heads, found in rows.items():
    for program in (one, eight):
      shape = re.compile(rf"(.*,)?4,{heads},150,5(,.*)?")
      found.append(any(shape.fullmatch(x) for x in words_of(program)))
  assert rows == {"64": [True, False], "8": [False, True]}


def test_layers_on_a_mesh_of_probes_rows_and_heads():
  batch, chunk, n = 4, 3, 4
  mesh = mesh_of(2, 2, 2)
  whole, placed = params_of(LAYERS, mesh)
  vocab, embed, hidden = 12, 64, 64
  tokens = np.random.default_rng(1).integers(0, vocab, (batch, 2 * chunk))
  key = jax.random.key(7)
  direction = directions.low_rank(1)
  one = query_of(
    models.from_linen(LAYERS), mesh_of(1, 1, 1), direction, n, chunk
  )
  expected = np.asarray(jax.jit(one)(whole, tokens, key))
  model = models.shard_heads(LAYERS, mesh)
  query = jax.jit(query_of(model, mesh, direction, n, chunk))
  program = query.lower(placed, tokens, key).compile()
  losses = np.asarray(program(placed, tokens, key))
  np.testing.assert_allclose(losses, expected, rtol=5e-7 * math.sqrt(24))
  assert np.ptp(expected) > 1e-4 * expected.mean()
  # On a device two probes with both signs read two rows.
  queries = 2 * 2
  rows = queries * 2 * chunk
  assert collectives(program) == {
    0: sorted(
      [
        ("all-gather", vocab * embed * 4),
        ("all-gather", 2 * embed * 4),  # Its right factors.
        ("all-gather", 2 * queries * 4),  # Losses, from two parts of the rows
        ("all-gather", n * 2 * 4),  # and of all probes.
      ]
    ),
    1: [("all-gather", rows * hidden * 4), ("all-reduce", rows * vocab * 4)],
  }


def test_a_gather_within_the_loop_is_counted():
  mesh = mesh_of(1, 1, 2)
  model = models.shard_heads(LAYERS, mesh)

  def gathering(params, carry, tokens):
    # XLA would take what is the same in all chunks out of the loop.
    everywhere = NamedSharding(mesh, PartitionSpec())
    carry = jax.lax.with_sharding_constraint(carry, everywhere)
    return model.apply(params, carry, tokens)

  params = params_of(LAYERS, mesh)[1]
  tokens = np.zeros((2, 6), np.int32)
  found = []
  for variant in (model, model._replace(apply=gathering)):
    loss = jax.jit(loss_fn(variant, 3, None, 1))
    found.append(collectives(loss.lower(params, tokens).compile()))
  right, wrong = (sum(size for _, size in moved[1]) for moved in found)
  states = 2 * 2 * 64 * 4  # Of two layers, for two rows.
  assert wrong == right + states


@pytest.mark.parametrize("base", DIRECTIONS)
def test_devices_draw_the_signs_of_an_unsharded_run(base):
  mesh = mesh_of(1, 1, 2)
  whole, placed = params_of(WORDS, mesh)
  direction = DIRECTIONS[base]()
  keys = jax.random.split(jax.random.key(3), 3)
  coefficients = jnp.arange(1.0, 4.0)
  expected = jax.jit(direction.combine)(keys, coefficients, whole)
  specs = places(models.shard_heads(WORDS, mesh), mesh)
  combine = jax.jit(direction.combine, out_shardings=specs)
  program = combine.lower(keys, coefficients, placed).compile()
  got = program(keys, coefficients, placed)
  # Sums of whole numbers: nothing is rounded.
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  assert collectives(program) == {}


@pytest.mark.parametrize("embedding_size", [100, 128, 256])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_device_holds_an_eighth_of_the_parameters(embedding_size, num_layers):
  module = MEDIUM.clone(
    embedding_size=embedding_size,
    num_layers=num_layers,
    layer_norm=num_layers > 1,
  )
  mesh = mesh_of(1, 1, 8)
  model = models.shard_heads(module, mesh)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  total = sum(x.size for x in shapes.values())
  copied = {"b_proj", "norm_scale_1", "norm_bias_1"}
  if embedding_size == 100:  # It has no eighth.
    copied.add("embed")
  here = {
    name: math.prod(sharding.shard_shape(shapes[name].shape))
    for name, sharding in places(model, mesh).items()
  }
  assert {x for x in here if here[x] == shapes[x].size} == copied & set(here)
  whole = sum(shapes[name].size for name in copied & set(here))
  assert sum(here.values()) == (total - whole) / 8 + whole
  assert sum(here.values()) < 1.01 * total / 8


def test_initial_parameters_are_those_of_the_whole():
  mesh = mesh_of(1, 1, 2)
  model = models.shard_heads(WORDS, mesh)
  init = jax.jit(model.init, out_shardings=places(model, mesh))
  whole = jax.jit(models.from_linen(WORDS).init)(jax.random.key(5))
  for name, x in init(jax.random.key(5)).items():
    np.testing.assert_array_equal(x, whole[name])
    parts = {shard.data.shape for shard in x.addressable_shards}
    assert (parts == {x.shape}) == (name not in model.specs)


def test_gradients_are_those_of_the_whole():
  mesh = mesh_of(1, 1, 2)
  module = LAYERS.clone(cell="elman")
  whole, placed = params_of(module, mesh)
  tokens = np.random.default_rng(1).integers(0, 12, (2, 6))
  expected, got = (
    jax.jit(jax.grad(loss_fn(model, 3, None, 1)))(params, tokens)
    for model, params in (
      (models.from_linen(module), whole),
      (models.shard_heads(module, mesh), placed),
    )
  )
  for name, x in got.items():
    atol = 1e-5 * np.abs(expected[name]).max()
    np.testing.assert_allclose(x, expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize(
  ("module", "message"),
  [
    (LAYERS.clone(num_heads=2), "8 devices cannot.*num_heads=2.*among 1, 2"),
    (
      MEDIUM.clone(hidden_size=36, num_heads=12),
      "12 heads.*mesh.head=8.*among 1, 2, 3, 4, 6, 12",
    ),
    (models.DNC(12, 4, 8, 4, 4, 1), "block-diagonal.*got DNC.*mesh.head to 1"),
  ],
)
def test_models_without_enough_heads_are_refused(module, message):
  with pytest.raises(ValueError, match=message):
    models.shard_heads(module, mesh_of(1, 1, 8))
  assert not models.shard_heads(module, mesh_of(8, 1, 1)).specs


def test_a_model_can_be_a_static_argument():
  model = models.shard_heads(LAYERS, mesh_of(1, 1, 2))
  assert hash(model) == hash(model._replace())
