"""The LSTM kernel beside XLA's scan and cuDNN: one model, and populations."""

import concurrent.futures
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax import kernels
from zorn_jax.bench import cases, timing


class Shape(NamedTuple):
  """A layer, and its population.

  Attributes:
    heads: Number N.
    head: Width D.
    batch: Rows B of a member.
    length: Tokens T.
    members: Number M; their inputs are looked up, those of one model given.
  """

  heads: int
  head: int
  batch: int
  length: int
  members: int = 1


# Those that arXiv:2412.07752 measured, of hidden width 768.
_ALONE = [Shape(768 // d, d, 16, 1024) for d in (16, 32, 64, 128, 768)]
# Tiny, small, medium and a tenth of large; of the last two fewer rows, for
# memory's sake.
_MANY = [Shape(12, 20, 1024, 11, 192), Shape(32, 50, 1024, 11, 192)]
_MANY += [Shape(64, 150, 128, 11, 192), Shape(22, 300, 128, 11, 192)]
_QUICK = [Shape(2, 4, 2, 3)], [Shape(2, 4, 2, 3, 4)]
_VOCABULARY = 100
_PERTURBATIONS = ("none", "dense", "low rank")


def run(quick: bool = False) -> dict[str, list[dict[str, Any]]]:
  """Tables of one model and of populations.

  Args:
    quick: Small shapes, one repeat.
  """
  alone, many = _QUICK if quick else (_ALONE, _MANY)
  repeats = 1 if quick else 7
  return {
    "LSTM kernel": [row for x in alone for row in _alone(x, repeats)],
    "LSTM kernel, population": [row for x in many for row in _many(x, repeats)],
  }


def _implementations() -> tuple[str, ...]:
  return ("triton", "xla") if jax.default_backend() == "gpu" else ("xla",)


def _alone(shape, repeats):
  programs = {}
  for name in _implementations():
    args = _arguments(shape, "none", looked_up=False)
    programs[name] = (partial(_forward, implementation=name), args)
  if jax.default_backend() == "gpu":
    function, args = _cudnn(shape)
    try:
      jax.jit(function).lower(*args)
      programs["cuDNN"] = function, args
    except (AttributeError, RuntimeError) as error:
      kernels.say(f"no cuDNN: {error}")
  return _rows(shape, programs, repeats, "none")


def _many(shape, repeats):
  programs, tuned = {}, {}
  for perturbation in _PERTURBATIONS:
    args = _arguments(shape, perturbation, looked_up=True)
    if jax.default_backend() == "gpu":
      *given, perturbed = args
      found = kernels.tune(*given, perturbation=perturbed, repeats=2)
      tuned[perturbation] = {
        str(tuple(config)): 1e3 * seconds for config, seconds in found.items()
      }
    for name in _implementations():
      run = partial(_forward, implementation=name)
      programs[name, perturbation] = (run, args)
  return _rows(shape, programs, repeats, tuned=tuned)


def _rows(shape, programs, repeats, perturbation=None, tuned=None):
  seconds = timing.measure(_compiled(programs), repeats)
  for key in programs:
    name, given = (key, perturbation) if perturbation else key
    ratio = (
      seconds[key] / seconds[("xla", given) if not perturbation else "xla"]
    )
    row = {
      **shape._asdict(),
      "perturbation": given,
      "program": name,
      **timing.spread("ms", 1e3 * seconds[key]),
      **timing.spread("ratio_to_xla", ratio),
    }
    if not perturbation:
      base = seconds[name, "none"]
      row |= timing.spread("ratio_to_none", seconds[key] / base)
    if tuned and name == "triton":
      row["tried_ms"] = tuned[given]
    yield row


def _compiled(programs) -> dict[Any, Callable[[], Any]]:
  """Compiles side by side."""

  def compiled(entry):
    function, args = entry
    return partial(jax.jit(function).lower(*args).compile(), *args)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    made = pool.map(compiled, programs.values())
    return dict(zip(programs, made, strict=True))


def _forward(x, r, b, carry, perturbation, implementation):
  return kernels.lstm(
    x, r, b, carry, perturbation=perturbation, implementation=implementation
  )


def _arguments(shape, perturbation, looked_up, dtype=jnp.bfloat16):
  """What :func:`zorn_jax.kernels.lstm` takes."""
  heads, head, batch, length, members = shape
  normal = lambda index, *sizes: jax.random.normal(jax.random.key(index), sizes)
  directions = max(1, members // 2)
  lead = (directions, 2)
  if perturbation == "none":  # All rows are those of one model.
    lead, batch = (), batch * members
  scales = cases.EPSILON * jnp.asarray([1.0, -1.0])
  given, factors = None, ()
  if perturbation == "dense":
    keys = jax.random.split(jax.random.key(0), directions)
    given = kernels.Dense(jax.random.key_data(keys), scales)
  elif perturbation == "low rank":
    of_r = (directions, 4, heads, 1, head)
    given = kernels.LowRank(normal(1, *of_r), normal(2, *of_r), scales)
    factors = (
      normal(3, *lead, 2, _VOCABULARY),
      normal(4, *lead, 2, heads, 4, head),
    )
  r = (normal(5, 4, heads, head, head) / head**0.5).astype(dtype)
  zeros = jnp.zeros((*lead, batch, heads, head))
  if looked_up:
    own = lead if perturbation == "dense" else ()
    table = normal(6, *own, _VOCABULARY, heads, 4, head)
    key = jax.random.key(7)
    tokens = jax.random.randint(key, (batch, length), 0, _VOCABULARY)
    x = kernels.Lookup(table, tokens, *factors)
  else:
    x = normal(6, *lead, batch, length, heads, 4, head).astype(dtype)
  return x, r, jnp.zeros((4, heads, head)), (zeros, zeros), given


def _cudnn(shape):
  """One dense layer in float32, with the projection of its input."""
  from jax.experimental import rnn

  hidden = shape.heads * shape.head
  sizes = {
    "input_size": hidden,
    "hidden_size": hidden,
    "num_layers": 1,
    "bidirectional": False,
  }
  normal = lambda index, *size: jax.random.normal(jax.random.key(index), size)
  x = normal(0, shape.batch, shape.length, hidden)
  weights = rnn.init_lstm_weight(jax.random.key(1), **sizes)
  state = jnp.zeros((1, shape.batch, hidden))
  lengths = jnp.full(shape.batch, shape.length, jnp.int32)
  forward = lambda *args: rnn.lstm(*args, dropout=0.0, **sizes)
  return forward, (x, state, state, weights, lengths)
