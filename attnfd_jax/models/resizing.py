# SPDX-License-Identifier: Apache-2.0
"""Bilinear resizing with aligned corners, as PyTorch does it for maps."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


def score_precision(dtype):
  """Of products that resize scores: float32's would not improve bfloat16's."""
  half = dtype is not None and jnp.finfo(dtype).bits < 32
  return lax.Precision.DEFAULT if half else lax.Precision.HIGHEST


def resize(x, height, width, *, precision=lax.Precision.HIGHEST):
  """Bilinear with align_corners: corner pixels of x stay corner pixels.

  [b, h, w, c] -> [b, height, width, c], of the same type; `precision` is that
  of its products, which a TPU or GPU may round.
  """
  b, h, w, c = x.shape
  if (h, w) == (height, width):
    return x
  # A single output pixel is the corner; a single input pixel is a constant.
  x = x[:, : h if height > 1 else 1, : w if width > 1 else 1]
  h, w = x.shape[1:3]
  sizes = (height, h), (width, w)
  steps = [(new - 1) / (old - 1) if old > 1 else new for new, old in sizes]
  scale = jnp.array(steps, np.promote_types(x.dtype, np.float32))
  # scale_and_translate counts from pixel edges, align_corners from centres.
  shift = jnp.where(jnp.array([h, w]) > 1, 0.5 * (1 - scale), 0)
  options = {'antialias': False, 'precision': precision}
  return jax.image.scale_and_translate(
    x, (b, height, width, c), (1, 2), scale, shift, 'linear', **options
  )


def matrix(size_out, size_in):
  """What each pixel of a resized line is made of, float32 [out, in]."""
  line = jnp.eye(size_in)[None, :, None]
  return resize(line, size_out, 1)[0, :, 0]
