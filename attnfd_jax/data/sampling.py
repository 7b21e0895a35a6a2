# SPDX-License-Identifier: Apache-2.0
"""Sampling that lets rare classes come up more often."""

import os

import grain
import numpy as np

from attnfd_jax import user_cache
from attnfd_jax.data import frequencies


class Balance(grain.transforms.RandomMap):
  """Replaces a share of the indices of records by draws that balance classes.

  Such a draw picks a class, all that occur alike, and then one of its records.

  Args:
    share: of the indices that are replaced, from 0 to 1.
    presence: bool [n, k], whether record n shows class k.
  """

  def __init__(self, share, presence):
    members = [np.flatnonzero(column) for column in presence.T]
    self._share = share
    self._members = [records for records in members if records.size]

  def random_map(self, index, rng):
    if not self._members or rng.random() >= self._share:
      return index
    records = self._members[rng.integers(len(self._members))]
    return int(records[rng.integers(records.size)])


def class_presence(source, num_classes, *, threads=4):
  """Whether record n shows class k, bool [n, k].

  Sources with a fingerprint are counted once, into the user's cache folder.
  """
  path = None
  if hasattr(source, 'fingerprint'):
    folder = user_cache.folder('presence')
    path = folder / f'{source.fingerprint()}-{num_classes}.npy'
    if path.exists():
      return np.load(path)
  rows = frequencies.count_labels(
    source, num_classes, threads, 'counting classes'
  )
  presence = rows[:, :-1] > 0
  if path:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{os.getpid()}-{path.name}')
    np.save(temporary, presence)
    temporary.replace(path)
  return presence
