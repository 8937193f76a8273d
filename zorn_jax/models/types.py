"""The shape that every model has for the rest of the package."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax.core import FrozenDict
from jax.sharding import PartitionSpec

from zorn_jax import types

InitFn = Callable[[types.Key], types.Params]
CarryFn = Callable[[types.Params, int], Any]
ApplyFn = Callable[[types.Params, Any, jax.Array], tuple[Any, jax.Array]]
ScoreFn = Callable[..., tuple[Any, jax.Array, jax.Array]]


class Model(NamedTuple):
  """A language model that streams, as pure functions.

  Attributes:
    init: (key) -> params.
    initial_carry: (params, batch_size) -> the state before the first token.
    apply: (params, carry, tokens [B, C]) -> (carry, logits [B, C, V]). Params
      may hold :class:`zorn_jax.perturbed.Perturbed` leaves. Two chunks, the
      carry handed on, give the logits of one.
    readout: Names of the parameters of the last linear layer, on which no state
      depends, at the top level of a dict; empty where there is none.
    decayed: Names of the top-level parameters that weight decay shrinks.
    score: (params, carry, tokens [B, C], targets [B, C]) -> (carry, the
      cross-entropies [B, C] in nats, whether the target was the likeliest
      [B, C]), without the logits in one array; None for what the logits say.
    deferred: Whether `score` takes :class:`zorn_jax.perturbed.Deferred`
      parameters and forms a block of them at a time.
    specs: How top-level parameters are split over the axes of a mesh, for those
      that are not on every device.
  """

  init: InitFn
  initial_carry: CarryFn
  apply: ApplyFn
  readout: tuple[str, ...] = ()
  decayed: tuple[str, ...] = ()
  specs: Mapping[str, PartitionSpec] = FrozenDict()
  score: ScoreFn | None = None
  deferred: bool = False
