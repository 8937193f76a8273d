"""The LSTM kernel against its twin on a GPU.

JAX_PLATFORMS=cuda python -m pytest tests/test_kernels_gpu.py
"""

import concurrent.futures
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_kernels

from zorn_jax import kernels
from zorn_jax.kernels import lstm_configs

WIDTHS = (20, 50, 150)
BATCH = 200  # Four blocks of 64 rows, the last not whole.
# Name -> type, precision of its products, and how far h and c may be off, times
# sqrt(D). TF32 rounds as float16 does, and tanh is approximate beside bfloat16.
PRECISIONS = {
  "float32": ("float32", "highest", 5e-7),
  "TF32": ("float32", None, 2e-4),
  "bfloat16": ("bfloat16", None, 2e-3),
}
PERTURBATIONS = ("dense", "low rank")
CASES = [
  *itertools.product(WIDTHS, PRECISIONS, PERTURBATIONS, [None]),
  *itertools.product([850], ["bfloat16"], ["", *PERTURBATIONS], [None]),
  *(  # Whatever the tuner may choose.
    (width, "bfloat16", perturbation, config)
    for width, perturbation in itertools.product(WIDTHS, PERTURBATIONS)
    for config in lstm_configs.choose(
      width, BATCH, jnp.bfloat16, perturbation == "dense"
    )
  ),
]

pytestmark = [
  pytest.mark.optimized,
  pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
]


def run(args, precision, **options):
  with jax.default_matmul_precision(precision):
    one = lambda args: kernels.lstm(**args, **options)
    return [np.asarray(x, float) for x in jax.tree.leaves(jax.jit(one)(args))]


@functools.cache
def expected(width, dtype, perturbation):
  """What `lstm` takes, and makes of it by XLA in float32 without TF32."""
  args = test_kernels.example(
    perturbation,
    dtype,
    head=width,
    batch=BATCH,
    looked_up="with factors" if perturbation == "low rank" else False,
  )
  return args, run(args, "highest", implementation="xla")


def measure(case):
  """How far each result is from the twin's."""
  width, name, perturbation, config = case
  dtype, precision, _ = PRECISIONS[name]
  args, wanted = expected(width, dtype, perturbation)
  found = run(args, precision, implementation="triton", config=config)
  pairs = zip(found, wanted, strict=True)
  return [np.abs(a - b).max() for a, b in pairs]


@pytest.fixture(scope="module")
def errors():
  """Of all cases, whose programs are compiled side by side."""
  with (
    pytest.MonkeyPatch.context() as patch,
    concurrent.futures.ThreadPoolExecutor() as pool,
  ):
    # Of 12 heads of members with four blocks, so that programs take two.
    patch.setattr(lstm_configs, "MANY_PROGRAMS", 24)
    return dict(zip(CASES, pool.map(measure, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_twin(case, errors):
  tolerance = PRECISIONS[case[1]][2] * case[0] ** 0.5
  assert max(errors[case]) < tolerance
