"""Eight CPU devices, strict broadcasting, and a cache of compiled programs."""

import os

import jax
import pytest

# Bounds on rounding are those of a CPU; JAX_PLATFORMS chooses otherwise.
if not os.environ.get("JAX_PLATFORMS"):
  jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
  """Keeps compiled programs from one run of the tests to the next."""
  cache = getattr(config, "cache", None)  # None with `-p no:cacheprovider`.
  if cache is not None:
    jax.config.update("jax_compilation_cache_dir", str(cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
