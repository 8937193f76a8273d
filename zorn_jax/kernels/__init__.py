"""Kernels: layers over time in one launch, each with a twin by XLA."""

from zorn_jax.kernels.arguments import Dense, Lookup, LowRank
from zorn_jax.kernels.lstm import lstm, tune
from zorn_jax.kernels.lstm_triton import Config

__all__ = ["Config", "Dense", "Lookup", "LowRank", "lstm", "tune"]
