"""What a run will cost, from its traced step: nothing is allocated."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.extend import core

from zorn_jax.mesh import UPDATES
from zorn_jax.step import (
  Experiment,
  init_state,
  programs,
  query,
  recall,
  update,
)

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


class Link(NamedTuple):
  """What joins devices.

  Attributes:
    rate: Bytes per second into a device (a host of several shares its port).
    hop: Seconds until a message is at the next device.
  """

  rate: float
  hop: float


# Rates of one direction: of the fourth NVLink (900 GB/s in both, data sheet of
# the H200), one NDR port of 400 Gb/s and one of 100 Gb/s. Hops: those that
# NCCL's tuning model has for rings of short messages (src/graph/tuning.cc); of
# Ethernet, which it has not, that of a TCP message, assumed.
LINKS = {
  "NVLink": Link(450e9, 0.5e-6),
  "InfiniBand": Link(50e9, 2.7e-6),
  "Ethernet": Link(12.5e9, 30e-6),
}
# Seconds to start a collective, from the same model.
_START = 7e-6


class Device(NamedTuple):
  """What arithmetic costs.

  Attributes:
    sign: Seconds to draw one random sign and add it to a sum.
    flops: Operations per second in the products that add up low ranks.
    rate: Bytes per second from and to memory.
  """

  sign: float
  flops: float
  rate: float


# The CPU core's are measured (scripts/predict_scaling.py). The H200's are
# computed: memory of 4.8 TB/s, through which a sum of float32 goes twice for
# every direction, and 2 ms for 512 directions of 10^9 parameters in products.
DEVICES = {
  "CPU core": Device(0.3e-9, 150e9, 15e9),
  "H200": Device(8.25 / 4.8e12, 512e12, 4.8e12),
}


class Transfer(NamedTuple):
  """A collective.

  Attributes:
    name: "all_gather" or "psum".
    size: Bytes that it gives to each device.
    devices: How many take part.
    times: How often it runs in a step.
  """

  name: str
  size: int
  devices: int
  times: int = 1


def seconds(transfer: Transfer, link: Link, per_node: int = 1) -> float:
  """Expected seconds of a collective in a ring.

  Args:
    transfer: What moves.
    link: What joins the nodes.
    per_node: Devices in a node, which NVLink joins.
  """
  count = transfer.devices
  if count == 1:
    return 0.0
  nodes = -(-count // per_node)
  inside = LINKS["NVLink"]
  if nodes == 1:
    link = inside
  hops = (count - nodes) * inside.hop + (nodes - 1) * link.hop
  moved = transfer.size * (count - 1) / count / link.rate
  rounds = 2 if transfer.name == "psum" else 1  # A sum is scattered, gathered.
  return transfer.times * (_START + rounds * (hops + moved))


class Cost(NamedTuple):
  """Cost of running a program once.

  Attributes:
    flops: Additions and multiplications in matrix products.
    peak_bytes: Memory beside the arguments, were elementwise chains fused.
  """

  flops: int
  peak_bytes: int


class Memory(NamedTuple):
  """Expected bytes of a step on one device.

  What is computed outside of the maps over devices counts whole, also where
  heads are split, so that memory is overestimated there.

  Attributes:
    held: The state and the data.
    query: What the queries need beside these.
    update: What the rest needs, which writes over the old state.
  """

  held: int
  query: int
  update: int

  @property
  def peak(self) -> int:
    """Bytes at the worst moment."""
    return self.held + max(self.query, self.update)


class _Traced(NamedTuple):
  """The programs of a step, and shapes of what is given to them."""

  state: Any
  data: Any
  query: core.Jaxpr
  recall: core.Jaxpr | None
  aside: Any
  update: core.Jaxpr

  @property
  def all(self) -> list[core.Jaxpr]:
    return [x for x in (self.query, self.recall, self.update) if x]


def memory(experiment: Experiment) -> Memory:
  """What a device of the experiment's layout needs, by the traced programs."""
  return _memory(experiment, _trace(experiment))


def query_bytes(experiment: Experiment) -> int:
  """`Memory.query` alone."""
  return cost(_trace_query(experiment, *_given(experiment))[0]).peak_bytes


def _given(experiment):
  """Shapes of the state and of the data."""
  state = jax.eval_shape(partial(init_state, experiment))
  return state, jax.eval_shape(lambda: experiment.task.data)


def _trace_query(experiment, *given):
  make = jax.make_jaxpr(partial(query, experiment), return_shape=True)
  traced, result = make(*given)
  return traced.jaxpr, result


def _trace(experiment) -> _Traced:
  layout = experiment.layout
  # What a sharded update moves is put there by the compiler.
  plain = experiment._replace(layout=layout._replace(update="replicated"))
  state, data = given = _given(plain)
  queries, (losses, aside) = _trace_query(plain, *given)
  recalled = None
  if plain.method.recall:
    make = jax.make_jaxpr(partial(recall, plain), return_shape=True)
    recalled, aside = make(*given)
    recalled = recalled.jaxpr
  updated = jax.make_jaxpr(partial(update, plain))(state, losses, aside)
  return _Traced(state, data, queries, recalled, aside, updated.jaxpr)


def _memory(experiment, traced):
  aside = _bytes(jax.tree.leaves(traced.aside))
  recalled = cost(traced.recall).peak_bytes if traced.recall else 0
  return Memory(
    held=_held(experiment, traced.data),
    query=cost(traced.query).peak_bytes,
    update=max(recalled, aside + cost(traced.update, True).peak_bytes),
  )


def plan(experiment: Experiment) -> dict[str, Any]:
  """The size and cost of one step on one device of the experiment's layout.

  Returns:
    `parameters`, of all devices; `forward_passes_per_step`, of all devices, a
    backward pass counted as two; `forward_flops_per_step`, of one device's
    matrix products in the queries, for sequences of full length (for BPTT also
    those of the backward passes);
    `peak_bytes_estimate`, by :func:`memory`;
    `collective_bytes_per_step`, which all collectives give to a device;
    `expected_cosine` of estimate and gradient, √(n/(n+d)) for n directions and
    the d parameters whose gradient is estimated; `mesh`, the devices on each
    axis; `updates`, for each way to update the bytes, the seconds of their
    transfer over each of `LINKS` and those of the update's arithmetic on each
    of `DEVICES`, all of them expected.
  """
  layout, method = experiment.layout, experiment.method
  traced = _trace(experiment)
  state = traced.state
  n, d = experiment.num_probes, _size(method.estimated(state.params))
  moved = [
    transfer
    for program in traced.all
    for transfer in _transfers(program, layout.mesh.shape)
  ]
  added = cost(traced.update).flops
  arithmetic = _Arithmetic(
    max(0, n * d - added // 2),
    added,
    # The gradient is written and read, the parameters are read and written,
    # and so is every moment.
    16 + 8 * round(_size(state.opt_state) / max(1, _size(state.params))),
  )
  updates = {
    name: _update(
      experiment._replace(layout=layout._replace(update=name)),
      moved,
      arithmetic,
    )
    for name in UPDATES
  }
  return {
    "parameters": _size(state.params),
    "forward_passes_per_step": method.passes_per_step,
    "forward_flops_per_step": _forward_flops(experiment, traced),
    "peak_bytes_estimate": _memory(experiment, traced).peak,
    "collective_bytes_per_step": updates[layout.update]["bytes"],
    "expected_cosine": math.sqrt(n / (n + d)) if d else 1.0,
    "mesh": dict(layout.mesh.shape),
    "updates": updates,
  }


def _forward_flops(experiment, traced) -> int:
  """Of the queries; with a curriculum, of its longest sequences."""
  watch = experiment.watch
  if watch.curriculum:
    traced = _trace(experiment._replace(watch=watch._replace(curriculum=None)))
  return sum(cost(x).flops for x in traced.all[:-1])


class _Arithmetic(NamedTuple):
  """Of an update: signs added one by one, FLOPs, bytes per parameter."""

  signs: int
  flops: int
  traffic: int


def _update(experiment, moved, arithmetic):
  """Bytes and seconds of one way to update."""
  layout = experiment.layout
  params = jax.eval_shape(experiment.model.init, jax.random.key(0))
  placed = layout.place(params, experiment.model.specs)
  slices = layout.slices(params, placed)
  held, updated = (_local(params, where) for where in (placed, slices))
  parts = layout.mesh.shape["probe"] * layout.mesh.shape["data"]
  # The slices move in float32, whatever the parameters are.
  moved = moved + [
    Transfer("all_gather", 4 * size, parts)
    for size, part in zip(held, updated, strict=True)
    if part < size
  ]
  leaves = zip(jax.tree.leaves(params), updated, strict=True)
  split = sum(part < leaf.size for leaf, part in leaves)
  if split:  # The squared norms of these leaves, at once.
    moved.append(Transfer("psum", 4 * split, layout.mesh.size))
  count = sum(updated)
  share = count / _size(params)
  return {
    "bytes": sum(x.size * x.times for x in moved),
    "transfer_seconds": {
      name: sum(seconds(x, link) for x in moved) for name, link in LINKS.items()
    },
    "arithmetic_seconds": {
      name: share * arithmetic.signs * device.sign
      + share * arithmetic.flops / device.flops
      + count * arithmetic.traffic / device.rate
      for name, device in DEVICES.items()
    },
  }


def _transfers(jaxpr, axes) -> Iterator[Transfer]:
  """The collectives that a program names; loops of unknown length run once."""
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name in ("all_gather", "psum"):
      of = equation.params["axis_name" if name == "all_gather" else "axes"]
      count = math.prod(axes[axis] for axis in of)
      yield Transfer(name, _bytes(x.aval for x in equation.outvars), count)
    repeats = equation.params.get("length", 1) if name == "scan" else 1
    for inner in _subprograms(equation.params):
      for found in _transfers(inner, axes):
        yield found._replace(times=repeats * found.times)


def _local(tree, where) -> list[int]:
  """Elements of every leaf on one device."""
  sizes = jax.tree.map(
    lambda x, s: math.prod(s.shard_shape(x.shape)), tree, where
  )
  return jax.tree.leaves(sizes)


def _held(experiment, data) -> int:
  """Bytes of a step's arguments on one device."""
  template = programs(experiment).template
  local = lambda x: jax.ShapeDtypeStruct(
    x.sharding.shard_shape(x.shape), x.dtype
  )
  return _bytes(map(local, jax.tree.leaves(template))) + _bytes(
    jax.tree.leaves(data)
  )


def _size(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def cost(jaxpr: core.Jaxpr, in_place: bool = False) -> Cost:
  """Walks a program; loops of unknown length count once.

  Args:
    jaxpr: The program.
    in_place: Whether its results are written over its arguments.
  """
  results = set(_variables(jaxpr.outvars)) if in_place else set()
  return _cost(jaxpr, set(jaxpr.invars) if in_place else set(), results)


def _cost(jaxpr, writable, elsewhere=frozenset()) -> Cost:
  """Cost of a program that may write over some of its arguments.

  Results that lie `elsewhere` need no memory.
  """
  uses = {}
  for index, equation in enumerate(jaxpr.eqns):
    for variable in _variables(equation.invars):
      uses.setdefault(variable, []).append(index)
  for variable in set(_variables(jaxpr.outvars)):
    uses.setdefault(variable, []).extend([len(jaxpr.eqns)] * 2)
  flops, live, peak = 0, 0, 0
  writable = dict.fromkeys(writable, 0)  # And the bytes that they hold.
  released = [0] * (len(jaxpr.eqns) + 2)
  for index, equation in enumerate(jaxpr.eqns):
    ended = lambda x, index=index: max(uses.get(x, [-1])) <= index
    over = {
      x for x in _variables(equation.invars) if x in writable and ended(x)
    }
    inner = _inner_cost(equation, over)
    flops += inner.flops
    name = equation.primitive.name
    # An array can be written over by one result alone.
    taken = {old: new for old, new in _written_over(equation) if old in over}
    taken = {new: old for old, new in taken.items()}
    for variable in equation.outvars:
      used = uses.get(variable, [])
      last = max(used, default=index)
      if variable in taken:
        size = writable[taken[variable]]
        released[index + 1] -= size
      elif variable in elsewhere:
        size = 0
      elif name in _MATERIALIZED or len(used) > 1:
        size = _bytes([variable.aval])
        live += size
      else:
        continue
      writable[variable] = size
      released[last + 1] += size
    peak = max(peak, live + inner.peak_bytes)
    live -= released[index + 1]
  return Cost(flops, peak)


def _inner_cost(equation, over) -> Cost:
  """Cost of one equation, apart from its results."""
  if equation.primitive.name == "dot_general":
    return Cost(_dot_flops(equation), 0)
  inner = []
  for jaxpr in _subprograms(equation.params):
    # Of a loop, what it carries on; else the arguments that nobody else reads.
    if equation.primitive.name in ("scan", "while"):
      first, carried = _carried(equation)
      if equation.primitive.name == "while":  # Each part has its own constants.
        first = len(jaxpr.invars) - carried
      writable = jaxpr.invars[first : first + carried]
    else:
      count = len(jaxpr.invars)
      pairs = zip(jaxpr.invars, equation.invars[-count:], strict=False)
      writable = [
        x
        for x, outer in pairs
        if not isinstance(outer, core.Literal) and outer in over
      ]
    inner.append(_cost(jaxpr, writable))
  repeats = equation.params.get("length", 1)
  return Cost(
    repeats * sum(part.flops for part in inner),
    max((part.peak_bytes for part in inner), default=0),
  )


def _written_over(equation):
  """Arguments, and the results that can take their places."""
  if equation.primitive.name == "dynamic_update_slice":
    first, count = 0, 1
  elif equation.primitive.name in ("scan", "while"):
    first, count = _carried(equation)
  else:
    return []
  carried = equation.invars[first : first + count]
  return [
    (old, new)
    for old, new in zip(carried, equation.outvars, strict=False)
    if not isinstance(old, core.Literal)
  ]


def _carried(equation):
  """Of a loop's arguments, the first that is carried on, and how many are."""
  params = equation.params
  if equation.primitive.name == "while":
    constants = params["cond_nconsts"] + params["body_nconsts"]
    return constants, len(equation.outvars)
  if "ft_in" in params:  # jax 0.11 and later.
    constants, carry, _ = params["ft_in"].unpack()
    return len(constants), len(carry)
  return params["num_consts"], params["num_carry"]


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
