"""The LSTM kernel, interpreted, and its twin against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import kernels

RESIDENT = kernels.Config(True, 16, 64, 64, 4, 1, False)
STREAMED = kernels.Config(False, 16, 32, 64, 4, 1, False)
CONFIGS = {
  "resident": RESIDENT,
  "prefetched": RESIDENT._replace(prefetch=True, by_head=True),
  "streamed": STREAMED,
  "early": STREAMED._replace(prefetch=True, by_head=True),
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
  if implementation == "xla":
    return jax.jit(lambda args: kernels.lstm(**args, **given))(args)
  with pytest.warns(RuntimeWarning, match="interpreted"):
    lowered = jax.jit(lambda args: kernels.lstm(**args, **given)).lower(args)
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


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("perturbation", ["", "dense", "low rank"])
def test_values(perturbation, dtype, config):
  check(example(perturbation, dtype, batch=17), CONFIGS[config])


@pytest.mark.parametrize("config", ["resident", "streamed"])
@pytest.mark.parametrize("head", [1, 33, 50, 100])
def test_odd_widths(head, config):
  check(example("dense", head=head), CONFIGS[config])
  check(example("low rank", head=head, looked_up=True), CONFIGS[config])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("perturbation", ["", "dense", "low rank"])
def test_lookup(perturbation, config):
  check(example(perturbation, looked_up=True), CONFIGS[config])
  check(example(perturbation, looked_up="with factors"), CONFIGS[config])


@pytest.mark.parametrize("config", ["resident", "streamed"])
def test_one_token_and_several_ranks(config):
  check(example("low rank", length=1, rank=3), CONFIGS[config])
  check(example("low rank", length=1, rank=16), CONFIGS[config])
