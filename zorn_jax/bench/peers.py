"""The steps that others would take on a case, ready to be timed."""

from functools import partial

import jax
import numpy as np

from zorn_jax import cores
from zorn_jax.bench import cases
from zorn_jax.bench.cases import EPSILON, RATE, Case
from zorn_jax.bench.jax_peer import dense_vmap_step
from zorn_jax.bench.timing import Run


def in_jax(case: Case) -> dict[str, Run]:
  """Back-propagation."""
  return {
    "JAX BPTT": cases.Step(cases.bptt(case)).step,
    "JAX BPTT, checkpointed": cases.Step(cases.bptt(case, True)).step,
  }


def vmapped(case: Case, probe_batch: int) -> Run:
  """CD-RGE as a user of JAX writes it, some probes at once."""
  loss_fn, batch = cases.loss(case)
  step, params = dense_vmap_step(
    loss_fn, _params(case), case.num_probes, EPSILON, RATE, probe_batch
  )
  return _repeated(step, params, batch)


def in_evosax(case: Case) -> dict[str, Run]:
  """OpenAI-ES with as many queries."""
  from zorn_jax.bench.evosax_peer import open_es_step

  loss_fn, batch = cases.loss(case)
  step, state = open_es_step(
    loss_fn, _params(case), 2 * case.num_probes, EPSILON, RATE
  )
  return {"evosax Open_ES": _repeated(step, state, batch)}


def in_torch(case: Case, num_probes: int) -> dict[str, Run]:
  """A loop over some of the probes, and back-propagation.

  On a CPU on all cores, and the loop also on one, which the many small
  operations of the DNC do better with.
  """
  import torch

  from zorn_jax.bench import torch_peer

  on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
  device = "cuda" if on_gpu else "cpu"
  arrays = jax.tree.map(np.asarray, _params(case))
  inputs, targets, weights = cases.sequences(case)
  if "controller_bias_hh" in arrays:
    memory = case.model.initial_carry(arrays, 1).memory[0]
    batch = (inputs, targets, weights)
    loss = torch_peer.dnc(arrays, *batch, memory, case.num_slots, device)
  else:
    loss = torch_peer.lstm(arrays, inputs, targets, weights, device)

  def awaited(step, threads):
    torch.set_num_threads(threads)
    values = step()
    if on_gpu:
      torch.cuda.synchronize()
    return values

  loop = partial(
    torch_peer.central_difference_step,
    loss,
    torch_peer.parameters(arrays, device),
    num_probes,
    EPSILON,
    RATE,
    seed=0,
  )
  bptt = partial(
    torch_peer.bptt_step, loss, torch_peer.parameters(arrays, device), RATE
  )
  count = cores.count()
  runs = {
    "torch loop": partial(awaited, loop, count),
    "torch BPTT": partial(awaited, bptt, count),
  }
  if not on_gpu and count > 1:
    runs["torch loop, one thread"] = partial(awaited, loop, 1)
  return runs


def _params(case):
  return jax.jit(case.model.init)(jax.random.key(0))


def _repeated(step, state, batch):
  """(state, batch, key) -> (state, losses), again and again."""
  key = jax.random.key(0)

  def run():
    nonlocal state
    state, losses = step(state, batch, key)
    return state, losses

  return run
