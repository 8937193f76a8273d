"""Kernels: layers over time in one launch, each with a twin by XLA."""

from zorn_jax.kernels.arguments import Dense, Lookup, LowRank
from zorn_jax.kernels.lstm import IMPLEMENTATIONS, chosen, lstm, say, tune
from zorn_jax.kernels.lstm_configs import Config

__all__ = [
  "IMPLEMENTATIONS",
  "Config",
  "Dense",
  "Lookup",
  "LowRank",
  "chosen",
  "lstm",
  "say",
  "tune",
]
