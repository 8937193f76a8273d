"""Eight CPU devices, strict broadcasting, and little time for compilers."""

import os
from collections.abc import Iterator

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


@pytest.fixture(scope="module", autouse=True)
def compiler(request: pytest.FixtureRequest) -> Iterator[None]:
  """Compiles fast what runs once; `optimized` modules get what users do."""
  quick = request.node.get_closest_marker("optimized") is None
  jax.config.update("jax_disable_most_optimizations", quick)
  yield
  if quick:  # Not for a module after it.
    jax.clear_caches()
