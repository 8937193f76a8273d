"""The recurrent cells: what one layer does within one step of time.

A cell gets the input gates x [B, G, N, D], projected and with their bias, and
the recurrent gates y = R h [B, G, N, D], one product per gate and head. Its
state is a tuple of arrays [B, N, D] in float32, zero before the first token,
whose first is the output h.

References: Hochreiter and Schmidhuber (1997) and Gers et al. (2000), `lstm`;
arXiv:1406.1078, `gru`; arXiv:2405.04517, `slstm`; Elman (1990), `elman`;
arXiv:2412.07752, all four with block-diagonal heads.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

State = tuple[jax.Array, ...]
StepFn = Callable[[jax.Array, jax.Array, State], State]


class Cell(NamedTuple):
  """A recurrence, as its step and the names of what the step takes.

  Attributes:
    gates: Names of the G gates, in the order of the parameters; "f" is a forget
      gate.
    states: Names of the state's arrays, the output "h" first.
    step: (x, y, state) -> state, one token further.
    num_trainable: How many of the states, from the first on, may start at a
      trained value; the others start at zero.
    recurrent_bias: Whether the last gate has a second bias, within `y`.
  """

  gates: tuple[str, ...]
  states: tuple[str, ...]
  step: StepFn
  num_trainable: int
  recurrent_bias: bool = False

  @property
  def num_biases(self) -> int:
    return len(self.gates) + self.recurrent_bias


def _elman(x, y, state):
  """h = tanh(x + y)."""
  del state
  return (jnp.tanh(x + y)[:, 0],)


def _gru(x, y, state):
  """The gated recurrent unit, its reset gate after the product.

  r = σ(x_r + y_r), z = σ(x_z + y_z), n = tanh(x_n + r y_n) with y_n = R_n h +
  b_rn, h = (1 - z) n + z h.
  """
  (h,) = state
  r, z = jnp.moveaxis(jax.nn.sigmoid(x[:, :2] + y[:, :2]), 1, 0)
  n = jnp.tanh(x[:, 2] + r * y[:, 2])
  return ((1 - z) * n + z * h,)


def _lstm(x, y, state):
  """c = σ(f) c + σ(i) tanh(z), h = σ(o) tanh(c)."""
  _, c = state
  i, f, z, o = jnp.moveaxis(x + y, 1, 0)
  c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(z)
  return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _slstm(x, y, state):
  """c = σ(f) c + e^i tanh(z), n = σ(f) n + e^i, h = σ(o) c / n.

  Kept as c e^-m and n e^-m with m the largest exponent so far. No exponential
  exceeds 1, and one of the two is 1, so that the kept n is at least 1.
  """
  _, c, n, m = state
  i, f, z, o = jnp.moveaxis(x + y, 1, 0)
  # Before the first token nothing was kept: m = 0 would be a weight of one.
  kept = jax.nn.log_sigmoid(f) + jnp.where(n > 0, m, -jnp.inf)
  m = jnp.maximum(kept, i)
  forget, write = jnp.exp(kept - m), jnp.exp(i - m)
  c = forget * c + write * jnp.tanh(z)
  n = forget * n + write
  return jax.nn.sigmoid(o) * c / n, c, n, m


CELLS = {
  "elman": Cell(("a",), ("h",), _elman, 1),
  "gru": Cell(("r", "z", "n"), ("h",), _gru, 1, recurrent_bias=True),
  "lstm": Cell(("i", "f", "z", "o"), ("h", "c"), _lstm, 2),
  # c and n sum over tokens seen: before the first one only h can be anything.
  "slstm": Cell(("i", "f", "z", "o"), ("h", "c", "n", "m"), _slstm, 1),
}
