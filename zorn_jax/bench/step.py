"""Whole training steps, beside those of others."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zorn_jax import mesh, probe_map
from zorn_jax.bench import cases, machine, peers, timing
from zorn_jax.bench.cases import Case

_OURS = cases.DIRECTIONS[0]  # What all others are compared with.
_VMAP = "JAX vmap, dense"


class Spec(NamedTuple):
  """What is measured of a case.

  Attributes:
    make: Makes it.
    probe_batches: Numbers of rank-one probes at once that are tried.
    dense_batches: The same of dense ones, ours and those of others.
    torch_probes: Probes of the loop in torch that run; their time is scaled to
      all of them, each of which it treats alone.
    shares: Whether to take the step apart.
    directions: Of the step.
  """

  make: Callable[[], Case]
  probe_batches: tuple[int, ...]
  dense_batches: tuple[int, ...]
  torch_probes: int
  shares: bool = False
  directions: tuple[str, ...] = cases.DIRECTIONS


_MANY, _SOME = (1, 4, 8, 16, 32), (1, 4)
SPECS = (
  Spec(lambda: cases.lstm("tiny", 64, 96), _MANY, _SOME, 96),
  Spec(lambda: cases.lstm("small", 16, 96), _MANY, _SOME, 48, True),
  Spec(lambda: cases.dnc(128, 96), (*_MANY, 48), _SOME, 12),
  Spec(lambda: cases.dnc(128, 96, "random"), _MANY, _SOME, 12),
  # Few probes suffice: its products are large enough for a machine's peak.
  Spec(lambda: cases.lstm("medium", 64, 8), (1, 2, 4, 8), (1, 4), 1, True),
)


def _on_gpu(size, probe_batches, probes=96, directions=cases.DIRECTIONS):
  """arXiv:2505.17852 measured such steps: 1024 sequences of 11 tokens."""
  make = lambda: cases.lstm(size, 1024, probes, 11, dtype="bfloat16")
  return Spec(make, probe_batches, probe_batches, 0, False, directions)


# Probes of the last are few, for a step of all takes long.
GPU_SPECS = (
  _on_gpu("tiny", (96,), 96, cases.DIRECTIONS[:1]),
  _on_gpu("small", (96,)),
  _on_gpu("medium", (16,), 96, cases.DIRECTIONS[:1]),
  _on_gpu("large", (2,), 96, cases.DIRECTIONS[:1]),
  _on_gpu("xlarge", (1,), 4, cases.DIRECTIONS[:1]),
)
QUICK = (Spec(lambda: cases.lstm("tiny", 2, 2), (1, 2), (1,), 1, True),)


def run(
  peaks: dict[str, dict[str, Any]],
  with_peers: bool = False,
  quick: bool = False,
) -> dict[str, list[dict[str, Any]]]:
  """Tables of the times of steps, and of their parts.

  Args:
    peaks: Name of a type -> as :func:`timing.gemm_peak` has it.
    with_peers: Whether to run those peers that are installed.
    quick: One small case, one repeat.
  """
  steps, parts = [], []
  repeats = 1 if quick else 3 if with_peers else 5
  specs = GPU_SPECS if jax.default_backend() == "gpu" else SPECS
  for spec in QUICK if quick else specs:
    measured = _measure(spec, with_peers, repeats)
    steps += _rows(measured, peaks)
    if spec.shares:
      parts += _shares(measured)
  return {"steps": steps, "noise and update": parts}


class _Measured(NamedTuple):
  case: Case
  programs: list[str]
  seconds: dict[str, Any]  # Of programs, and of parts of ours.
  notes: dict[str, dict[str, Any]]  # Of programs.


def _measure(spec, with_peers, repeats) -> _Measured:
  case = spec.make()
  runs, others, notes, loops = {}, {}, {}, []
  for direction in spec.directions:
    step, notes[direction] = _tuned(case, direction, spec)
    runs[f"{direction} query"] = step.query
    runs[f"{direction} update"] = step.update
    if spec.shares:
      runs[f"{direction} draw"] = _drawing(case, direction)
  if with_peers:
    ways = {k: peers.vmapped(case, k) for k in spec.dense_batches}
    best, tried = timing.fastest(ways, repeats=1)
    notes[_VMAP] = _note(best, tried)
    others |= {_VMAP: ways[best]} | peers.in_jax(case)
    if machine.installed("evosax"):
      others |= peers.in_evosax(case)
    if machine.installed("torch"):
      in_torch = peers.in_torch(case, spec.torch_probes)
      loops = [name for name in in_torch if name.startswith("torch loop")]
      others |= in_torch
      notes |= dict.fromkeys(loops, {"probes_measured": spec.torch_probes})
  seconds = timing.measure(runs | others, repeats)
  for direction in spec.directions:
    both = (seconds[f"{direction} {part}"] for part in ("query", "update"))
    seconds[direction] = sum(both)
  for name in loops:
    seconds[name] *= case.num_probes / spec.torch_probes
  return _Measured(case, [*spec.directions, *others], seconds, notes)


def _tuned(case, direction, spec):
  """The fastest step, and what was tried."""
  first = direction == _OURS
  steps, state = {}, None
  for size in spec.probe_batches if first else spec.dense_batches:
    experiment = cases.zero_order(case, direction, size, devices=0)
    steps[size] = cases.Step(experiment, state)
    state = steps[size].state
  runs = {size: step.query for size, step in steps.items()}
  best, tried = timing.fastest(runs, repeats=1)
  return steps[best], _note(best, tried)


def _note(best, tried):
  return {
    "probe_batch": best,
    "tried_ms": {str(size): ms for size, ms in tried.items()},
  }


def _drawing(case, direction):
  """Draws the directions of a step, and does little else with them.

  What the query pays for its directions, about: there, they are also added to
  the parameters.
  """
  params = jax.eval_shape(case.model.init, jax.random.key(0))
  sample = cases.make_direction(direction).sample

  def draw(key):
    # Over the columns at last: XLA adds many rows at once.
    add = lambda z: jnp.sum(z, axis=tuple(range(z.ndim - 1))).sum()
    return jax.tree.map(add, sample(key, params))

  keys = jax.random.split(jax.random.key(0), case.num_probes)
  # One after the other on the devices of the step, as it draws them.
  devices = mesh.make(case.num_probes)
  run = jax.jit(partial(probe_map.sharded(devices, 1).map, draw))
  return lambda: run(keys)


def _rows(measured, peaks):
  case, programs, seconds, notes = measured
  params = jax.eval_shape(case.model.init, jax.random.key(0))
  dtype = jax.tree.leaves(params)[0].dtype.name
  peak = peaks[dtype]["flops_per_second"]
  for program in programs:
    row = {
      "case": case.name,
      "batch": case.batch_size,
      "probes": case.num_probes,
      "dtype": dtype,
      "program": program,
      **timing.spread("ms", 1e3 * seconds[program]),
      **timing.spread("ratio", seconds[program] / seconds[_OURS]),
      **notes.get(program, {}),
    }
    if program in cases.DIRECTIONS:
      size = notes[program]["probe_batch"]
      counted = case._replace(model=case.counted)
      flops = cases.query_flops(cases.zero_order(counted, program, size))
      rate = flops / seconds[f"{program} query"]
      row |= timing.spread("update_ms", 1e3 * seconds[f"{program} update"])
      row["query_gflop"] = flops / 1e9
      row |= timing.spread("share_of_peak", rate / peak)
    yield row


def _shares(measured):
  """How much of a step the directions and the update are."""
  case, _, seconds, _ = measured
  for direction in cases.DIRECTIONS:
    draw, update = (seconds[f"{direction} {x}"] for x in ("draw", "update"))
    yield {
      "case": case.name,
      "batch": case.batch_size,
      "probes": case.num_probes,
      "program": direction,
      **timing.spread("draw_ms", 1e3 * draw),
      **timing.spread("update_ms", 1e3 * update),
      **timing.spread("share", (draw + update) / seconds[direction]),
    }
