"""The LSTM against its equations, head by head."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import directions, models, perturbed

# The name `models.lstm` is the function's.
lstm = importlib.import_module("zorn_jax.models.lstm")

# Bounds of STYLE.md, times the square root of the longest reduction.
ATOL = {jnp.float32: 5e-7, jnp.bfloat16: 2e-3}


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def equations(params, tokens, carry=None, narrow=lambda h: h):
  """Logits [B, T, V] and the state (h, c), in float64, head by head.

  Args:
    params: The model's, as arrays.
    tokens: Integers [B, T].
    carry: The state (h, c) before, [B, N, D] each.
    narrow: What happens to h before it is multiplied.
  """
  p = {name: np.asarray(x, np.float64) for name, x in params.items()}
  _, num_heads, size, _ = p["r"].shape
  rows, length = tokens.shape
  hidden = num_heads * size
  states0 = p.get("states0", np.zeros((2, 1, 1, num_heads, size)))
  logits = np.zeros((rows, length, len(p["b_proj"])))
  last_h = np.zeros((rows, num_heads, size))
  last_c = np.zeros((rows, num_heads, size))
  for row in range(rows):
    if carry is None:
      h, c = states0[0, 0, 0].copy(), states0[1, 0, 0].copy()
    else:
      h, c = (np.array(x[row], np.float64) for x in carry)
    for t in range(length):
      drive = p["embed"][tokens[row, t]] @ p["w_in"]
      for n in range(num_heads):
        gates = []
        for g in range(4):
          first = g * hidden + n * size
          gates.append(
            drive[first : first + size]
            + p["r"][g, n] @ narrow(h[n])
            + p["b"][g, n]
          )
        i, f, z, o = gates
        c[n] = sigmoid(f) * c[n] + sigmoid(i) * np.tanh(z)
        h[n] = sigmoid(o) * np.tanh(c[n])
      logits[row, t] = p["w_proj"] @ narrow(h.ravel()) + p["b_proj"]
    last_h[row], last_c[row] = h, c
  return logits, (last_h, last_c)


def build(vocab=11, heads=3, **options):
  """A small model with parameters that are nowhere zero."""
  model = models.lstm(
    vocab_size=vocab,
    embedding_size=5,
    hidden_size=6,
    num_heads=heads,
    **options,
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(heads)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes
  )
  return model, params


def tokens_of(vocab, rows, length):
  return np.random.default_rng(1).integers(0, vocab, (rows, length))


def run(model, params, tokens, carry=None):
  if carry is None:
    carry = jax.jit(model.initial_carry, static_argnums=1)(params, len(tokens))
  return jax.jit(model.apply)(params, carry, jnp.asarray(tokens))


def check(got, expected, atol):
  (h, c), logits = got
  expected_logits, expected_carry = expected
  assert logits.dtype == h.dtype == c.dtype == jnp.float32
  np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=atol)
  np.testing.assert_allclose(
    np.stack([h, c]), np.stack(expected_carry), rtol=0, atol=atol
  )


# Few tokens and more words than a table may have: no table.
FOLDED, UNFOLDED = 11, lstm.MAX_TABLE_ROWS + 1


@pytest.mark.parametrize("vocab", [FOLDED, UNFOLDED])
@pytest.mark.parametrize("initial_state", ["zeros", "trainable"])
@pytest.mark.parametrize("heads", [1, 3])
def test_logits_and_state_follow_the_equations(heads, initial_state, vocab):
  model, params = build(vocab, heads, initial_state=initial_state)
  assert ("states0" in params) == (initial_state == "trainable")
  tokens = tokens_of(vocab, 2, 7)
  # Sums over E, D and H, whose errors meet again at each of 7 steps.
  atol = 7 * ATOL[jnp.float32] * np.sqrt(5 + 6 + 6)
  check(run(model, params, tokens), equations(params, tokens), atol)


def test_many_tokens_fold_a_large_vocabulary(monkeypatch):
  monkeypatch.setattr(lstm, "MAX_TABLE_ROWS", 4)
  model, params = build(FOLDED)
  atol = 7 * ATOL[jnp.float32] * np.sqrt(5 + 6 + 6)
  for length, table in ((7, True), (5, False)):  # 14 tokens, then 10.
    tokens = tokens_of(FOLDED, 2, length)
    program = jax.make_jaxpr(model.apply)(
      params, model.initial_carry(params, 2), jnp.asarray(tokens)
    )
    assert (f"f32[{FOLDED},24]" in str(program)) == table
    check(run(model, params, tokens), equations(params, tokens), atol)


@pytest.mark.parametrize("vocab", [FOLDED, UNFOLDED])
def test_bfloat16_rounds_parameters_and_products_only(vocab):
  model, params = build(vocab, dtype=jnp.bfloat16)
  tokens = tokens_of(vocab, 2, 5)
  narrow = lambda h: np.asarray(jnp.asarray(h, jnp.bfloat16), np.float64)
  expected = equations(params, tokens, narrow=narrow)
  atol = ATOL[jnp.bfloat16] * np.sqrt(6)
  check(run(model, params, tokens), expected, atol)


@pytest.mark.parametrize("initial_state", ["zeros", "trainable"])
def test_chunks_that_hand_on_the_carry_are_one_sequence(initial_state):
  model, params = build(initial_state=initial_state)
  tokens = tokens_of(FOLDED, 2, 7)
  carry, logits = run(model, params, tokens)
  state, parts = None, []
  for first, last in ((0, 3), (3, 4), (4, 7)):  # One of a single token.
    state, part = run(model, params, tokens[:, first:last], state)
    assert part.shape == (2, last - first, FOLDED)
    parts.append(part)
  # The same sums in another order.
  np.testing.assert_allclose(
    np.concatenate(parts, axis=1), logits, rtol=0, atol=5e-6
  )
  np.testing.assert_allclose(
    np.stack(state), np.stack(carry), rtol=0, atol=5e-6
  )


@pytest.mark.parametrize("vocab", [FOLDED, UNFOLDED])
@pytest.mark.parametrize("rank", [1, 2])
def test_perturbed_parameters_are_their_materialised_selves(rank, vocab):
  model, params = build(vocab, initial_state="trainable")
  tokens = tokens_of(vocab, 2, 4)
  rng = np.random.default_rng(rank)

  def draw(x):
    """As `directions.low_rank`, without compiling it."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    if x.ndim < 2:
      return normal(*x.shape)
    *leading, m, k = x.shape
    return directions.Factors(
      normal(*leading, rank, m), normal(*leading, rank, k)
    )

  def moved():
    z = jax.tree.map(draw, params)
    return directions.low_rank(rank).perturb(params, z, 0.1)

  def logits(params):
    carry = model.initial_carry(params, 2)
    return model.apply(params, carry, jnp.asarray(tokens))[1]

  population = [moved(), moved()]
  assert isinstance(population[0]["r"], perturbed.Perturbed)
  together = jax.jit(jax.vmap(logits))(
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *population)
  )
  for member, got in zip(population, together, strict=True):
    plain = perturbed.materialize(member)
    expected, _ = equations(plain, tokens)
    # As above, and one more rounding where `plain` is formed.
    atol = 4 * 2 * ATOL[jnp.float32] * np.sqrt(5 + 6 + 6)
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


# Parameters.


@pytest.mark.parametrize(
  ("hidden", "heads", "count"), [(240, 12, 150740), (1600, 32, 1139700)]
)
@pytest.mark.parametrize("initial_state", ["zeros", "trainable"])
def test_parameter_names_shapes_and_counts(hidden, heads, count, initial_state):
  v, e, d = 100, 100, hidden // heads
  model = models.lstm(
    vocab_size=v,
    embedding_size=e,
    hidden_size=hidden,
    num_heads=heads,
    initial_state=initial_state,
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  shapes = {
    "embed": (v, e),
    "w_in": (e, 4 * hidden),
    "r": (4, heads, d, d),
    "b": (4, heads, d),
    "states0": (2, 1, 1, heads, d),
    "w_proj": (v, hidden),
    "b_proj": (v,),
  }
  if initial_state == "zeros":
    del shapes["states0"]
    count -= 2 * hidden
  assert {name: x.shape for name, x in params.items()} == shapes
  assert all(x.dtype == jnp.float32 for x in params.values())
  assert sum(x.size for x in params.values()) == count
  if initial_state == "trainable":
    assert count == v * (e + 1) + hidden * (4 * e + 4 * d + 6 + v)


@pytest.mark.parametrize("readout_scale", ["hidden", "head"])
def test_initial_scales(readout_scale):
  vocab, embed, hidden, heads = 64, 32, 64, 4
  model = models.lstm(
    vocab_size=vocab,
    embedding_size=embed,
    hidden_size=hidden,
    num_heads=heads,
    readout_scale=readout_scale,
    embedding_scale=0.25,
    forget_bias=1.5,
    initial_state="trainable",
  )
  params = jax.jit(model.init)(jax.random.key(0))
  deviations = {
    "embed": 0.25,
    "w_in": embed**-0.5,
    "r": (hidden // heads) ** -0.5,
    "w_proj": {"hidden": hidden, "head": hidden // heads}[readout_scale]
    ** -0.5,
  }
  for name, deviation in deviations.items():
    x = np.asarray(params[name]) / deviation
    # Five standard errors of a mean and of a standard deviation.
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.std() - 1) < 5 / np.sqrt(2 * x.size)
  for name in ("b_proj", "states0"):
    np.testing.assert_array_equal(params[name], 0)
  np.testing.assert_array_equal(params["b"][1], 1.5)
  np.testing.assert_array_equal(np.asarray(params["b"])[[0, 2, 3]], 0)


def test_the_initial_state_is_zero_unless_trained():
  model, params = build()
  h, c = model.initial_carry(params, 2)
  assert h.shape == c.shape == (2, 3, 2)
  np.testing.assert_array_equal(np.stack([h, c]), 0)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_heads": 4}, "multiple of num_heads.*hidden_size=6, num_heads=4"),
    ({"num_heads": 0}, "num_heads must be positive, got 0"),
    ({"vocab_size": 0}, "vocab_size must be positive, got 0"),
    ({"embedding_size": -1}, "embedding_size must be positive, got -1"),
    ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
    ({"readout_scale": "gate"}, "unknown readout_scale 'gate'.*hidden, head"),
    ({"initial_state": "ones"}, "unknown initial_state 'ones'.*trainable"),
  ],
)
def test_options_that_make_no_model_are_refused(options, message):
  right = {
    "vocab_size": 3,
    "embedding_size": 4,
    "hidden_size": 6,
    "num_heads": 2,
  }
  with pytest.raises(ValueError, match=message):
    models.lstm(**{**right, **options})
