"""The recurrent models against their equations, head by head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import directions, models, perturbed, tiles
from zorn_jax.models import cells, inputs, population, recurrent

# Times the square root of the longest reduction.
ATOL = {jnp.float32: 5e-7, jnp.bfloat16: 2e-3}


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def elman(x, y, h):
  return (np.tanh(x[0] + y[0]),)


def gru(x, y, h):
  r = sigmoid(x[0] + y[0])
  z = sigmoid(x[1] + y[1])
  n = np.tanh(x[2] + r * (y[2] + x[3]))  # x[3] is the fourth bias.
  return ((1 - z) * n + z * h,)


def lstm(x, y, h, c):
  i, f, z, o = (x[g] + y[g] for g in range(4))
  c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
  return sigmoid(o) * np.tanh(c), c


def slstm(x, y, h, c, n, m):
  """Not stabilised: `c` and `n` are whole sums, e^`m` the largest weight."""
  i, f, z, o = (x[g] + y[g] for g in range(4))
  c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
  n = sigmoid(f) * n + np.exp(i)
  m = np.maximum(m + np.log(sigmoid(f)), i)
  return sigmoid(o) * c / n, c, n, m


ORACLES = {
  "elman": (elman, 1),
  "gru": (gru, 3),
  "lstm": (lstm, 4),
  "slstm": (slstm, 4),
}
NUM_STATES = {"elman": 1, "gru": 1, "lstm": 2, "slstm": 4}


def equations(params, tokens, cell="lstm", residual=False, narrow=lambda h: h):
  """Logits [B, T, V] and the states, in float64, row by row, head by head.

  Args:
    params: The model's, as arrays.
    tokens: Integers [B, T].
    cell: Name of the cell.
    residual: Whether layers after the first add their input.
    narrow: What happens to an operand of a product.
  """
  p = {name: np.asarray(x, np.float64) for name, x in params.items()}
  oracle, num_gates = ORACLES[cell]
  _, num_heads, size, _ = p["r"].shape
  ends = [""] + [f"_{layer}" for layer in range(1, 9) if f"r_{layer}" in p]
  logits = np.zeros((*tokens.shape, len(p["b_proj"])))
  carries = []
  for row, sequence in enumerate(tokens):
    states = np.zeros((len(ends), NUM_STATES[cell], num_heads, size))
    if cell == "slstm":
      states[:, 3] = -np.inf  # No weight before the first token.
    for layer, end in enumerate(ends):
      if f"states0{end}" in p:
        start = p[f"states0{end}"][:, 0, 0]
        states[layer, : len(start)] = start
    for t, token in enumerate(sequence):
      x = p["embed"][token]
      for layer, end in enumerate(ends):
        y = x
        if f"norm_scale{end}" in p:
          y = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
          y = y * p[f"norm_scale{end}"] + p[f"norm_bias{end}"]
        drive = narrow(y) @ p[f"w_in{end}"]
        for n in range(num_heads):
          biases = p[f"b{end}"][:, n]
          fed = np.array(biases)
          mixed = np.zeros((num_gates, size))
          for g in range(num_gates):
            first = (n * num_gates + g) * size  # Head, gate, unit.
            fed[g] += drive[first : first + size]
            mixed[g] = p[f"r{end}"][g, n] @ narrow(states[layer, 0, n])
          states[layer, :, n] = oracle(fed, mixed, *states[layer, :, n])
        h = states[layer, 0].ravel()
        x = x + h if residual and layer else h
      logits[row, t] = p["w_proj"] @ narrow(x) + p["b_proj"]
    carries.append(states)
  carry = np.stack(carries, axis=2)  # [layer, state, B, N, D]
  if cell == "slstm":
    carry[:, 1:3] *= np.exp(-carry[:, 3:])
  return logits, carry.reshape(-1, *carry.shape[2:])


def recurrent_model(cell, **options):
  return models.from_linen(models.Recurrent(cell, **options))


def build(vocab=11, heads=3, cell="lstm", **options):
  """A small model with parameters that are nowhere zero."""
  model = recurrent_model(
    cell,
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
  carry, logits = got
  expected_logits, expected_carry = expected
  assert isinstance(carry, tuple)
  assert all(x.dtype == jnp.float32 for x in (logits, *carry))
  np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=atol)
  np.testing.assert_allclose(np.stack(carry), expected_carry, rtol=0, atol=atol)


# Few tokens and more words than a table may have: no table.
FOLDED, UNFOLDED = 11, inputs.MAX_TABLE_ROWS + 1

CELLS = sorted(cells.CELLS)
BOTH = {"layer_norm": True, "residual": True}


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


@pytest.mark.parametrize("cell", [x for x in CELLS if x != "lstm"])
def test_every_cell_follows_its_equations(cell):
  model, params = build(cell=cell)
  tokens = tokens_of(FOLDED, 2, 7)
  atol = 7 * ATOL[jnp.float32] * np.sqrt(5 + 6 + 6)
  check(run(model, params, tokens), equations(params, tokens, cell), atol)


@pytest.mark.parametrize(
  ("cell", "layer_norm", "residual"),
  [
    *((cell, True, True) for cell in CELLS),
    ("lstm", True, False),
    ("lstm", False, True),
    ("lstm", False, False),
  ],
)
def test_three_layers_follow_the_equations(cell, layer_norm, residual):
  model, params = build(
    cell=cell,
    num_layers=3,
    layer_norm=layer_norm,
    residual=residual,
    initial_state="trainable",
  )
  assert ("norm_bias_2" in params) == layer_norm
  tokens = tokens_of(FOLDED, 2, 5)
  # As above for each layer; standardising enlarges what it gets.
  atol = 3 * 5 * ATOL[jnp.float32] * np.sqrt(5 + 6 + 6)
  expected = equations(params, tokens, cell, residual)
  check(run(model, params, tokens), expected, atol)


def test_slstm_takes_exponents_far_beyond_the_range_of_float32():
  model, params = build(cell="slstm")
  tokens = tokens_of(FOLDED, 2, 7)
  for level in (-300, 300):
    far = params | {"b": params["b"].at[0].add(level)}
    # The spacing of float32 at the level is 3e-5.
    expected = equations(far, tokens, "slstm")
    check(run(model, far, tokens), expected, 7 * 3e-5)


def test_the_gradient_of_slstm_passes_the_first_token():
  model, params = build(cell="slstm")
  tokens = tokens_of(FOLDED, 2, 3)
  weights = np.random.default_rng(2).normal(size=(2, 3, FOLDED))

  def loss(params):
    carry = model.initial_carry(params, 2)
    logits = model.apply(params, carry, jnp.asarray(tokens))[1]
    return (logits * jnp.asarray(weights, jnp.float32)).sum()

  grads = jax.jit(jax.grad(loss))(params)
  for name in ("w_in", "r", "b"):
    x = np.asarray(params[name], np.float64)
    z = np.random.default_rng(3).normal(size=x.shape)
    ends = [
      equations(params | {name: x + epsilon * z}, tokens, "slstm")
      for epsilon in (1e-4, -1e-4)
    ]
    slope = ((ends[0][0] - ends[1][0]) * weights).sum() / 2e-4
    np.testing.assert_allclose((grads[name] * z).sum(), slope, rtol=1e-3)


def loops(program):
  """The bodies of the scans of a jaxpr."""
  return [
    equation.params["jaxpr"].jaxpr
    for equation in program.jaxpr.eqns
    if equation.primitive.name == "scan"
  ]


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_a_step_of_time_has_one_product(cell, num_layers):
  model, params = build(cell=cell, num_layers=num_layers)
  program = jax.make_jaxpr(model.apply)(
    params,
    jax.eval_shape(lambda: model.initial_carry(params, 2)),
    jnp.zeros((2, 4), int),
  )
  bodies = loops(program)
  assert len(bodies) == num_layers
  assert all(str(body).count("dot_general") == 1 for body in bodies)


def test_many_tokens_fold_a_large_vocabulary(monkeypatch):
  monkeypatch.setattr(inputs, "MAX_TABLE_ROWS", 4)
  model, params = build(FOLDED)
  atol = 7 * ATOL[jnp.float32] * np.sqrt(5 + 6 + 6)
  for length, table in ((7, True), (5, False)):  # 14 tokens, then 10.
    tokens = tokens_of(FOLDED, 2, length)
    program = jax.make_jaxpr(model.apply)(
      params, model.initial_carry(params, 2), jnp.asarray(tokens)
    )
    assert (f"f32[{FOLDED},24]" in str(program)) == table
    check(run(model, params, tokens), equations(params, tokens), atol)


@pytest.mark.parametrize(
  ("vocab", "options"),
  [(FOLDED, {}), (UNFOLDED, {}), (FOLDED, {"num_layers": 2, **BOTH})],
)
def test_bfloat16_rounds_parameters_and_products_only(vocab, options):
  model, params = build(vocab, dtype=jnp.bfloat16, **options)
  tokens = tokens_of(vocab, 2, 5)
  narrow = lambda h: np.asarray(jnp.asarray(h, jnp.bfloat16), np.float64)
  residual = options.get("residual", False)
  expected = equations(params, tokens, residual=residual, narrow=narrow)
  atol = ATOL[jnp.bfloat16] * np.sqrt(6)
  check(run(model, params, tokens), expected, atol)


@pytest.mark.parametrize(
  ("cell", "options"),
  [
    ("lstm", {}),
    ("lstm", {"initial_state": "trainable"}),
    *((cell, {"num_layers": 2, **BOTH}) for cell in CELLS),
  ],
)
def test_chunks_that_hand_on_the_carry_are_one_sequence(cell, options):
  model, params = build(cell=cell, **options)
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


def members_of(params, rank):
  """Two perturbed copies of the parameters."""
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

  return [moved(), moved()]


@pytest.mark.parametrize(
  ("rank", "vocab", "cell", "options"),
  [
    (2, FOLDED, "lstm", {}),
    (2, UNFOLDED, "lstm", {}),
    *((1, FOLDED, cell, {"num_layers": 2, **BOTH}) for cell in CELLS),
  ],
)
def test_perturbed_parameters_are_their_materialised_selves(
  rank, vocab, cell, options
):
  model, params = build(vocab, cell=cell, initial_state="trainable", **options)
  tokens = tokens_of(vocab, 2, 4)

  def logits(params):
    carry = model.initial_carry(params, 2)
    return model.apply(params, carry, jnp.asarray(tokens))[1]

  members = members_of(params, rank)
  assert isinstance(members[0]["r"], perturbed.Perturbed)
  together = jax.jit(jax.vmap(logits))(
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
  )
  residual = options.get("residual", False)
  layers = options.get("num_layers", 1)
  for member, got in zip(members, together, strict=True):
    plain = perturbed.materialize(member)
    expected, _ = equations(plain, tokens, cell, residual)
    # As above, and one more rounding where `plain` is formed.
    atol = layers * 4 * 2 * ATOL[jnp.float32] * np.sqrt(5 + 6 + 6)
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("cell", CELLS)
def test_only_biases_and_initial_states_are_formed(cell, monkeypatch):
  model, params = build(
    cell=cell, num_layers=2, initial_state="trainable", **BOTH
  )
  formed, dense, array = [], perturbed._dense, population.array
  monkeypatch.setattr(
    perturbed, "_dense", lambda w: formed.append(w.shape) or dense(w)
  )

  def spy(layout, leaf, axes):
    if perturbed.is_perturbed(leaf):
      formed.append(leaf.shape)
    return array(layout, leaf, axes)

  monkeypatch.setattr(population, "array", spy)

  def logits(params):
    carry = model.initial_carry(params, 2)
    return model.apply(params, carry, jnp.zeros((2, 4), int))[1]

  jax.eval_shape(logits, members_of(params, 1)[0])
  vectors = ("b", "b_1", "states0", "states0_1")
  assert sorted(formed) == sorted(params[name].shape for name in vectors)


# Parameters.


@pytest.mark.parametrize(
  ("hidden", "heads", "vocab", "count"),
  [
    (240, 12, 100, 150740),
    (1600, 32, 100, 1139700),
    (9600, 64, 100, 10627700),
    (66000, 220, 100, 112606100),
    (297500, 350, 100, 1162045100),
    (1000000, 1000, 100, 4506010100),
    (2**17, 2**8, 50260, 6914405668),
  ],
)
@pytest.mark.parametrize("initial_state", ["zeros", "trainable"])
def test_parameter_names_shapes_and_counts(
  hidden, heads, vocab, count, initial_state
):
  v, e, d = vocab, 100, hidden // heads
  model = recurrent_model(
    "lstm",
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


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(
  ("cell", "gates", "biases", "states"),
  [
    ("elman", 1, 1, 1),
    ("gru", 3, 4, 1),
    ("lstm", 4, 4, 2),
    ("slstm", 4, 4, 1),
  ],
)
def test_parameter_counts_of_every_cell(
  cell, gates, biases, states, num_layers
):
  v, e, hidden, heads = 50, 30, 240, 12
  model = recurrent_model(
    cell,
    vocab_size=v,
    embedding_size=e,
    hidden_size=hidden,
    num_heads=heads,
    num_layers=num_layers,
    layer_norm=num_layers > 1,
    initial_state="trainable",
  )
  params = jax.eval_shape(model.init, jax.random.key(0))
  each = hidden * (gates * hidden // heads + biases + states)
  more = gates * hidden**2 + each + 2 * hidden
  count = v * (e + 1 + hidden) + gates * e * hidden + each
  count += (num_layers - 1) * more
  assert sum(x.size for x in params.values()) == count


@pytest.mark.parametrize("cell", CELLS)
def test_matrices_decay_and_no_state_depends_on_the_readout(cell):
  model, params = build(
    cell=cell, num_layers=3, initial_state="trainable", **BOTH
  )
  kept = ("b", "states0", "norm_scale", "norm_bias", "b_proj")
  stems = {name: name.rstrip("_12") for name in params}
  assert set(model.decayed) == {x for x in params if stems[x] not in kept}
  assert len(model.decayed) == 2 + 3 * 2
  assert model.readout == ("w_proj", "b_proj")
  without = params | {x: jnp.zeros_like(params[x]) for x in model.readout}
  tokens = tokens_of(FOLDED, 2, 3)
  carry, logits = run(model, params, tokens)
  same, zeros = run(model, without, tokens)
  np.testing.assert_array_equal(np.stack(same), np.stack(carry))
  np.testing.assert_array_equal(zeros, 0)
  assert np.abs(logits).max() > 0


def test_initial_scales():
  vocab, embed, hidden, heads = 64, 32, 64, 4
  module = models.Recurrent(
    "lstm",
    vocab_size=vocab,
    embedding_size=embed,
    hidden_size=hidden,
    num_heads=heads,
    num_layers=2,
    layer_norm=True,
    readout_scale="hidden",
    embedding_scale=0.25,
    forget_bias=1.5,
    initial_state="trainable",
  )
  model = models.from_linen(module)
  other = models.from_linen(module.clone(readout_scale="head"))

  @jax.jit  # Of the other nothing else is drawn.
  def draw(key):
    w_proj = other.init(jax.random.fold_in(key, 1))["w_proj"]
    return model.init(key) | {"by_head": w_proj}

  params = draw(jax.random.key(0))
  deviations = {
    "embed": 0.25,
    "w_in": embed**-0.5,
    "w_in_1": hidden**-0.5,
    "r": (hidden // heads) ** -0.5,
    "r_1": (hidden // heads) ** -0.5,
    "w_proj": hidden**-0.5,
    "by_head": (hidden // heads) ** -0.5,
  }
  for name, deviation in deviations.items():
    x = np.asarray(params[name]) / deviation
    # Five standard errors of a mean and of a standard deviation.
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.std() - 1) < 5 / np.sqrt(2 * x.size)
  for name in ("b_proj", "states0", "states0_1", "norm_bias_1"):
    np.testing.assert_array_equal(params[name], 0)
  np.testing.assert_array_equal(params["norm_scale_1"], 1)
  for name in ("b", "b_1"):
    np.testing.assert_array_equal(params[name][1], 1.5)
    np.testing.assert_array_equal(np.asarray(params[name])[[0, 2, 3]], 0)


@pytest.mark.parametrize("cell", CELLS)
def test_the_initial_state_is_zero_unless_trained(cell):
  model, params = build(cell=cell, num_layers=2)
  carry = model.initial_carry(params, 2)
  assert len(carry) == 2 * NUM_STATES[cell]
  assert all(state.shape == (2, 3, 2) for state in carry)
  np.testing.assert_array_equal(np.stack(carry), 0)


RIGHT = {
  "vocab_size": 3,
  "embedding_size": 4,
  "hidden_size": 6,
  "num_heads": 2,
}


def test_every_cell_has_a_name_in_the_registry():
  for cell in CELLS:
    assert models.MODULES[cell](**RIGHT).cell == cell


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_heads": 4}, "multiple of num_heads.*hidden_size=6, num_heads=4"),
    ({"num_heads": 0}, "num_heads must be positive, got 0"),
    ({"num_layers": 0}, "num_layers must be positive, got 0"),
    ({"vocab_size": 0}, "vocab_size must be positive, got 0"),
    ({"embedding_size": -1}, "embedding_size must be positive, got -1"),
    ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
    ({"readout_scale": "gate"}, "unknown readout_scale 'gate'.*hidden, head"),
    ({"initial_state": "ones"}, "unknown initial_state 'ones'.*trainable"),
    ({"cell": "rnn"}, "unknown cell 'rnn'.*elman, gru, lstm, slstm"),
    ({"cell": "gru", "forget_bias": 1.0}, "'gru' has no forget.*=1.0"),
    ({"cell": "elman", "forget_bias": 1.0}, "'elman' has no forget"),
    ({"layer_norm": True}, "layer_norm acts on the layers after.*=1"),
    ({"residual": True}, "residual acts on the layers after.*=1"),
  ],
)
def test_options_that_make_no_model_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    models.Recurrent(**{"cell": "lstm", **RIGHT, **options})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_large_parameters_are_drawn_in_blocks(dtype, monkeypatch):
  init = recurrent._scaled_normal(1 / 9)
  key, shape = jax.random.key(0), (70, 100)
  whole = init(key, shape, jnp.float32)
  monkeypatch.setattr(recurrent, "_LARGE", 1)
  monkeypatch.setattr(tiles, "largest", lambda: 2**10)
  drawn = init(key, shape, dtype)
  assert drawn.dtype == dtype
  # XLA multiplies the two constants first.
  rtol = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(drawn.astype(jnp.float32), whole, rtol=rtol)
