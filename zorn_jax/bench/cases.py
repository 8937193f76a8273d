"""What is measured: experiments of the paper's sizes, and their programs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zorn_jax import (
  control,
  directions,
  estimators,
  mesh,
  methods,
  metrics,
  models,
  plan,
  probe_map,
  step,
  tasks,
)
from zorn_jax.models import Model
from zorn_jax.tasks import Split, Task

# Small enough that no loss explodes, however often a step is repeated.
EPSILON, RATE = 1e-2, 1e-4
# reference: arXiv:2505.17852. hidden_size, num_heads.
LSTM_SIZES = {
  "tiny": (240, 12),
  "small": (1600, 32),
  "medium": (9600, 64),
  "large": (66000, 220),
  "xlarge": (297500, 350),
}
DIRECTIONS = ("rank one", "dense")
_VOCABULARY = _EMBEDDING = 100


class Case(NamedTuple):
  """A model and the one batch that all probes of all its steps share.

  Attributes:
    name: For people.
    model: The model.
    task: The task.
    batch_size: Sequences B.
    num_probes: Directions n of a step.
    counted: The same model without kernels, whose products can be counted.
    num_slots: Slots of a DNC's memory, which may keep one for all.
  """

  name: str
  model: Model
  task: Task
  batch_size: int
  num_probes: int
  counted: Model
  num_slots: int = 0


def lstm(
  size: str,
  batch_size: int,
  num_probes: int,
  length: int = 0,
  chunk: int = 0,
  dtype: str = "float32",
) -> Case:
  """An LSTM of the paper on its copy task, or on random tokens.

  Args:
    size: One of `LSTM_SIZES`.
    batch_size: Sequences B.
    num_probes: Directions n of a step.
    length: Random tokens T in a sequence; 0 for strings of up to 10 letters
      and their copies, T = 21.
    chunk: Of these tokens, how many are read at once; 0 for all.
    dtype: Of the parameters.
  """
  module = _lstm(*LSTM_SIZES[size], dtype)
  counted = models.from_linen(module.clone(implementation="xla"))
  if length:
    task = tasks.random_tokens(
      batch_size, _VOCABULARY, length, time_chunk=chunk or length
    )
  else:
    task = tasks.ALGORITHMIC["copy"](
      batch_size=batch_size, max_length=10, time_chunk=21
    )
    task = tasks.one_batch(task)
  name = f"LSTM {size}"
  model = models.from_linen(module)
  return Case(name, model, task, batch_size, num_probes, counted)


def _lstm(hidden_size, num_heads, dtype):
  return models.Recurrent(
    "lstm",
    _VOCABULARY,
    _EMBEDDING,
    hidden_size,
    num_heads,
    readout_scale="head",
    initial_state="trainable",
    dtype=jnp.dtype(dtype),
  )


def dnc(size: int, num_probes: int, memory: str = "zeros") -> Case:
  """The DNC of Figure 1: 100 random tokens after 100 others, batch 1.

  Args:
    size: Width of the controller and of a slot, and number of slots; 128 in the
      smallest of the figure.
    num_probes: Directions n of a step.
    memory: Which model: "zeros" for the figure's, an RNN with a memory all of
      whose slots are equal; "random" for the published class, an LSTM, with one
      whose slots differ.
  """
  controller = "rnn" if memory == "zeros" else "lstm"
  sizes = (_VOCABULARY, 32, size, 1, size, size, controller, memory)
  task = tasks.random_tokens(
    1, _VOCABULARY, seq_length=100, time_chunk=100, source_length=100
  )
  model = models.from_linen(models.DNC(*sizes))
  name = f"DNC {size}" if memory == "zeros" else f"DNC {size}, {memory}"
  return Case(name, model, task, 1, num_probes, model, size)


def zero_order(
  case: Case,
  direction: str = "rank one",
  probe_batch: int | None = None,
  optimizer: optax.GradientTransformation | None = None,
  devices: int = 1,
) -> step.Experiment:
  """CD-RGE with SGD, unless another optimiser is given.

  Args:
    case: What is trained.
    direction: "rank one" or "dense", of signs.
    probe_batch: Probes at once on a device; None for all that it has.
    optimizer: Treats every parameter alone.
    devices: How many share the probes; 0 for all that there are.
  """
  layout = mesh.Layout(mesh.make(case.num_probes, devices))
  make = partial(
    estimators.central_difference,
    num_probes=case.num_probes,
    direction=make_direction(direction, case.model.deferred),
    probe_map=probe_map.sharded(layout.mesh, probe_batch),
  )
  method = methods.zero_order(
    case.model,
    case.task,
    make,
    num_probes=case.num_probes,
    batch_per_probe=False,
  )
  return _experiment(case, method, layout, EPSILON, optimizer)


def make_direction(name: str, deferred: bool = False) -> directions.Direction:
  """One of `DIRECTIONS`; a dense one perhaps formed a block at a time."""
  if name == "dense":
    return directions.rademacher(deferred=deferred)
  return directions.low_rank()


def bptt(case: Case, checkpoint: bool = False) -> step.Experiment:
  """Back-propagation and SGD, with chunks computed again if wanted."""
  method = methods.bptt(case.model, case.task, checkpoint=checkpoint)
  return _experiment(case, method, mesh.Layout(mesh.make(0)), 0.0, None)


def _experiment(case, method, layout, epsilon, optimizer):
  return step.Experiment(
    model=case.model,
    task=case.task,
    method=method,
    optimizer=optimizer or optax.sgd(RATE),
    elementwise=True,
    watch=control.Watch(),
    search=None,
    num_probes=case.num_probes if epsilon else 0,
    peak_rate=RATE,
    rate_schedule=optax.constant_schedule(1.0),
    epsilon=epsilon,
    epsilon_follows=False,
    seed=0,
    steps=1,
    evaluate_every=1,
    checkpoint_every=1,
    log_every=1,
    layout=layout,
  )


class Step:
  """A step that runs in its two parts, as training runs it.

  Args:
    experiment: Of the step.
    state: The state to begin with, which an update uses up; the first one
      unless given.
  """

  def __init__(self, experiment: step.Experiment, state: Any = None):
    self._parts = step.programs(experiment)
    self._data = mesh.put(experiment.task.data, experiment.layout.everywhere)
    self.state = self._parts.init() if state is None else state

  def query(self):
    """The losses of all probes; of BPTT the gradient."""
    losses, _, aside = self._parts.query(self.state, self._data)
    if self._parts.recall:
      aside = self._parts.recall(self.state, self._data)
    self._passed = losses, aside
    return self._passed

  def update(self):
    """The parameters after the last query's losses."""
    self.state, values = self._parts.update(self.state, *self._passed)
    return self.state, values

  def step(self):
    """Both."""
    self.query()
    return self.update()


def loss(case: Case) -> tuple[Callable[[Any, Any], jax.Array], Any]:
  """(params, batch) -> mean loss, and the batch."""
  task = case.task
  batch = (task.data, tasks.first_batch(task, task.data))
  num_chunks = task.num_chunks(task.max_length)

  def loss_fn(params, batch):
    split = Split(*batch, num_chunks)
    return metrics.mean_loss(case.model, task, params, split)

  return loss_fn, batch


def sequences(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Inputs, targets and weights [B, T] of the batch."""
  task = case.task
  batch = tasks.first_batch(task, task.data)
  chunks = [
    task.chunk(task.data, batch, index)
    for index in range(task.num_chunks(task.max_length))
  ]
  inputs, targets, weights = (
    np.concatenate(x, axis=1) for x in zip(*chunks, strict=True)
  )
  return inputs, targets, weights


def query_flops(experiment: step.Experiment) -> int:
  """Additions and multiplications in the matrix products of a step's passes."""
  state = step.programs(experiment).template
  data = jax.eval_shape(lambda: experiment.task.data)
  return flops(partial(step.query, experiment), state, data)


def flops(function: Callable[..., Any], *args: Any) -> int:
  """The same of a function of arrays, or of their shapes."""
  return plan.cost(jax.make_jaxpr(function)(*args).jaxpr).flops


def num_parameters(case: Case) -> int:
  params = jax.eval_shape(case.model.init, jax.random.key(0))
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
