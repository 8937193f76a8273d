r"""The simplified differentiable neural computer of arXiv:2505.17852.

A controller reads the token x_t and what it read last, [x_t; v_{t-1}], and
drives a memory of M slots of width S. One step, for slots m and read heads r,
where every LN is a layer norm with parameters of its own:

    h   = controller(LN([x_t; v_{t-1}])),  q = LN(h)
    s   = σ(W_s q + b_s),  e = σ(W_e q + b_e),  a = tanh(W_a q + b_a)
    ω   = s softmax_m(LN(W_w q + b_w) · LN(M_m))           write weighting
    M_m = M_m (1 - ω_m e) + ω_m a                          erase, then add
    α_r = softmax_m(LN(W_r q + b_r)_r · LN(M_m))           of the new memory
    v   = [Σ_m α_1m M_m; ...; Σ_m α_Rm M_m]
    logits = W_proj LN([q; v]) + b_proj

The slots are kept as their means and what is left of them, C_m = M_m - mean_m.
Then LN(M_m) = γ C_m / σ_m + β is not formed: a key k has the scores
(γ k) · C_m / σ_m, to which β would add the same for all slots. A write changes
the mean by ω_m δ_m, δ_m = mean(a - M_m e), and C_m by ω_m (a - M_m e - δ_m).

The controller is an LSTM with gates (i, f, g, o), or tanh(W_ih u + b_ih +
W_hh h + b_hh). Slots are found by their content only: those that are equal at
first are equal for ever. They all have a weight of 1 / M, so that one is kept
for all of them, a write weighs s / M, what is read is the slot, and no key has
any effect.
"""

import functools
import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zorn_jax import perturbed

NORM_EPSILON = 1e-5  # Added to variances.

_GATES = {"lstm": 4, "rnn": 1}
_MEMORY_INITS = ("random", "zeros")
_MEMORY_KEY = 0  # The first memory is the same in every run.
_SIZES = (
  "vocab_size",
  "embedding_size",
  "hidden_size",
  "num_reads",
  "memory_slots",
)

# Scores are sums of S products of size one; a matrix unit rounds to 10 bits.
_contract = functools.partial(jnp.einsum, precision="highest")

# Before XLA, which on a CPU does not vectorise it, takes the largest of a row.
_HALVINGS = 4


class State(NamedTuple):
  """What the model keeps between two tokens, in float32.

  Attributes:
    controller: (h, c) of the LSTM or (h,) of the RNN, each [B, H].
    memory: The slots, [B, M, S], or [B, 1, S] where all are equal.
    reads: What the heads have read, [B, R S].
  """

  controller: tuple[jax.Array, ...]
  memory: jax.Array
  reads: jax.Array


class _Slots(NamedTuple):
  """The memory within a chunk.

  Attributes:
    centred: Slots without their means, [B, M, S].
    mean: [B, M].
    inverse: 1 / √(variance + ε) of each slot, [B, M].
  """

  centred: jax.Array
  mean: jax.Array
  inverse: jax.Array


def _affine(x: jax.Array, layer) -> jax.Array:
  """x W + b over the last axis, in float32."""
  weight, bias = layer
  y = perturbed.matmul(x.astype(weight.dtype), weight)
  return y + jnp.broadcast_to(bias, y.shape)


def _bias(*layers) -> jax.Array:
  """The biases of some layers [out, in], one after the other, in float32."""
  biases = [perturbed.materialize(bias) for _, bias in layers]
  return jnp.concatenate(biases).astype(jnp.float32)


def _stack(*matrices):
  """The rows of some matrices, arrays or Perturbed, as one matrix."""
  values = [w.value if perturbed.is_perturbed(w) else w for w in matrices]
  ends = np.cumsum([len(value) for value in values])
  left, right = [], []
  for w, end in zip(matrices, ends, strict=True):
    if perturbed.is_perturbed(w):
      around = (end - w.shape[0], ends[-1] - end)
      left.append(jnp.pad(w.scale * w.left, ((0, 0), around)))
      right.append(w.right)
  value = jnp.concatenate(values)
  if not left:
    return value
  factors = (jnp.concatenate(x) for x in (left, right))
  return perturbed.Perturbed(value, *factors, jnp.ones(()))


def _sum(x: jax.Array) -> jax.Array:
  """Sums the last axis, kept. On a CPU, XLA has no faster sum of short rows."""
  return _contract("...s,s->...", x, jnp.ones(x.shape[-1]))[..., None]


def _mean(x: jax.Array) -> jax.Array:
  return _sum(x) / x.shape[-1]


def _normalize(x: jax.Array, layer) -> jax.Array:
  """Layer norm over the last axis, in float32."""
  scale, bias = (
    jnp.broadcast_to(v, x.shape) for v in perturbed.materialize(layer)
  )
  x = x.astype(jnp.float32)
  x = x - _mean(x)
  return x * jax.lax.rsqrt(_mean(x * x) + NORM_EPSILON) * scale + bias


def _softmax(x: jax.Array) -> jax.Array:
  peak = jax.lax.stop_gradient(x)
  for _ in range(_HALVINGS):
    if peak.shape[-1] % 2 == 0:
      peak = jnp.maximum(*jnp.split(peak, 2, axis=-1))
  x = jnp.exp(x - peak.max(-1, keepdims=True))
  return x / _sum(x)


def _slots(centred: jax.Array, mean: jax.Array) -> _Slots:
  squares = _contract("bms,bms->bm", centred, centred)
  inverse = jax.lax.rsqrt(squares / centred.shape[-1] + NORM_EPSILON)
  return _Slots(centred, mean, inverse)


def _write(slots: _Slots, weights, erase, add) -> _Slots:
  """Slots after a write with weights [B, M]; erase and add are [B, S]."""
  centred, mean, _ = slots
  kept = _contract("bs,bms->bm", erase, centred) / centred.shape[-1]
  change = _mean(add) - kept - mean * _mean(erase)
  added = add[:, None] - (centred + mean[..., None]) * erase[:, None]
  added = weights[..., None] * (added - change[..., None])
  return _slots(centred + added, mean + weights * change)


def _read(slots: _Slots, weights) -> jax.Array:
  """What heads with weights [B, R, M] read, [B, R, S]."""
  reads = _contract("bkm,bms->bks", weights, slots.centred)
  return reads + _contract("bkm,bm->bk", weights, slots.mean)[..., None]


class DNC(nn.Module):
  """Simplified DNC that streams over chunks of time.

  Matrices are [out, in] and start Xavier-uniform, biases at zero, and scales of
  norms at one. With C = E + R S, T = H + R S, and G = 4 ("lstm") or 1 ("rnn"),
  they count V E + 2 C + G H (C + H + 2) + 2 H + R S (H + 1) + 3 S (H + 1) + H +
  1 + 6 S + 2 T + V (T + 1) numbers, whatever M is.

  The state of one sequence holds M S numbers, each of which a token reads and
  writes, for every probe that runs at once; S numbers if the memory starts at
  zero.

  Attributes:
    vocab_size: Number of tokens V.
    embedding_size: Width E of the embedding.
    hidden_size: Width H of the controller.
    num_reads: Number R of read heads.
    memory_slots: Number M of slots.
    slot_size: Width S of a slot, or 0 for H / R.
    controller: "lstm" or "rnn".
    memory_init: "random", for normal entries of deviation √(1e-5 / S), the same
      in every run and for every sequence, and not parameters; or "zeros" as in
      the authors' code, where all slots stay equal, so that the memory is one
      vector that every write changes by s / M of what it could, and the keys
      and norms that find slots do not matter. The deviation gives the scores of
      the first token, whose norms have an epsilon of 1e-5, a deviation of about
      one: weightings differ between slots but no slot takes all. Slots of size
      1 have a constant norm, and nothing finds them.
    embedding_scale: Standard deviation of the initial embedding.
    dtype: Type of the parameters; sums and the state are float32 whatever it
      is.
  Raises:
    ValueError: If a size is not positive, `slot_size` is negative, or is 0 and
      `num_reads` does not divide `hidden_size`, or a named choice is unknown.
  References: arXiv:2505.17852, whose code forgets v between chunks; Graves et
    al. (2016) for the full one.
  """

  READOUT: ClassVar = ("fc_proj_weight", "fc_proj_bias")
  DECAYED: ClassVar = (
    "embed",
    "controller_weight_ih",
    "controller_weight_hh",
    "fc_read_keys_weight",
    "fc_write_keys_weight",
    "fc_write_strength_weight",
    "fc_erase_vector_weight",
    "fc_add_vector_weight",
    "fc_proj_weight",
  )

  vocab_size: int
  embedding_size: int
  hidden_size: int
  num_reads: int
  memory_slots: int
  slot_size: int = 0
  controller: str = "lstm"
  memory_init: str = "random"
  embedding_scale: float = 1.0
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    for name in _SIZES:
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be positive, got {getattr(self, name)}. Choose 1 or "
          "more."
        )
    if self.slot_size < 0:
      raise ValueError(
        f"slot_size must not be negative, got {self.slot_size}. Choose 1 or "
        "more, or 0 for hidden_size / num_reads."
      )
    if not self.slot_size and self.hidden_size % self.num_reads:
      raise ValueError(
        "without a slot_size, hidden_size must be a multiple of num_reads, got "
        f"hidden_size={self.hidden_size}, num_reads={self.num_reads}. Choose "
        "num_reads that divides it, or a slot_size."
      )
    for name, known in (
      ("controller", tuple(_GATES)),
      ("memory_init", _MEMORY_INITS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f"unknown {name} {getattr(self, name)!r}. Choose one of "
          f"{', '.join(known)}."
        )

  @property
  def slot_width(self) -> int:
    return self.slot_size or self.hidden_size // self.num_reads

  @property
  def _distinct(self) -> int:
    """How many slots may differ from each other."""
    return 1 if self.memory_init == "zeros" else self.memory_slots

  def setup(self):
    hidden, slot = self.hidden_size, self.slot_width
    reads = self.num_reads * slot
    inputs = self.embedding_size + reads
    gates = _GATES[self.controller] * hidden
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    xavier = nn.initializers.xavier_uniform()

    def param(name, init, *shape):
      return self.param(name, init, shape, self.dtype)

    def norm(name, size):
      return (
        param(f"{name}_weight", ones, size),
        param(f"{name}_bias", zeros, size),
      )

    def affine(name, fan_in, fan_out, suffix=""):
      return (
        param(f"{name}_weight{suffix}", xavier, fan_out, fan_in),
        param(f"{name}_bias{suffix}", zeros, fan_out),
      )

    self.embed = param(
      "embed",
      nn.initializers.normal(self.embedding_scale),
      self.vocab_size,
      self.embedding_size,
    )
    self.input_norm = norm("input_norm", inputs)
    self.controller_in = affine("controller", inputs, gates, "_ih")
    self.controller_recurrent = affine("controller", hidden, gates, "_hh")
    self.controller_norm = norm("controller_norm", hidden)
    self.fc_read_keys = affine("fc_read_keys", hidden, reads)
    self.fc_write_keys = affine("fc_write_keys", hidden, slot)
    self.fc_write_strength = affine("fc_write_strength", hidden, 1)
    self.fc_erase_vector = affine("fc_erase_vector", hidden, slot)
    self.fc_add_vector = affine("fc_add_vector", hidden, slot)
    self.read_keys_norm = norm("read_keys_norm", slot)
    self.write_keys_norm = norm("write_keys_norm", slot)
    self.memory_norm = norm("memory_norm", slot)
    self.pre_output_norm = norm("pre_output_norm", hidden + reads)
    self.fc_proj = affine("fc_proj", hidden + reads, self.vocab_size)

  def initial_carry(self, batch_size: int) -> State:
    """The state before the first token, zero but for a random memory."""
    slots, slot = self._distinct, self.slot_width
    if self.memory_init == "random":
      key = jax.random.key(_MEMORY_KEY)
      rows = jax.random.normal(key, (slots, slot), jnp.float32)
      rows = rows * math.sqrt(NORM_EPSILON / slot)
    else:
      rows = jnp.zeros((slots, slot))
    h = jnp.zeros((batch_size, self.hidden_size))
    return State(
      controller=(h, h) if self.controller == "lstm" else (h,),
      memory=jnp.broadcast_to(rows, (batch_size, slots, slot)),
      reads=jnp.zeros((batch_size, self.num_reads * slot)),
    )

  def _layers(self):
    """The layers of a step: what the controller reads, and what reads q."""
    ih, hh = self.controller_in, self.controller_recurrent
    controller = _stack(ih[0].mT, hh[0].mT), _bias(ih) + _bias(hh)
    vectors = [self.fc_erase_vector, self.fc_add_vector]
    if self._distinct > 1:
      vectors += [self.fc_write_keys, self.fc_read_keys]
    # Transposed here: within the loop it would be done again in every step.
    heads, strength = (
      (_stack(*(weight for weight, _ in layers)).mT, _bias(*layers))
      for layers in (vectors, (self.fc_write_strength,))
    )
    return controller, heads, strength

  def _control(self, state, x, layer):
    """The controller's state after the input x [B, C]."""
    gates = _affine(jnp.concatenate([x, state[0]], axis=-1), layer)
    if self.controller == "rnn":
      return (jnp.tanh(gates),)
    i, f, g, o = jnp.split(gates, _GATES["lstm"], axis=-1)
    c = nn.sigmoid(f) * state[1] + nn.sigmoid(i) * jnp.tanh(g)
    return nn.sigmoid(o) * jnp.tanh(c), c

  def _weigh(self, keys, norm, slots):
    """Weightings [B, K, M] of the slots for keys [B, K S]."""
    keys = keys.reshape(len(keys), -1, self.slot_width)
    scale = perturbed.materialize(self.memory_norm[0])
    keys = _normalize(keys, norm)
    keys = keys * jnp.broadcast_to(scale, keys.shape)
    scores = _contract("bks,bms->bkm", keys, slots.centred)
    return _softmax(scores * slots.inverse[:, None])

  def _access(self, slots, q, heads, strength):
    """The memory and the reads [B, R S] after one write and one read."""
    slot = self.slot_width
    erase, add, keys = jnp.split(_affine(q, heads), [slot, 2 * slot], axis=-1)
    write = nn.sigmoid(_affine(q, strength))
    read = jnp.ones((len(q), self.num_reads, 1))
    if self._distinct > 1:
      key, keys = jnp.split(keys, [slot], axis=-1)
      write *= self._weigh(key, self.write_keys_norm, slots)[:, 0]
    else:
      write /= self.memory_slots
    slots = _write(slots, write, nn.sigmoid(erase), jnp.tanh(add))
    if self._distinct > 1:
      read = self._weigh(keys, self.read_keys_norm, slots)
    return slots, _read(slots, read).reshape(len(q), -1)

  def __call__(self, carry: State, tokens: jax.Array):
    """Runs one chunk of time.

    Args:
      carry: The state before the chunk.
      tokens: Integers [B, C].
    Returns:
      The state after the chunk, and logits [B, C, V] in float32.
    """
    gates, *others = self._layers()

    def step(before, token):
      controller, slots, reads = before
      x = perturbed.take(self.embed, token).astype(jnp.float32)
      x = _normalize(jnp.concatenate([x, reads], axis=-1), self.input_norm)
      controller = self._control(controller, x, gates)
      q = _normalize(controller[0], self.controller_norm)
      slots, reads = self._access(slots, q, *others)
      return (controller, slots, reads), jnp.concatenate([q, reads], axis=-1)

    mean = _mean(carry.memory)
    slots = _slots(carry.memory - mean, mean[..., 0])
    before = (carry.controller, slots, carry.reads)
    (controller, slots, reads), outputs = jax.lax.scan(step, before, tokens.T)
    memory = slots.centred + slots.mean[..., None]
    outputs = _normalize(outputs, self.pre_output_norm)
    weight, _ = self.fc_proj
    logits = _affine(outputs, (weight.mT, _bias(self.fc_proj)))
    return State(controller, memory, reads), logits.swapaxes(0, 1)
