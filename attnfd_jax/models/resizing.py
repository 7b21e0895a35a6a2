# SPDX-License-Identifier: Apache-2.0
"""Resizes feature maps bilinearly with aligned corners, as in PyTorch."""

from typing import Any, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from attnfd_jax.types import AnyArray, DType

# An int, or symbolic while a network is exported (exporting/stablehlo.py).
Size: TypeAlias = Any


def logits_precision(dtype: DType | None) -> lax.Precision:
  """Precision of the matrix products that resize logits of a compute dtype.

  With bfloat16 logits, products in float32 precision would gain nothing.
  """
  half = dtype is not None and jnp.finfo(dtype).bits < 32
  return lax.Precision.DEFAULT if half else lax.Precision.HIGHEST


def resize(
  x: Float[AnyArray, 'b h w c'],
  height: Size,
  width: Size,
  *,
  precision: lax.Precision = lax.Precision.HIGHEST,
) -> Float[AnyArray, 'b height width c']:
  """Resizes bilinearly so that corner pixels stay corner pixels.

  The dtype stays the same. `precision` is that of the matrix products, whose
  inputs a TPU or GPU rounds by default.
  """
  b, h, w, c = x.shape
  if (h, w) == (height, width):
    return x
  # A single output pixel is the corner; a single input pixel is repeated.
  x = x[:, : h if height > 1 else 1, : w if width > 1 else 1]
  h, w = x.shape[1:3]
  sizes = (height, h), (width, w)
  steps = [(new - 1) / (old - 1) if old > 1 else new for new, old in sizes]
  scale = jnp.array(steps, np.promote_types(x.dtype, np.float32))
  # scale_and_translate counts from pixel edges, align_corners from centers.
  shift = jnp.where(jnp.array([h, w]) > 1, 0.5 * (1 - scale), 0)
  options = {'antialias': False, 'precision': precision}
  return jax.image.scale_and_translate(
    x, (b, height, width, c), (1, 2), scale, shift, 'linear', **options
  )


def matrix(size_out: Size, size_in: Size) -> Float[AnyArray, 'n_out n_in']:
  """Matrix that resizes a row or a column of pixels; its rows are weights."""
  line = jnp.eye(size_in)[None, :, None]
  return resize(line, size_out, 1)[0, :, 0]
