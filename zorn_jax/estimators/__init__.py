"""Gradient estimators that need only forward passes."""

from zorn_jax.estimators.finite_difference import (
  central_difference,
  forward_difference,
)
from zorn_jax.estimators.types import Estimator

ESTIMATORS = {
  "central_difference": central_difference,
  "forward_difference": forward_difference,
}

__all__ = [
  "ESTIMATORS",
  "Estimator",
  "central_difference",
  "forward_difference",
]
