"""Gradient estimators that need only forward passes."""

from zorn_jax.estimators.adaptive import AdaptiveState, adaptive
from zorn_jax.estimators.bandit import BanditState, bandit_spsa
from zorn_jax.estimators.curvature import spsa1_5, spsa2
from zorn_jax.estimators.finite_difference import (
  central_difference,
  forward_difference,
)
from zorn_jax.estimators.forward_mode import forward_gradient
from zorn_jax.estimators.sanger import SangerState, sanger_spsa
from zorn_jax.estimators.streaming import (
  StreamingEstimator,
  StreamingState,
  noise_reuse_es,
  persistent_es,
)
from zorn_jax.estimators.types import Estimator

ESTIMATORS = {
  "bandit_spsa": bandit_spsa,
  "central_difference": central_difference,
  "forward_difference": forward_difference,
  "forward_gradient": forward_gradient,
  "sanger_spsa": sanger_spsa,
  "spsa1_5": spsa1_5,
  "spsa2": spsa2,
}
STREAMING = {
  "noise_reuse_es": noise_reuse_es,
  "persistent_es": persistent_es,
}

__all__ = [
  "ESTIMATORS",
  "STREAMING",
  "AdaptiveState",
  "BanditState",
  "Estimator",
  "SangerState",
  "StreamingEstimator",
  "StreamingState",
  "adaptive",
  "bandit_spsa",
  "central_difference",
  "forward_difference",
  "forward_gradient",
  "noise_reuse_es",
  "persistent_es",
  "sanger_spsa",
  "spsa1_5",
  "spsa2",
]
