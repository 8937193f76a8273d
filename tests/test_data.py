"""The data of a step: read once, or part after part."""

import numpy as np
import pytest

from zorn_jax.data import Feed
from zorn_jax.tasks import copy


def refreshed(read, every=3):
  def refresh(part):
    read.append(part)
    return np.full(4, part)

  task = copy(1, 3, 4)
  return task._replace(data=refresh(0), refresh=refresh, refresh_every=every)


@pytest.fixture
def feed():
  """Makes feeds, and closes them."""
  made = []

  def make(task):
    made.append(Feed(task))
    return made[-1]

  yield make
  for one in made:
    one.close()


def test_every_step_sees_the_part_of_its_number(feed):
  data = feed(refreshed([]))
  # Forwards, a roll-back, and a step of a resumed run.
  for step in (0, 1, 2, 3, 5, 6, 2, 100):
    np.testing.assert_array_equal(data.at(step), np.full(4, step // 3))


def test_parts_are_read_once_and_ahead(feed):
  read = []
  data = feed(refreshed(read))
  read.clear()
  for step in range(9):
    data.at(step)
  data.close()
  assert read in ([0, 1, 2], [0, 1, 2, 3])


def test_small_data_are_put_on_the_device_once(feed):
  task = copy(1, 3, 4)._replace(data=np.arange(5))
  data = feed(task)
  assert data.at(0) is data.at(1000)
  np.testing.assert_array_equal(data.at(0), np.arange(5))


def test_a_file_that_cannot_be_read_is_reported(feed):
  def refresh(part):
    raise ValueError(f"part {part} is gone")

  task = copy(1, 3, 4)._replace(refresh=refresh, refresh_every=1)
  with pytest.raises(ValueError, match="part 7 is gone"):
    feed(task).at(7)
