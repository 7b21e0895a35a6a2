# SPDX-License-Identifier: Apache-2.0
"""One seed is one start: on any backend, and on any number of devices."""

import jax
import numpy as np

from attnfd_jax.training import stage


def test_keys_have_the_same_numbers_on_every_backend():
  """Before they were of rbg, which each backend computes its own way."""
  key = stage.init_key(3, 1)
  assert str(jax.random.key_impl(key)) == 'threefry2x32'
  # As JAX documents its default; a change would move every number of ours.
  np.testing.assert_array_equal(
    jax.random.key_data(stage.init_key(0, 0)), [1797259609, 2579123966]
  )


def test_numbers_do_not_depend_on_how_they_are_split():
  mesh = jax.sharding.Mesh(jax.devices(), 'data')
  places = [
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    for axes in ((), ('data',))
  ]
  key = stage.init_key(0, 0)
  whole, split = (
    jax.jit(lambda k: jax.random.normal(k, (8, 3)), out_shardings=place)(key)
    for place in places
  )
  np.testing.assert_array_equal(whole, split)
