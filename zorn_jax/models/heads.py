"""Models of block-diagonal heads that are larger than one device.

Every device holds some of the heads, the columns of the embedding that are its
share, and the columns of the readout that read its heads. Its logits are those
of its heads; their sum over the devices is the only thing that moves in a chunk
of time.
"""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
from flax.core import FrozenDict
from jax.sharding import Mesh, PartitionSpec

from zorn_jax import perturbed, probe_map
from zorn_jax.models.linen import from_linen
from zorn_jax.models.recurrent import Recurrent, name_of
from zorn_jax.models.types import Model

AXIS = "head"  # Of the mesh.

# Signs come in words of 32. An axis that ends within a word is drawn whole: its
# parts would have to be exchanged.
_WORD = 32

_COLUMNS = PartitionSpec(None, AXIS)
_OF_LAYER = {
  "w_in": _COLUMNS,
  "r": PartitionSpec(None, AXIS),
  "b": PartitionSpec(None, AXIS),
  "states0": PartitionSpec(None, None, None, AXIS),
}
_STATE = PartitionSpec(None, AXIS)  # [B, N, D]


def shard_heads(module: nn.Module, mesh: Mesh) -> Model:
  """A model whose heads are spread over the mesh axis "head".

  Its parameters have the names, shapes and initial values of the module, and
  its functions take and give global arrays; `Model.specs` says where each
  parameter is to live. Of S devices each holds N / S heads of `w_in`, `r`, `b`
  and `states0`, the columns of `w_proj` that read them, and E / S columns of
  `embed` if S and 32 divide E; otherwise `embed`, as always `b_proj` and the
  parameters of the normalisation, is on every device.

  What moves: once per sequence the columns of `embed` [V, E] are gathered, and
  the carry keeps them; per chunk of time the logits [B, C, V] are summed, and
  each layer after the first gathers its input [B, C, H]. Directions, which are
  added to the parameters outside, are drawn by the devices that hold them. Only
  dense signs of `w_proj` exchange a few words between neighbours if 32 does not
  divide H, and of `w_in` if it does not divide G H.

  Args:
    module: The whole model, a :class:`Recurrent`.
    mesh: The devices. Its other axes are left to the callers, who may map over
      them with `jax.shard_map`. The functions run under `jax.jit` only.
  Returns:
    The :class:`Model`, the same as `from_linen(module)` if the axis has one
    device. Its logits differ from those of the whole by the rounding of the sum
    over devices.
  Raises:
    ValueError: If the module is no :class:`Recurrent`, or the number of devices
      does not divide its heads.
  """
  shards = mesh.shape[AXIS]
  whole = from_linen(module)
  if shards == 1:
    return whole
  if not isinstance(module, Recurrent):
    raise ValueError(
      "only models of block-diagonal heads can be split over devices, got "
      f"{type(module).__name__} and mesh.head={shards}. Set mesh.head to 1."
    )
  heads = module.num_heads
  if heads % shards:
    divisors = [str(k) for k in range(1, heads + 1) if heads % k == 0]
    raise ValueError(
      f"{shards} devices cannot share {heads} heads evenly, got num_heads="
      f"{heads}, mesh.head={shards}. Choose a mesh.head among "
      f"{', '.join(divisors)}."
    )
  part = from_linen(_part(module, shards))
  specs = _specs(module, shards)
  split_embed = "embed" in specs

  def spread(fn, params, inputs, in_specs, out_specs):
    in_specs = (_specs_of(params, specs), *in_specs)
    spread_fn = probe_map.spread(fn, mesh, AXIS, in_specs, out_specs)
    return spread_fn(params, *inputs)

  def initial_carry(params, batch_size):
    def local(params):
      params = _cut_factors(params)
      if not split_embed:
        return (), part.initial_carry(params, batch_size)
      embed = _gather_columns(params["embed"])
      return embed, part.initial_carry(params | {"embed": embed}, batch_size)

    return spread(local, params, (), (), (PartitionSpec(), _STATE))

  def apply(params, carry, tokens):
    embed, states = carry
    if not split_embed:
      embed = params["embed"]
    others = {name: x for name, x in params.items() if name != "embed"}

    def local(others, embed, states, tokens):
      params = _cut_factors(others) | {"embed": embed}
      return part.apply(params, states, tokens)

    states, logits = spread(
      local,
      others,
      (embed, states, tokens),
      (PartitionSpec(), _STATE, PartitionSpec()),
      (_STATE, PartitionSpec()),
    )
    return (carry[0], states), logits

  return whole._replace(
    initial_carry=initial_carry,
    apply=apply,
    specs=specs,
    score=None,  # The logits of all heads have to meet.
    deferred=False,
  )


class _Part(Recurrent):
  """The heads of one device, within `shard_map`; sizes are of its part."""

  shards: int = 1

  @property
  def _width(self) -> int:
    return self.hidden_size * self.shards

  def _gather(self, x):
    return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)

  def _sum(self, logits):
    return jax.lax.psum(logits, AXIS)


def _part(module, shards):
  names = [field.name for field in dataclasses.fields(Recurrent) if field.init]
  options = {name: getattr(module, name) for name in names}
  for name in ("parent", "name"):
    del options[name]
  options["hidden_size"] //= shards
  options["num_heads"] //= shards
  return _Part(**options, shards=shards)


def _specs(module, shards) -> Mapping[str, PartitionSpec]:
  """Where the parameters live that are not everywhere."""
  specs = {"w_proj": _COLUMNS}
  if module.embedding_size % math.lcm(shards, _WORD) == 0:
    specs["embed"] = _COLUMNS
  for index in range(module.num_layers):
    for stem, spec in _OF_LAYER.items():
      if stem != "states0" or module.initial_state == "trainable":
        specs[name_of(stem, index)] = spec
  return FrozenDict(specs)


def _specs_of(params, specs):
  """The specs of arrays, and of the parts of perturbed ones."""
  return {
    name: _spec_of(leaf, specs.get(name, PartitionSpec()))
    for name, leaf in params.items()
  }


def _spec_of(leaf, spec):
  if not perturbed.is_perturbed(leaf):
    return spec
  *leading, rows, columns = [*spec, *[None] * (leaf.ndim - len(spec))]

  def of_factor(factor, axis):
    whole = factor.shape[-1] % _WORD
    return PartitionSpec(*leading, None, None if whole else axis)

  return perturbed.Perturbed(
    value=spec,
    left=of_factor(leaf.left, rows),
    right=of_factor(leaf.right, columns),
    scale=PartitionSpec(),
  )


def _cut_factors(params):
  """The factors of these heads, of those that every device has whole."""

  def cut(factor, size):
    if factor.shape[-1] == size:
      return factor
    start = jax.lax.axis_index(AXIS) * size
    return jax.lax.dynamic_slice_in_dim(factor, start, size, axis=-1)

  def of_leaf(leaf):
    if not perturbed.is_perturbed(leaf):
      return leaf
    *_, rows, columns = leaf.shape
    return dataclasses.replace(
      leaf, left=cut(leaf.left, rows), right=cut(leaf.right, columns)
    )

  return {name: of_leaf(leaf) for name, leaf in params.items()}


def _gather_columns(w):
  gather = lambda x: jax.lax.all_gather(x, AXIS, axis=-1, tiled=True)
  if not perturbed.is_perturbed(w):
    return gather(w)
  return dataclasses.replace(w, value=gather(w.value), right=gather(w.right))
