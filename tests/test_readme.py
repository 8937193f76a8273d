"""The README's example runs, and does what it says."""

import pathlib
import re

import jax.numpy as jnp

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_library_example_trains_the_users_own_loss():
  (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  lines = [line for line in code.splitlines() if line.strip()]
  assert len(lines) - 1 <= 15  # Beside the imports.
  scope = {}
  exec(code, scope)
  start = {"w": jnp.zeros((3, 8)), "v": jnp.zeros(8)}
  loss_fn, batch = scope["loss_fn"], scope["batch"]
  loss = loss_fn(scope["params"], batch)
  assert loss < 0.1 * loss_fn(start, batch)
