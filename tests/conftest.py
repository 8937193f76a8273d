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
  """Compiles a program once for all workers, commands and later runs."""
  cache = getattr(config, "cache", None)  # None with `-p no:cacheprovider`.
  if cache is not None:
    options = {
      "jax_compilation_cache_dir": str(cache.mkdir("jax")),
      "jax_persistent_cache_min_compile_time_secs": 0,
    }
    for name, value in options.items():
      jax.config.update(name, value)
      os.environ[name.upper()] = str(value)  # For processes that tests start.
