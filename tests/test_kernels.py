"""The LSTM kernel, interpreted, and its twin against NumPy in float64."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import kernels
from zorn_jax.kernels import lstm_configs, threefry
from zorn_jax.kernels.arguments import check as check_arguments
from zorn_jax.kernels.lstm_layout import Layout

# The module, whose name its function has.
lstm = sys.modules["zorn_jax.kernels.lstm"]

# One warp has all 16 rows, and one product makes all gates; of four each gate
# has its own.
RESIDENT = kernels.Config(True, 16, 64, 64, 1, 1, False)
STREAMED = kernels.Config(False, 16, 32, 64, 4, 1, False)
CONFIGS = {
  "resident": RESIDENT,
  "prefetched": RESIDENT._replace(warps=4, prefetch=True, by_head=True),
  "streamed": STREAMED,
  "early": STREAMED._replace(warps=1, prefetch=True, by_head=True),
}
TOLERANCE = {"float32": 5e-7, "bfloat16": 2e-3}  # Times sqrt(D).


FAST = {"xla_backend_optimization_level": 0}


def example(
  perturbation="",
  dtype="float32",
  head=20,
  batch=3,
  length=4,
  heads=2,
  looked_up=False,
  rank=1,
  seed=0,
):
  """What `lstm` takes: of three directions with two members each, if any."""
  key = jax.random.key(seed)
  normal = lambda index, *shape: jax.random.normal(
    jax.random.fold_in(key, index), shape
  )
  lead = (3, 2) if perturbation else ()
  r = (normal(0, 4, heads, head, head) / head**0.5).astype(dtype)
  b = normal(1, 4, heads, head).astype(dtype)
  carry = tuple(normal(i, *lead, batch, heads, head) for i in (2, 3))
  if looked_up:
    tokens = jax.random.randint(key, (*lead, batch, length), 0, 7)
    table = normal(4, *lead, 7, heads, 4, head)
    x = kernels.Lookup(table, tokens)
    if looked_up == "with factors":
      left, right = normal(7, *lead, 2, 7), normal(8, *lead, 2, heads, 4, head)
      x = kernels.Lookup(
        table.reshape(-1, *table.shape[-4:])[0], tokens, left, right
      )
  else:
    x = normal(4, *lead, batch, length, heads, 4, head).astype(dtype)
  scales = jnp.asarray([0.3, -0.2])
  given = None
  if perturbation == "dense":
    keys = jax.random.split(jax.random.key(seed + 1), 3)
    given = kernels.Dense(jax.random.key_data(keys), scales)
  elif perturbation == "low rank":
    shape = (3, 4, heads, rank, head)
    given = kernels.LowRank(normal(5, *shape), normal(6, *shape), scales)
  return {"x_proj": x, "r": r, "b": b, "carry": carry, "perturbation": given}


def rounded(x, dtype):
  return np.asarray(jnp.asarray(x).astype(dtype), np.float64)


def signs(key_data, shape):
  """One bit of the key's stream for each, rows padded to whole words."""
  words = -(-shape[-1] // 32)
  key = jax.random.wrap_key_data(key_data, impl="threefry2x32")
  bits = np.asarray(jax.random.bits(key, (*shape[:-1], words), jnp.uint32))
  spread = (bits[..., None] >> np.arange(32, dtype=np.uint32)) & 1
  return 1.0 - 2.0 * spread.reshape(*shape[:-1], -1)[..., : shape[-1]]


def oracle(x_proj, r, b, carry, perturbation):
  """Loops in float64 over members, rows, tokens and heads."""
  dtype = r.dtype
  lead = carry[0].shape[:-3]
  flat = lambda x, n: np.asarray(x, np.float64).reshape(-1, *x.shape[n:])
  if isinstance(x_proj, kernels.Lookup):
    table, tokens = np.asarray(x_proj.table, float), np.asarray(x_proj.tokens)
    if x_proj.left is not None:
      moved = np.einsum("...kv,...kngd->...vngd", x_proj.left, x_proj.right)
      table = table + moved
    table = table.reshape(-1, *table.shape[len(lead) :])
    tokens = tokens.reshape(-1, *tokens.shape[len(lead) :])
    x = np.stack([t[row] for t, row in zip(table, tokens, strict=True)])
  else:
    x = flat(x_proj, len(lead)) if lead else flat(x_proj, 0)[None]
  x = x.reshape(-1, *x.shape[-5:])
  h, c = (np.asarray(s, np.float64).reshape(-1, *s.shape[-3:]) for s in carry)
  everything, b = np.zeros((*x.shape[:4], x.shape[-1])), np.asarray(b, float)
  for member in range(len(x)):
    matrix = np.asarray(r, np.float64)
    if perturbation is not None:
      index, scale = member // 2, np.float64(perturbation.scales[member % 2])
      if isinstance(perturbation, kernels.Dense):
        z = signs(perturbation.key_data[index], r.shape)
        matrix = rounded(matrix + scale * z, dtype)
      else:
        left, right = (
          np.asarray(x[index], np.float64)
          for x in (perturbation.left, perturbation.right)
        )
        matrix = matrix + scale * np.einsum("gnkd,gnke->gnde", left, right)
    for t in range(x.shape[2]):
      sent = rounded(h[member], dtype)
      y = np.einsum("gnde,bne->bngd", matrix, sent)
      y += x[member, :, t] + b.swapaxes(0, 1)
      i, f, z, o = np.moveaxis(y, 2, 0)
      sigmoid = lambda v: 1 / (1 + np.exp(-v))
      c[member] = sigmoid(f) * c[member] + sigmoid(i) * np.tanh(z)
      h[member] = sigmoid(o) * np.tanh(c[member])
      everything[member, :, t] = h[member]
  apart = lambda x: x.reshape(*lead, *x.shape[1:]) if lead else x[0]
  return (apart(h), apart(c)), apart(everything)


def run(args, implementation, config=None, **options):
  given = {"implementation": implementation, **options}
  if implementation == "triton":
    given |= {"config": config, "interpret": True}
  function = jax.jit(lambda args: kernels.lstm(**args, **given))
  if implementation == "xla":
    return function.lower(args).compile(FAST)(args)
  with pytest.warns(RuntimeWarning, match="interpreted"):
    lowered = function.lower(args)
  # Most of the time would go into making it fast.
  return lowered.compile(FAST)(args)


def check(args, config):
  dtype = args["r"].dtype.name
  (h, c), every = oracle(**args)
  for name, at in {"xla": None, "triton": config}.items():
    (found_h, found_c), found = run(args, name, at)
    assert found.dtype == args["r"].dtype
    for got, want in ((found_h, h), (found_c, c), (found, every)):
      near = TOLERANCE[dtype] * args["r"].shape[-1] ** 0.5
      np.testing.assert_allclose(np.asarray(got, float), want, 0, near, name)


@pytest.mark.parametrize("config", ["resident", "early"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("perturbation", ["", "dense", "low rank"])
def test_values(perturbation, dtype, config):
  check(example(perturbation, dtype, batch=17), CONFIGS[config])


@pytest.mark.parametrize("head, config", [(1, "early"), (33, "resident")])
def test_odd_widths(head, config):
  check(example("dense", head=head), CONFIGS[config])


def test_a_head_of_several_tiles():
  args = example("low rank", head=40, heads=1, looked_up=True)
  check(args, RESIDENT._replace(units=16))
  args = example("low rank", head=80, heads=1, looked_up=True)
  for prefetch in (False, True):  # h of three tiles is multiplied as of two.
    check(args, RESIDENT._replace(units=32, prefetch=prefetch))


@pytest.mark.parametrize(
  "perturbation, head, config",
  [
    ("dense", 80, RESIDENT._replace(units=32)),
    ("dense", 40, STREAMED._replace(depth=32, warps=1)),
    ("dense", 40, STREAMED._replace(depth=32, units=64)),
    ("low rank", 40, STREAMED._replace(depth=32)),
    ("low rank", 40, STREAMED._replace(depth=64, warps=1)),
  ],
)
def test_several_tiles_of_inputs(perturbation, head, config):
  check(example(perturbation, head=head, heads=1, length=2), config)


def layout_of(head, config):
  sizes = dict.fromkeys(Layout._fields, 0) | {"head": head, "config": config}
  return Layout(**sizes)


def test_tiles_meet_and_lie_in_what_is_padded():
  """Nothing else keeps a GPU from reading what is not there."""
  for head in range(1, 1025):
    for units, warps in itertools.product((8, 16, 32, 64, 128), (1, 4)):
      config = RESIDENT._replace(units=units, warps=warps)
      if units == 8 and not config.warps_own_rows:
        continue
      layout = layout_of(head, config)
      tiles, sources = layout.tiles, layout.sources
      ends = [[x.start + x.size for x in some] for some in (tiles, sources)]
      for some, end in zip((tiles, sources), ends, strict=True):
        assert [x.start for x in some] == [0, *end[:-1]]
      assert head <= ends[0][-1] <= layout.padded == ends[1][-1]
      assert ends[0][-1] + sum(layout.filling) == layout.padded
      assert all(source.size % 32 == 0 for source in sources)
      # Neighbours of one size, joined until there are none.
      stack = []
      for size in [*(x.size for x in tiles), *layout.filling]:
        stack.append(size)
        while len(stack) > 1 and stack[-2] == stack[-1]:
          stack[-2:] = [2 * stack[-1]]
      assert stack == [source.size for source in sources]


@pytest.mark.parametrize("prefetch", [False, True])
def test_several_blocks_of_rows_to_a_program(prefetch, monkeypatch):
  config = RESIDENT._replace(prefetch=prefetch, by_head=prefetch, blocks=3)
  args = example("dense", batch=49, heads=3, looked_up=prefetch, length=2)
  assert fitted(args, config).blocks == 1  # Too few programs would be left.
  monkeypatch.setattr(lstm_configs, "MANY_PROGRAMS", 6)
  assert fitted(args, config).blocks == 2  # Of four, the last of one row.
  check(args, config)
  monkeypatch.setattr(lstm_configs, "MANY_PROGRAMS", 72)
  assert fitted(args, config).blocks == 1


def arguments_of(args):
  order = "x_proj", "r", "b", "carry", "perturbation"
  return check_arguments(*map(args.get, order))


def fitted(args, config):
  return lstm_configs.fitted(arguments_of(args), config)


def test_tuned_configs_go_to_calls_of_the_same_table():
  small = {"head": 130, "batch": 17, "heads": 1, "length": 1}
  tables = {}
  for dtype in ("float32", "bfloat16"):
    for perturbation in ("", "dense", "low rank"):
      for looked_up in (False, True, "with factors"):
        for rank in (1, 4):
          args = arguments_of(
            example(
              perturbation, dtype, **small, looked_up=looked_up, rank=rank
            )
          )
          table = lstm_configs.candidates(args)
          assert tables.setdefault(lstm._key(args), table) == table
  assert len({str(table) for table in tables.values()}) > 3


@pytest.mark.parametrize("perturbation", ["", "dense", "low rank"])
def test_lookup(perturbation):
  example_ = example(perturbation, looked_up=True)
  check(example_, CONFIGS["prefetched"])
  factored = example(perturbation, looked_up="with factors")
  check(factored, CONFIGS["early"])


@pytest.mark.parametrize("config", ["resident", "streamed"])
def test_one_token_and_several_ranks(config):
  check(example("low rank", length=1, rank=3), CONFIGS[config])


def test_the_carry_goes_on():
  args = example("low rank", heads=1, length=4)
  x = args.pop("x_proj")
  carry, whole = run({"x_proj": x} | args, "triton", RESIDENT)
  after, first = run({"x_proj": x[:, :, :, :2]} | args, "triton", RESIDENT)
  rest = {"x_proj": x[:, :, :, 2:]} | args | {"carry": after}
  after, second = run(rest, "triton", RESIDENT)
  joined = np.concatenate([first, second], 3)
  np.testing.assert_allclose(joined, whole, 0, 5e-7 * 20**0.5)
  for got, want in zip(after, carry, strict=True):
    np.testing.assert_allclose(got, want, 0, 5e-7 * 20**0.5)


def test_outputs():
  args = example(dtype="bfloat16", heads=1, length=2)
  for name in ("xla", "triton"):
    (h, c), every = run(args, name, RESIDENT)
    np.testing.assert_array_equal(h, h.astype(jnp.bfloat16).astype(h.dtype))
    carry, last = run(args, name, RESIDENT, output="last")
    np.testing.assert_array_equal(last, every[:, -1])
    np.testing.assert_array_equal(carry[0], h)
    (_, again), nothing = run(args, name, RESIDENT, output="none")
    assert nothing is None
    np.testing.assert_array_equal(again, c)


def test_maps_over_members():
  """A `vmap`, and shards of it, equal a loop."""
  args = example("low rank", heads=1, length=2)
  xs = jnp.stack([args["x_proj"], -args["x_proj"]])

  def one(x):
    return kernels.lstm(
      **args | {"x_proj": x},
      implementation="triton",
      config=RESIDENT,
      interpret=True,
    )[1]

  mesh = jax.make_mesh((2,), ("probe",), (jax.sharding.AxisType.Auto,))
  spread = jax.shard_map(
    lambda x: one(x[0])[None],
    mesh=mesh,
    in_specs=jax.P("probe"),
    out_specs=jax.P("probe"),
    check_vma=False,
  )
  with pytest.warns(RuntimeWarning, match="interpreted"):
    looped = jnp.stack([one(xs[0]), one(xs[1])])
    for mapped in (jax.vmap(one), spread):
      found = jax.jit(mapped)(xs)
      np.testing.assert_allclose(found, looped, 0, 1e-6)


def test_the_hash_is_threefry():
  """A known answer of Random123, and the words that JAX draws."""
  key, counter = (
    [np.uint32(0x13198A2E), np.uint32(0x03707344)],
    [np.uint32(0x243F6A88), np.uint32(0x85A308D3)],
  )
  found = threefry.threefry2x32(key, counter)
  assert [int(x) for x in found] == [0xC4923A9C, 0x483DF7A0]
  data = jax.random.key_data(jax.random.key(5))
  words = threefry.word(data, jnp.arange(70, dtype=jnp.uint32))
  drawn = jax.random.bits(jax.random.key(5), (70,), jnp.uint32)
  np.testing.assert_array_equal(words, drawn)


WRONG = [
  ({"implementation": "cuda"}, "unknown implementation 'cuda'"),
  ({"output": "some"}, "unknown output 'some'"),
  ({"r": jnp.zeros((4, 2, 20, 21))}, r"r must have the shape \[4, N, D, D\]"),
  ({"b": jnp.zeros((4, 2, 21))}, r"b must .*20.* r \(4, 2, 20, 20\).*21"),
  ({"x_proj": jnp.zeros((3, 4, 2, 4, 21))}, "x_proj must .*20.*21"),
  ({"x_proj": jnp.zeros((3, 0, 2, 4, 20))}, "3 rows of 0"),
  ({"x_proj": jnp.zeros((3, 4, 2, 4, 20), int)}, "x_proj must be .*int32"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=lambda x: str(x)[:30])
def test_wrong_arguments(change, message):
  with pytest.raises(ValueError, match=message):
    kernels.lstm(**example() | change)


def test_what_the_kernel_cannot_hold():
  wide = lambda: example(head=1025, batch=1, length=1, heads=1)
  run = lambda: kernels.lstm(**wide(), implementation="triton")
  with pytest.raises(ValueError, match="width 1 to 1024, got 1025.*'xla'"):
    jax.eval_shape(run)
  many = example("low rank", rank=17)
  with pytest.raises(ValueError, match="rank 1 to 16, got 17"):
    kernels.lstm(**many, implementation="triton")
  for change, message in (
    ({"rows": 24}, "rows .*power of two.*got 24"),
    ({"units": 4}, "units .*from 8 on, got 4"),
    ({"units": 8, "warps": 4}, "units .*from 16 on, got 8"),
  ):
    config = RESIDENT._replace(**change)
    with pytest.raises(ValueError, match=message):
      kernels.lstm(**example(), implementation="triton", config=config)


def test_the_twin_runs_elsewhere_and_says_so(monkeypatch, caplog):
  monkeypatch.setattr(lstm, "_LOGGED", set())
  with caplog.at_level("INFO", logger="absl"):
    _, found = kernels.lstm(**example())
  assert "LSTM by XLA, because the device is a CPU" in caplog.text
  _, wanted = kernels.lstm(**example(), implementation="xla")
  np.testing.assert_array_equal(found, wanted)


class Turing:
  device_kind, compute_capability = "Tesla T4", "7.5"


def test_an_old_gpu_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "local_devices", lambda: [Turing])
  with pytest.raises(ValueError, match=r"8.0 .*got 7.5 \(Tesla T4\).*'xla'"):
    kernels.lstm(**example(), implementation="triton")
  assert not kernels.chosen(None, 20, None)
