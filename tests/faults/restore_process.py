# SPDX-License-Identifier: Apache-2.0
"""Restores in one of two processes, each from a folder of its own."""

import os
import sys

import jax
import jax.numpy as jnp

from attnfd_jax.devices import processes
from attnfd_jax.errors import InputError
from attnfd_jax.runs import checkpoints

RUN = {'seed': 0}


def make_state(step):
  return {'w': jnp.full((40, 50), step, jnp.float32)}


if __name__ == '__main__':
  coordinator, index, folder = sys.argv[1:]
  processes.initialize(
    coordinator=coordinator, num_processes=2, process_id=int(index)
  )
  mesh = jax.sharding.Mesh(jax.devices(), 'data')
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  zeros = jax.jit(lambda: make_state(0), out_shardings=whole)()
  try:
    state, step = checkpoints.restore_latest(folder, zeros, RUN)
    print('restored', step, float(state['w'].addressable_data(0)[0, 0]))
  except InputError as error:
    print('refused', error)
    sys.stdout.flush()
    os._exit(0)  # The other process may wait for this one.
