"""The simplified DNC against its equations, slot by slot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from zorn_jax import directions, estimators, models, perturbed
from zorn_jax.models import dnc

FIGURE = small.ROOT / "configs" / "paper" / "dnc.py"
V, E, H, M, S = 7, 3, 6, 5, 4
CONTROLLERS = ("lstm", "rnn")


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def softmax(x):
  x = np.exp(np.array(x) - np.max(x))
  return x / x.sum()


def equations(params, tokens, num_reads, controller, carry):
  """Logits [B, T, V], the last state and all weightings, in float64.

  Args:
    params: The model's, as arrays.
    tokens: Integers [B, T].
    num_reads: Number R of heads.
    controller: "lstm" or "rnn".
    carry: The state before.
  Returns:
    Logits, (h, c, memory, reads) and the write weightings [B, T, M].
  """
  p = {name: np.asarray(x, np.float64) for name, x in params.items()}

  def affine(x, name, suffix=""):
    return p[f"{name}_weight{suffix}"] @ x + p[f"{name}_bias{suffix}"]

  def norm(x, name):
    x = (x - np.mean(x)) / np.sqrt(np.var(x) + 1e-5)
    return x * p[f"{name}_weight"] + p[f"{name}_bias"]

  batch, length = tokens.shape
  logits = np.zeros((batch, length, len(p["embed"])))
  written, last = [], []
  for row in range(batch):
    h, *c = (np.array(x[row], np.float64) for x in carry.controller)
    c = c[0] if c else np.zeros_like(h)
    memory, reads = (
      np.array(x[row], np.float64) for x in (carry.memory, carry.reads)
    )
    written.append([])
    for t in range(length):
      u = norm(
        np.concatenate([p["embed"][tokens[row, t]], reads]), "input_norm"
      )
      gates = affine(u, "controller", "_ih") + affine(h, "controller", "_hh")
      if controller == "rnn":
        h = np.tanh(gates)
      else:
        i, f, g, o = gates.reshape(4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
      q = norm(h, "controller_norm")
      # Write.
      key = norm(affine(q, "fc_write_keys"), "write_keys_norm")
      strength = sigmoid(affine(q, "fc_write_strength"))[0]
      erase = sigmoid(affine(q, "fc_erase_vector"))
      add = np.tanh(affine(q, "fc_add_vector"))
      scores = [key @ norm(slot, "memory_norm") for slot in memory]
      weights = softmax(scores) * strength
      written[-1].append(weights)
      memory = np.array(
        [
          slot * (1 - weight * erase) + weight * add
          for slot, weight in zip(memory, weights, strict=True)
        ]
      )
      # Read what has just been written.
      read_keys = affine(q, "fc_read_keys").reshape(num_reads, -1)
      reads = []
      for read_key in read_keys:
        key = norm(read_key, "read_keys_norm")
        alpha = softmax([key @ norm(slot, "memory_norm") for slot in memory])
        reads.append(
          sum(a * slot for a, slot in zip(alpha, memory, strict=True))
        )
      reads = np.concatenate(reads)
      both = np.concatenate([q, reads])
      logits[row, t] = affine(norm(both, "pre_output_norm"), "fc_proj")
    last.append((h, c, memory, reads))
  last = [np.stack(x) for x in zip(*last, strict=True)]
  return logits, last, np.array(written)


def build(controller="lstm", num_reads=2, memory_init="random", **options):
  """A small model with parameters that are nowhere zero."""
  sizes = {"hidden_size": H, "memory_slots": M, "slot_size": S} | options
  model = models.from_linen(
    dnc.DNC(
      vocab_size=V,
      embedding_size=E,
      num_reads=num_reads,
      controller=controller,
      memory_init=memory_init,
      **sizes,
    )
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(num_reads)
  params = {
    name: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[-1]), x.dtype)
    if x.ndim == 2
    else jnp.asarray(
      rng.normal(size=x.shape) / 2 + name.endswith("norm_weight"), x.dtype
    )
    for name, x in shapes.items()
  }
  return model, params


def tokens_of(rows, length):
  return np.random.default_rng(1).integers(0, V, (rows, length))


def run(model, params, tokens, carry=None):
  if carry is None:
    carry = model.initial_carry(params, len(tokens))
  return jax.jit(model.apply)(params, carry, jnp.asarray(tokens))


def all_slots(state):
  """With all M slots, of which a model with equal ones keeps one."""
  batch, _, size = state.memory.shape
  return state._replace(memory=jnp.broadcast_to(state.memory, (batch, M, size)))


def close(got, expected, tolerance):
  """Compares relative to the largest of what is expected."""
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
    got, expected, rtol=0, atol=tolerance * np.abs(expected).max()
  )


@pytest.mark.parametrize("memory_init", ["random", "zeros"])
@pytest.mark.parametrize("num_reads", [1, 2])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_logits_and_state_follow_the_equations(
  controller, num_reads, memory_init
):
  model, params = build(controller, num_reads, memory_init)
  tokens = tokens_of(2, 24)
  before = all_slots(model.initial_carry(params, 2))
  expected, state, written = equations(
    params, tokens, num_reads, controller, before
  )
  carry, logits = run(model, params, tokens)
  close(logits, expected, 1e-5)
  h, c, memory, reads = state
  close(all_slots(carry).memory, memory, 1e-5)
  close(carry.reads, reads, 1e-5)
  controller_state = (h, c) if controller == "lstm" else (h,)
  for got, want in zip(carry.controller, controller_state, strict=True):
    close(got, want, 1e-5)
  # All of it matters: slots are told apart, or not at all.
  spread = np.ptp(written, axis=-1).max()
  assert spread > 0.1 if memory_init == "random" else spread < 1e-12


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_chunks_that_hand_on_the_carry_are_one_sequence(controller):
  model, params = build(controller)
  tokens = tokens_of(2, 13)
  carry, logits = run(model, params, tokens)
  state, parts = None, []
  for first, last in ((0, 6), (6, 7), (7, 13)):  # One of a single token.
    before = state
    state, part = run(model, params, tokens[:, first:last], state)
    assert part.shape == (2, last - first, V)
    parts.append(part)
  close(np.concatenate(parts, axis=1), logits, 5e-6)
  jax.tree.map(lambda a, b: close(a, b, 5e-6), state, carry)
  # What was read in the chunk before is an input of the next.
  forgetful = before._replace(reads=jnp.zeros_like(before.reads))
  _, part = run(model, params, tokens[:, 7:], forgetful)
  assert np.abs(part - parts[-1]).max() > 1e-3


def test_sequences_of_a_batch_do_not_meet():
  model, params = build()
  tokens = tokens_of(3, 6)
  _, together = run(model, params, tokens)
  for row in range(3):
    _, alone = run(model, params, tokens[row : row + 1])
    close(alone[0], together[row], 5e-6)


# Memory.


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_slots_that_start_equal_stay_equal(controller):
  options = {"memory_slots": 7, "slot_size": 5}
  model, params = build(controller, memory_init="random", **options)
  tokens = tokens_of(2, 200)
  before = model.initial_carry(params, 2)
  zero = before._replace(memory=jnp.zeros_like(before.memory))
  carry, logits = run(model, params, tokens, zero)
  memory = np.asarray(carry.memory)
  assert np.abs(memory).max() > 0.1  # It was written.
  np.testing.assert_array_equal(memory, memory[:, :1].repeat(7, axis=1))
  # So that one is enough.
  one, _ = build(controller, memory_init="zeros", **options)
  kept, same = run(one, params, tokens)
  assert kept.memory.shape == (2, 1, 5)
  close(same, logits, 1e-5)
  close(kept.memory, memory[:, :1], 1e-5)

  carry, _ = run(model, params, tokens)
  memory = np.asarray(carry.memory)
  for first in range(7):
    for second in range(first):
      apart = np.abs(memory[:, first] - memory[:, second]).max(axis=-1)
      assert (apart > 1e-3).all()  # They started less than 1e-2 apart.


def test_no_key_finds_a_slot_among_equal_ones():
  model, params = build(memory_init="zeros")
  tokens = tokens_of(2, 6)
  names = [x for x in params if "keys" in x or x.startswith("memory_norm")]
  assert len(names) == 10
  other = params | {name: params[name] + 1 for name in names}
  np.testing.assert_array_equal(
    run(model, params, tokens)[1], run(model, other, tokens)[1]
  )


def test_equal_slots_are_one_vector():
  """Their number only divides what a write changes."""
  tokens = tokens_of(1, 8)
  model, params = build(memory_init="zeros", memory_slots=1)
  many, _ = build(memory_init="zeros", memory_slots=16)
  weak = dict(params)
  # σ(x) / 16 is a strength that the model of one slot can have as well.
  weak["fc_write_strength_weight"] *= 0
  strong = dict(weak, fc_write_strength_bias=jnp.full((1,), 40.0))
  weak["fc_write_strength_bias"] = jnp.full((1,), -np.log(15.0))
  close(run(many, strong, tokens)[1], run(model, weak, tokens)[1], 1e-5)


@pytest.mark.parametrize("size", [64, 256])
def test_the_first_token_tells_random_slots_apart(size):
  options = {"hidden_size": size, "memory_slots": size, "slot_size": size}
  model, params = build("rnn", 1, **options)
  for name in ("write_keys_norm", "memory_norm"):  # As they start.
    params[f"{name}_weight"] = jnp.ones(size)
    params[f"{name}_bias"] = jnp.zeros(size)
  before = model.initial_carry(params, 1)
  rows = np.asarray(before.memory[0])
  again = model.initial_carry(params, 3).memory
  np.testing.assert_array_equal(again, np.broadcast_to(rows, (3, size, size)))
  _, _, written = equations(params, tokens_of(1, 1), 1, "rnn", before)
  scores = np.log(written[0, 0])
  # Five standard errors of a deviation of one.
  assert abs(scores.std() - 1) < 5 / np.sqrt(2 * size)


@pytest.mark.parametrize("offset", [-30.0, 30.0])
def test_slots_far_from_zero_keep_their_variance(offset):
  """It is 1e-5 of the square of their mean."""
  model, params = build()
  tokens = tokens_of(2, 3)
  before = model.initial_carry(params, 2)
  rng = np.random.default_rng(0)
  memory = offset + 0.1 * rng.normal(size=before.memory.shape)
  before = before._replace(memory=jnp.asarray(memory, jnp.float32))
  expected, state, _ = equations(params, tokens, 2, "lstm", before)
  carry, logits = run(model, params, tokens, before)
  close(logits, expected, 3e-4)  # Float32 has 2e-5 of the deviations.
  close(carry.memory, state[2], 1e-4)


@pytest.mark.parametrize("slots", [5, 16])
def test_scores_beyond_the_range_of_exponentials(slots):
  model, params = build(memory_slots=slots)
  params["memory_norm_weight"] *= 1e3
  tokens = tokens_of(1, 2)
  before = model.initial_carry(params, 1)
  expected, _, written = equations(params, tokens, 2, "lstm", before)
  assert written.min() < 1e-40
  close(run(model, params, tokens)[1], expected, 1e-3)


@pytest.mark.parametrize("num_reads", [1, 2])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_gradients_are_slopes_of_the_equations(controller, num_reads):
  model, params = build(controller, num_reads)
  tokens = tokens_of(2, 5)
  before = model.initial_carry(params, 2)

  def total(params):
    return jnp.sum(jnp.sin(model.apply(params, before, tokens)[1]))

  slopes = jax.jit(jax.grad(total))(params)
  rng = np.random.default_rng(0)
  for _ in range(3):
    z = {name: rng.normal(size=x.shape) for name, x in params.items()}

    def at(scale):
      moved = {n: np.asarray(params[n], np.float64) + scale * z[n] for n in z}  # noqa: B023
      logits, _, _ = equations(moved, tokens, num_reads, controller, before)
      return np.sin(logits).sum()

    expected = (at(1e-5) - at(-1e-5)) / 2e-5
    got = sum(np.vdot(slopes[name], z[name]) for name in z)
    size = np.sqrt(sum(np.square(x).sum() for x in slopes.values()))
    assert abs(got - expected) < 1e-4 * size


# Perturbations.


def drawn(params, rank, seed):
  """As `directions.low_rank`, without compiling it."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)

  def draw(x):
    if x.ndim < 2:
      return normal(*x.shape)
    m, k = x.shape
    return directions.Factors(normal(rank, m), normal(rank, k))

  return jax.tree.map(draw, params)


@pytest.mark.parametrize(("rank", "controller"), [(1, "lstm"), (2, "rnn")])
def test_perturbed_parameters_are_their_materialised_selves(rank, controller):
  model, params = build(controller)
  tokens = tokens_of(2, 6)
  population = [
    directions.low_rank(rank).perturb(params, drawn(params, rank, seed), 0.05)
    for seed in range(2)
  ]
  for name, leaf in population[0].items():
    assert perturbed.is_perturbed(leaf) == (params[name].ndim == 2)

  def logits(params):
    carry = model.initial_carry(params, 2)
    return model.apply(params, carry, jnp.asarray(tokens))[1]

  together = jax.jit(jax.vmap(logits))(
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *population)
  )
  _, clean = run(model, params, tokens)
  for member, got in zip(population, together, strict=True):
    plain = perturbed.materialize(member)
    expected, _, _ = equations(
      plain, tokens, 2, controller, model.initial_carry(params, 2)
    )
    close(got, expected, 2e-5)
    assert np.abs(got - clean).max() > 0.01


def test_central_differences_are_those_of_the_equations():
  model, params = build("rnn", 1)
  tokens = tokens_of(1, 6)

  def loss_fn(params, tokens):
    carry = model.initial_carry(params, 1)
    _, logits = model.apply(params, carry, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    ).mean()

  epsilon = 0.01
  estimator = estimators.central_difference(
    epsilon, 1, direction=directions.low_rank(1)
  )
  state = estimator.init(params)

  @jax.jit
  def query(params, key):
    losses = estimator.query(loss_fn, params, jnp.asarray(tokens), state, key)
    return losses, estimator.update(losses, params, state, key)[0]

  losses, estimate = query(params, jax.random.key(3))
  slope = float(losses[0, 0] - losses[0, 1]) / (2 * epsilon)
  assert abs(slope) > 0.1
  z = jax.tree.map(lambda x: np.asarray(x, np.float64) / slope, estimate)
  for x in z.values():
    np.testing.assert_allclose(np.abs(x), 1, rtol=1e-5)
  before = model.initial_carry(params, 1)
  for sign, got in zip((1, -1), losses[0], strict=True):
    moved = {
      name: np.asarray(x, np.float64) + sign * epsilon * np.sign(z[name])
      for name, x in params.items()
    }
    logits, _, _ = equations(moved, tokens[:, :-1], 1, "rnn", before)
    shares = [
      -np.log(softmax(x)[target])
      for x, target in zip(logits[0], tokens[0, 1:], strict=True)
    ]
    np.testing.assert_allclose(got, np.mean(shares), rtol=1e-5)


# Parameters.

# V = 100, R = 1, H = M = S = 128 scale: scale, rnn and lstm with E = 32, lstm
# with E = H.
COUNTS = (
  (1, 134053, 245413, 304357),
  (2, 461349, 880677, 1132901),
  (4, 1705765, 3330853, 4362853),
  (8, 6553893, 12949797, 17114213),
  (16, 25687333, 51062053, 67782757),
  (32, 101702949, 202784037, 269783141),
  (64, 404729125, 808217893, 1076437093),
  (128, 1614761253, 3227045157, 4300357733),
)


def shapes_of(**options):
  model = models.from_linen(dnc.DNC(**options))
  return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize("row", COUNTS, ids=lambda row: f"scale{row[0]}")
def test_counts_of_the_paper(row):
  size = 128 * row[0]
  cases = (
    (32, "rnn", row[1], size),
    (32, "lstm", row[2], 1),  # Slots are not counted.
    (size, "lstm", row[3], size),
  )
  for embedding_size, controller, count, slots in cases:
    params = shapes_of(
      vocab_size=100,
      embedding_size=embedding_size,
      hidden_size=size,
      num_reads=1,
      memory_slots=slots,
      slot_size=size,
      controller=controller,
    )
    assert sum(x.size for x in params.values()) == count


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_names_shapes_and_count(controller):
  reads, gates = 2, {"lstm": 4, "rnn": 1}[controller]
  c, t = E + reads * S, H + reads * S
  norms = {
    "input_norm": c,
    "controller_norm": H,
    "read_keys_norm": S,
    "write_keys_norm": S,
    "memory_norm": S,
    "pre_output_norm": t,
  }
  layers = {
    "fc_read_keys": (reads * S, H),
    "fc_write_keys": (S, H),
    "fc_write_strength": (1, H),
    "fc_erase_vector": (S, H),
    "fc_add_vector": (S, H),
    "fc_proj": (V, t),
  }
  shapes = {
    "embed": (V, E),
    "controller_weight_ih": (gates * H, c),
    "controller_weight_hh": (gates * H, H),
    "controller_bias_ih": (gates * H,),
    "controller_bias_hh": (gates * H,),
  }
  for name, size in norms.items():
    shapes |= {f"{name}_weight": (size,), f"{name}_bias": (size,)}
  for name, shape in layers.items():
    shapes |= {f"{name}_weight": shape, f"{name}_bias": shape[:1]}
  model, params = build(controller, reads)
  assert {name: x.shape for name, x in params.items()} == shapes
  matrices = {name for name, shape in shapes.items() if len(shape) == 2}
  assert set(model.decayed) == matrices
  assert set(model.readout) == {"fc_proj_weight", "fc_proj_bias"}
  hs = H * reads * S + reads * S + 3 * (H * S + S)
  count = V * E + 2 * c + gates * (H * c + H * H + 2 * H) + 2 * H + hs
  count += H + 1 + 6 * S + 2 * t + t * V + V
  assert sum(x.size for x in params.values()) == count


def test_no_state_depends_on_the_readout():
  model, params = build()
  changed = params | {name: 2 * params[name] for name in model.readout}
  tokens = tokens_of(2, 4)
  carry, logits = run(model, params, tokens)
  other, twice = run(model, changed, tokens)
  jax.tree.map(np.testing.assert_array_equal, carry, other)
  close(twice, 2 * logits, 1e-6)


def test_initial_parameters():
  model, _ = build(hidden_size=32, slot_size=16, embedding_scale=0.25)
  params = jax.jit(model.init)(jax.random.key(0))
  for name, x in params.items():
    x = np.asarray(x)
    if name.endswith("norm_weight"):
      np.testing.assert_array_equal(x, 1)
    elif "bias" in name:
      np.testing.assert_array_equal(x, 0)
    elif name != "embed":
      bound = np.sqrt(6 / sum(x.shape))
      assert np.abs(x).max() <= bound
      if x.size > 100:
        # Five standard errors of the square of a uniform variable.
        limit = 5 * np.sqrt(4 / 5 / x.size)
        assert abs(3 * np.square(x / bound).mean() - 1) < limit
  embed = np.asarray(params["embed"]) / 0.25
  assert abs(np.square(embed).mean() - 1) < 5 * np.sqrt(2 / embed.size)


def test_a_slot_size_of_zero_shares_the_width_among_the_heads():
  model, params = build(num_reads=3, slot_size=0)
  assert params["memory_norm_weight"].shape == (H // 3,)
  assert model.initial_carry(params, 1).memory.shape == (1, M, 2)


def test_bfloat16_keeps_a_float32_state():
  model, params = build(dtype=jnp.bfloat16)
  assert {x.dtype for x in params.values()} == {jnp.dtype(jnp.bfloat16)}
  before = model.initial_carry(params, 2)
  carry, logits = run(model, params, tokens_of(2, 3))
  assert logits.dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((before, carry)))
  expected, _, _ = equations(params, tokens_of(2, 3), 2, "lstm", before)
  close(logits, expected, 0.03)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"vocab_size": 0}, "vocab_size must be positive, got 0"),
    ({"embedding_size": -1}, "embedding_size must be positive, got -1"),
    ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
    ({"num_reads": 0}, "num_reads must be positive, got 0"),
    ({"memory_slots": 0}, "memory_slots must be positive, got 0"),
    ({"slot_size": -4}, "slot_size must not be negative, got -4"),
    (
      {"slot_size": 0, "num_reads": 4},
      "multiple of num_reads.*hidden_size=6, num_reads=4",
    ),
    ({"controller": "gru"}, "unknown controller 'gru'.*lstm, rnn"),
    ({"memory_init": "ones"}, "unknown memory_init 'ones'.*random, zeros"),
  ],
)
def test_options_that_make_no_model_are_refused(options, message):
  right = {
    "vocab_size": 3,
    "embedding_size": 4,
    "hidden_size": 6,
    "num_reads": 2,
    "memory_slots": 5,
    "slot_size": 4,
  }
  with pytest.raises(ValueError, match=message):
    dnc.DNC(**{**right, **options})


# The config of Figure 1.


@pytest.mark.parametrize(
  ("arg", "count", "probes"),
  [
    (None, 6553893, 512),
    ("", 6553893, 512),
    ("scale=8,controller=lstm", 12949797, 512),
    ("probes=8,scale=2,controller=lstm,input=scale", 1132901, 8),
    ("input=100,scale=1", None, 512),
  ],
)
def test_config_of_the_figure(arg, count, probes):
  config = small.config(FIGURE, arg)
  options = config.model.to_dict()
  assert options.pop("name") == "dnc"
  options["dtype"] = jnp.dtype(options["dtype"])
  options["vocab_size"] = config.task.vocab_size
  total = sum(x.size for x in shapes_of(**options).values())
  if count is None:
    assert config.model.embedding_size == 100
  else:
    assert total == count
  assert config.num_probes == probes
  assert options["hidden_size"] == options["memory_slots"]
  assert options["hidden_size"] == options["slot_size"]


def test_epsilon_of_the_figure_follows_the_learning_rate():
  assert small.config(FIGURE).epsilon == 0.01
  assert small.config(FIGURE, "scale=1", learning_rate=0.5).epsilon == 0.5


def test_the_config_has_the_fields_of_the_lstm():
  lstm = small.config(small.ROOT / "configs" / "paper" / "lstm.py").to_dict()
  mine = small.config(FIGURE).to_dict()
  assert set(mine) == set(lstm)
  for name in set(mine) - {"task", "model"}:
    if isinstance(mine[name], dict):
      assert set(mine[name]) == set(lstm[name])


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("tiny", "name=value, got 'tiny'"),
    ("scale=8,", "name=value, got ''"),
    ("size=8", "unknown option 'size'.*scale, controller, input, probes"),
    ("scale=1,scale=2", "'scale' is given twice"),
    ("scale=0", "scale must be a whole number above 0, got '0'"),
    ("scale=x", "scale must be a whole number above 0, got 'x'"),
    ("probes=-1", "probes must be a whole number above 0, got '-1'"),
    ("input=", "input must be a whole number above 0 or 'scale', got ''"),
    ("controller=gru", "unknown controller 'gru'.*rnn, lstm"),
  ],
)
def test_config_arguments_that_make_no_sense_are_refused(arg, message):
  with pytest.raises(ValueError, match=message):
    small.config(FIGURE, arg)
