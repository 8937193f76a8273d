"""Peak memory of a training step, by the compiler: nothing is allocated."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zorn_jax import step
from zorn_jax.bench import cases
from zorn_jax.bench.cases import Case
from zorn_jax.perturbed import Perturbed
from zorn_jax.tasks import first_batch

_OPTIMIZERS = {"SGD": optax.sgd, "Adam": optax.adam}
_TARGETS = {"rank one": 1.10, "dense": 1.25}  # Of a step to a forward pass.
_CHUNK = 128  # Tokens that are held at once, however long a sequence is.


def run(quick: bool = False) -> dict[str, list[dict[str, Any]]]:
  """Tables of bytes, of a step beside a forward pass and by length.

  Args:
    quick: A small case alone.
  """
  sizes, batch = (("tiny",), 2) if quick else (("medium", "large"), 16)
  probe_batches = (1,) if quick else (1, 4)
  steps = [
    row
    for size in sizes
    for direction in cases.DIRECTIONS
    for row in _steps(size, batch, probe_batches, direction)
  ]
  lengths = (128, 1024) if quick else (128, 1024, 8192, 65536)
  growth = [
    row
    for size in (("tiny",) if quick else ("tiny", "small"))
    for row in _by_length(size, batch, lengths)
  ]
  return {"step and forward pass": steps, "context length": growth}


def _steps(size, batch, probe_batches, direction):
  """Rows for all probes at once, and optimisers."""
  case = cases.lstm(size, batch, num_probes=8)
  make = partial(cases.zero_order, case, direction)
  updates = {
    name: update_bytes(make(1, optimizer(cases.RATE)))
    for name, optimizer in _OPTIMIZERS.items()
  }
  for probe_batch in probe_batches:
    rows = cases.lstm(size, 2 * probe_batch * batch, num_probes=0)
    plain, lean = (forward_bytes(rows, lean) for lean in (False, True))
    alone = query_bytes(make(probe_batch))
    for name, optimizer in _OPTIMIZERS.items():
      params = jax.eval_shape(case.model.init, jax.random.key(0))
      state = jax.eval_shape(optimizer(cases.RATE).init, params)
      moments = num_bytes(state)
      peak = max(alone + moments, updates[name])
      ratio = (peak - moments) / min(plain, lean)
      yield {
        "case": case.name,
        "batch": batch,
        "probe_batch": probe_batch,
        "direction": direction,
        "optimizer": name,
        "forward_mb": plain / 1e6,
        "lean_forward_mb": lean / 1e6,
        "query_mb": (alone + moments) / 1e6,
        "update_mb": updates[name] / 1e6,
        "moments_mb": moments / 1e6,
        # Of what the step needs beside the moments.
        "ratio_to_forward": (peak - moments) / plain,
        "ratio_to_lean": ratio,
        "target": _TARGETS[direction],
        "met": ratio <= _TARGETS[direction],
      }


def _by_length(size, batch, lengths):
  """Rows for all lengths, of what is needed beside the sequences."""
  makers = {
    "zero_order": partial(cases.zero_order, probe_batch=1),
    "bptt": cases.bptt,
    "checkpointed_bptt": partial(cases.bptt, checkpoint=True),
  }
  updates = {}
  for length in lengths:
    case = cases.lstm(size, batch, num_probes=8, length=length, chunk=_CHUNK)
    data = num_bytes(jax.eval_shape(lambda case=case: case.task.data))
    row = {"case": case.name, "batch": batch, "length": length}
    row["sequences_mb"] = data / 1e6
    for name, make in makers.items():
      experiment = make(case)
      if name not in updates:  # It reads no sequences.
        updates[name] = update_bytes(experiment) - data
      query = query_bytes(experiment) - data
      row[f"{name}_mb"] = max(query, updates[name]) / 1e6
    yield row


def forward_bytes(case: Case, lean: bool) -> int:
  """Peak bytes of the mean loss of a batch with unperturbed parameters.

  To compare with a step whose queries run `probe_batch` pairs at once, the
  batch has as many rows as they have together, 2 probe_batch B. One batch of so
  many rows is the most frugal way to read them at once: they share one set of
  parameters, which copies of the model, mapped over, could only hold again.

  Args:
    case: The model, and that batch.
    lean: Whether a few heads at a time run through all of a chunk, as those of
      perturbed models do, so that no outputs of all heads are held. Otherwise
      the model runs as it does wherever nothing is perturbed.
  """
  loss_fn, _ = cases.loss(case)
  task = case.task

  def loss(params, batch):
    return loss_fn(_with_no_factors(params) if lean else params, batch)

  params = jax.eval_shape(case.model.init, jax.random.key(0))
  batch = jax.eval_shape(lambda: (task.data, first_batch(task, task.data)))
  return _peak(jax.jit(loss), (params, batch))


def _with_no_factors(params):
  """The same values, as matrices perturbed by a direction of rank zero."""

  def wrap(leaf):
    if leaf.ndim < 2:
      return leaf
    *leading, m, k = leaf.shape
    left, right = (jnp.zeros((*leading, 0, size)) for size in (m, k))
    return Perturbed(leaf, left, right, jnp.zeros(()))

  return jax.tree.map(wrap, params)


def query_bytes(experiment: step.Experiment) -> int:
  """Peak bytes of a step's queries, the whole training state held."""
  parts, given = _given(experiment)
  return _peak(parts.query, given)


def update_bytes(experiment: step.Experiment) -> int:
  """Peak bytes of a step's update, which writes over the old state."""
  parts, given = _given(experiment)
  state, data = given
  losses, _, aside = jax.eval_shape(parts.query, state, data)
  if parts.recall:
    aside = jax.eval_shape(parts.recall, state, data)
  return _peak(parts.update, (state, losses, aside)) + num_bytes(data)


def _given(experiment):
  parts = step.programs(experiment)
  return parts, (parts.template, jax.eval_shape(lambda: experiment.task.data))


def _peak(program, given) -> int:
  """What a program needs at its worst moment, with what it is given.

  Arguments that it does not read are held as well.
  """
  stats = program.lower(*given).compile().memory_analysis()
  return (
    num_bytes(given)
    + stats.output_size_in_bytes
    + stats.temp_size_in_bytes
    - stats.alias_size_in_bytes
  )


def num_bytes(tree) -> int:
  """Of all arrays of a tree, or of their shapes."""
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
