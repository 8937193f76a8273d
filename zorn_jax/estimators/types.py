"""The shape that every estimator has."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from zorn_jax import types

LossFn = Callable[[types.Params, types.Batch], jax.Array]
InitFn = Callable[[types.Params], Any]
QueryFn = Callable[..., jax.Array]
UpdateFn = Callable[..., tuple[types.Grads, Any]]


class Estimator(NamedTuple):
  """A gradient estimate from scalar losses, as pure functions.

  Attributes:
    init: (params) -> state; `()` for a stateless estimator.
    query: (loss_fn, params, batch, state, key) -> losses [n, q]. Runs the
      forward passes; `loss_fn(params, batch)` returns a scalar.
    update: (losses, params, state, key) -> (grads, state). Needs neither the
      batch nor the loss: it draws the directions again from `key`.
    queries_per_step: Number of forward passes that `query` runs.
    num_losses: How many of the q columns are losses, from the first on; the
      others are slopes.
    blocks: As `update`, but the gradient is a tree of functions, one for each
      leaf: (a :class:`zorn_jax.tiles.Window`, or None for all) -> a float32
      block of it. None where the gradient cannot be had in parts.
    pairs: Whether the losses are those of fresh antithetic pairs, [n, 2] in the
      order (+, -), whose noise says what the gradient's is.
  """

  init: InitFn
  query: QueryFn
  update: UpdateFn
  queries_per_step: int
  num_losses: int
  blocks: UpdateFn | None = None
  pairs: bool = False
