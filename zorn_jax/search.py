"""A learning rate found with forward passes alone."""

import math
from collections.abc import Callable
from typing import NamedTuple


class Search(NamedTuple):
  """How a learning rate is searched for.

  Attributes:
    low: Smallest candidate, > 0.
    high: Largest candidate, > low.
    depth: Rounds; the first tries three candidates, each other two more.
    steps: Training steps with each candidate.
    on_plateau: Whether to search again where the loss stands still.
  """

  low: float
  high: float
  depth: int = 3
  steps: int = 1
  on_plateau: bool = False


def check(search: Search) -> None:
  """Raises ValueError if a number is out of range."""
  if not 0 < search.low < search.high:
    raise ValueError(
      "search needs 0 < low < high, got "
      f"{search.low} and {search.high}. Choose for example 1e-5 and 0.1."
    )
  if search.depth < 1 or search.steps < 1:
    raise ValueError(
      "search.depth and search.steps must be positive, got "
      f"{search.depth} and {search.steps}. Choose 1 or more."
    )


def best_rate(search: Search, trial: Callable[[float], float]) -> float:
  """The candidate after which the loss is lowest.

  Starts with `low`, the geometric mean and `high`, then tries the geometric
  means between the best candidate and its neighbours, `depth - 1` times.

  Args:
    search: The range and the number of rounds.
    trial: (learning rate) -> loss after some steps with it, from the same
      state, with the same keys and data for every candidate. A loss that is
      not finite counts as the worst.
  Returns:
    A learning rate; the smallest of equals.
  Raises:
    ValueError: If no candidate has a finite loss.
  References: the authors' later code of arXiv:2505.17852.
  """

  def measured(rate):
    loss = trial(rate)
    return loss if math.isfinite(loss) else math.inf

  middle = math.sqrt(search.low * search.high)
  losses = {rate: measured(rate) for rate in (search.low, middle, search.high)}
  for _ in range(search.depth - 1):
    rates = sorted(losses)
    best = rates.index(min(rates, key=losses.__getitem__))
    for other in (best - 1, best + 1):
      if 0 <= other < len(rates):
        rate = math.sqrt(rates[best] * rates[other])
        losses[rate] = measured(rate)
  rate = min(sorted(losses), key=losses.__getitem__)
  if math.isinf(losses[rate]):
    raise ValueError(
      f"no learning rate from {search.low} to {search.high} gives a finite "
      "loss. Lower the range, or look at the first loss."
    )
  return rate
