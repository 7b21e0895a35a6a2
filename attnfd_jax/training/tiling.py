# SPDX-License-Identifier: Apache-2.0
"""Scores of images that do not fit the device, from overlapping tiles."""

import itertools

import numpy as np


def covers(tile, size):
  """Whether one tile is enough for an image of `size`."""
  return all(n >= m for n, m in zip(tile, size, strict=True))


def starts(length, tile, overlap):
  """First pixels of the tiles along one side: the least number, evenly spread.

  Neighbours share at least `overlap` of a tile, up to rounding.
  """
  if tile >= length:
    return [0]
  stride = max(int(tile * (1 - overlap)), 1)
  count = -(-(length - tile) // stride) + 1
  return [round(x) for x in np.linspace(0, length - tile, count)]


def falling_weights(length):
  """Weight of each pixel of a tile's side: 1 in the middle, least at its ends.

  Linear, and never 0: the corner of an image has one tile alone.
  """
  pixels = np.arange(length) + 0.5
  return (np.minimum(pixels, length - pixels) * 2 / length).astype(np.float32)


def tiled(apply, image, *, tile, overlap=0.25):
  """Scores of a whole image, float32 [h, w, k], on the host.

  Tiles have one shape, cut to the image where that is smaller, so `apply`
  compiles once per shape. Where they overlap, scores are averaged with weights
  that fall to the tile's edge, where the network sees least around a pixel.

  Args:
    apply: part of the image [th, tw, c] -> scores [th, tw, k].
    image: [h, w, c].
    tile: (height, width). If it covers the image the result is apply(image).
    overlap: least share of a tile that the next one covers again, in [0, 1).
  """
  size = image.shape[:2]
  if covers(tile, size):
    return np.asarray(apply(image))
  th, tw = (min(n, m) for n, m in zip(tile, size, strict=True))
  weight = np.outer(falling_weights(th), falling_weights(tw))
  rows, columns = (
    starts(n, m, overlap) for n, m in zip(size, (th, tw), strict=True)
  )
  total, weights = 0.0, np.zeros(size, np.float32)
  for y, x in itertools.product(rows, columns):
    window = slice(y, y + th), slice(x, x + tw)
    scores = np.asarray(apply(image[window]))
    if not np.ndim(total):
      total = np.zeros((*size, scores.shape[-1]), np.float32)
    total[window] += scores * weight[..., None]
    weights[window] += weight
  total /= weights[..., None]
  return total


def resize_on_host(x, size):
  """As models.layers.resize of one [h, w, k]: bilinear with align_corners."""
  for axis, n in enumerate(size):
    m = x.shape[axis]
    if n == m:
      continue
    at = np.linspace(0, m - 1, n)
    low = np.minimum(at.astype(int), max(m - 2, 0))
    high = np.minimum(low + 1, m - 1)
    share = np.expand_dims(at - low, [i for i in range(3) if i != axis])
    share = share.astype(np.float32)
    x = (1 - share) * x.take(low, axis) + share * x.take(high, axis)
  return x
