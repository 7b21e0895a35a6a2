# SPDX-License-Identifier: Apache-2.0
"""Bilinear resizing with aligned corners, as PyTorch does it for maps."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


def score_precision(dtype):
  """Of the products that resize scores of a network that computes in `dtype`.

  Those of bfloat16 are not made better by products of float32.
  """
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

  def step(size_out, size_in):
    return (size_out - 1) / (size_in - 1) if size_in > 1 else size_out

  scale = jnp.array(
    [step(height, h), step(width, w)], np.promote_types(x.dtype, np.float32)
  )
  # scale_and_translate counts from pixel edges, align_corners from centres.
  shift = jnp.where(jnp.array([h, w]) > 1, 0.5 * (1 - scale), 0)
  return jax.image.scale_and_translate(
    x,
    (b, height, width, c),
    (1, 2),
    scale,
    shift,
    'linear',
    antialias=False,
    precision=precision,
  )


def matrix(size_out, size_in):
  """What each pixel of a resized line is made of, float32 [out, in]."""
  line = jnp.eye(size_in)[None, :, None]
  return resize(line, size_out, 1)[0, :, 0]
