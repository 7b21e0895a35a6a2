# SPDX-License-Identifier: Apache-2.0
"""The mesh, and where arrays live on it."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from attnfd_jax.errors import InputError


def make_mesh(num_devices=-1):
  """A mesh with one axis, 'data', over the first devices; -1 takes all.

  Raises:
    InputError: if there are not that many devices.
  """
  devices = jax.devices()
  if num_devices == -1:
    num_devices = len(devices)
  if not 1 <= num_devices <= len(devices):
    raise InputError(
      f'config.mesh.data={num_devices} but there are {len(devices)} devices '
      f'({devices[0].device_kind}); -1 takes all of them.'
    )
  # Without axis_types the axes are Explicit on newer jax, Auto on older.
  return jax.sharding.Mesh(
    np.array(devices[:num_devices]),
    ('data',),
    axis_types=(jax.sharding.AxisType.Auto,),
  )


def replicated(mesh):
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh):
  """The first axis is split over the devices."""
  return NamedSharding(mesh, PartitionSpec('data'))
