"""The differentiable neural computer against the equations of its paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zorn_jax import directions, models, perturbed
from zorn_jax.models import dnc_graves

ATOL = {jnp.float32: 1e-5, jnp.bfloat16: 3e-2}
V, E, H, M, W = 7, 3, 5, 6, 4
STATE = dnc_graves.State._fields


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def oneplus(x):
  return 1 + np.log1p(np.exp(x))


def softmax(x):
  x = np.exp(np.array(x) - np.max(x))
  return x / x.sum()


def dot(x, y):
  """A sum from left to right, so that equal slots stay equal."""
  total = 0.0
  for a, b in zip(x, y, strict=True):
    total += float(a) * float(b)
  return total


def content(memory, key, strength):
  scores = []
  for slot in memory:
    norms = math.sqrt((dot(key, key) + 1e-6) * (dot(slot, slot) + 1e-6))
    scores.append(strength * dot(key, slot) / norms)
  return softmax(scores)


def allocation(usage):
  weights, product = np.zeros(len(usage)), 1.0
  for slot in np.argsort(usage, kind="stable"):
    weights[slot] = (1 - usage[slot]) * product
    product *= usage[slot]
  return weights


def equations(params, tokens, num_reads, carry=None, slots=M, narrow=None):
  """Logits [B, T, V] and the last state, in float64, slot by slot.

  Args:
    params: The model's, as arrays.
    tokens: Integers [B, T].
    num_reads: Number R of heads.
    carry: The state before, or None for zeros.
    slots: Number M of slots.
    narrow: What happens to vectors before they are multiplied by a matrix.
  """
  p = {name: np.asarray(x, np.float64) for name, x in params.items()}
  narrow = narrow or (lambda x: x)
  hidden, width = p["w_output"].shape[1], p["w_reads"].shape[1] // num_reads
  batch, length = tokens.shape
  logits, last = np.zeros((batch, length, len(p["w_output"]))), []
  for row in range(batch):
    if carry is None:
      h = c = np.zeros(hidden)
      reads = np.zeros((num_reads, width))
      memory, link = np.zeros((slots, width)), np.zeros((slots, slots))
      u, prec, ww = np.zeros(slots), np.zeros(slots), np.zeros(slots)
      wr = np.zeros((num_reads, slots))
    else:
      h, c, reads, memory, u, prec, link, ww, wr = (
        np.array(x[row], np.float64) for x in carry
      )
    for t in range(length):
      # The controller.
      x = np.concatenate([p["embed"][tokens[row, t]], reads.ravel(), h])
      gates = narrow(x) @ p["w_controller"] + p["b"]
      i, f, z, o = (gates[k * hidden : (k + 1) * hidden] for k in range(4))
      c = sigmoid(f) * c + sigmoid(i) * np.tanh(z)
      h = sigmoid(o) * np.tanh(c)

      # The interface vector, eaten from the front.
      xi = list(narrow(h) @ p["w_interface"])
      eat = lambda count, xi=xi: np.array([xi.pop(0) for _ in range(count)])
      read_keys = [eat(width) for _ in range(num_reads)]
      read_strengths = oneplus(eat(num_reads))
      write_key, write_strength = eat(width), oneplus(eat(1)[0])
      erase, write_vector = sigmoid(eat(width)), eat(width)
      free = sigmoid(eat(num_reads))
      allocation_gate, write_gate = sigmoid(eat(1)[0]), sigmoid(eat(1)[0])
      modes = [softmax(eat(3)) for _ in range(num_reads)]
      assert not xi

      # Usage, then the write.
      psi = np.ones(slots)
      for m in range(slots):
        for r in range(num_reads):
          psi[m] *= 1 - free[r] * wr[r, m]
      u = (u + ww - u * ww) * psi
      a, cw = allocation(u), content(memory, write_key, write_strength)
      ww = write_gate * (allocation_gate * a + (1 - allocation_gate) * cw)
      written = np.zeros((slots, width))
      for m in range(slots):
        for k in range(width):
          written[m, k] = memory[m, k] * (1 - ww[m] * erase[k])
          written[m, k] += ww[m] * write_vector[k]
      memory = written

      # Links, then precedence, then the reads.
      linked = np.zeros((slots, slots))
      for m in range(slots):
        for n in range(slots):
          if m != n:
            linked[m, n] = (1 - ww[m] - ww[n]) * link[m, n] + ww[m] * prec[n]
      link = linked
      prec = (1 - sum(ww)) * prec + ww
      weights, read = np.zeros((num_reads, slots)), np.zeros((num_reads, width))
      for r in range(num_reads):
        cr = content(memory, read_keys[r], read_strengths[r])
        for m in range(slots):
          backward, forward = dot(link[:, m], wr[r]), dot(link[m], wr[r])
          weights[r, m] = (
            modes[r][0] * backward + modes[r][1] * cr[m] + modes[r][2] * forward
          )
        for m in range(slots):
          read[r] += weights[r, m] * memory[m]
      wr, reads = weights, read
      logits[row, t] = p["w_output"] @ narrow(h)
      logits[row, t] += p["w_reads"] @ narrow(reads.ravel())
    last.append((h, c, reads, memory, u, prec, link, ww, wr))
  return logits, [np.stack(x) for x in zip(*last, strict=True)]


def build(num_reads=2, slots=M, **options):
  """A small model with parameters that are nowhere zero and a busy memory."""
  model = models.from_linen(
    dnc_graves.DNCGraves(
      vocab_size=V,
      embedding_size=E,
      hidden_size=H,
      num_reads=num_reads,
      memory_slots=slots,
      slot_size=W,
      **options,
    )
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(num_reads)
  scales = {"w_interface": 3.0, "w_output": 2.0}
  params = {
    name: jnp.asarray(scales.get(name, 1.0) * rng.normal(size=x.shape), x.dtype)
    for name, x in shapes.items()
  }
  return model, params


def tokens_of(rows, length):
  return np.random.default_rng(1).integers(0, V, (rows, length))


def weighting(rng, *shape):
  """Weightings that sum to less than one."""
  x = rng.uniform(size=shape)
  return 0.8 * x / x.sum(-1, keepdims=True)


def state_of(rows, num_reads):
  """A state that a model may be in, with no two slots alike."""
  rng = np.random.default_rng(2)
  links = weighting(rng, rows, M, M) / M * (1 - np.eye(M))
  state = dnc_graves.State(
    hidden=rng.uniform(-1, 1, (rows, H)),
    cell=rng.normal(size=(rows, H)),
    reads=rng.normal(size=(rows, num_reads, W)),
    memory=rng.normal(size=(rows, M, W)),
    usage=rng.uniform(size=(rows, M)),
    precedence=weighting(rng, rows, M),
    links=links,
    write_weights=weighting(rng, rows, M),
    read_weights=weighting(rng, rows, num_reads, M),
  )
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), state)


def by_usage(state):
  """The state with its slots from the least used on."""
  axes = {name: (1,) for name in ("memory", "usage", "precedence")}
  axes |= {"links": (1, 2), "write_weights": (1,), "read_weights": (2,)}
  state = dict(zip(STATE, state, strict=True))
  orders = np.argsort(np.asarray(state["usage"]), axis=1)
  for name, slot_axes in axes.items():
    rows = []
    for row, order in zip(np.asarray(state[name]), orders, strict=True):
      for axis in slot_axes:
        row = np.take(row, order, axis=axis - 1)
      rows.append(row)
    state[name] = np.stack(rows)
  return list(state.values())


def run(model, params, tokens, carry=None):
  if carry is None:
    carry = model.initial_carry(params, len(tokens))
  return jax.jit(model.apply)(params, carry, jnp.asarray(tokens))


def close(got, expected, atol):
  for name, x, y in zip(STATE, got, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("start", ["zeros", "midway"])
@pytest.mark.parametrize("num_reads", [1, 2, 3])
def test_logits_and_state_follow_the_equations(num_reads, start):
  model, params = build(num_reads)
  tokens = tokens_of(2, 24)
  carry = state_of(2, num_reads) if start == "midway" else None
  state, logits = run(model, params, tokens, carry)
  expected, last = equations(params, tokens, num_reads, carry)
  assert logits.dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in state)
  assert 0.5 < np.std(expected) < 5
  atol = ATOL[jnp.float32]
  np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)
  if start == "zeros":  # Slots were alike, and any of them may have been taken.
    assert np.diff(np.sort(last[4])).min() > 10 * atol
    state, last = by_usage(state), by_usage(last)
  close(state, last, atol)


def test_one_slot_has_no_links():
  model, params = build(slots=1)
  tokens = tokens_of(2, 20)
  state, logits = run(model, params, tokens)
  expected, last = equations(params, tokens, 2, slots=1)
  atol = ATOL[jnp.float32]
  np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)
  close(state, last, atol)
  np.testing.assert_array_equal(state.links, 0)


def test_bfloat16_rounds_parameters_and_products_only():
  model, params = build(dtype=jnp.bfloat16)
  assert all(x.dtype == jnp.bfloat16 for x in params.values())
  tokens, carry = tokens_of(2, 4), state_of(2, 2)
  narrow = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
  state, logits = run(model, params, tokens, carry)
  expected, last = equations(params, tokens, 2, carry, narrow=narrow)
  assert logits.dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in state)
  # A float32 sum on the edge between two bfloat16 is rounded to the other one.
  atol = ATOL[jnp.bfloat16]
  np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)
  close(state, last, atol)


def test_chunks_that_hand_on_the_carry_are_one_sequence():
  model, params = build()
  tokens = tokens_of(2, 9)
  for start in (None, state_of(2, 2)):
    carry, logits = run(model, params, tokens, start)
    state, parts = start, []
    for first, last in ((0, 4), (4, 5), (5, 9)):  # One of a single token.
      state, part = run(model, params, tokens[:, first:last], state)
      assert part.shape == (2, last - first, V)
      parts.append(part)
    # The same sums in another order.
    np.testing.assert_allclose(
      np.concatenate(parts, axis=1), logits, rtol=0, atol=5e-6
    )
  close(state, carry, 5e-6)


# The memory.


def test_weightings_stay_within_their_bounds():
  model, params = build(3)
  state = model.initial_carry(params, 4)

  @jax.jit
  def access(state, vector):
    return dnc_graves.access(state, dnc_graves.split_interface(vector, 3, W))

  rng, rounding, largest = np.random.default_rng(4), 2e-6, 0
  for _ in range(60):
    # Gates that are nearly shut or open, and keys that are sharp.
    vector = 5 * rng.normal(size=(4, 3 * W + 3 * W + 5 * 3 + 3))
    state = access(state, jnp.asarray(vector, jnp.float32))
    s = dnc_graves.State(*map(np.asarray, state))
    weightings = (s.write_weights, s.read_weights, s.precedence, s.links)
    for weights in (*weightings, s.links.swapaxes(1, 2)):
      assert weights.min() >= -rounding
      assert weights.sum(-1).max() <= 1 + rounding
    np.testing.assert_array_equal(s.links * np.eye(M), 0)
    assert 0 <= s.usage.min() and s.usage.max() <= 1
    expected = np.einsum("brm,bmw->brw", s.read_weights, s.memory)
    np.testing.assert_allclose(s.reads, expected, rtol=1e-5, atol=1e-5)
    peaks = [s.usage.max(), *(x.sum(-1).max() for x in weightings)]
    largest = np.maximum(largest, peaks)
  assert largest.min() > 0.9  # The bounds were near.


@pytest.mark.parametrize(
  ("usage", "expected"),
  [
    ([0.9, 0.0, 0.5], [0.0, 1.0, 0.0]),
    ([0.5, 0.25, 1.0], [0.125, 0.75, 0.0]),
    ([0.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
    ([0.5, 0.5, 0.5], [0.5, 0.25, 0.125]),
    ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]),
  ],
)
def test_allocation_of_known_usages(usage, expected):
  usage = jnp.array([usage, usage[::-1], [0.75, 0.5, 0.25]])
  got = dnc_graves.allocation_weights(usage)
  np.testing.assert_allclose(got[0], expected, rtol=0, atol=1e-7)
  for row, weights in zip(np.asarray(usage), got, strict=True):
    np.testing.assert_allclose(weights, allocation(row), rtol=0, atol=1e-7)


def test_content_weights_of_known_keys():
  memory = jnp.array([[[3.0, 0.0], [0.0, 5.0], [-2.0, 0.0]]])
  keys = jnp.array([[[7.0, 0.0], [0.0, 0.0]]])
  got = dnc_graves.content_weights(memory, keys, jnp.array([[2.0, 9.0]]))
  expected = np.exp([2.0, 0.0, -2.0])  # Cosines 1, 0, -1.
  np.testing.assert_allclose(got[0, 0], expected / expected.sum(), atol=1e-6)
  np.testing.assert_allclose(got[0, 1], np.full(3, 1 / 3), atol=1e-7)


# Perturbations and gradients.


@pytest.mark.parametrize("rank", [1, 2])
def test_perturbed_parameters_are_their_materialised_selves(rank):
  model, params = build()
  tokens = tokens_of(2, 20)
  rng = np.random.default_rng(rank)

  def draw(x):
    """As `directions.low_rank`, without compiling it."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    if x.ndim < 2:
      return normal(*x.shape)
    return directions.Factors(
      normal(rank, x.shape[0]), normal(rank, x.shape[1])
    )

  def moved():
    z = jax.tree.map(draw, params)
    return directions.low_rank(rank).perturb(params, z, 0.1)

  def logits(params):
    carry = model.initial_carry(params, 2)
    return model.apply(params, carry, jnp.asarray(tokens))[1]

  population = [moved(), moved()]
  assert isinstance(population[0]["w_interface"], perturbed.Perturbed)
  together = jax.jit(jax.vmap(logits))(
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *population)
  )
  for member, got in zip(population, together, strict=True):
    expected, _ = equations(perturbed.materialize(member), tokens, 2)
    # As above, and one more rounding where the matrices are formed.
    atol = 2 * ATOL[jnp.float32]
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def test_the_gradient_is_the_slope_of_the_equations():
  model, params = build()
  tokens, rng = tokens_of(2, 20), np.random.default_rng(3)
  weights = rng.normal(size=(2, 20, V)) / 20

  def loss(params):
    carry = model.initial_carry(params, 2)
    logits = model.apply(params, carry, jnp.asarray(tokens))[1]
    return jnp.sum(jnp.asarray(weights, jnp.float32) * logits)

  grads = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))
  assert all(np.isfinite(x).all() and np.any(x) for x in grads.values())

  step = 1e-5
  for name in [*params, "all"]:
    z = {k: rng.normal(size=x.shape) for k, x in params.items()}
    if name != "all":
      z = {k: x * (k == name) for k, x in z.items()}
    moved = lambda sign, z=z: {
      k: np.asarray(x, np.float64) + sign * step * z[k]
      for k, x in params.items()
    }
    values = [
      np.sum(weights * equations(moved(sign), tokens, 2)[0]) for sign in (1, -1)
    ]
    slope = (values[0] - values[1]) / (2 * step)
    got = sum(np.vdot(grads[k], z[k]) for k in params)
    size = math.sqrt(sum(np.vdot(grads[k] * (z[k] != 0), grads[k]) for k in z))
    assert abs(got - slope) < 1e-4 * size, name


def test_the_readout_moves_no_state():
  model, params = build()
  assert model.readout == ("w_output", "w_reads")
  assert set(model.decayed) == set(params) - {"b"}
  tokens = tokens_of(2, 5)
  moved = params | {name: 2 * params[name] for name in model.readout}
  (state, logits), (after, doubled) = (
    run(model, p, tokens) for p in (params, moved)
  )
  close(after, state, 0)
  np.testing.assert_allclose(doubled, 2 * logits, rtol=1e-6)


# Parameters.


@pytest.mark.parametrize(("slots", "num_reads"), [(6, 1), (16, 4)])
def test_parameter_names_shapes_and_count(slots, num_reads):
  v, e, h, w = 30, 8, 20, 5
  model = models.from_linen(dnc_graves.DNCGraves(v, e, h, num_reads, slots, w))
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  reads = num_reads * w
  assert {name: x.shape for name, x in shapes.items()} == {
    "embed": (v, e),
    "w_controller": (e + reads + h, 4 * h),
    "b": (4 * h,),
    "w_interface": (h, reads + 3 * w + 5 * num_reads + 3),
    "w_output": (v, h),
    "w_reads": (v, reads),
  }
  interface = reads + 3 * w + 5 * num_reads + 3
  assert sum(x.size for x in shapes.values()) == (
    v * e + 4 * h * (e + reads + h + 1) + h * interface + v * (h + reads)
  )
  carry = model.initial_carry(shapes, 3)
  assert [x.shape for x in carry] == [
    (3, h),
    (3, h),
    (3, num_reads, w),
    (3, slots, w),
    (3, slots),
    (3, slots),
    (3, slots, slots),
    (3, slots),
    (3, num_reads, slots),
  ]
  assert not any(x.any() for x in carry)


def test_initial_scales():
  v, e, h, r, w = 64, 32, 48, 2, 16
  model = models.from_linen(
    dnc_graves.DNCGraves(v, e, h, r, 4, w, embedding_scale=0.25)
  )
  params = jax.jit(model.init)(jax.random.key(0))
  deviations = {
    "embed": 0.25,
    "w_controller": (e + r * w + h) ** -0.5,
    "w_interface": h**-0.5,
    "w_output": (h + r * w) ** -0.5,
    "w_reads": (h + r * w) ** -0.5,
  }
  for name, deviation in deviations.items():
    x = np.asarray(params[name]) / deviation
    # Five standard errors of a mean and of a standard deviation.
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.std() - 1) < 5 / np.sqrt(2 * x.size)
  np.testing.assert_array_equal(params["b"], 0)


SIZES = {
  "vocab_size": V,
  "embedding_size": E,
  "hidden_size": H,
  "num_reads": 1,
  "memory_slots": M,
  "slot_size": W,
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_below_one_are_refused(name):
  with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
    dnc_graves.DNCGraves(**{**SIZES, name: 0})
