"""How much memory a device has left."""

import pathlib
from collections.abc import Iterator

import jax


def available(devices: int = 1) -> int | None:
  """Bytes that are left for what runs on one device of this process.

  Args:
    devices: Of this process in use; on a CPU they share the host's memory.
  Returns:
    Bytes, of a GPU those of its pool; None where they cannot be read.
  """
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    free = host()
    return None if free is None else free // devices
  stats = device.memory_stats() or {}
  if "bytes_limit" not in stats:
    return None
  return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def host(root: pathlib.Path = pathlib.Path("/")) -> int | None:
  """Bytes that the kernel and the control groups leave to this process.

  Args:
    root: Where proc and sys are found.
  """
  found = [*_kernel(root), *_groups(root)]
  return max(0, min(found)) if found else None


def _kernel(root) -> Iterator[int]:
  for line in _lines(root / "proc/meminfo"):
    if line.startswith("MemAvailable:"):
      yield 1024 * int(line.split()[1])


def _groups(root) -> Iterator[int]:
  """What is left in each control group around this process."""
  for line in _lines(root / "proc/self/cgroup"):
    _, kinds, path = line.split(":", 2)
    if not kinds:
      base, names = "sys/fs/cgroup", ("memory.max", "memory.current")
    elif "memory" in kinds.split(","):
      base = "sys/fs/cgroup/memory"
      names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    else:
      continue
    place = pathlib.PurePath(path.lstrip("/"))
    for group in (place, *place.parents):
      folder = root / base / group
      limit, used = (_lines(folder / name) for name in names)
      if limit and used and limit[0].isdecimal():
        yield int(limit[0]) - int(used[0]) + _reclaimable(folder)


def _reclaimable(folder) -> int:
  """Bytes of files that are kept only until others need the memory."""
  sizes = {}
  for line in _lines(folder / "memory.stat"):
    name, size = line.split()
    sizes[name] = int(size)
  own = sizes.get("inactive_file", 0)
  return sizes.get("total_inactive_file", own)  # Version 1, with those inside.


def _lines(path) -> list[str]:
  try:
    return path.read_text().splitlines()
  except OSError:
    return []
