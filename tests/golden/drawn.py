# SPDX-License-Identifier: Apache-2.0
"""Tensors drawn by their name: torch and the tests make the same ones.

So weights and images need not be stored beside what torch computes of them.
NumPy keeps the raw stream of a bit generator from version to version.
"""

import json
import zlib

import numpy as np

# Larger tensors are compared by their length and by some projections.
FULL, PROJECTIONS = 128, 8
IGNORE_LABEL = 255


def uniform(name, shape, low=-1.0, high=1.0):
  """float64 of that shape; the values fit in float32."""
  raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(
    int(np.prod(shape, dtype=int))
  )
  unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
  values = low + (high - low) * unit
  return values.astype(np.float32).astype(np.float64).reshape(shape)


def checksum():
  """Of some draws: with other ones no stored number could be met."""
  return zlib.crc32(uniform('checksum', (1000,)).tobytes())


def weight(name, shape):
  """A tensor of a state dict, in torch's layout, never 0 or 1 throughout."""
  if len(shape) > 1:
    bound = (6 / np.prod(shape[1:])) ** 0.5
    return uniform(name, shape, -bound, bound)
  if name.endswith(('running_var', '.weight')):
    return uniform(name, shape, 0.5, 1.5)
  return uniform(name, shape, -0.5, 0.5)


def image(name, shape):
  """Images [b, c, h, w] of different colors: they differ after pooling."""
  means = uniform(f'{name} means', (*shape[:2], 1, 1))
  return uniform(name, shape, -2, 2) + means


def labels(name, shape, num_classes):
  """uint8 [b, h, w]; about every sixth pixel is ignored."""
  ids = np.floor(uniform(name, shape, 0, num_classes * 1.2 - 1e-3))
  return np.where(ids < num_classes, ids, IGNORE_LABEL).astype(np.uint8)


def summary(name, array):
  """The values of a small tensor; else its length and projections, [9]."""
  array = np.asarray(array, np.float64).ravel()
  if array.size <= FULL:
    return array
  axes = uniform(f'{name} axes', (PROJECTIONS, array.size))
  # Each about as large as the length.
  return np.concatenate([[np.linalg.norm(array)], axes @ array * 3**0.5])


def pack(tensors):
  """Summaries of {name: array} as one vector, and {name: size} as bytes."""
  parts = {name: summary(name, tensors[name]) for name in sorted(tensors)}
  sizes = {name: part.size for name, part in parts.items()}
  return {
    'values': np.concatenate(list(parts.values())).astype(np.float32),
    'sizes': to_bytes(sizes),
  }


def unpack(values, sizes):
  """{name: summary} of what `pack` gave."""
  sizes = from_bytes(sizes)
  ends = np.cumsum(list(sizes.values()))
  return dict(zip(sizes, np.split(values, ends[:-1]), strict=True))


def to_bytes(tree):
  return np.frombuffer(json.dumps(tree).encode(), np.uint8)


def from_bytes(array):
  return json.loads(array.tobytes())
