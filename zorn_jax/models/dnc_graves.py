r"""The differentiable neural computer of Graves et al. (2016).

An LSTM reads the token x_t and what it read last, [x_t; r_{t-1}], and emits an
interface vector that drives a memory of M slots of width W through one write
head and R read heads. One step, for slots i and j and read head r:

    ψ[i]   = Π_r (1 - f_r w^r_r[i])                       retention
    u      = (u + w^w - u w^w) ψ                          usage
    a[φ_k] = (1 - u[φ_k]) Π_{l<k} u[φ_l]                  allocation
    w^w    = g_w (g_a a + (1 - g_a) C(M, k_w, β_w))       write weighting
    M      = M (1 - w^w eᵀ) + w^w vᵀ                      erase, then add
    L[i,j] = (1 - w^w[i] - w^w[j]) L[i,j] + w^w[i] p[j]   links, L[i,i] = 0
    p      = (1 - Σ w^w) p + w^w                          precedence
    w^r_r  = π_1 Lᵀ w^r_r + π_2 C(M, k_r, β_r) + π_3 L w^r_r
    r_r    = Mᵀ w^r_r
    y      = W_output h + W_reads [r_1; ...; r_R]

Right-hand sides hold values of the step before until their own line has been
passed. φ lists the slots from the least used on, C is a softmax over slots of
β times the cosine similarity. Everything starts at zero; allocation, which
takes the first of equally used slots, tells the slots apart.
"""

import functools
import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from zorn_jax import perturbed

NUM_GATES = 4  # Input, forget, cell candidate, output.
NUM_MODES = 3  # Backward, content, forward.
# Added to squared norms, so that an empty slot has a similarity and a gradient.
NORM_EPSILON = 1e-6

# Weightings are sums that stay below 1; a matrix unit rounds to 10 bits.
_contract = functools.partial(jnp.einsum, precision="highest")


def _normal(fan_in: int):
  return nn.initializers.normal(stddev=1 / math.sqrt(fan_in))


class State(NamedTuple):
  """What the model keeps between two tokens, in float32.

  Attributes:
    hidden: Output h of the controller, [B, H].
    cell: Its cell, [B, H].
    reads: What the heads have read, [B, R, W].
    memory: The slots, [B, M, W].
    usage: How much each slot is in use, in [0, 1], [B, M].
    precedence: How much each slot was the last one written, [B, M].
    links: Entry (i, j) is how much i was written right after j, [B, M, M].
    write_weights: Weighting of the write head, [B, M].
    read_weights: Weightings of the read heads, [B, R, M].
  """

  hidden: jax.Array
  cell: jax.Array
  reads: jax.Array
  memory: jax.Array
  usage: jax.Array
  precedence: jax.Array
  links: jax.Array
  write_weights: jax.Array
  read_weights: jax.Array


class Interface(NamedTuple):
  """The interface vector, cut into its parts and brought into their ranges.

  Attributes:
    read_keys: [B, R, W].
    read_strengths: [B, R], at least 1.
    write_key: [B, W].
    write_strength: [B], at least 1.
    erase: [B, W], in [0, 1].
    write: What is added, [B, W].
    free_gates: [B, R], in [0, 1].
    allocation_gate: [B], in [0, 1].
    write_gate: [B], in [0, 1].
    read_modes: [B, R, 3] (backward, content, forward), of sum 1.
  """

  read_keys: jax.Array
  read_strengths: jax.Array
  write_key: jax.Array
  write_strength: jax.Array
  erase: jax.Array
  write: jax.Array
  free_gates: jax.Array
  allocation_gate: jax.Array
  write_gate: jax.Array
  read_modes: jax.Array


def _oneplus(x: jax.Array) -> jax.Array:
  return 1 + jax.nn.softplus(x)


def split_interface(vector: jax.Array, num_reads: int, slot_size: int):
  """Cuts interface vectors in the order of the paper.

  Args:
    vector: [B, W R + 3 W + 5 R + 3].
    num_reads: Number R of read heads.
    slot_size: Width W of a slot.
  Returns:
    An :class:`Interface`.
  """
  r, w = num_reads, slot_size
  sizes = (r * w, r, w, 1, w, w, r, 1, 1, NUM_MODES * r)
  ends = [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
  parts = Interface(*jnp.split(vector, ends, axis=-1))
  batch = len(vector)
  return Interface(
    read_keys=parts.read_keys.reshape(batch, r, w),
    read_strengths=_oneplus(parts.read_strengths),
    write_key=parts.write_key,
    write_strength=_oneplus(parts.write_strength[:, 0]),
    erase=nn.sigmoid(parts.erase),
    write=parts.write,
    free_gates=nn.sigmoid(parts.free_gates),
    allocation_gate=nn.sigmoid(parts.allocation_gate[:, 0]),
    write_gate=nn.sigmoid(parts.write_gate[:, 0]),
    read_modes=nn.softmax(parts.read_modes.reshape(batch, r, NUM_MODES)),
  )


def content_weights(memory: jax.Array, keys: jax.Array, strengths: jax.Array):
  """Weightings of the slots by their likeness to keys.

  Args:
    memory: [B, M, W].
    keys: [B, K, W].
    strengths: [B, K].
  Returns:
    [B, K, M], softmax over M of the strength times the cosine similarity,
    whose squared norms are larger by `NORM_EPSILON`.
  """
  inverse = lambda x: jax.lax.rsqrt(jnp.square(x).sum(-1) + NORM_EPSILON)
  products = _contract("bkw,bmw->bkm", keys, memory)
  norms = inverse(keys)[:, :, None] * inverse(memory)[:, None, :]
  return nn.softmax(strengths[:, :, None] * products * norms)


def allocation_weights(usage: jax.Array) -> jax.Array:
  """Weightings of the slots by how free they are.

  Args:
    usage: [B, M], in [0, 1].
  Returns:
    [B, M]: the least used slot has its free share, the next one its own of
    what is left. Of equally used slots the first comes first. The gradient
    takes the order as given.
  """
  order = jnp.argsort(usage, axis=-1, stable=True)
  ascending = jnp.take_along_axis(usage, order, axis=-1)
  before = jnp.cumprod(ascending[:, :-1], axis=-1)
  before = jnp.concatenate([jnp.ones_like(usage[:, :1]), before], axis=-1)
  rows = jnp.arange(len(usage))[:, None]
  return (
    jnp.zeros_like(usage)
    .at[rows, order]
    .set((1 - ascending) * before, unique_indices=True)
  )


def access(state: State, interface: Interface) -> State:
  """Writes to the memory and reads from it, once.

  Args:
    state: The state before; the controller's part is handed through.
    interface: What the controller asks for.
  Returns:
    The state after.
  """
  freed = interface.free_gates[:, :, None] * state.read_weights
  retention = jnp.prod(1 - freed, axis=1)
  # In this form rounding keeps usage in [0, 1].
  usage = state.usage + (1 - state.usage) * state.write_weights
  usage = usage * retention

  content = content_weights(
    state.memory,
    interface.write_key[:, None, :],
    interface.write_strength[:, None],
  )[:, 0]
  gate = interface.allocation_gate[:, None]
  write = gate * allocation_weights(usage) + (1 - gate) * content
  write = interface.write_gate[:, None] * write

  kept = 1 - write[:, :, None] * interface.erase[:, None, :]
  memory = state.memory * kept
  memory = memory + write[:, :, None] * interface.write[:, None, :]

  kept = 1 - write[:, :, None] - write[:, None, :]
  links = kept * state.links
  links = links + write[:, :, None] * state.precedence[:, None, :]
  links = links * (1 - jnp.eye(links.shape[-1])[None])
  precedence = (1 - write.sum(-1, keepdims=True)) * state.precedence + write

  forward = _contract("bij,brj->bri", links, state.read_weights)
  backward = _contract("bji,brj->bri", links, state.read_weights)
  content = content_weights(
    memory, interface.read_keys, interface.read_strengths
  )
  modes = interface.read_modes
  read = modes[..., :1] * backward + modes[..., 1:2] * content
  read = read + modes[..., 2:] * forward
  return state._replace(
    reads=_contract("brm,bmw->brw", read, memory),
    memory=memory,
    usage=usage,
    precedence=precedence,
    links=links,
    write_weights=write,
    read_weights=read,
  )


class DNCGraves(nn.Module):
  """Differentiable neural computer that streams over chunks of time.

  The controller is one LSTM layer with gates (i, f, z, o). Matrices start
  normal with variance 1 / fan_in, where the readout's two matrices are one
  layer of fan_in H + R W; the bias of the LSTM, the only one, starts at zero.
  They count V E + 4 H (E + R W + H + 1) + H (R W + 3 W + 5 R + 3) + V (H + R W)
  numbers, whatever M is.

  The links of one sequence are M² numbers, and each token reads and writes all
  of them: memory and time grow with B M², for every probe that runs at once.
  Slots that nothing has told apart are exchangeable: rounding may break a tie
  between them in another way, which permutes the state and keeps the logits.

  Attributes:
    vocab_size: Number of tokens V.
    embedding_size: Width E of the embedding.
    hidden_size: Width H of the controller.
    num_reads: Number R of read heads.
    memory_slots: Number M of slots.
    slot_size: Width W of a slot.
    embedding_scale: Standard deviation of the initial embedding.
    dtype: Type of the parameters; sums and the state are float32 whatever it
      is.
  Raises:
    ValueError: If a size is not positive.
  References: Graves et al. (2016), Hybrid computing using a neural network with
    dynamic external memory, Nature 538, Methods.
  """

  READOUT: ClassVar = ("w_output", "w_reads")
  DECAYED: ClassVar = (
    "embed",
    "w_controller",
    "w_interface",
    "w_output",
    "w_reads",
  )

  vocab_size: int
  embedding_size: int
  hidden_size: int
  num_reads: int
  memory_slots: int
  slot_size: int
  embedding_scale: float = 1.0
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    for name in (
      "vocab_size",
      "embedding_size",
      "hidden_size",
      "num_reads",
      "memory_slots",
      "slot_size",
    ):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be positive, got {getattr(self, name)}. Choose 1 or "
          "more."
        )

  def setup(self):
    vocab, embed, hidden = (
      self.vocab_size,
      self.embedding_size,
      self.hidden_size,
    )
    reads = self.num_reads * self.slot_size
    inputs = embed + reads + hidden
    interface = reads + 3 * self.slot_size + 5 * self.num_reads + 3

    def param(name, init, *shape):
      return self.param(name, init, shape, self.dtype)

    self.embed = param(
      "embed", nn.initializers.normal(self.embedding_scale), vocab, embed
    )
    self.w_controller = param(
      "w_controller", _normal(inputs), inputs, NUM_GATES * hidden
    )
    self.b = param("b", nn.initializers.zeros, NUM_GATES * hidden)
    self.w_interface = param("w_interface", _normal(hidden), hidden, interface)
    readout = _normal(hidden + reads)
    self.w_output = param("w_output", readout, vocab, hidden)
    self.w_reads = param("w_reads", readout, vocab, reads)

  def initial_carry(self, batch_size: int) -> State:
    """The state before the first token, zero everywhere."""
    b, r, m, w = batch_size, self.num_reads, self.memory_slots, self.slot_size
    return State(
      hidden=jnp.zeros((b, self.hidden_size)),
      cell=jnp.zeros((b, self.hidden_size)),
      reads=jnp.zeros((b, r, w)),
      memory=jnp.zeros((b, m, w)),
      usage=jnp.zeros((b, m)),
      precedence=jnp.zeros((b, m)),
      links=jnp.zeros((b, m, m)),
      write_weights=jnp.zeros((b, m)),
      read_weights=jnp.zeros((b, r, m)),
    )

  def __call__(self, carry: State, tokens: jax.Array):
    """Runs one chunk of time.

    Args:
      carry: The state before the chunk.
      tokens: Integers [B, C].
    Returns:
      The state after the chunk, and logits [B, C, V] in float32.
    """
    batch = len(tokens)
    b = perturbed.materialize(self.b)[None]

    def step(state, token):
      x = perturbed.take(self.embed, token)
      inputs = (x, state.reads.reshape(batch, -1), state.hidden)
      inputs = jnp.concatenate([x.astype(self.dtype) for x in inputs], axis=-1)
      gates = perturbed.matmul(inputs, self.w_controller) + b
      i, f, z, o = jnp.split(gates, NUM_GATES, axis=-1)
      cell = nn.sigmoid(f) * state.cell + nn.sigmoid(i) * jnp.tanh(z)
      hidden = nn.sigmoid(o) * jnp.tanh(cell)
      vector = perturbed.matmul(hidden.astype(self.dtype), self.w_interface)
      interface = split_interface(vector, self.num_reads, self.slot_size)
      state = access(state._replace(hidden=hidden, cell=cell), interface)
      return state, (hidden, state.reads)

    carry, (hidden, reads) = jax.lax.scan(step, carry, tokens.T)
    reads = reads.reshape(*hidden.shape[:2], -1).astype(self.dtype)
    logits = perturbed.matmul(hidden.astype(self.dtype), self.w_output.mT)
    logits = logits + perturbed.matmul(reads, self.w_reads.mT)
    return carry, logits.swapaxes(0, 1)
