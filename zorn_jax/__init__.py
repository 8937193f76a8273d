"""Training recurrent networks with forward passes only."""

from zorn_jax.directions import (
  grouped,
  low_rank,
  mapped,
  normal,
  normalized,
  rademacher,
  sparse,
  uniform,
)
from zorn_jax.estimators import (
  Estimator,
  StreamingEstimator,
  adaptive,
  bandit_spsa,
  central_difference,
  forward_difference,
  forward_gradient,
  noise_reuse_es,
  persistent_es,
  sanger_spsa,
  spsa1_5,
  spsa2,
)
from zorn_jax.in_place import update_in_place
from zorn_jax.perturbed import Perturbed, materialize, matmul, take
from zorn_jax.probe_map import ProbeMap, sequential

__all__ = [
  "Estimator",
  "Perturbed",
  "ProbeMap",
  "StreamingEstimator",
  "adaptive",
  "bandit_spsa",
  "central_difference",
  "forward_difference",
  "forward_gradient",
  "grouped",
  "low_rank",
  "mapped",
  "materialize",
  "matmul",
  "noise_reuse_es",
  "normal",
  "normalized",
  "persistent_es",
  "rademacher",
  "sanger_spsa",
  "sequential",
  "sparse",
  "spsa1_5",
  "spsa2",
  "take",
  "uniform",
  "update_in_place",
]
