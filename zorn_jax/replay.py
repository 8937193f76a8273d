"""Steps taken again from their losses, without a query."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from zorn_jax import control
from zorn_jax.data import Feed
from zorn_jax.journal import Record
from zorn_jax.step import Programs
from zorn_jax.train_state import TrainState

_CHECKED_AT_ONCE = 256  # Waiting for every step would take longer.


@jax.jit
def _with_scale(watched, scale):
  """What watches the loss, so that it multiplies the learning rate so."""
  rest = control.scale(watched._replace(scale=jnp.float32(1)))
  return watched._replace(scale=scale / rest)  # Of a power of two: exactly.


def replay(
  parts: Programs, state: TrainState, records: Iterable[Record], feed: Feed
) -> TrainState:
  """Updates a state with the losses of the steps that follow it.

  Args:
    parts: The programs of the run; they have a `recall`.
    state: The state before the first record. It is used up.
    records: Of consecutive steps.
    feed: The data, of which only an exact readout needs any.
  Returns:
    The state after the last record; its parameters are those of the run in
    every bit, where the programs are.
  Raises:
    ValueError: If a record was made with another epsilon.
  """
  epsilons = []
  for record in records:
    # A search or a roll-back may have changed it.
    watched = _with_scale(state.control, np.float32(record.scale))
    state = state._replace(control=watched)
    aside = parts.recall(state, feed.at(record.step - 1))
    state, values = parts.update(state, record.losses, aside)
    epsilons.append((record, values["epsilon"]))
    if len(epsilons) == _CHECKED_AT_ONCE:
      _check(epsilons)
      epsilons = []
  _check(epsilons)
  return state


def _check(epsilons):
  """Compares the epsilon of records with that of their steps taken again."""
  for record, epsilon in epsilons:
    # Another kind of device may round the schedule otherwise.
    if not np.isclose(epsilon, record.epsilon, rtol=1e-5, atol=0):
      raise ValueError(
        f"step {record.step} of the journal was made with epsilon "
        f"{record.epsilon:.6g}, but this config has {float(epsilon):.6g} "
        "there. Use the config of the run."
      )
