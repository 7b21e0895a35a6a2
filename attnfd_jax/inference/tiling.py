# SPDX-License-Identifier: Apache-2.0
"""Logits of images that do not fit the device, from overlapping tiles."""

import itertools

import numpy as np

_ROWS = 64  # Of a result that are resized at a time.


def starts(length, tile, overlap):
  """First pixels of the least tiles along a side that share the overlap."""
  stride, last = max(int(tile * (1 - overlap)), 1), max(length - tile, 0)
  return [round(x) for x in np.linspace(0, last, -(-last // stride) + 1)]


def falling_weights(length):
  """Weights along a tile: 1 in the middle, above 0 at ends, for corners."""
  pixels = np.arange(length) + 0.5
  return (np.minimum(pixels, length - pixels) * 2 / length).astype(np.float32)


def shares(firsts, tile, length):
  """Share of each tile in its pixels along one side, float32 [tiles, tile]."""
  weight, total = falling_weights(tile), np.zeros(length, np.float32)
  for first in firsts:
    total[first : first + tile] += weight
  return [weight / total[first : first + tile] for first in firsts]


def bands(apply, image, *, tile, overlap=0.25):
  """Yields logits of a whole image from its top, float32 [rows, w, k].

  Where tiles overlap, logits are averaged with weights that fall to the tile's
  edge, where the network sees least around a pixel. Only what one row of tiles
  touches is held: all logits are many times the image. `apply` takes parts of
  it [th, tw, c], the tile cut to the image, and returns logits [th, tw, k].
  """
  h, w = image.shape[:2]
  th, tw = map(min, tile, (h, w))
  rows, columns = starts(h, th, overlap), starts(w, tw, overlap)
  down, across = shares(rows, th, h), shares(columns, tw, w)
  unfinished = np.zeros((0, w, 1), np.float32)
  for i, (y, following) in enumerate(itertools.pairwise([*rows, h])):
    total = None
    for x, share in zip(columns, across, strict=True):
      logits = np.asarray(apply(image[y : y + th, x : x + tw]))
      if total is None:
        total = np.zeros((th, w, logits.shape[-1]), np.float32)
        total[: len(unfinished)] = unfinished
        unfinished = None  # Its memory.
      total[:, x : x + tw] += logits * np.outer(down[i], share)[..., None]
    yield total[: following - y]
    unfinished = total[following - y :]


def _between(x, at, axis):
  """Linear interpolation of `x` at positions along an axis."""
  low = np.minimum(at.astype(int), max(x.shape[axis] - 2, 0))
  high = np.minimum(low + 1, x.shape[axis] - 1)
  share = (at - low).astype(np.float32).reshape(-1, *[1] * (2 - axis))
  return (1 - share) * x.take(low, axis) + share * x.take(high, axis)


def resized(x, size):
  """Yields bands of one [h, w, k], resized as models.resizing does it."""
  height, width = size
  rows = np.linspace(0, len(x) - 1, height)
  columns = np.linspace(0, x.shape[1] - 1, width)
  for first in range(0, height, _ROWS):
    yield _between(_between(x, rows[first : first + _ROWS], 0), columns, 1)
