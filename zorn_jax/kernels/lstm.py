"""An LSTM layer over time, alone or as a population of perturbed members.

The input is projected before; what is left is the recurrence, which costs a
launch or two a token where XLA runs it, and one launch for all tokens where the
kernel does. Other cells have no kernel: models run them by XLA.
"""

import concurrent.futures
import time
import warnings

import jax
from absl import logging

from zorn_jax.kernels import lstm_configs, lstm_triton, lstm_xla
from zorn_jax.kernels.arguments import (
  Arguments,
  Dense,
  Lookup,
  LowRank,
  check,
)
from zorn_jax.kernels.lstm_configs import Config

OUTPUTS = ("all", "last", "none")
IMPLEMENTATIONS = (None, "xla", "triton")
_AMPERE = 8.0  # Compute capability.
# Programs that stream their weights, below which XLA's products, which use the
# whole GPU for each token, are faster.
_FEW = 32

# What `tune` found: the key of a call -> its config.
_TUNED: dict[tuple, Config] = {}
_LOGGED: set[str] = set()


def lstm(
  x_proj: jax.Array | Lookup,
  r: jax.Array,
  b: jax.Array,
  carry: tuple[jax.Array, jax.Array],
  *,
  perturbation: Dense | LowRank | None = None,
  output: str = "all",
  implementation: str | None = None,
  config: Config | None = None,
  interpret: bool = False,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
  """Runs block-diagonal heads over the tokens of a chunk.

      c = σ(f) c + σ(i) tanh(z),  h = σ(o) tanh(c),  (i, f, z, o) = x + b + R h

  With a perturbation there are P directions with S members each, whose
  recurrent matrices R + scales[s] Z are nowhere stored; their carries have the
  axes [P, S] in front, and so have x_proj and perhaps b.

  Args:
    x_proj: The projected input [B, T, N, G, D] without bias, of G = 4 gates
      i, f, z, o; float32 or bfloat16. Or a :class:`Lookup` of it by tokens,
      for which nothing of this size is made.
    r: Recurrent matrices [G, N, D, D], out by in; float32 or bfloat16. The h
      that they multiply is rounded to their type; sums are float32.
    b: Biases [G, N, D].
    carry: h and c before the chunk, float32 [B, N, D].
    perturbation: Of `r`: :class:`Dense`, :class:`LowRank` or None.
    output: "all" for each token's h, "last" for the last one's, "none" for
      nothing but the carry.
    implementation: "xla", "triton", or None for the kernel where it runs, on
      CUDA GPUs from Ampere, and XLA elsewhere; the log says which.
    config: How the kernel is cut up; None for what `tune` found, or else a
      table's.
    interpret: Whether Pallas interprets the kernel, to test it without a GPU.
  Returns:
    The carry after the chunk, its h rounded to r's type; and h of r's type,
    [B, T, N, D] or [B, N, D], or None.
  Raises:
    ValueError: If shapes or types disagree, a choice is unknown, or "triton" is
      asked for what the kernel cannot do.
  Guarantees: the signs are those of `directions.signs`, to the bit. Under
    `vmap` the kernel gets one more axis of programs, and one such map is all
    that fits a GPU's grid; `shard_map` takes check_vma=False.
  References: arXiv:2412.07752 (heads in one launch); arXiv:2505.17852.
  """
  for name, value, known in (
    ("output", output, OUTPUTS),
    ("implementation", implementation, IMPLEMENTATIONS),
  ):
    if value not in known:
      choices = ", ".join(map(str, known))
      raise ValueError(f"unknown {name} {value!r}. Choose one of {choices}.")
  if interpret and implementation == "xla":
    raise ValueError(
      "interpret=True interprets the kernel, got implementation='xla'. Leave "
      "out one of both."
    )
  args = check(x_proj, r, b, carry, perturbation)
  keep = output == "all"
  if interpret or chosen(implementation, args.h.shape[-1], _rank(args)):
    h, c, all_h = _run_triton(args, keep, config, interpret, implementation)
  else:
    h, c, all_h = lstm_xla.run(args, keep)
  lead = carry[0].shape[:-3]
  apart = lambda x: x.reshape(*lead, *x.shape[1:])
  made = apart(h).astype(r.dtype) if output == "last" else None
  if all_h is not None:
    made = apart(all_h)
  return (apart(h), apart(c)), made


def _run_triton(args, keep, config, interpret, implementation):
  if interpret:
    warnings.warn(
      "the LSTM kernel is interpreted, which is for tests and takes many times "
      "as long. Leave out interpret=True.",
      RuntimeWarning,
      stacklevel=3,
    )
  config = config or _TUNED.get(_key(args)) or lstm_configs.config_of(args)
  _check_config(config)
  programs = lstm_configs.programs(args, config)
  if implementation is None and not config.resident and programs < _FEW:
    say(f"LSTM by XLA, because {programs} programs would not fill a GPU")
    return lstm_xla.run(args, keep)
  return lstm_triton.run(args, keep, config, interpret)


def _rank(args: Arguments) -> int | None:
  given = args.perturbation
  return given.left.shape[3] if isinstance(given, LowRank) else None


def chosen(implementation: str | None, head: int, rank: int | None) -> bool:
  """Whether the kernel is to run; the log says so, once for each reason.

  Args:
    implementation: As of :func:`lstm`.
    head: Width D of a head.
    rank: Of the perturbation, if it is of low rank.
  Raises:
    ValueError: If "triton" is asked for what the kernel cannot do.
  """
  if implementation == "xla":
    return False
  reason = _unsupported(head, rank)
  on_gpu = jax.default_backend() == "gpu"
  if on_gpu:
    reason = reason or _old_device()
  if implementation == "triton":  # Perhaps compiled here for a GPU elsewhere.
    if reason:
      raise ValueError(f"{reason}. Choose implementation='xla'.")
    return True
  if not on_gpu:
    reason = f"the device is a {jax.default_backend().upper()}"
  say(f"LSTM by XLA, because {reason}" if reason else "LSTM by a Triton kernel")
  return reason is None


def say(text: str) -> None:
  """Logs what is not yet in the log."""
  if text not in _LOGGED:
    _LOGGED.add(text)
    logging.info(text)


def _old_device() -> str | None:
  """Why the default device, a GPU, cannot run the kernel."""
  device = jax.local_devices()[0]
  capability = getattr(device, "compute_capability", None)
  try:
    if float(capability) >= _AMPERE:
      return None
  except (TypeError, ValueError):
    pass
  return (
    "the kernel needs an NVIDIA GPU of compute capability 8.0 (Ampere) or "
    f"newer, got {capability} ({device.device_kind})"
  )


def _unsupported(head: int, rank: int | None) -> str | None:
  """Why the kernel cannot take heads of a width, or a rank."""
  widest, most = lstm_triton.MAX_WIDTH, lstm_triton.MAX_RANK
  if head > widest:
    return f"the kernel holds heads of width 1 to {widest}, got {head}"
  if rank is not None and not 1 <= rank <= most:
    return f"the kernel takes perturbations of rank 1 to {most}, got {rank}"
  return None


def _check_config(config: Config) -> None:
  units = lstm_configs.NARROW if config.warps_own_rows else 16
  for name, least in (
    ("rows", 16),
    ("units", units),
    ("depth", lstm_configs.WORD),
    ("warps", 1),
  ):
    value = getattr(config, name)
    if value < least or value & (value - 1):
      raise ValueError(
        f"{name} of a config must be a power of two from {least} on, got "
        f"{value}. Leave out `config` for the table's."
      )


def _key(args: Arguments) -> tuple:
  """What configs depend on."""
  _, batch, _, head = args.h.shape
  given = args.perturbation
  return (
    jax.devices()[0].device_kind,
    head,
    batch <= lstm_configs.FEW_ROWS,
    args.r.dtype.name,
    type(given).__name__,
    args.padded_factors,
    args.tokens is None,
    str(jax.config.jax_default_matmul_precision),
  )


def tune(
  x_proj,
  r,
  b,
  carry,
  *,
  perturbation=None,
  output: str = "all",
  candidates: tuple[Config, ...] | None = None,
  repeats: int = 5,
) -> dict[Config, float]:
  """Times a handful of configs on the GPU, and keeps the fastest.

  Later calls of :func:`lstm` in this process, of the same width, type, kind of
  inputs and of perturbation, take it.

  Args:
    x_proj: As of :func:`lstm`, and so are r, b, carry, perturbation, output.
    r: See there.
    b: See there.
    carry: See there.
    perturbation: See there.
    output: See there.
    candidates: What is tried; None for some around the table's.
    repeats: Runs of each, of which the least counts.
  Returns:
    The seconds of each config that compiled, the fastest first.
  Raises:
    ValueError: If no config compiled.
  """
  args = check(x_proj, r, b, carry, perturbation)
  if candidates is None:
    candidates = tuple(lstm_configs.candidates(args))
  given = (x_proj, r, b, carry, perturbation)

  def compiled(candidate):
    def run(x_proj, r, b, carry, perturbation):
      return lstm(
        x_proj,
        r,
        b,
        carry,
        perturbation=perturbation,
        output=output,
        implementation="triton",
        config=candidate,
      )

    try:
      return jax.jit(run).lower(*given).compile()
    except jax.errors.JaxRuntimeError as error:  # It needs too much memory.
      say(f"LSTM config {candidate} failed: {str(error)[:200]}")
      return None

  with concurrent.futures.ThreadPoolExecutor() as pool:
    programs = dict(
      zip(candidates, pool.map(compiled, candidates), strict=True)
    )
  seconds = {}
  for candidate, program in programs.items():
    if program is None:
      continue
    times = []
    for _ in range(repeats + 1):
      start = time.perf_counter()
      jax.block_until_ready(program(*given))
      times.append(time.perf_counter() - start)
    seconds[candidate] = min(times[1:])
  if not seconds:
    raise ValueError(
      f"none of {len(candidates)} configs compiled. Choose smaller tiles."
    )
  ranked = dict(sorted(seconds.items(), key=lambda item: item[1]))
  _TUNED[_key(args)] = next(iter(ranked))
  return ranked
