"""Every core is a device, unless somebody chose otherwise."""

import os
import subprocess
import sys

import pytest

from zorn_jax import cores

_COUNT = "from zorn_jax import cores; cores.use(); import jax; " + (
  "print(jax.device_count())"
)


@pytest.mark.parametrize(
  ("chosen", "expected"),
  [
    ({}, cores.count()),
    ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
    ({"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
  ],
)
def test_devices_of_a_process(chosen, expected):
  env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | chosen
  done = subprocess.run(
    [sys.executable, "-c", _COUNT], env=env, capture_output=True, text=True
  )
  assert done.stdout.split() == [str(expected)], done.stderr
