# SPDX-License-Identifier: Apache-2.0
"""Resizes labels to the size of a feature map."""

from jaxtyping import Integer
import numpy as np

from attnfd_jax.types import AnyArray


def nearest(
  labels: Integer[AnyArray, 'b _ _'], height: int, width: int
) -> Integer[AnyArray, 'b {height} {width}']:
  """Resizes labels as PyTorch's interpolate(mode='nearest').

  Row i of the result is row floor(i H / height) of the labels, computed in
  float32 as in PyTorch; likewise for columns.

  >>> nearest(np.arange(4).reshape(1, 1, 4), 1, 2).tolist()
  [[[0, 2]]]
  """
  rows, columns = (
    _nearest_indices(old, new)
    for old, new in zip(labels.shape[1:], (height, width), strict=True)
  )
  return labels[:, rows][:, :, columns]


def _nearest_indices(old, new):
  positions = np.arange(new, dtype=np.float32) * np.float32(old / new)
  return np.minimum(positions.astype(np.int32), old - 1)
