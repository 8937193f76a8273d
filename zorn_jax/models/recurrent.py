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
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from zorn_jax import directions, kernels, perturbed, tiles
from zorn_jax.models import cells, fused, inputs, population, readout

_READOUT_SCALES = ("hidden", "head")
_INITIAL_STATES = ("zeros", "trainable")
_SIZES = (
  "vocab_size",
  "embedding_size",
  "hidden_size",
  "num_heads",
  "num_layers",
)


# Elements of a parameter that is drawn block by block.
_LARGE = 2**24


def _scaled_normal(variance: float):
  """An initializer, which needs no memory beside a large parameter's own."""
  deviation = math.sqrt(variance)

  def init(key, shape, dtype):
    if math.prod(shape) < _LARGE:
      return nn.initializers.normal(deviation)(key, shape, dtype)
    draw = lambda window: directions.normals(key, shape, window)
    scale = lambda z, _: [(deviation * z).astype(dtype)]
    (drawn,), _ = tiles.update([jnp.zeros(shape, dtype)], draw, scale)
    return drawn

  return init


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
    implementation: Of `score` where parameters are perturbed: "triton" for the
      kernel of :mod:`zorn_jax.kernels`, "xla", or None for the kernel on GPUs
      that run it, if it takes the model; the log says which.
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
  implementation: str | None = None

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
      ("implementation", kernels.IMPLEMENTATIONS),
    ):
      if getattr(self, name) not in known:
        raise ValueError(
          f"unknown {name} {getattr(self, name)!r}. Choose one of "
          f"{', '.join(map(str, known))}."
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

  DEFERRED: ClassVar = True

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
    layout, params = population.trail(len(tokens)), self._params()
    args = (params, carry, tokens)
    after, x = self._outputs(layout, *map(population.alone, args), *args)
    x = layout.restore(x, batch=1)  # [C, B, H]
    logits = perturbed.matmul(x.astype(self.dtype), self.w_proj.mT)
    logits = self._sum(logits) + perturbed.materialize(self.b_proj)[None, None]
    return after, logits.swapaxes(0, 1)

  def score(self, carry, tokens: jax.Array, targets: jax.Array):
    """Runs one chunk of time and compares its logits with targets.

    All members of a population, the axes of a `vmap` over perturbed parameters,
    share the products with what is unperturbed. Deferred parameters are formed
    for a few heads, and the states of these heads run through the whole chunk.

    Args:
      carry: The states before the chunk.
      tokens: Integers [B, C].
      targets: Integers [B, C].
    Returns:
      The states after the chunk; cross-entropies [B, C] in nats, float32; and
      whether the target had the largest logit, [B, C].
    """
    args = (self._params(), carry, tokens, targets)

    def alone(beside, *args):
      layout = population.trail(args[2].shape[-2], (), beside)
      return self._score(layout, *map(population.alone, args), *args)

    plain = partial(alone, 1)

    def together(sizes, axes, *args):
      if fused.takes(self, args[0], axes[0]):
        return fused.score(self, sizes, axes, *args)
      if not _shared(args[0], axes[0]):
        one = partial(alone, math.prod(sizes))
        return population.one_by_one(one, sizes, axes, *args)
      layout = population.trail(args[2].shape[-2], sizes)
      return self._score(layout, *axes, *args)

    if not _is_perturbed(args[0]):
      if self.implementation == "triton":
        kernels.say("LSTM by XLA, because no parameter is perturbed")
      return plain(*args)
    nowhere = jax.tree.map(lambda _: population.NONE, args)
    one = partial(together, (), nowhere)
    return population.mapped(one, together, *args)

  def _params(self):
    return {
      "embed": self.embed,
      "layers": self.layers,
      "w_proj": self.w_proj,
      "b_proj": self.b_proj,
    }

  def _score(self, layout, axes, carry_axes, token_axes, target_axes, *args):
    params, carry, tokens, targets = args
    given = (layout, axes, carry_axes, token_axes, params, carry, tokens)
    targets = layout.place(targets, target_axes, batch=0)
    bias = population.array(layout, params["b_proj"], axes["b_proj"])
    weights = (params["w_proj"], axes["w_proj"])
    few = self.num_layers == 1 and self.vocab_size <= self.hidden_size
    if few and _is_perturbed(params):
      after, logits = self._logits(*given)
      compared = readout.compare(logits + bias[None], targets)
    else:
      after, x = self._outputs(*given)
      x = x.astype(self.dtype)
      compared = readout.compare_blocks(layout, x, *weights, bias, targets)
    return after, *(layout.restore(x, batch=0) for x in compared)

  def _outputs(self, layout, axes, carry_axes, token_axes, params, *args):
    """The states after a chunk, and outputs [C, H, trail...] in float32."""
    carry, tokens = args
    feed = inputs.of_tokens(
      layout, params["embed"], axes["embed"], tokens, token_axes
    )
    count, after, x = len(self._cell.states), [], jnp.zeros(())
    for index, layer in enumerate(params["layers"]):
      where = axes["layers"][index]
      if index:
        y = self._gather(x)
        y = _normalize(layout, layer, where, y) if self.layer_norm else y
        feed = inputs.of_outputs(layout, y.astype(self.dtype))
      part = slice(index * count, (index + 1) * count)
      states, h = self._layer(
        layout, where, layer, carry_axes[part], carry[part], feed
      )
      after += states
      x = x + h if self.residual and index else h
    return tuple(after), x

  def _logits(self, layout, axes, carry_axes, token_axes, params, *args):
    """The states after a chunk, and logits [C, V, trail...] without bias."""
    carry, tokens = args
    feed = inputs.of_tokens(
      layout, params["embed"], axes["embed"], tokens, token_axes
    )
    w_proj = (params["w_proj"], axes["w_proj"])
    after, logits = self._layer(
      layout,
      axes["layers"][0],
      params["layers"][0],
      carry_axes,
      carry,
      feed,
      w_proj,
    )
    return tuple(after), logits

  def _layer(self, layout, axes, layer, state_axes, states, feed, w_proj=None):
    """One layer over a chunk of time, some of its heads after the other.

    Returns the states after it, and outputs [C, H, trail...] in float32 or,
    with a readout, the logits [C, V, trail...] that they sum up to.
    """
    heads, head = self.num_heads, self.head_size
    gates = len(self._cell.gates)
    states = tuple(
      layout.place(state, at, batch=0)  # [N, D, trail...]
      for state, at in zip(states, state_axes, strict=True)
    )
    states = tuple(
      jnp.broadcast_to(x, x.shape[:2] + layout.shape) for x in states
    )
    size = _heads_at_once(layer["r"], heads, gates * head, layout)
    width = size * head
    total, large = None, False
    if w_proj:
      total = readout.zeros(layout, feed.length, w_proj)
      large = readout.is_large(layout, w_proj[0], width)

    def some(total, given):
      index, states = given

      def part(axis, unit):
        return perturbed.Part(axis, index * unit, unit, unit % 32 == 0)

      def cut(leaf, axis, unit):
        if size == heads:
          return leaf
        return perturbed.cut(leaf, part(axis, unit))

      parts = {
        "w_in": cut(layer["w_in"], -1, gates * width),
        "r": cut(layer["r"], -3, size),
        "b": cut(layer["b"], -2, size),
      }
      fetch = feed.through(parts["w_in"], axes["w_in"], (size, gates, head))
      run = partial(self._run, layout, parts, axes, states, fetch, feed.length)
      if large:
        states, _, h = run(None, None)
        h = h.reshape(feed.length, width, *layout.shape).astype(self.dtype)
        columns = part(-1, width)
        total = readout.add_large(layout, w_proj[0], columns, total, h)
        return total, (states, None)
      add = None
      if w_proj:
        leaf = cut(w_proj[0], -1, width)
        add = readout.adder(layout, leaf, w_proj[1])
      states, total, h = run(add, total)
      return total, (states, h)

    if size == heads:
      total, (states, h) = some(total, (0, states))
    else:
      split = lambda x: x.reshape(heads // size, size, *x.shape[1:])
      given = (jnp.arange(heads // size), jax.tree.map(split, states))
      total, (states, h) = jax.lax.scan(some, total, given)
      join = lambda x: x.reshape(heads, *x.shape[2:])
      states = jax.tree.map(join, states)
      if h is not None:
        h = h.swapaxes(0, 1)  # [C, blocks, ...]
    after = [layout.restore(state, batch=0) for state in states]
    if w_proj:
      return after, readout.logits(layout, *w_proj, total)
    return after, h.reshape(feed.length, heads * head, *layout.shape)

  def _run(self, layout, parts, axes, states, fetch, length, add, total):
    """Some heads over time: states, what `add` made, or outputs."""
    cell = self._cell
    gates = len(cell.gates)
    r = population.matrix(layout, parts["r"], axes["r"])
    by_head = lambda x: None if x is None else x.swapaxes(0, 1)
    value, left, right = (by_head(x) for x in r)
    merged = value.reshape(len(value), -1, value.shape[-1])
    b = population.array(layout, parts["b"], axes["b"]).swapaxes(0, 1)
    b, second = b[:, :gates], b[:, gates:]
    if cell.recurrent_bias:
      padding = [(0, 0), (gates - 1, 0)] + [(0, 0)] * (b.ndim - 2)
      second = jnp.pad(second, padding)

    def step(carry, t):
      states, x, total = carry
      h = states[0].astype(self.dtype)  # [N, D, trail...]
      y = population.multiply(layout, merged, h)
      y = y.reshape(*value.shape[:3], *y.shape[2:])  # [N, G, D, trail...]
      if left is not None:
        mixed = population.inner(layout, right, h[:, None, None])
        y = population.correct(layout, y, left, mixed)
      if cell.recurrent_bias:
        y = y + second
      states = cell.step(fetch.sum(x) + b, y, states)
      total = add(total, t, states[0].astype(self.dtype)) if add else total
      # Read here, so that the next step finds it in memory: XLA would not
      # vectorise what reads a part of another array.
      x = fetch.at(jnp.minimum(t + 1, length - 1))
      return (states, x, total), None if add else states[0]

    carry = (states, fetch.at(0), total)
    (states, _, total), h = jax.lax.scan(step, carry, jnp.arange(length))
    return states, total, h

  def _gather(self, x):
    """What the next layer reads [C, H, trail...], of these heads' outputs."""
    return x

  def _sum(self, logits):
    """The logits, of those of these heads."""
    return logits


# Bytes of gates, or of recurrent weights, that some heads may have at once: a
# share of the cache of one core. Of weights that are not perturbed, and may
# have a gradient, more: their heads are only split so that no copy of them is
# large.
_BLOCK_BYTES = 2**21
_COPY_BYTES = 2**26


def _heads_at_once(r, num_heads, width, layout):
  """How many heads run through time together; a divisor of all."""
  if perturbed.is_any(r):
    columns = max(math.prod(layout.shape), r.shape[-1]) * layout.beside
    most = max(1, _BLOCK_BYTES // (4 * width * columns))
  else:
    most = max(1, _COPY_BYTES // (4 * width * r.shape[-1]))
  return max(
    k for k in range(1, num_heads + 1) if num_heads % k == 0 and k <= most
  )


def _is_perturbed(params) -> bool:
  leaves = jax.tree.leaves(params, is_leaf=perturbed.is_any)
  return any(map(perturbed.is_any, leaves))


def _shared(params, axes) -> bool:
  """Whether all members have the matrices in common, apart from factors."""
  matrices = [params["embed"], params["w_proj"]]
  where = [axes["embed"], axes["w_proj"]]
  for layer, at in zip(params["layers"], axes["layers"], strict=True):
    matrices += [layer["w_in"], layer["r"]]
    where += [at["w_in"], at["r"]]
  for leaf, at in zip(matrices, where, strict=True):
    if perturbed.is_deferred(leaf):
      return False
    if at.value if perturbed.is_perturbed(leaf) else at:
      return False
  return True


def name_of(stem: str, index: int) -> str:
  """The name of the parameter `stem` of a layer."""
  return f"{stem}_{index}" if index else stem


def _normalize(layout, layer, axes, x):
  """Each column of x [C, H, trail...] standardised, scaled and shifted."""
  scale, bias = (
    population.array(layout, layer[name], axes[name])
    for name in ("norm_scale", "norm_bias")
  )
  x = jax.nn.standardize(x, axis=1, algorithm="stable")
  return x * scale[None] + bias[None]
