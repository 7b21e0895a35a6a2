# SPDX-License-Identifier: Apache-2.0
"""Labels at the size of a map."""

import numpy as np


def nearest(labels, height, width):
  """[b, H, W] -> [b, height, width], as PyTorch's interpolate(mode='nearest').

  Pixel i of the result is pixel floor(i H / height) of the labels, in float32
  as there.
  """
  rows, columns = (
    _nearest_indices(old, new)
    for old, new in zip(labels.shape[1:], (height, width), strict=True)
  )
  return labels[:, rows][:, :, columns]


def _nearest_indices(old, new):
  positions = np.arange(new, dtype=np.float32) * np.float32(old / new)
  return np.minimum(positions.astype(np.int32), old - 1)
