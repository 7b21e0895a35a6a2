# SPDX-License-Identifier: Apache-2.0
"""The mesh, and where arrays live on it.

Axis 'data' splits the batch, axis 'spatial' the height of the maps of an
image; XLA exchanges the rows at the seams and sums what is over the whole
batch. A result is the same on any mesh, up to rounding.
"""

import functools

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from attnfd_jax.errors import InputError

# Arrays below this number of elements are not worth the exchange.
_SMALLEST_SHARDED = 4096


def make_mesh(data=-1, spatial=1):
  """A mesh with the axes 'data' and 'spatial' over the first devices.

  `data` are parts of the batch, -1 for all devices; `spatial` are parts of the
  height of each image, on devices of one process. InputError if there are too
  few devices, or some stay idle in a process.
  """
  # The rows that a process reads are the rows that its devices hold.
  devices = sorted(jax.devices(), key=lambda x: (x.process_index, x.id))
  local = jax.local_device_count()
  if spatial < 1 or local % spatial:
    raise InputError(
      f'config.mesh.spatial={spatial} must divide the {local} devices here.'
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


def replicated(mesh):
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh):
  """The first axis is split over 'data'.

  Images come so: of a program's arguments 'spatial' would have to divide them.
  """
  return NamedSharding(mesh, PartitionSpec('data'))


def split_height(x, mesh):
  """Inside a program: [b, h, ...] is split over both axes, for any h."""
  if mesh.shape['spatial'] == 1:
    return x
  place = NamedSharding(mesh, PartitionSpec('data', 'spatial'))
  return jax.lax.with_sharding_constraint(x, place)


def split_state(shapes, mesh):
  """Shardings of a TrainState whose large arrays are split over 'data'.

  Each along its largest axis that divides; small arrays and what is not
  trained are replicated.
  """

  def split(x):
    fitting = [0 if size % mesh.shape['data'] else size for size in x.shape]
    if x.size < _SMALLEST_SHARDED or not any(fitting):
      return replicated(mesh)
    axes = [None] * x.ndim
    axes[fitting.index(max(fitting))] = 'data'
    return NamedSharding(mesh, PartitionSpec(*axes))

  whole = jax.tree.map(lambda _: replicated(mesh), shapes)
  trained = ('params', 'opt_state', 'ema')
  return whole.replace(
    **{name: jax.tree.map(split, getattr(shapes, name)) for name in trained}
  )


@functools.lru_cache
def _mover(sharding):
  return jax.jit(lambda tree: tree, out_shardings=sharding)


def place(tree, sharding):
  """`tree`, the same in every process, on the devices of all of them."""
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)
  # device_put takes no keys for devices of others.
  return _mover(sharding)(tree)


def to_host(tree):
  """NumPy arrays of the whole of `tree`, in every process."""

  def gather(x):
    if isinstance(x, jax.Array) and not x.is_fully_replicated:
      x = place(x, replicated(x.sharding.mesh))
    return jax.device_get(x)

  return jax.tree.map(gather, tree)
