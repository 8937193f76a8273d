"""Language models of recurrent layers with block-diagonal heads.

Embedding, layers, readout. A layer projects its input x_t, mixes its last
output within each head, and hands both to its cell, one of
:mod:`zorn_jax.models.cells`:

    state_t = cell(x_t W_in + b, R h_{t-1}, state_{t-1})
    logits_t = W_proj h_t + b_proj

Layers after the first may normalise their input and add it to their output. One
layer of `lstm` is the model of arXiv:2505.17852.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from zorn_jax import perturbed
from zorn_jax.models import cells

# Below this vocabulary size, embedding and input projection become one table.
MAX_TABLE_ROWS = 512

_READOUT_SCALES = ("hidden", "head")
_INITIAL_STATES = ("zeros", "trainable")
_SIZES = (
  "vocab_size",
  "embedding_size",
  "hidden_size",
  "num_heads",
  "num_layers",
)


def _scaled_normal(variance: float):
  return nn.initializers.normal(stddev=math.sqrt(variance))


class Recurrent(nn.Module):
  """Recurrent language model that streams over chunks of time.

  The parameters of the first layer are `w_in` [E, G H], `r` [G, N, D, D], D out
  by D in, and `b` [G, N, D]; those of the second `w_in_1` [H, G H], `r_1` and
  `b_1`, and so on. The GRU's `b` has a fourth row, the bias b_rn that its reset
  gate scales together with the recurrent product.

  The columns of `w_in` are ordered head, gate, unit: G D of them for the first
  head, D for each gate, then those of the second. Any contiguous part of all
  these parameters' heads is a model of these heads, which
  :func:`zorn_jax.models.shard_heads` gives to one device.

  Attributes:
    cell: "lstm", "gru", "slstm" or "elman".
    vocab_size: Number of tokens V.
    embedding_size: Width E of the embedding.
    hidden_size: Width H = N D of each layer; a multiple of `num_heads`.
    num_heads: Number N of heads.
    num_layers: Number of layers. All but the first project a whole chunk of
      time at once, which takes [B, C, G H] of memory.
    layer_norm: Whether layers after the first standardise their input over H,
      with the parameters `norm_scale_1` and `norm_bias_1` [H] and so on.
    residual: Whether layers after the first add their input to their output.
    embedding_scale: Standard deviation of the initial embedding.
    readout_scale: Standard deviation of the initial readout, "hidden" for
      1/√H, "head" for 1/√D as in the authors' code.
    initial_state: "zeros", or "trainable" for the parameter `states0`
      [S, 1, 1, N, D] in each layer: (h, c) of `lstm` as in the authors' code, h
      of the other cells.
    forget_bias: Initial value of the forget gate's bias; 0 where the cell has
      no such gate.
    dtype: Type of the parameters; sums are float32 whatever it is.
  Raises:
    ValueError: If a size is not positive, `hidden_size` is not a multiple of
      `num_heads`, a named choice is unknown, or an option would do nothing.
  """

  cell: str
  vocab_size: int
  embedding_size: int
  hidden_size: int
  num_heads: int
  num_layers: int = 1
  layer_norm: bool = False
  residual: bool = False
  embedding_scale: float = 1.0
  readout_scale: str = "hidden"
  initial_state: str = "zeros"
  forget_bias: float = 0.0
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    for name in _SIZES:
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
      ("cell", cells.CELLS),
      ("readout_scale", _READOUT_SCALES),
      ("initial_state", _INITIAL_STATES),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f"unknown {name} {getattr(self, name)!r}. Choose one of "
          f"{', '.join(known)}."
        )
    if self.forget_bias and "f" not in self._cell.gates:
      raise ValueError(
        f"the cell {self.cell!r} has no forget gate, got "
        f"forget_bias={self.forget_bias}. Set it to 0."
      )
    for name in ("layer_norm", "residual"):
      if getattr(self, name) and self.num_layers == 1:
        raise ValueError(
          f"{name} acts on the layers after the first, got num_layers=1. Set "
          "it to False, or choose more layers."
        )

  @property
  def READOUT(self) -> tuple[str, ...]:  # noqa: N802 (what `from_linen` reads)
    return ("w_proj", "b_proj")

  @property
  def DECAYED(self) -> tuple[str, ...]:  # noqa: N802 (what `from_linen` reads)
    matrices = [
      name_of(stem, index)
      for index in range(self.num_layers)
      for stem in ("w_in", "r")
    ]
    return ("embed", *matrices, "w_proj")

  @property
  def head_size(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def _width(self) -> int:
    """The width of what layers after the first read."""
    return self.hidden_size

  @property
  def _cell(self) -> cells.Cell:
    return cells.CELLS[self.cell]

  def setup(self):
    vocab, embed, hidden = (
      self.vocab_size,
      self.embedding_size,
      self.hidden_size,
    )
    cell, heads, head = self._cell, self.num_heads, self.head_size
    fan_in = {"hidden": hidden, "head": head}[self.readout_scale]
    zeros, ones = nn.initializers.zeros, nn.initializers.ones

    def init_bias(key, shape, dtype):
      b = zeros(key, shape, dtype)
      if "f" not in cell.gates:
        return b
      return b.at[cell.gates.index("f")].set(self.forget_bias)

    def param(name, init, *shape):
      return self.param(name, init, shape, self.dtype)

    def layer(index, width):
      def add(stem, init, *shape):
        params[stem] = param(name_of(stem, index), init, *shape)

      params = {}
      if self.layer_norm and index:
        add("norm_scale", ones, width)
        add("norm_bias", zeros, width)
      gates = len(cell.gates)
      add("w_in", _scaled_normal(1 / width), width, gates * hidden)
      add("r", _scaled_normal(1 / head), gates, heads, head, head)
      add("b", init_bias, cell.num_biases, heads, head)
      if self.initial_state == "trainable":
        add("states0", zeros, cell.num_trainable, 1, 1, heads, head)
      return params

    self.embed = param(
      "embed", _scaled_normal(self.embedding_scale**2), vocab, embed
    )
    widths = [embed] + [self._width] * (self.num_layers - 1)
    self.layers = [layer(index, width) for index, width in enumerate(widths)]
    self.w_proj = param("w_proj", _scaled_normal(1 / fan_in), vocab, hidden)
    self.b_proj = param("b_proj", zeros, vocab)

  def initial_carry(self, batch_size: int):
    """The states of all layers before the first token.

    A flat tuple of arrays [B, N, D] in float32: (h, c) for one layer of `lstm`,
    (h, c, h_1, c_1) for two.
    """
    shape = (batch_size, self.num_heads, self.head_size)
    carry = []
    for layer in self.layers:
      trained = []
      if self.initial_state == "trainable":
        states0 = perturbed.materialize(layer["states0"]).astype(jnp.float32)
        trained = [jnp.broadcast_to(state[0], shape) for state in states0]
      others = len(self._cell.states) - len(trained)
      carry += [*trained, *(jnp.zeros(shape) for _ in range(others))]
    return tuple(carry)

  def __call__(self, carry, tokens: jax.Array):
    """Runs one chunk of time.

    Args:
      carry: The states before the chunk, as :meth:`initial_carry` has them.
      tokens: Integers [B, C].
    Returns:
      The states after the chunk, and logits [B, C, V] in float32.
    """
    batch, length = tokens.shape
    first, *others = self.layers
    if self.vocab_size <= max(batch * length, MAX_TABLE_ROWS):
      table = perturbed.matmul(self.embed, first["w_in"])
      project = lambda token: perturbed.take(table, token)
    else:
      project = lambda token: perturbed.matmul(
        perturbed.take(self.embed, token), first["w_in"]
      )
    count = len(self._cell.states)
    after, x = self._scan(first, carry[:count], tokens.T, project)
    for index, layer in enumerate(others, 1):
      y = self._gather(x)
      y = _normalize(layer, y) if self.layer_norm else y
      y = perturbed.matmul(y.astype(self.dtype), layer["w_in"])
      state = carry[index * count : (index + 1) * count]
      state, h = self._scan(layer, state, y, lambda row: row)
      after += state
      x = x + h if self.residual else h
    logits = perturbed.matmul(x.astype(self.dtype), self.w_proj.mT)
    logits = self._sum(logits) + perturbed.materialize(self.b_proj)[None, None]
    return after, logits.swapaxes(0, 1)

  def _gather(self, x):
    """What the next layer reads [C, B, H], of the outputs of these heads."""
    return x

  def _sum(self, logits):
    """The logits, of those of these heads."""
    return logits

  def _scan(self, layer, state, xs, project):
    """One layer over time: the last state, and outputs [C, B, H] in float32."""
    cell, heads, head = self._cell, self.num_heads, self.head_size
    batch, gates = len(state[0]), len(cell.gates)
    b = perturbed.materialize(layer["b"])
    b, second = b[:gates][None], b[gates:]
    if cell.recurrent_bias:
      second = jnp.pad(second, ((gates - 1, 0), (0, 0), (0, 0)))[None]
    recurrent = layer["r"].mT  # [G, N, D in, D out]

    def step(state, x):
      x = project(x).reshape(batch, heads, gates, head).swapaxes(1, 2) + b
      rows = state[0].astype(self.dtype)[:, None, :, None]  # [B, 1, N, 1, D]
      y = perturbed.matmul(rows, recurrent)[..., 0, :]  # [B, G, N, D]
      if cell.recurrent_bias:
        y = y + second
      state = cell.step(x, y, state)
      return state, state[0]

    state, h = jax.lax.scan(step, state, xs)
    return state, h.reshape(len(xs), batch, self.hidden_size)


def name_of(stem: str, index: int) -> str:
  """The name of the parameter `stem` of a layer."""
  return f"{stem}_{index}" if index else stem


def _normalize(layer, x):
  """Each row of x [C, B, H] standardised, scaled and shifted."""
  scale, bias = perturbed.materialize((layer["norm_scale"], layer["norm_bias"]))
  x = jax.nn.standardize(x, algorithm="stable")
  return x * scale[None, None] + bias[None, None]
