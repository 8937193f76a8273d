"""The LSTM over time by XLA: what the kernel has to equal."""

import jax
import jax.numpy as jnp

from zorn_jax import directions
from zorn_jax.kernels.arguments import Arguments, Dense


def run(args: Arguments, keep: bool):
  """A scan over time.

      y = R h_{t-1},  (i, f, z, o) = x_t + b + y
      c_t = σ(f) c_{t-1} + σ(i) tanh(z),  h_t = σ(o) tanh(c_t)

  Args:
    args: Of all members.
    keep: Whether all h are wanted.
  Returns:
    h and c after the last token, float32 [M, B, N, D], h rounded to r's type;
    and all h, of r's type [M, B, T, N, D], or None.
  """
  dtype, given = args.r.dtype, args.perturbation
  members = len(args.h)
  left = right = None
  r = args.r
  if isinstance(given, Dense):
    r = _perturbed(r, given)
  elif given is not None:
    size = len(given.scales)
    of_each = lambda x: jnp.repeat(x.astype(jnp.float32), size, axis=0)
    left, right = of_each(given.left), of_each(given.right)
    scales = jnp.tile(given.scales, len(given.left))
    left = left * scales.reshape(members, 1, 1, 1, 1)
  product = "mbnk,mgndk->mbngd" if r.ndim == 5 else "mbnk,gndk->mbngd"
  b = args.b.astype(jnp.float32).swapaxes(1, 2)[:, None]  # [M, 1, N, G, D]

  inputs, of_step = _inputs(args)

  def step(carry, x):
    h, c = carry
    h = h.astype(dtype)
    y = jnp.einsum(product, h, r, preferred_element_type=jnp.float32)
    if left is not None:
      h = h.astype(jnp.float32)
      inner = jnp.einsum("mgnrk,mbnk->mbngr", right, h)
      y = y + jnp.einsum("mgnrd,mbngr->mbngd", left, inner)
    x = of_step(x).astype(jnp.float32)  # [M, B, N, G, D]
    i, f, z, o = jnp.moveaxis(x + b + y, -2, 0)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(z)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h.astype(dtype) if keep else None

  (h, c), all_h = jax.lax.scan(step, (args.h, args.c), inputs)
  if keep:
    all_h = jnp.moveaxis(all_h, 0, 2)
  return h.astype(dtype).astype(jnp.float32), c, all_h


def _inputs(args):
  """What the steps read, time first, and what makes inputs of it."""
  if args.tokens is None:
    return jnp.moveaxis(args.x, 2, 0), lambda x: x
  take = lambda table, tokens: jnp.take(table, tokens, axis=0, mode="clip")
  members = len(args.h)
  every = lambda x: jnp.broadcast_to(x, (members, *x.shape[1:]))
  table = args.x if len(args.x) == 1 else every(args.x)
  if args.factors is not None:
    moved = jnp.einsum("mkv,mkngd->mvngd", *args.factors)
    table = table.astype(jnp.float32) + moved
  tokens = jnp.moveaxis(every(args.tokens), 2, 0)  # [T, M, B]
  if len(table) == 1:
    return tokens, lambda token: take(table[0], token)
  return tokens, lambda token: jax.vmap(take)(table, token)


def _perturbed(r, given):
  """R + scale S of all members, rounded once, [M, G, N, D, D]."""
  keys = jax.random.wrap_key_data(given.key_data, impl="threefry2x32")
  signs = jax.vmap(lambda key: directions.signs(key, r.shape))(keys)
  moved = given.scales.reshape(1, -1, 1, 1, 1, 1) * signs[:, None]
  moved = r.astype(jnp.float32)[None, None] + moved
  return moved.astype(r.dtype).reshape(-1, *r.shape)
