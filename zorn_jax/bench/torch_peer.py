"""The step in PyTorch, one probe at a time, as good as eager operations get.

A probe perturbs the parameters in place by +ε z, by -2 ε z and by +ε z, with a
forward pass after the first and the second; the update draws each z again. The
models are those of :mod:`zorn_jax.models.recurrent` and
:mod:`zorn_jax.models.dnc`, in float32. Nothing is compiled, and one stream of
operations runs at a time.

What makes it fast: all parameters lie in one tensor, so that a direction is
drawn and added in one go; a random word gives 64 signs, from a generator of
their own; what does not depend on the state is computed once per forward pass;
a token of the LSTM is one gather, one batched product over heads and one
sigmoid of all gates, in memory that is used again.

References: arXiv:2505.17852 for the models and the step.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

Tensors = dict[str, torch.Tensor]
LossFn = Callable[[Tensors], torch.Tensor]


class Parameters(NamedTuple):
  """A model's parameters.

  Attributes:
    flat: All of them, float32 [P].
    named: Views of `flat`, in their shapes.
  """

  flat: torch.Tensor
  named: Tensors


def parameters(
  arrays: Mapping[str, np.ndarray], device: str = "cpu"
) -> Parameters:
  """Copies arrays to one tensor on a device, in float32."""
  tensors = {name: _tensor(x, device) for name, x in arrays.items()}
  flat = torch.cat([x.reshape(-1) for x in tensors.values()])
  parts = flat.split([x.numel() for x in tensors.values()])
  named = {
    name: part.view(x.shape)
    for (name, x), part in zip(tensors.items(), parts, strict=True)
  }
  return Parameters(flat, named)


def directions(
  count: int, device: str = "cpu"
) -> Callable[[int], torch.Tensor]:
  """Draws directions of independent signs, from a generator of its own.

  Args:
    count: Number P of signs.
    device: Where they are drawn.
  Returns:
    (seed) -> float32 [P] of ±1, in memory that the next call overwrites.
  """
  generator = torch.Generator(device)
  words = torch.empty(-(-count // 64), dtype=torch.int64, device=device)
  powers = (1 << torch.arange(32, device=device)).to(torch.int32)
  bits = torch.empty(2 * len(words), 32, dtype=torch.int32, device=device)
  # Each bit of a word becomes the sign of a float, whatever its other bits say.
  floats, one = bits.view(torch.float32), torch.ones((), device=device)

  def draw(seed):
    generator.manual_seed(seed)
    words.random_(-(2**63), None, generator=generator)
    torch.mul(words.view(torch.int32)[:, None], powers, out=bits)
    torch.copysign(one, floats, out=floats)
    return floats.view(-1)[:count]

  return draw


@torch.inference_mode()
def central_difference_step(
  loss_fn: LossFn,
  params: Parameters,
  num_probes: int,
  epsilon: float,
  rate: float,
  seed: int,
) -> torch.Tensor:
  r"""One step of CD-RGE and plain gradient descent, in place.

  .. math:: \theta \leftarrow \theta - \frac{\eta}{n} \sum_i
    \frac{f(\theta + \epsilon z_i) - f(\theta - \epsilon z_i)}{2 \epsilon} z_i

  Probe i of the step draws from the seed `seed * num_probes + i`. Perturbations
  come and go by rounded sums, so that the parameters drift.

  Args:
    loss_fn: (named parameters) -> loss, a scalar.
    params: What :func:`parameters` gives; changed.
    num_probes: Number n of directions. Costs 2n forward passes.
    epsilon: Smoothing radius ε, in units of the parameters.
    rate: Learning rate η.
    seed: Number of the step.
  Returns:
    Losses [n, 2], ordered (+, -).
  """
  flat, named = params
  draw = directions(len(flat), str(flat.device))
  seeds = range(seed * num_probes, (seed + 1) * num_probes)
  losses = flat.new_empty(num_probes, 2)
  for probe, probe_seed in enumerate(seeds):
    z = draw(probe_seed)
    flat.add_(z, alpha=epsilon)
    losses[probe, 0] = loss_fn(named)
    flat.add_(z, alpha=-2 * epsilon)
    losses[probe, 1] = loss_fn(named)
    flat.add_(z, alpha=epsilon)
  steps = (losses[:, 1] - losses[:, 0]) * (rate / (2 * epsilon * num_probes))
  for probe_seed, step in zip(seeds, steps.tolist(), strict=True):
    flat.add_(draw(probe_seed), alpha=step)
  return losses


def bptt_step(loss_fn: LossFn, params: Parameters, rate: float) -> torch.Tensor:
  """One step of gradient descent by back-propagation, in place.

  Args:
    loss_fn: (named parameters) -> loss, a scalar.
    params: What :func:`parameters` gives; changed.
    rate: Learning rate.
  Returns:
    The loss before the step.
  """
  leaves = {n: x.detach().requires_grad_() for n, x in params.named.items()}
  loss = loss_fn(leaves)
  grads = torch.autograd.grad(
    loss, list(leaves.values()), materialize_grads=True
  )
  with torch.no_grad():
    torch._foreach_add_(list(params.named.values()), grads, alpha=-rate)
  return loss.detach()


def lstm(
  params: Mapping[str, np.ndarray],
  inputs: np.ndarray,
  targets: np.ndarray,
  weights: np.ndarray,
  device: str = "cpu",
) -> LossFn:
  """The loss of one layer of LSTM with block-diagonal heads on one batch.

  Args:
    params: Parameters of `Recurrent("lstm", ...)`, for their shapes.
    inputs: Token ids [B, T].
    targets: Token ids that follow them, [B, T].
    weights: What each prediction counts, [B, T].
    device: Where the batch lies.
  Returns:
    (named parameters) -> Σ weight cross-entropy / Σ weight.
  """
  _, heads, size, _ = params["r"].shape
  batch, length = inputs.shape
  tokens = _tokens(inputs, device)  # [T, B]
  compare = _comparison(targets, weights, device)
  known = torch.arange(length * batch, device=device).view(length, batch)
  shared = len(params["embed"]) <= tokens.numel()
  ids = (tokens if shared else known)[:, None]
  rows = ids * heads + torch.arange(heads, device=device)[:, None]
  rows = rows.view(length, heads * batch)  # Of a table [., N] of gates.

  def loss(p):
    embed = p["embed"] if shared else p["embed"][tokens.view(-1)]
    bias = p["b"].transpose(0, 1).reshape(-1)
    table = torch.addmm(bias, embed, p["w_in"])
    recurrent = (
      p["r"].transpose(0, 1).clone(memory_format=torch.contiguous_format)
    )
    recurrent = recurrent.view(heads, 4 * size, size)
    # With 2 z for z, tanh(z) = 2 σ(2 z) - 1 shares the sigmoid of the others.
    table.view(-1, heads, 4, size)[:, :, 2].mul_(2)
    recurrent.view(heads, 4, size, size)[:, 2].mul_(2)
    start = (
      p["states0"][:, 0, 0]
      if "states0" in p
      else bias.new_zeros(2, heads, size)
    )
    h, c = start[:, :, None].expand(2, heads, batch, size)
    run = _lstm_in_place if torch.is_inference_mode_enabled() else _lstm
    h = run(table.view(-1, 4 * size), rows, recurrent.mT, h, c)
    return compare(p["b_proj"], h.flatten(2).flatten(0, 1), p["w_proj"].T)

  return loss


def _lstm(table, rows, recurrent, h, c):
  """Outputs [T, B, N, D]."""
  gates, outputs = (*h.shape[:2], 4, h.shape[2]), []
  # One gather, whose gradient is one table.
  inputs = table.index_select(0, rows.view(-1))
  for x in inputs.view(-1, *h.shape[:2], table.shape[1]).unbind():
    x = torch.baddbmm(x, h, recurrent).sigmoid_()
    i, f, z, o = x.view(gates).unbind(2)
    c = torch.addcmul(f * c - i, i, z, value=2)
    h = o * torch.tanh(c)
    outputs.append(h)
  return torch.stack(outputs).transpose(1, 2)


def _lstm_in_place(table, rows, recurrent, h, c):
  """Outputs [T, B, N, D], without their gradient."""
  heads, batch, size = h.shape
  outputs = h.new_empty(len(rows), batch, heads, size).transpose(1, 2)
  c = c.clone(memory_format=torch.contiguous_format)
  squashed = torch.empty_like(c)
  x = table.new_empty(heads, batch, 4 * size)
  flat = x.view(-1, 4 * size)
  i, f, z, o = x.view(heads, batch, 4, size).unbind(2)
  for row, output in zip(rows, outputs, strict=True):
    torch.index_select(table, 0, row, out=flat)
    x.baddbmm_(h, recurrent).sigmoid_()
    c.mul_(f).addcmul_(i, z, value=2).sub_(i)
    h = torch.mul(o, torch.tanh(c, out=squashed), out=output)
  return outputs.transpose(1, 2)


def dnc(
  params: Mapping[str, np.ndarray],
  inputs: np.ndarray,
  targets: np.ndarray,
  weights: np.ndarray,
  memory: np.ndarray,
  num_slots: int,
  device: str = "cpu",
) -> LossFn:
  """The loss of the simplified DNC on one batch.

  The controller is an LSTM where it has four gates, and tanh where it has one.

  Args:
    params: Parameters of `DNC(...)`, for their shapes.
    inputs: Token ids [B, T].
    targets: Token ids that follow them, [B, T].
    weights: What each prediction counts, [B, T].
    memory: The first memory [M, S], the same for every sequence; [1, S] where
      all slots are equal, and stay so.
    num_slots: Their number M.
    device: Where the batch lies.
  Returns:
    (named parameters) -> Σ weight cross-entropy / Σ weight.
  """
  batch, length = inputs.shape
  slots, slot = memory.shape
  distinct = slots > 1
  hidden = len(params["controller_norm_weight"])
  reads = len(params["fc_read_keys_bias"])
  recurrent = len(params["controller_bias_hh"]) > hidden
  tokens = _tokens(inputs, device)  # [T, B]
  compare = _comparison(targets, weights, device)
  first = _tensor(memory, device).expand(batch, slots, slot).contiguous()
  # The sigmoids of the interface lie side by side. Keys find equal slots alike.
  interface = ["write_strength", "erase_vector", "add_vector"]
  sizes = [1 + slot, slot]
  if distinct:
    interface += ["write_keys", "read_keys"]
    sizes += [slot, reads]

  def loss(p):
    def norm(x, name):
      weight = p[f"{name}_weight"]
      bias = p[f"{name}_bias"]
      return functional.layer_norm(x, weight.shape, weight, bias)

    w_ih = p["controller_weight_ih"].T.contiguous()
    w_hh = p["controller_weight_hh"].T.contiguous()
    b_h = p["controller_bias_ih"] + p["controller_bias_hh"]
    w_q = torch.cat([p[f"fc_{x}_weight"] for x in interface]).T.contiguous()
    b_q = torch.cat([p[f"fc_{x}_bias"] for x in interface])
    memory = first
    found = norm(memory, "memory_norm") if distinct else None
    h = c = memory.new_zeros(batch, hidden)
    v = memory.new_zeros(batch, reads)
    outputs = []
    for x in functional.embedding(tokens, p["embed"]):
      u = norm(torch.cat([x, v], 1), "input_norm")
      gates = torch.addmm(torch.addmm(b_h, u, w_ih), h, w_hh)
      if recurrent:
        i, f, _, o = torch.sigmoid(gates).chunk(4, 1)
        g = torch.tanh(gates[:, 2 * hidden : 3 * hidden])
        c = torch.addcmul(f * c, i, g)
        h = o * torch.tanh(c)
      else:
        h = torch.tanh(gates)
      q = norm(h, "controller_norm")
      se, a, *both = torch.addmm(b_q, q, w_q).split_with_sizes(sizes, 1)
      se, a = torch.sigmoid(se)[:, None], torch.tanh(a)[:, None]
      if distinct:
        key, keys = both
        key = norm(key, "write_keys_norm")[:, :, None]
        weighting = torch.bmm(found, key).softmax(1) * se[..., :1]
      else:
        weighting = se[..., :1] / num_slots
      # One pass less than M (1 - ω e) + ω a.
      memory = memory + (a - memory * se[..., 1:]) * weighting
      if distinct:
        found = norm(memory, "memory_norm")
        keys = norm(keys.reshape(batch, -1, slot), "read_keys_norm")
        weightings = torch.bmm(keys, found.mT).softmax(2)
        v = torch.bmm(weightings, memory).view(batch, reads)
      else:
        v = memory[:, 0].repeat(1, reads // slot)
      outputs.append(torch.cat([q, v], 1))
    outputs = norm(torch.cat(outputs), "pre_output_norm")
    return compare(p["fc_proj_bias"], outputs, p["fc_proj_weight"].T)

  return loss


def _tensor(x, device):
  return torch.tensor(np.asarray(x), dtype=torch.float32, device=device)


def _tokens(x, device):
  """Token ids [T, B] of an array [B, T]."""
  x = np.ascontiguousarray(np.asarray(x).T)
  return torch.tensor(x, dtype=torch.int64, device=device)


def _comparison(targets, weights, device):
  """(bias, outputs [T B, H], w [H, V]) -> the weighted mean cross-entropy."""
  targets = _tokens(targets, device).view(-1)
  weights = _tensor(np.asarray(weights).T, device).reshape(-1)
  weights = weights / weights.sum()

  def compare(bias, outputs, w):
    logits = torch.addmm(bias, outputs, w)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return torch.dot(losses, weights)

  return compare
