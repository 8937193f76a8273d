"""The cores of a CPU, each as a device of its own."""

import os

import jax

_FLAG = "xla_force_host_platform_device_count"


def count() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):  # Linux.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def use() -> None:
  """Makes a device of every core, before anything touches one.

  Probes then run side by side, each on a core, in little more than half the
  time that the cores together take for one after the other. Whoever has set
  JAX_NUM_CPU_DEVICES, or the number in XLA_FLAGS, keeps it.
  """
  chosen = jax.config.jax_num_cpu_devices > 0
  if not chosen and _FLAG not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", count())
