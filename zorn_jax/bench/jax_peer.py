"""The step as a user of JAX writes it by hand, with dense directions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def dense_vmap_step(
  loss_fn: Callable[[Any, Any], jax.Array],
  params,
  num_probes: int,
  epsilon: float,
  rate: float,
  batch_size: int,
):
  r"""One step of CD-RGE and plain gradient descent.

  Batches of probes run at once under `vmap`, each with parameters of its own,
  and draw from `jax.random.rademacher`, in the losses and in the update.

  .. math:: \theta \leftarrow \theta - \frac{\eta}{n} \sum_i
    \frac{f(\theta + \epsilon z_i) - f(\theta - \epsilon z_i)}{2 \epsilon} z_i

  Args:
    loss_fn: (params, batch) -> loss, a scalar.
    params: Tree of the first parameters; copied.
    num_probes: Number n of directions.
    epsilon: Smoothing radius ε, in units of the parameters.
    rate: Learning rate η.
    batch_size: Probes that run at once. Their parameters, and those of their
      antithetic twins one after the other, are in memory.
  Returns:
    (step, params), where the jitted step is (params, batch, key) -> (params,
    losses [n, 2]) and donates its parameters.
  Raises:
    ValueError: If `batch_size` does not divide `num_probes`.
  """
  if num_probes % batch_size:
    raise ValueError(
      f"batch_size must divide num_probes, got batch_size={batch_size}, "
      f"num_probes={num_probes}. Choose a divisor of num_probes."
    )

  def draw(key, params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
      tree,
      [
        jax.random.rademacher(k, x.shape, x.dtype)
        for k, x in zip(keys, leaves, strict=True)
      ],
    )

  def step(params, batch, key):
    keys = jax.random.split(key, num_probes)

    def query(key):
      z = draw(key, params)
      add = lambda scale: jax.tree.map(lambda x, u: x + scale * u, params, z)
      return jnp.stack(
        [loss_fn(add(epsilon), batch), loss_fn(add(-epsilon), batch)]
      )

    losses = jax.lax.map(query, keys, batch_size=batch_size)
    coefficients = (losses[:, 0] - losses[:, 1]) / (2 * epsilon * num_probes)

    def add(total, part):
      keys, coefficients = part
      z = jax.vmap(draw, in_axes=(0, None))(keys, params)
      return jax.tree.map(
        lambda x, u: x + jnp.tensordot(coefficients, u, 1), total, z
      ), None

    parts = jax.tree.map(
      lambda x: x.reshape(-1, batch_size), (keys, coefficients)
    )
    grads, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
    return jax.tree.map(lambda x, g: x - rate * g, params, grads), losses

  return jax.jit(step, donate_argnums=0), jax.tree.map(jnp.array, params)
