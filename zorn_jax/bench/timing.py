"""Times programs fairly: all of them take turns, and everything is awaited."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Run = Callable[[], Any]


def measure(
  runs: Mapping[str, Run], repeats: int, warmup: int = 1
) -> dict[str, np.ndarray]:
  """Seconds of some programs, which take turns.

  What slows a machine down for a while then slows all of them down, and their
  quotients stay.

  Args:
    runs: Name -> the program, whose result is awaited.
    repeats: Rounds that are timed.
    warmup: Runs of each before, which compile it.
  Returns:
    Name -> seconds [repeats].
  """
  for run in runs.values():
    for _ in range(warmup):
      jax.block_until_ready(run())
  seconds = {name: [] for name in runs}
  for _ in range(repeats):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      seconds[name].append(time.perf_counter() - start)
  return {name: np.asarray(values) for name, values in seconds.items()}


def spread(name: str, samples) -> dict[str, Any]:
  """The median as `name`, the lower and upper quartile beside it."""
  low, median, high = np.percentile(samples, [25, 50, 75])
  return {
    name: float(median),
    f"{name}_quartiles": [float(low), float(high)],
  }


def exponent(sizes: Sequence[float], samples: Sequence[np.ndarray]) -> float:
  """The power of the size that the median time follows, by least squares."""
  medians = [np.median(values) for values in samples]
  return float(np.polyfit(np.log(sizes), np.log(medians), 1)[0])


def fastest(runs: Mapping[Any, Run], repeats: int) -> tuple[Any, dict]:
  """The key of the fastest program, and all keys' least milliseconds."""
  seconds = measure(runs, repeats)
  least = {key: 1e3 * float(values.min()) for key, values in seconds.items()}
  return min(least, key=least.__getitem__), least


def gemm_peak(sizes: Sequence[int], dtype: Any, repeats: int) -> dict[str, Any]:
  """FLOP/s of the fastest product of two square matrices.

  It uses all cores and, as the models do, JAX's default precision.

  Args:
    sizes: Rows of the matrices that are tried.
    dtype: Of both; the result is float32.
    repeats: Products of each size, of which the median counts.
  Returns:
    `flops_per_second`, the `size` that has it, and all `tried`.
  """

  def run(size):
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(
      lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)
    )
    return lambda: product(a, a)

  seconds = measure({size: run(size) for size in sizes}, repeats, warmup=2)
  rates = {
    size: 2 * size**3 / float(np.median(values))
    for size, values in seconds.items()
  }
  best = max(rates, key=rates.__getitem__)
  return {
    "dtype": jnp.dtype(dtype).name,
    "flops_per_second": rates[best],
    "size": best,
    "tried": {str(size): rate for size, rate in rates.items()},
  }
