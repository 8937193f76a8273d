"""Training recurrent networks with forward passes only."""

from zorn_jax.directions import low_rank, normal, rademacher, sparse, uniform
from zorn_jax.estimators import (
  Estimator,
  central_difference,
  forward_difference,
)
from zorn_jax.perturbed import Perturbed, materialize, matmul, take
from zorn_jax.probe_map import ProbeMap, sequential

__all__ = [
  "Estimator",
  "Perturbed",
  "ProbeMap",
  "central_difference",
  "forward_difference",
  "low_rank",
  "materialize",
  "matmul",
  "normal",
  "rademacher",
  "sequential",
  "sparse",
  "take",
  "uniform",
]
