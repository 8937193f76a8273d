"""The step of evosax, whose population is one array of flat parameters."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from evosax.algorithms import Open_ES
from evosax.core.fitness_shaping import identity_fitness_shaping_fn


def open_es_step(
  loss_fn: Callable[[Any, Any], jax.Array],
  params,
  population_size: int,
  epsilon: float,
  rate: float,
  seed: int = 0,
):
  """One step of OpenAI-ES: ask, evaluate all members at once, tell.

  Members are antithetic pairs of normal directions, and losses go unshaped, so
  that the estimate is that of CD-RGE. Needs the memory of `population_size`
  copies of the parameters, and of what the losses of all need at once.

  Args:
    loss_fn: (params, batch) -> loss, a scalar.
    params: Tree of the first parameters.
    population_size: Number of members 2n; even.
    epsilon: Standard deviation of the members, in units of the parameters.
    rate: Learning rate of plain gradient descent.
    seed: Of the key that evosax asks for at its start.
  Returns:
    (step, state), where the jitted step is (state, batch, key) -> (state,
    losses [2n], the + members first) and donates its state, whose `mean` [P]
    holds the parameters.
  Raises:
    ValueError: If `population_size` is odd or not positive.
  """
  if population_size < 2 or population_size % 2:
    raise ValueError(
      "population_size must be even and positive, got "
      f"population_size={population_size}. Choose 2 for each probe."
    )
  strategy = Open_ES(
    population_size,
    params,
    optimizer=optax.sgd(rate),
    std_schedule=optax.constant_schedule(epsilon),
    fitness_shaping_fn=identity_fitness_shaping_fn,
    metrics_fn=lambda *_: {},
  )
  options = strategy.default_params

  def step(state, batch, key):
    ask, tell = jax.random.split(key)
    population, state = strategy.ask(ask, state, options)
    losses = jax.vmap(loss_fn, in_axes=(0, None))(population, batch)
    state, _ = strategy.tell(tell, population, losses, state, options)
    return _strong(state), losses

  state = _strong(strategy.init(jax.random.key(seed), params, options))
  return jax.jit(step, donate_argnums=0), state


def _strong(state):
  """The state without weak types, which would compile the step twice."""
  return jax.tree.map(
    lambda x: jax.lax.convert_element_type(x, jax.numpy.result_type(x)), state
  )
