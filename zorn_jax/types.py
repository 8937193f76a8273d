"""Names of the trees and arrays that the rest of the package passes around."""

from typing import Any

import jax

PyTree = Any
Params = PyTree  # Leaves are floating-point arrays.
Grads = PyTree  # Same structure, shapes and dtypes as the parameters.
Batch = PyTree
Key = jax.Array  # A typed key of `jax.random.key`.
