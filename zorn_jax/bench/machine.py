"""What a benchmark ran on."""

import datetime
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
from typing import Any

import jax

from zorn_jax import cores

PEERS = ("torch", "evosax")


def describe() -> dict[str, Any]:
  """The machine, the versions of what runs on it, and the date."""
  versions = {name: _version(name) for name in ("jax", "jaxlib", *PEERS)}
  return {
    "device": _device(),
    "cores": cores.count(),
    "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    "platform": f"{platform.system()} {platform.machine()}",
    "backend": jax.default_backend(),
    "python": platform.python_version(),
    **versions,
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
  }


def installed(peer: str) -> bool:
  """Whether a peer can be imported."""
  return importlib.util.find_spec(peer) is not None


def _version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _device():
  device = jax.local_devices()[0]
  if device.platform != "cpu":
    return device.device_kind
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  models = [x.partition(":")[2].strip() for x in lines if "model name" in x]
  return models[0] if models else platform.processor() or "CPU"
