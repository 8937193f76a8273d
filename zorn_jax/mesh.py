"""Which device does what: a mesh of probes, rows of a batch, and heads.

Probes are spread over the axis "probe", the rows of a batch over "data", and
the heads of a model that is larger than a device over "head".
"""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from zorn_jax import types

AXES = ("probe", "data", "head")
UPDATES = ("replicated", "sharded")

# Smaller arrays are updated everywhere: gathering them would cost more.
_SMALLEST_SLICED = 4096


class Layout(NamedTuple):
  """How a run is spread over devices.

  Attributes:
    mesh: The devices, with axes "probe", "data" and "head".
    update: "replicated": every device updates all parameters that it holds, and
      nothing but losses moves. "sharded": each updates a slice of them, with
      its part of the optimiser's state, and the slices are gathered once.
  """

  mesh: Mesh
  update: str = "replicated"

  @property
  def everywhere(self) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(self.mesh, PartitionSpec())

  def place(self, tree: types.PyTree, specs) -> types.PyTree:
    """The sharding of each parameter, by its name in `specs` or everywhere."""

    def sharding(path, leaf):
      del leaf
      name = getattr(path[0], "key", None) if path else None
      return NamedSharding(self.mesh, specs.get(name, PartitionSpec()))

    return jax.tree.map_with_path(sharding, tree)

  def slices(self, tree: types.PyTree, placed: types.PyTree) -> types.PyTree:
    """The sharding of what each device updates, given where parameters are."""
    if self.update == "replicated":
      return placed
    return jax.tree.map(self._slice, tree, placed)

  def _slice(self, leaf, placed):
    axes = [name for name in ("probe", "data") if self.mesh.shape[name] > 1]
    parts = math.prod(self.mesh.shape[name] for name in axes)
    spec = list(placed.spec) + [None] * (leaf.ndim - len(placed.spec))
    # Random words hold the signs of 32 neighbours along the last axis.
    grains = [1] * (leaf.ndim - 1) + [32]
    free = [
      axis
      for axis, (size, grain) in enumerate(zip(leaf.shape, grains, strict=True))
      if spec[axis] is None and size % (parts * grain) == 0
    ]
    if leaf.size < _SMALLEST_SLICED or not free:
      return placed
    spec[free[0]] = tuple(axes)
    return NamedSharding(self.mesh, PartitionSpec(*spec))


def make(
  num_probes: int,
  probe: int = 0,
  data: int = 1,
  head: int = 1,
  num_devices: int = 0,
) -> Mesh | AbstractMesh:
  """A mesh of the devices of all processes.

  Args:
    num_probes: Directions n per step, which "probe" has to divide; 0 for a
      method without any, which runs on one device.
    probe: Devices that share the probes; 0 for as many as there are and divide
      them.
    data: Devices that share the rows of each batch.
    head: Devices that share a model.
    num_devices: Devices to plan for, which need not be there; 0 for those that
      there are.
  Returns:
    A mesh with the axes "probe", "data" and "head"; an abstract one, which
    programs can be traced for but not run on, if it is a plan.
  Raises:
    ValueError: If there are too few devices, or they do not divide the probes.
  """
  available = num_devices or jax.device_count()
  sizes = {"probe": probe, "data": data, "head": head}
  for name, size in sizes.items():
    least = 0 if name == "probe" else 1
    if size < least:
      raise ValueError(
        f"mesh.{name} must be at least {least}, got {size}. Choose the number "
        "of devices for it."
      )
  if not num_probes:
    if probe > 1 or data > 1 or head > 1 or jax.process_count() > 1:
      raise ValueError(
        "back-propagation has no probes to spread and runs on one device, got "
        f"a mesh of {sizes} in {jax.process_count()} processes. Set mesh.probe "
        "to 0 and the others to 1, and start one process."
      )
    probe = 1
  elif not probe:
    probe = max(1, available // (data * head))
    if jax.process_count() == 1:
      probe = _largest_divisor(num_probes, probe)
  wanted = probe * data * head
  if wanted > available:
    raise ValueError(
      f"the mesh {probe} x {data} x {head} (probe, data, head) needs {wanted} "
      f"devices, but there are {available}. Make an axis of it smaller."
    )
  if num_probes % probe:
    below = num_probes // probe * probe
    near = f"{below} or {below + probe}" if below else f"{probe}"
    fewer = _largest_divisor(num_probes, probe)
    raise ValueError(
      f"{probe} devices cannot share {num_probes} probes evenly. Set "
      f"num_probes to {near}, or mesh.probe to {fewer}."
    )
  if num_devices:
    shape = (probe, data, head)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
  if jax.process_count() > 1 and wanted != available:
    raise ValueError(
      f"the mesh {probe} x {data} x {head} uses {wanted} of {available} "
      "devices, but every process must have a part. Use all, or start fewer "
      "processes."
    )
  grid = np.array(jax.devices()[:wanted]).reshape(probe, data, head)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def _largest_divisor(number, most):
  return max(k for k in range(1, most + 1) if number % k == 0)


def put(x, place: jax.sharding.Sharding | None) -> jax.Array:
  """An array that every process has, where it belongs on their devices.

  Args:
    x: An array; every process brings what its devices hold.
    place: Its sharding; None for the first device.
  """
  if jax.process_count() == 1:
    return jax.device_put(x, place)
  whole = np.asarray(x)
  return jax.make_array_from_callback(
    whole.shape, place, lambda index: whole[index]
  )


def describe(layout: Layout) -> str:
  """The layout in one line."""
  sizes = " x ".join(
    f"{size} {name}" for name, size in layout.mesh.shape.items()
  )
  kinds = {device.device_kind for device in layout.mesh.devices.flat}
  return (
    f"{layout.mesh.size} of {jax.device_count()} devices "
    f"({', '.join(sorted(kinds))}) in {jax.process_count()} processes as "
    f"{sizes}, update {layout.update}"
  )
