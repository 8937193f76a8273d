"""The LSTM over time in one launch, by Pallas for Triton.

Here the inputs of its programs are padded and their grid is laid out.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from zorn_jax.kernels import lstm_configs, lstm_resident, lstm_streamed
from zorn_jax.kernels.arguments import GATES, Arguments, Dense, LowRank
from zorn_jax.kernels.lstm_configs import WORD, Config
from zorn_jax.kernels.lstm_layout import HALVES, Layout
from zorn_jax.kernels.lstm_program import Program

MAX_WIDTH = 1024  # Of a head; what is compiled and tested.
MAX_RANK = 16
# Values of `jax_default_matmul_precision` that rule TF32 out.
_EXACT = ("highest", "float32", "F32_F32_F32", "TF32_TF32_F32_X3")


def run(args: Arguments, keep: bool, config: Config, interpret: bool):
  """As `lstm_xla.run`, by the kernel.

  Args:
    args: Of all members.
    keep: Whether all h are wanted.
    config: Of the kernel.
    interpret: Whether Pallas interprets it, for tests.
  Returns:
    h and c after the last token, float32 [M, B, N, D], h rounded to r's type;
    and all h, of r's type [M, B, T, N, D], or None.
  """
  members, batch, heads, head = args.h.shape
  length, given = args.length, args.perturbation
  config = lstm_configs.fitted(args, config)
  looked_up = args.tokens is not None
  layout = Layout(
    batch=batch,
    length=length,
    heads=heads,
    head=head,
    dtype=args.r.dtype,
    config=config,
    looked_up=looked_up,
    own_x=max(len(args.x), len(args.b) if looked_up else 1) > 1,
    own_tokens=args.tokens is not None and len(args.tokens) > 1,
    own_bias=len(args.b) > 1,
    dense=isinstance(given, Dense),
    scales=1 if given is None else len(given.scales),
    mixes=isinstance(given, LowRank),
    mixes_tokens=args.factors is not None,
    factors=args.padded_factors,
    keep=keep,
    precision=_precision(args.r.dtype, interpret),
    interpret=interpret,
  )
  # What is small ends where the last tile does: its loads need no mask.
  width = layout.padded
  halved = lambda x, axis: x * _along(axis, x.ndim).astype(x.dtype)
  r = _pad(halved(args.r, 0), width, width)
  b = args.b.astype(jnp.float32)
  inputs = {"r": r, "h0": args.h, "c0": args.c}
  if looked_up:
    table = halved(args.x + b.swapaxes(1, 2)[:, None], -2)
    table = table.astype(layout.dtype)
    inputs |= {"x": _pad(table, width), "tokens": args.tokens}
  else:
    inputs |= {"x": args.x, "b": _pad(halved(b, 1), width)}
  if isinstance(given, Dense):
    drawn = given.key_data
    if not config.resident:
      drawn = _words(args.r.shape, given)
      drawn = _pad(drawn, width, width // WORD)
    inputs |= {"scales": given.scales, "drawn": drawn}
  if layout.factors:
    inputs |= _factors(args, layout.factors, width)
  struct = jax.ShapeDtypeStruct
  state = struct((members, batch, heads, head), jnp.float32)
  outputs = {"h": state, "c": state}
  if keep:
    outputs["all_h"] = struct(
      (members, batch, length, heads, head), layout.dtype
    )
  if not config.resident:
    buffer = (members, heads, layout.blocks, 2, config.rows, width)
    outputs["buffer"] = struct(buffer, layout.dtype)
    outputs["cells"] = struct((*buffer[:3], *buffer[4:]), jnp.float32)
  groups = members // layout.scales if layout.together else members
  names = (*inputs, *outputs)
  call = pl.pallas_call(
    functools.partial(_body, layout=layout, names=names),
    grid=(
      (groups * layout.programs_of_head, heads)
      if config.by_head
      else (heads * layout.programs_of_head, groups)
    ),
    out_shape=list(outputs.values()),
    compiler_params=pltriton.CompilerParams(
      num_warps=config.warps, num_stages=config.stages
    ),
    interpret=interpret,
    name="lstm_resident" if config.resident else "lstm_streamed",
  )
  with warnings.catch_warnings():
    # jax 0.11 and later say that the Triton backend will go.
    warnings.filterwarnings("ignore", ".*Triton.*", DeprecationWarning)
    made = dict(zip(outputs, call(*inputs.values()), strict=True))
  return made["h"], made["c"], made.get("all_h")


def _body(*refs, layout, names):
  program = Program(layout, dict(zip(names, refs, strict=True)))
  (lstm_resident if layout.config.resident else lstm_streamed).run(program)


def _factors(args, count, width):
  """Of R and of the table, so that both are corrected by one product.

  Each gate gets Σ_f left_f m_f, where m_f is right_f · h for factors of R, and
  for factors of the table a token's coefficient. Those of the other gates are
  zero.
  """
  members, given, dtype = len(args.h), args.perturbation, args.r.dtype
  lefts, inputs = [], {}
  if isinstance(given, LowRank):
    directions, gates, heads, rank, head = given.left.shape
    shape = (directions, heads, gates * rank, head)
    right = given.right.swapaxes(1, 2).reshape(shape)
    inputs["right"] = _pad(right, count, width).astype(dtype)
    apart = jnp.eye(gates).reshape(1, gates, 1, gates, 1, 1)
    left = apart * given.left.astype(jnp.float32)[:, :, :, None]
    left = left.reshape(directions, 1, gates, heads, gates * rank, head)
    left = given.scales.reshape(1, -1, 1, 1, 1, 1) * left
    lefts.append(left.reshape(members, *left.shape[2:]))
  if args.factors is not None:
    of_tokens, right = (x.astype(jnp.float32) for x in args.factors)
    before = lefts[0].shape[3] if lefts else 0
    lefts.append(right.transpose(0, 3, 2, 1, 4))  # [M, G, N, k, D]
    of_tokens = jnp.pad(of_tokens.mT, [(0, 0), (0, 0), (before, 0)])
    inputs["coefficients"] = _pad(of_tokens, count)  # [M, V, F]
  left = jnp.concatenate(lefts, axis=3) * _along(1, 5)
  inputs["left"] = _pad(left, count, width).astype(dtype)
  return inputs


def _along(axis, rank):
  """The halves of gates along an axis."""
  shape = [1] * rank
  shape[axis] = GATES
  return jnp.asarray(HALVES).reshape(shape)


def _pad(x, *sizes):
  """Zeros behind the last axes, up to these sizes."""
  padding = [(0, 0)] * (x.ndim - len(sizes))
  padding += [
    (0, size - had)
    for size, had in zip(sizes, x.shape[-len(sizes) :], strict=True)
  ]
  return jnp.pad(x, padding)


def _words(shape, given):
  """The words of all signs, uint32 [P, G, N, D, W]: one bit a weight."""
  keys = jax.random.wrap_key_data(given.key_data, impl="threefry2x32")
  stored = (*shape[:-1], -(-shape[-1] // WORD))
  return jax.vmap(lambda key: jax.random.bits(key, stored, jnp.uint32))(keys)


def _precision(dtype, interpret):
  """Of float32 products: TF32, or three of them, which is float32's."""
  if dtype != jnp.float32:
    return None
  if interpret:
    return jax.lax.Precision.HIGHEST
  if str(jax.config.jax_default_matmul_precision) in _EXACT:
    return jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
  return jax.lax.DotAlgorithmPreset.TF32_TF32_F32
