# SPDX-License-Identifier: Apache-2.0
"""Creates the device mesh and the shardings of arrays on it.

Axis 'data' splits the batch, and axis 'spatial' the height of feature maps. XLA
inserts the communication: the rows that neighboring devices need for
convolutions, and sums over the batch. Results are the same on any mesh, up to
rounding.
"""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from attnfd_jax.errors import InputError
from attnfd_jax.types import PyTree

# Number of elements below which sharding an array costs more than it saves.
_SMALLEST_SHARDED = 4096


def make_mesh(data: int = -1, spatial: int = 1) -> jax.sharding.Mesh:
  """Creates a mesh with the axes 'data' and 'spatial' over the first devices.

  Args:
    data: number of parts of the batch; -1 uses all devices.
    spatial: number of parts of the height of each image, which are on devices
      of the same process.

  Raises:
    InputError: if there are too few devices, or if there are several processes
      and some devices would be idle.
  """
  # In the order of processes: each reads the images that its devices hold.
  devices = sorted(jax.devices(), key=lambda x: (x.process_index, x.id))
  local = jax.local_device_count()
  if spatial < 1 or local % spatial:
    raise InputError(
      f'config.mesh.spatial={spatial} must divide the {local} devices of each '
      'process.'
    )
  if data == -1:
    data = len(devices) // spatial
  if not 1 <= data * spatial <= len(devices):
    raise InputError(
      f'config.mesh.data={data} times config.mesh.spatial={spatial}, but there '
      f'are {len(devices)} devices; data=-1 takes all of them.'
    )
  if jax.process_count() > 1 and data * spatial < len(devices):
    raise InputError(
      f'config.mesh.data={data} leaves devices idle in a process; use -1.'
    )
  # Without axis_types the axes are Explicit on newer jax, Auto on older.
  return jax.sharding.Mesh(
    np.array(devices[: data * spatial]).reshape(data, spatial),
    ('data', 'spatial'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Sharding that copies an array to every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Sharding that splits the first axis of an array over 'data'.

  Images enter programs with it, not split over 'spatial' too, since the height
  of an argument would have to be divisible.
  """
  return NamedSharding(mesh, PartitionSpec('data'))


def split_height(x: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
  """Splits [b, h, ...] over both axes of the mesh, inside jit, for any h."""
  if mesh.shape['spatial'] == 1:
    return x
  sharding = NamedSharding(mesh, PartitionSpec('data', 'spatial'))
  return jax.lax.with_sharding_constraint(x, sharding)


def split_state(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
  """Shardings of a TrainState, with large trained arrays split over 'data'.

  An array is split along its largest axis that is divisible. Small arrays and
  those that are not trained are replicated.

  Args:
    shapes: TrainState of arrays or of their ShapeDtypeStructs.
    mesh: from make_mesh.

  Returns:
    TrainState of NamedShardings.
  """

  def split(x: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
    divisible = [0 if size % mesh.shape['data'] else size for size in x.shape]
    if x.size < _SMALLEST_SHARDED or not any(divisible):
      return replicated(mesh)
    axes: list[str | None] = [None] * x.ndim
    axes[divisible.index(max(divisible))] = 'data'
    return NamedSharding(mesh, PartitionSpec(*axes))

  shardings = jax.tree.map(lambda _: replicated(mesh), shapes)
  trained = ('params', 'opt_state', 'ema')
  return shardings.replace(
    **{name: jax.tree.map(split, getattr(shapes, name)) for name in trained}
  )


@functools.lru_cache
def _mover(sharding: jax.sharding.Sharding) -> Any:
  return jax.jit(lambda tree: tree, out_shardings=sharding)


def place(tree: PyTree, sharding: jax.sharding.Sharding) -> PyTree:
  """Puts a tree, which must be equal in all processes, on the devices."""
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  # device_put does not take PRNG keys if other processes have devices.
  return _mover(sharding)(tree)


def to_host(tree: PyTree) -> PyTree:
  """Copies the global arrays of a tree to NumPy arrays, in every process."""

  def gather(x: Any) -> Any:
    if isinstance(x, jax.Array) and not x.is_fully_replicated:
      sharding: Any = x.sharding  # A NamedSharding.
      x = place(x, replicated(sharding.mesh))
    return jax.device_get(x)

  return jax.tree.map(gather, tree)
