"""The pieces that steps are made of, one by one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from zorn_jax import directions, estimators, in_place, models, perturbed
from zorn_jax.bench import cases, timing

_HEADS = (20, 50, 150, 300)  # Widths of the paper's heads, tiny to large.
_MEMBERS = (1, 192)
_PROBES = 96
_TILE = (512, 256)  # Signs that stay in a core's cache.


def run(
  peaks: dict[str, dict[str, Any]], quick: bool = False
) -> dict[str, list[dict[str, Any]]]:
  """Tables of random signs, of updates, and of layers.

  Args:
    peaks: Name of each type to measure -> as :func:`timing.gemm_peak` has it.
    quick: Small pieces, one repeat.
  """
  repeats = 1 if quick else 5
  probes, side = (4, 64) if quick else (_PROBES, 2048)
  rates = {name: peak["flops_per_second"] for name, peak in peaks.items()}
  updates = [
    _update(direction, name, side, probes, rate, repeats)
    for name, rate in rates.items()
    for direction in cases.DIRECTIONS
  ]
  tables = {
    "signs": [_signs(4 if quick else 64, repeats)],
    "updates": updates,
  }
  if jax.default_backend() == "gpu":  # Which has a kernel, and its own tables.
    return tables
  layers = [
    row
    for name, rate in rates.items()
    for head in (_HEADS[:1] if quick else _HEADS)
    for row in _layer(head, name, quick, rate, repeats)
  ]
  return tables | {"LSTM layer": layers}


def _signs(count, repeats):
  """Draws signs where a core has them at hand."""

  def draw(key):
    one = lambda i, _: directions.signs(jax.random.fold_in(key, i), _TILE)
    return jax.lax.fori_loop(0, count, one, jnp.zeros(_TILE))

  key, drawn = jax.random.key(0), jax.jit(draw)
  seconds = timing.measure({"": lambda: drawn(key)}, repeats)[""]
  total = count * _TILE[0] * _TILE[1]
  return {"signs": total, **timing.spread("ns_per_sign", 1e9 * seconds / total)}


def _update(direction, dtype, side, probes, peak, repeats):
  """SGD by the sum of many directions, on one matrix where it lies."""
  estimator = estimators.central_difference(
    cases.EPSILON, probes, direction=cases.make_direction(direction)
  )
  optimizer = optax.sgd(cases.RATE)

  @partial(jax.jit, donate_argnums=0)
  def update(params, losses, key):
    params, _, _ = in_place.update_in_place(
      estimator, optimizer, losses, params, optimizer.init(params), (), key
    )
    return params

  key = jax.random.key(0)
  losses = jax.random.normal(key, (probes, 2))
  params = {"w": jnp.zeros((side, side), dtype)}

  def run():
    nonlocal params
    params = update(params, losses, key)
    return params

  seconds = timing.measure({"": run}, repeats)[""]
  elements = probes * side**2
  row = {
    "update": direction,
    "dtype": dtype,
    "matrix": [side, side],
    "probes": probes,
    **timing.spread("ms", 1e3 * seconds),
    # To draw each sign of a dense direction, and to add it to the sum.
    **timing.spread("ns_per_element", 1e9 * seconds / elements),
  }
  if direction == "rank one":
    row |= timing.spread("share_of_peak", 2 * elements / seconds / peak)
  return row


def _layer(head, dtype, quick, peak, repeats):
  """Rows of one layer, alone and as a population of rank-one members.

  Embedding and readout of four tokens are in it, and cost little.
  """
  heads, batch, length, vocab = (2, 2, 4, 4) if quick else (4, 16, 16, 4)
  module = models.Recurrent(
    "lstm", vocab, vocab, heads * head, heads, dtype=jnp.dtype(dtype)
  )
  model = models.from_linen(module)
  params = jax.jit(model.init)(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, vocab)
  direction = cases.make_direction("rank one")

  def forward(params):
    carry = model.initial_carry(perturbed.materialize(params), batch)
    return model.score(params, carry, tokens, tokens)[:2]

  def population(params, z):
    at = lambda z, scale: forward(direction.perturb(params, z, scale))
    both = jax.vmap(at, in_axes=(None, 0))
    scales = cases.EPSILON * jnp.asarray([1.0, -1.0])
    return jax.vmap(both, in_axes=(0, None))(z, scales)

  programs = {}
  for members in _MEMBERS[: 1 if quick else None]:
    if members == 1:
      programs[members] = (forward, (params,))
    else:
      keys = jax.random.split(jax.random.key(2), members // 2)
      sample = lambda key: direction.sample(key, params)
      programs[members] = (population, (params, jax.vmap(sample)(keys)))
  runs = {
    members: partial(jax.jit(function), *args)
    for members, (function, args) in programs.items()
  }
  seconds = timing.measure(runs, repeats)
  for members, (function, args) in programs.items():
    flops = cases.flops(function, *args)
    cells = members * batch * length * heads * head
    yield {
      "implementation": "xla",
      "dtype": dtype,
      "head": head,
      "heads": heads,
      "batch": batch,
      "length": length,
      "members": members,
      **timing.spread("ms", 1e3 * seconds[members]),
      **timing.spread("mcells_per_second", cells / seconds[members] / 1e6),
      **timing.spread("share_of_peak", flops / seconds[members] / peak),
    }
