"""Models of a user, for the tests."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import zorn_jax


class LinenGRU(nn.Module):
  """Embedding, Flax's own GRU cell, readout."""

  vocab_size: int
  hidden_size: int

  READOUT = ("out",)
  DECAYED = ("embed", "out")

  def initial_carry(self, batch_size):
    return jnp.zeros((batch_size, self.hidden_size))

  @nn.compact
  def __call__(self, carry, tokens):
    x = nn.Embed(self.vocab_size, self.hidden_size, name="embed")(tokens)
    cell = nn.GRUCell(self.hidden_size, name="cell")
    outputs = []
    for t in range(tokens.shape[1]):
      carry, y = cell(carry, x[:, t])
      outputs.append(y)
    out = nn.Dense(self.vocab_size, name="out")
    return carry, out(jnp.stack(outputs, 1))


class NNXElman(nnx.Module):
  """The same with an Elman cell, in NNX."""

  READOUT = ("out/kernel", "out/bias")
  DECAYED = ("mixed/0/kernel", "out/kernel")

  def __init__(self, vocab_size, hidden_size, rngs):
    self.hidden_size = hidden_size
    self.embed = nnx.Embed(vocab_size, hidden_size, rngs=rngs)
    self.mixed = nnx.List([nnx.Linear(hidden_size, hidden_size, rngs=rngs)])
    self.out = nnx.Linear(hidden_size, vocab_size, rngs=rngs)

  def initial_carry(self, batch_size):
    return jnp.zeros((batch_size, self.hidden_size))

  def __call__(self, carry, tokens):
    x = self.embed(tokens)
    outputs = []
    for t in range(tokens.shape[1]):
      carry = jnp.tanh(x[:, t] + self.mixed[0](carry))
      outputs.append(carry)
    return carry, self.out(jnp.stack(outputs, 1))


class Bigram(nn.Module):
  """Sees factors, and knows what to do with them."""

  vocab_size: int
  width: int

  PERTURBED = True

  def initial_carry(self, batch_size):
    return jnp.zeros((batch_size, 0))

  @nn.compact
  def __call__(self, carry, tokens):
    init = nn.initializers.normal(1.0)
    embed = self.param("embed", init, (self.vocab_size, self.width))
    out = self.param("out", init, (self.width, self.vocab_size))
    return carry, zorn_jax.matmul(zorn_jax.perturbed.take(embed, tokens), out)


class Counting(nnx.Module):
  """Keeps a count, which a pure function cannot."""

  def __init__(self, vocab_size, rngs):
    self.count = nnx.BatchStat(jnp.zeros(()))
    self.out = nnx.Linear(1, vocab_size, rngs=rngs)

  def initial_carry(self, batch_size):
    return jnp.zeros((batch_size, 1))

  def __call__(self, carry, tokens):
    return carry, self.out(jax.nn.one_hot(tokens, 1))


class Scored(nn.Module):
  """Has a method whose name we use otherwise."""

  vocab_size: int

  def initial_carry(self, batch_size):
    return jnp.zeros((batch_size, 0))

  @nn.compact
  def __call__(self, carry, tokens):
    return carry, nn.Embed(self.vocab_size, self.vocab_size)(tokens)

  def score(self, sentence):
    raise AssertionError(sentence)


class Normed(Scored):
  @nn.compact
  def __call__(self, carry, tokens):
    x = nn.Embed(self.vocab_size, self.vocab_size)(tokens)
    return carry, nn.BatchNorm(use_running_average=True)(x)


class Wrong(nnx.Module):
  """Misspells a field."""

  def __init__(self, vocab_size, hidden_size, rngs):
    self.hidden_size = hidden_size
    self.out = nnx.Linear(self.hidden_sizee, vocab_size, rngs=rngs)

  def initial_carry(self, batch_size):
    return jnp.zeros((batch_size, 0))

  def __call__(self, carry, tokens):
    return carry, self.out(tokens)


class NoCarry(nn.Module):
  vocab_size: int

  @nn.compact
  def __call__(self, carry, tokens):
    return carry, nn.Dense(self.vocab_size)(tokens)


NOT_A_CLASS = 3
