"""What a run will cost, from its traced step: nothing is allocated."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend import core

from zorn_jax.methods import Now
from zorn_jax.step import Experiment, init_state, train_step

# Primitives whose result a compiler writes to memory even if it is used once.
_MATERIALIZED = {
  "dot_general",
  "scan",
  "while",
  "concatenate",
  "gather",
  "sort",
  "dynamic_update_slice",
}


class Cost(NamedTuple):
  """Cost of running a program once.

  Attributes:
    flops: Additions and multiplications in matrix products.
    peak_bytes: Memory beside the arguments, were elementwise chains fused.
  """

  flops: int
  peak_bytes: int


def plan(experiment: Experiment) -> dict[str, Any]:
  """The size and cost of one step on one device.

  Returns:
    `parameters`; `forward_passes_per_step`, a backward pass counted as two;
    `forward_flops_per_step`, of all matrix products in the queries (for BPTT
    also those of the backward passes); `peak_bytes_estimate`, arguments and
    temporaries of the step; `collective_bytes_per_step`; `expected_cosine` of
    estimate and gradient, √(n/(n+d)) for n directions and the d parameters
    whose gradient is estimated.
  """
  state = jax.eval_shape(partial(init_state, experiment))
  data = jax.eval_shape(lambda: experiment.task.data)
  step = jax.make_jaxpr(partial(train_step, experiment))(state, data)
  queries = jax.make_jaxpr(partial(_query, experiment))(state, data)
  size = lambda tree: sum(
    math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)
  )
  n, d = experiment.num_probes, size(experiment.method.estimated(state.params))
  return {
    "parameters": size(state.params),
    "forward_passes_per_step": experiment.method.passes_per_step,
    "forward_flops_per_step": cost(queries.jaxpr).flops,
    "peak_bytes_estimate": _bytes(step.in_avals) + cost(step.jaxpr).peak_bytes,
    "collective_bytes_per_step": 0,  # One device.
    "expected_cosine": math.sqrt(n / (n + d)) if d else 1.0,
  }


def _query(experiment, state, data):
  """The forward passes of a step."""
  now = Now(
    state.step,
    state.probe_key,
    state.data_key,
    experiment.epsilon,
    experiment.task.max_length,
  )
  losses, _ = experiment.method.query(
    state.params, state.method_state, data, now
  )
  return losses


def cost(jaxpr: core.Jaxpr) -> Cost:
  """Walks a program; loops of unknown length count once."""
  uses = {}
  for index, equation in enumerate(jaxpr.eqns):
    for variable in _variables(equation.invars):
      uses.setdefault(variable, []).append(index)
  for variable in _variables(jaxpr.outvars):
    uses.setdefault(variable, []).extend([len(jaxpr.eqns)] * 2)
  flops, live, peak = 0, 0, 0
  released = [0] * (len(jaxpr.eqns) + 2)
  for index, equation in enumerate(jaxpr.eqns):
    inner = _inner_cost(equation)
    flops += inner.flops
    name = equation.primitive.name
    for variable in equation.outvars:
      used = uses.get(variable, [])
      if name in _MATERIALIZED or len(used) > 1:
        size = _bytes([variable.aval])
        live += size
        released[max(used, default=index) + 1] += size
    peak = max(peak, live + inner.peak_bytes)
    live -= released[index + 1]
  return Cost(flops, peak)


def _inner_cost(equation) -> Cost:
  """Cost of one equation, apart from its results."""
  if equation.primitive.name == "dot_general":
    return Cost(_dot_flops(equation), 0)
  inner = [cost(jaxpr) for jaxpr in _subprograms(equation.params)]
  repeats = equation.params.get("length", 1)
  return Cost(
    repeats * sum(part.flops for part in inner),
    max((part.peak_bytes for part in inner), default=0),
  )


def _subprograms(params):
  """The programs that an equation calls."""
  for value in params.values():
    for part in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(part, core.ClosedJaxpr):
        yield part.jaxpr
      elif isinstance(part, core.Jaxpr):
        yield part


def _variables(atoms):
  return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _bytes(avals) -> int:
  total = 0
  for aval in avals:
    item = 8 if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key) else None
    total += math.prod(aval.shape) * (item or aval.dtype.itemsize)
  return total


def _dot_flops(equation) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval
  summed = math.prod(left.shape[axis] for axis in contracted)
  return 2 * summed * math.prod(equation.outvars[0].aval.shape)
