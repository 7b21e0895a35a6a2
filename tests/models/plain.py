# SPDX-License-Identifier: Apache-2.0
"""Operations as NumPy has them, in float64, to compare with."""

import numpy as np


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_convolution(x, kernel, strides, dilation, padding):
  """Every output pixel by itself, in float64; depthwise with 1 input."""
  x, kernel = x.astype(np.float64), kernel.astype(np.float64)
  pad = (padding, padding)
  x = np.pad(x, ((0, 0), pad, pad, (0, 0)))
  k, _, inputs, features = kernel.shape
  reach = dilation * (k - 1)
  rows = range(0, x.shape[1] - reach, strides)
  columns = range(0, x.shape[2] - reach, strides)
  y = np.zeros((len(x), len(rows), len(columns), features))
  formula = 'bijc,ijcf->bf'
  if inputs == 1:
    kernel, formula = kernel[:, :, 0], 'bijc,ijc->bc'
  for i, top in enumerate(rows):
    for j, left in enumerate(columns):
      window = x[
        :,
        top : top + reach + 1 : dilation,
        left : left + reach + 1 : dilation,
      ]
      y[:, i, j] = np.einsum(formula, window, kernel)
  return y


def interpolation(size_out, size_in):
  """Matrix [out, in] of linear interpolation with aligned corners."""
  matrix = np.zeros((size_out, size_in))
  for i in range(size_out):
    x = i * (size_in - 1) / (size_out - 1) if size_out > 1 else 0.0
    low = min(int(np.floor(x)), max(size_in - 2, 0))
    high = min(low + 1, size_in - 1)
    matrix[i, low] += 1 - (x - low)
    matrix[i, high] += x - low
  return matrix
