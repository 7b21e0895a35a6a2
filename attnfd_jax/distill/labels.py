# SPDX-License-Identifier: Apache-2.0
"""Labels at the size of a map."""

import numpy as np


def nearest(labels, height, width):
  """[b, H, W] -> [b, height, width], as PyTorch's interpolate(mode='nearest').

  Pixel i of the result is pixel floor(i H / height) of the labels.
  """
  rows, columns = (
    np.arange(new) * old // new
    for new, old in zip((height, width), labels.shape[1:], strict=True)
  )
  return labels[:, rows][:, :, columns]
