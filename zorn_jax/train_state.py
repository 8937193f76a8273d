"""What a run must remember between two steps, and a fingerprint of it."""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from zorn_jax import types
from zorn_jax.control import Control


class TrainState(NamedTuple):
  """Everything that the next step depends on, apart from its batch.

  Attributes:
    step: Steps taken so far, an int32 scalar array.
    params: The parameters.
    opt_state: State of the optax optimiser.
    method_state: State of the method, such as an estimator's; `()` for a
      stateless one.
    control: State of what watches the loss.
    probe_key: Root key of the directions, never advanced: steps fold their
      number into it.
    data_key: Root key of the data, independent of `probe_key`.
  """

  step: jax.Array
  params: types.Params
  opt_state: Any
  method_state: Any
  control: Control
  probe_key: types.Key
  data_key: types.Key


def digest(tree: types.PyTree) -> str:
  """Fingerprints a tree: the SHA-256 of all its bytes in tree order.

  Args:
    tree: A tree of arrays; typed keys count as their key data. On several
      hosts, all of them call it, and what is spread over them is gathered.
  Returns:
    64 hexadecimal digits. They do not depend on names, shapes or sharding.
  """
  sha = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not (
      leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
      leaf = multihost_utils.process_allgather(leaf, tiled=True)
    sha.update(np.asarray(leaf).tobytes())
  return sha.hexdigest()
