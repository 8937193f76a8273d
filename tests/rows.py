"""A row for every estimator: how it is made, and its formula in NumPy."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zorn_jax import directions, estimators, perturbed

EPSILON = 0.5  # 2ε = 1, and sums of integers stay exact.
SIZE = 15  # Parameters of `params_of`.
# Compiling takes the time of these tests, not running.
quick = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
CURVATURE = {  # Along z, and between z and u.
  "spsa1_5": lambda f: np.abs(f[1] - 2 * f[0] + f[2]) / EPSILON**2,
  "spsa2": lambda f: np.abs(f[2] - f[3] - f[4] + f[5]) / (4 * EPSILON**2),
}
SANGER = {"rank": 2, "rate": 0.3, "identity": 0.5, "warmup": 8}
CLEAN, PAIR = (0, 0), ((1, 0), (-1, 0))
CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))
BANDIT = {"capacity": 6, "exploit": (0.5, 0.9), "ramp": (3.0, 1.0)}


def params_of(vector):
  """A matrix and a vector."""
  vector = jnp.asarray(vector, jnp.float32)
  return {"matrix": vector[:12].reshape(4, 3), "vector": vector[12:]}


def flat(params):
  leaves = jax.tree.leaves(perturbed.materialize(params))
  return jnp.concatenate([x.ravel() for x in leaves])


def quadratic(params, batch):
  x, (hessian, b) = flat(params), batch
  return x @ hessian @ x + b @ x


def integers():
  """Integers (x, H [3, d, d], b) of f(x) = xᵀHx + bx, which no sum rounds.

  The first f is convex, the second concave and the third neither.
  """
  rng = np.random.default_rng(0)
  mixed, root = rng.integers(-1, 2, (2, SIZE, SIZE))
  hessians = np.stack([root @ root.T, -root @ root.T, 2 * (mixed + mixed.T)])
  return rng.integers(-3, 4, SIZE), hessians, rng.integers(-9, 10, SIZE)


def problems():
  """The same as batches [3, ...] of `quadratic`."""
  _, hessians, b = integers()
  return jnp.float32(hessians), jnp.float32(np.tile(b, (3, 1)))


# The table.


class Row(NamedTuple):
  """An estimator and its formula.

  Attributes:
    make: (epsilon, num_probes, **options) -> the estimator.
    stencil: Multiples of z and u at the points of its losses; None for a
      column of derivatives.
    coefficient: (losses of a probe by column, in NumPy) -> that of z.
    mean: (gradient, state) -> the mean of the estimates on a quadratic; None
      where it has no simple form.
  """

  make: Callable
  stencil: tuple = ((1, 0), (-1, 0))
  coefficient: Callable = lambda f: f[0] - f[1]
  mean: Any = lambda gradient, state: gradient

  @property
  def columns(self):
    return len(self.stencil)


def curved(name, f, exponent, floor):
  """The coefficient of 1.5-SPSA or 2-SPSA."""
  plus, minus = {"spsa1_5": f[1:3], "spsa2": f[:2]}[name]
  return (plus - minus) / np.maximum(CURVATURE[name](f) ** exponent, floor)


def forward_gradient(epsilon, num_probes, **options):
  del epsilon
  return estimators.forward_gradient(num_probes, **options)


def adaptive(epsilon, num_probes, *, direction=None, **options):
  make = lambda direction: estimators.central_difference(
    epsilon, num_probes, direction=direction, **options
  )
  return estimators.adaptive(make, direction or directions.rademacher(), 0.5)


def streaming(name, epsilon, num_probes, **options):
  """A streaming estimator of two unrolls, which hand nothing on."""
  base = estimators.STREAMING[name](
    epsilon, num_probes, 2, stagger=False, **options
  )

  def query(loss_fn, params, batch, state, key):
    unroll = lambda params, carry, batch, first: (carry, loss_fn(params, batch))
    stack = lambda x: jnp.broadcast_to(x, (num_probes, *x.shape))
    batch = jax.tree.map(stack, batch)
    return base.query(unroll, params, batch, (), state, key)[0]

  queries = base.queries_per_step
  return estimators.Estimator(base.init, query, base.update, queries, 2)


def stretched(w, side):
  """What `subspace_probes` multiplies directions with, in NumPy."""
  ratio = side / w.shape[-1]
  stretch = np.eye(side) + (np.sqrt(ratio) - 1) * w @ w.swapaxes(-1, -2)
  return stretch / np.sqrt(2 - 1 / ratio)


def amplified(gradient, state, within=False):
  """What Sanger-SPSA makes of a gradient, in NumPy."""
  w = np.asarray(state.factors["matrix"], np.float64)
  matrix = gradient[:12].reshape(4, 3)
  if within:  # E[z zᵀ] of (z + (a - 1) P z) / √(2 - 1/a²), P no projection.
    stretch = stretched(w, 3)
    matrix = matrix @ stretch @ stretch.T
  weight = min((int(state.step) + 1) / SANGER["warmup"], 1)
  matrix = SANGER["identity"] * matrix + weight * matrix @ w @ w.T
  return np.concatenate([matrix.ravel(), gradient[12:]])


def scales(moment):
  """The scales of `adaptive`, in NumPy."""
  inverse = (moment + 0.01 * moment.mean()) ** -0.5
  return inverse / np.sqrt(np.mean(inverse**2))


def preconditioned(gradient, state):
  moment = np.asarray(flat(state.moment), np.float64)
  return scales(moment) ** 2 * gradient


def known(name, **options):
  return functools.partial(estimators.ESTIMATORS[name], **options)


ROWS = {
  "central_difference": Row(known("central_difference")),
  "forward_difference": Row(
    known("forward_difference"), (CLEAN, (1, 0)), lambda f: 2 * (f[1] - f[0])
  ),
  "forward_difference antithetic": Row(
    known("forward_difference", antithetic=True),
    (CLEAN, *PAIR),
    lambda f: f[1] - f[2],
  ),
  "spsa1_5": Row(
    known("spsa1_5", exponent=0.5, floor=2.0),
    (CLEAN, *PAIR),
    lambda f: curved("spsa1_5", f, 0.5, 2.0),
    mean=None,
  ),
  "spsa2": Row(
    known("spsa2", exponent=1.0, floor=3.0),
    (*PAIR, *CORNERS),
    lambda f: curved("spsa2", f, 1.0, 3.0),
    mean=None,
  ),
  "bandit_spsa": Row(known("bandit_spsa", **BANDIT), mean=None),
  "sanger_spsa": Row(known("sanger_spsa", **SANGER), mean=amplified),
  "sanger_spsa within": Row(
    known("sanger_spsa", subspace_probes=True, **SANGER),
    mean=functools.partial(amplified, within=True),
  ),
  "forward_gradient": Row(forward_gradient, (CLEAN, None), lambda f: f[1]),
  "adaptive": Row(adaptive, mean=preconditioned),
  "noise_reuse_es": Row(functools.partial(streaming, "noise_reuse_es")),
  "persistent_es": Row(functools.partial(streaming, "persistent_es")),
}
