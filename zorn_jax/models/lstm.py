"""The LSTM language model with block-diagonal heads (arXiv:2505.17852).

One layer: embedding, input projection, recurrence within each head, readout.
With gates (i, f, z, o) and heads n,

    a_t = x_t W_in + R h_{t-1} + b          (R acts on each head alone)
    c_t = σ(a_f) c_{t-1} + σ(a_i) tanh(a_z)
    h_t = σ(a_o) tanh(c_t)
    logits_t = W_proj h_t + b_proj
"""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from zorn_jax import perturbed

NUM_GATES = 4  # Input, forget, cell candidate, output.
# Below this vocabulary size, embedding and input projection become one table.
MAX_TABLE_ROWS = 512


_READOUT_SCALES = ("hidden", "head")
_INITIAL_STATES = ("zeros", "trainable")


def _scaled_normal(variance: float):
  return nn.initializers.normal(stddev=math.sqrt(variance))


class LSTM(nn.Module):
  """LSTM language model that streams over chunks of time.

  Attributes:
    vocab_size: Number of tokens V.
    embedding_size: Width E of the embedding.
    hidden_size: Width H = N D of the state; a multiple of `num_heads`.
    num_heads: Number N of heads.
    embedding_scale: Standard deviation of the initial embedding.
    readout_scale: Standard deviation of the initial readout, "hidden" for
      1/√H, "head" for 1/√D as in the authors' code.
    initial_state: "zeros", or "trainable" for the parameter `states0` of the
      authors' code.
    forget_bias: Initial value of the forget gate's bias.
    dtype: Type of the parameters; sums are float32 whatever it is.
  Raises:
    ValueError: If a size is not positive, `hidden_size` is not a multiple of
      `num_heads`, or a named choice is unknown.
  """

  READOUT: ClassVar = ("w_proj", "b_proj")
  DECAYED: ClassVar = ("embed", "w_in", "r", "w_proj")

  vocab_size: int
  embedding_size: int
  hidden_size: int
  num_heads: int
  embedding_scale: float = 1.0
  readout_scale: str = "hidden"
  initial_state: str = "zeros"
  forget_bias: float = 0.0
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    for name in ("vocab_size", "embedding_size", "hidden_size", "num_heads"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be positive, got {getattr(self, name)}. Choose 1 or "
          "more."
        )
    if self.hidden_size % self.num_heads:
      raise ValueError(
        "hidden_size must be a multiple of num_heads, got "
        f"hidden_size={self.hidden_size}, num_heads={self.num_heads}. Choose "
        "num_heads that divides it."
      )
    for name, known in (
      ("readout_scale", _READOUT_SCALES),
      ("initial_state", _INITIAL_STATES),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f"unknown {name} {getattr(self, name)!r}. Choose one of "
          f"{', '.join(known)}."
        )

  @property
  def head_size(self) -> int:
    return self.hidden_size // self.num_heads

  def setup(self):
    vocab, embed, hidden = (
      self.vocab_size,
      self.embedding_size,
      self.hidden_size,
    )
    heads, head = self.num_heads, self.head_size
    fan_in = {"hidden": hidden, "head": head}[self.readout_scale]

    def init_bias(key, shape, dtype):
      del key
      return jnp.zeros(shape, dtype).at[1].set(self.forget_bias)

    def param(name, init, *shape):
      return self.param(name, init, shape, self.dtype)

    zeros = nn.initializers.zeros
    self.embed = param(
      "embed", _scaled_normal(self.embedding_scale**2), vocab, embed
    )
    self.w_in = param(
      "w_in", _scaled_normal(1 / embed), embed, NUM_GATES * hidden
    )
    self.r = param("r", _scaled_normal(1 / head), NUM_GATES, heads, head, head)
    self.b = param("b", init_bias, NUM_GATES, heads, head)
    if self.initial_state == "trainable":
      self.states0 = param("states0", zeros, 2, 1, 1, heads, head)
    self.w_proj = param("w_proj", _scaled_normal(1 / fan_in), vocab, hidden)
    self.b_proj = param("b_proj", zeros, vocab)

  def initial_carry(self, batch_size: int):
    """The state (h, c) before the first token, each [B, N, D] in float32."""
    shape = (batch_size, self.num_heads, self.head_size)
    if self.initial_state == "trainable":
      h, c = perturbed.materialize(self.states0).astype(jnp.float32)
      return (
        jnp.broadcast_to(h[0], shape),
        jnp.broadcast_to(c[0], shape),
      )
    return jnp.zeros(shape), jnp.zeros(shape)

  def __call__(self, carry, tokens: jax.Array):
    """Runs one chunk of time.

    Args:
      carry: The state (h, c) before the chunk, each [B, N, D].
      tokens: Integers [B, C].
    Returns:
      The state after the chunk, and logits [B, C, V] in float32.
    """
    batch, length = tokens.shape
    heads, head = self.num_heads, self.head_size
    b = perturbed.materialize(self.b).reshape(1, -1)
    if self.vocab_size <= max(batch * length, MAX_TABLE_ROWS):
      table = perturbed.matmul(self.embed, self.w_in)
      project = lambda token: perturbed.take(table, token) + b
    else:
      project = lambda token: (
        perturbed.matmul(perturbed.take(self.embed, token), self.w_in) + b
      )
    recurrent = self.r.mT  # [G, N, D in, D out]

    def step(carry, token):
      h, c = carry
      gates = project(token).reshape(batch, NUM_GATES, heads, head)
      rows = h.astype(self.dtype)[:, None, :, None]  # [B, 1, N, 1, D]
      mixed = perturbed.matmul(rows, recurrent)[..., 0, :]  # [B, G, N, D]
      i, f, z, o = jnp.moveaxis(gates + mixed, 1, 0)
      c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(z)
      h = nn.sigmoid(o) * jnp.tanh(c)
      return (h, c), h

    carry, h = jax.lax.scan(step, carry, tokens.T)
    h = h.reshape(length, batch, self.hidden_size).astype(self.dtype)
    logits = perturbed.matmul(h, self.w_proj.mT)
    logits = logits + perturbed.materialize(self.b_proj)[None, None]
    return carry, logits.swapaxes(0, 1)
