"""The score of a population by a kernel that holds a layer's whole time.

Here members come first, [M, B, T, ...], as GPUs want them: one launch runs all
heads of all members over all tokens, reads its inputs from a table of a row per
token, and leaves nothing but the outputs, which one product reads out.
"""

import math

import jax
import jax.numpy as jnp

from zorn_jax import directions, kernels, perturbed

# With more tokens than this, logits of all are too many to be held.
_MAX_VOCABULARY = 1024


def takes(module, params, axes) -> bool:
  """Whether :func:`score` can take a model's parameters of some members.

  Args:
    module: A :class:`zorn_jax.models.Recurrent`.
    params: Its parameters, some of them perturbed.
    axes: Of the parameters.
  """
  if module.implementation == "xla":
    return False
  reason = _unfit(module, params, axes)
  if reason is None:
    return kernels.chosen(
      module.implementation, module.head_size, _rank(params["layers"][0]["r"])
    )
  if module.implementation == "triton":
    raise ValueError(
      f"the LSTM kernel cannot score this population: {reason}. Choose "
      "implementation=None or 'xla'."
    )
  kernels.say(f"LSTM by XLA, because {reason}")
  return False


def _unfit(module, params, axes) -> str | None:
  if module.cell != "lstm" or module.num_layers > 1:
    return "it takes one layer of LSTM"
  if module.vocab_size > _MAX_VOCABULARY:
    return f"it takes up to {_MAX_VOCABULARY} tokens, got {module.vocab_size}"
  leaf, at = params["layers"][0]["r"], axes["layers"][0]["r"]
  if perturbed.is_perturbed(leaf):
    return None
  if not perturbed.is_deferred(leaf):
    return "the recurrent matrices are not perturbed"
  if leaf.draw is not directions.signs or leaf.scales.shape[-1] != 1:
    return "it makes dense directions of signs alone, and one of them"
  if not at.scales <= {0} or 0 in at.keys:
    return "the innermost map must be that over the scales"
  return None


def _rank(leaf) -> int | None:
  return leaf.left.shape[-2] if perturbed.is_perturbed(leaf) else None


def score(module, sizes, axes, params, carry, tokens, targets):
  """As :meth:`zorn_jax.models.Recurrent.score`, of all members.

  Args:
    module: The model.
    sizes: Of the axes of members, the innermost first.
    axes: Those of each of the following.
    params: Parameters, of which `r` is Perturbed or Deferred.
    carry: States [B, N, D].
    tokens: Integers [B, C].
    targets: Integers [B, C].
  Returns:
    What `score` does, with all axes of members in front.
  """
  at_params, at_carry, at_tokens, at_targets = axes
  layer, at = params["layers"][0], at_params["layers"][0]
  front = sizes[::-1]
  lead, perturbation = _perturbation(sizes, at["r"], layer["r"])

  def of_each(function, where, *args):
    found, varies = _of_each(function, sizes, where, *args)
    return found.reshape(*lead, *found.shape[len(front) :]) if varies else found

  def of_all(function, where, *args):
    """With all members, also where they have one in common."""
    found, varies = _of_each(function, sizes, where, *args)
    if not varies:
      return jnp.broadcast_to(found, (*lead, *found.shape))
    return found.reshape(*lead, *found.shape[len(front) :])

  heads, head = module.num_heads, module.head_size
  x, b = _inputs(
    of_each,
    of_all,
    (params["embed"], layer["w_in"], layer["b"]),
    (at_params["embed"], at["w_in"], at["b"]),
    lambda x: x.reshape(*x.shape[:-1], heads, -1, head),
  )
  tokens = of_each(lambda x: x.astype(jnp.int32), (at_tokens,), tokens)
  after, h = kernels.lstm(
    x._replace(tokens=tokens),
    layer["r"].value,
    b,
    tuple(
      of_all(lambda x: x, (where,), x)
      for x, where in zip(carry, at_carry, strict=True)
    ),
    perturbation=perturbation,
    implementation=module.implementation,
  )
  # From here on, members are one axis.
  merge = lambda x: x.reshape(-1, *x.shape[len(lead) :])
  flat = lambda x, rank: x.reshape(-1, *x.shape[x.ndim - rank :])
  h = merge(h).reshape(math.prod(lead), *tokens.shape[-2:], heads * head)
  logits = _logits(sizes, at_params["w_proj"], params["w_proj"], h)
  where = (at_params["b_proj"],)
  bias = of_each(perturbed.materialize, where, params["b_proj"])
  logits += flat(bias, 1)[:, None, None]
  targets = flat(of_each(lambda x: x, (at_targets,), targets), 2)
  compared = _compare(logits, targets)
  apart = lambda x: x.reshape(*front, *x.shape[1:])
  return tuple(apart(merge(x)) for x in after), *map(apart, compared)


def _of_each(function, sizes, axes, *args):
  """What a function makes for each member, and whether they differ."""
  if not any(map(bool, jax.tree.leaves(axes, is_leaf=_is_axes))):
    return function(*args), False
  for number, size in enumerate(sizes):
    where = jax.tree.map(
      lambda at, number=number: 0 if number in at else None,
      axes,
      is_leaf=_is_axes,
    )
    function = jax.vmap(function, in_axes=where, axis_size=size)
  return function(*args), True


def _is_axes(x):
  return isinstance(x, frozenset)


def _perturbation(sizes, axes, leaf):
  """The axes (P, S) of members, and what the kernel makes of them."""
  members = math.prod(sizes)
  if perturbed.is_perturbed(leaf):
    factors = lambda leaf: (leaf.scale * leaf.left, leaf.right)
    made, varies = _of_each(factors, sizes, (axes,), leaf)
    left, right = (
      x.reshape(members, *x.shape[len(sizes) :]) if varies else x[None]
      for x in made
    )
    return (members, 1), kernels.LowRank(left, right, jnp.ones(1))
  inner = sizes[0] if sizes else 1
  drawn = lambda leaf: (jax.random.key_data(leaf.keys[0]), leaf.scales[0])
  (keys, scales), _ = _of_each(drawn, sizes, (axes,), leaf)
  shape = members // inner, inner
  keys = jnp.broadcast_to(keys, (*sizes[::-1], 2)).reshape(*shape, 2)
  scales = jnp.broadcast_to(scales, sizes[::-1]).reshape(shape)
  # A direction's members have its key, and all directions the scales.
  return shape, kernels.Dense(keys[:, 0], scales[0])


def _inputs(of_each, of_all, leaves, axes, by_head):
  """The projected inputs of all members, without tokens, and their biases.

  Where parameters have factors, all share one table, and the factors of the
  table are those of the product of embedding and input projection, and one for
  the bias.
  """
  embed, w_in, b = leaves
  if not all(map(_is_shared, leaves, axes)):
    table = of_each(_table, axes[:2], embed, w_in)
    b = of_each(perturbed.materialize, axes[2:], b)
    return kernels.Lookup(by_head(table), None), b

  value = lambda leaf: leaf.value if perturbed.is_perturbed(leaf) else leaf
  table = by_head(_table(value(embed), value(w_in)))

  def factors(embed, w_in, b):
    """[k, V] and [k, N, G, D]."""
    with jax.default_matmul_precision("highest"):
      product = perturbed.matmul(embed, w_in)
      left, right = [], []
      if perturbed.is_perturbed(product):
        left.append(product.scale * product.left)
        right.append(by_head(product.right))
      if perturbed.is_perturbed(b):
        moved = b.scale * jnp.einsum("...rm,...rk->...mk", b.left, b.right)
        left.append(jnp.ones((1, table.shape[0])))
        right.append(moved.swapaxes(0, 1)[None])
    return jnp.concatenate(left), jnp.concatenate(right)

  if any(map(perturbed.is_perturbed, leaves)):
    left = of_all(lambda *args: factors(*args)[0], axes, *leaves)
    right = of_all(lambda *args: factors(*args)[1], axes, *leaves)
    return kernels.Lookup(table, None, left, right), value(b)
  return kernels.Lookup(table, None), b


def _is_shared(leaf, axes) -> bool:
  """Whether members have all but factors in common."""
  if perturbed.is_deferred(leaf):
    return False
  return not (axes.value if perturbed.is_perturbed(leaf) else axes)


def _table(embed, w_in):
  """Embedding times input projection, [V, G H] in float32."""
  with jax.default_matmul_precision("highest"):
    return perturbed.materialize(perturbed.matmul(embed, w_in))


def _logits(sizes, axes, weights, h):
  """Of h [M, B, T, H], without bias; the factors have a part in one product."""

  def rows(leaf):
    if perturbed.is_perturbed(leaf):
      rows = jnp.concatenate([leaf.value, leaf.right.astype(leaf.dtype)])
    else:
      rows = perturbed.materialize(leaf)
    return jnp.pad(rows, ((0, -len(rows) % 8), (0, 0)))

  vocab = weights.shape[0]
  w, varies = _of_each(rows, sizes, (axes,), weights)
  if varies:
    w = w.reshape(-1, *w.shape[-2:])
    flat = h.reshape(len(h), -1, h.shape[-1])
    product = jnp.einsum(
      "mch,mvh->mcv", flat, w, preferred_element_type=jnp.float32
    )
    product = product.reshape(*h.shape[:3], -1)
  else:
    product = jnp.matmul(h, w.mT, preferred_element_type=jnp.float32)
  logits = product[..., :vocab]
  if perturbed.is_perturbed(weights):
    scaled = lambda leaf: leaf.scale * leaf.left
    left, _ = _of_each(scaled, sizes, (axes,), weights)
    left = left.reshape(-1, *left.shape[-2:])
    for rank in range(left.shape[1]):
      mixed = product[..., vocab + rank, None]
      logits = logits + mixed * left[:, None, None, rank]
  return logits


def _compare(logits, targets):
  """Cross-entropies in nats, and whether the target has the largest logit."""
  peak = logits.max(-1)
  total = jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)
  index = jnp.broadcast_to(targets, peak.shape)[..., None]
  target = jnp.take_along_axis(logits, index, axis=-1, mode="clip")[..., 0]
  right = jnp.argmax(logits, axis=-1) == targets
  return peak + jnp.log(total) - target, right
