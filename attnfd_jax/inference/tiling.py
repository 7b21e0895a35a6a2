# SPDX-License-Identifier: Apache-2.0
"""Computes logits of images too large for the device in overlapping tiles."""

from collections.abc import Callable, Iterator, Sequence
import itertools

import numpy as np

_ROWS = 64  # Rows of a result that are resized at a time.


def starts(length: int, tile: int, overlap: float) -> list[int]:
  """First pixels of the tiles along a side, as few as share the overlap."""
  stride, last = max(int(tile * (1 - overlap)), 1), max(length - tile, 0)
  return [round(x) for x in np.linspace(0, last, -(-last // stride) + 1)]


def falling_weights(length: int) -> np.ndarray:
  """Weights along a tile: 1 in the middle, close to 0 at both ends.

  They are never 0: the corner of an image lies in a single tile.
  """
  pixels = np.arange(length) + 0.5
  return (np.minimum(pixels, length - pixels) * 2 / length).astype(np.float32)


def shares(firsts: Sequence[int], tile: int, length: int) -> list[np.ndarray]:
  """Weights [tile] of each tile along a side; at every pixel they sum to 1."""
  weight, total = falling_weights(tile), np.zeros(length, np.float32)
  for first in firsts:
    total[first : first + tile] += weight
  return [weight / total[first : first + tile] for first in firsts]


def bands(
  apply: Callable[[np.ndarray], np.ndarray],
  image: np.ndarray,
  *,
  tile: Sequence[int],
  overlap: float = 0.25,
) -> Iterator[np.ndarray]:
  """Yields the logits of an image from top to bottom, float32 [rows, w, k].

  Where tiles overlap, their logits are averaged. The weights fall toward the
  edges of a tile, where the network sees the least context. Only one row of
  tiles is held in memory: all logits are many times the size of the image.

  Args:
    apply: maps a part of the image [th, tw, c] to its logits [th, tw, k].
    image: [h, w, c].
    tile: (height, width), cropped to the size of the image.
    overlap: the least fraction of a tile that its neighbor covers as well.
  """
  h, w = image.shape[:2]
  th, tw = map(min, tile, (h, w))
  rows, columns = starts(h, th, overlap), starts(w, tw, overlap)
  down, across = shares(rows, th, h), shares(columns, tw, w)
  unfinished: np.ndarray | None = None
  for i, (y, next_y) in enumerate(itertools.pairwise([*rows, h])):
    total: np.ndarray | None = None
    for x, share in zip(columns, across, strict=True):
      logits = np.asarray(apply(image[y : y + th, x : x + tw]))
      if total is None:
        total = np.zeros((th, w, logits.shape[-1]), np.float32)
        if unfinished is not None:
          total[: len(unfinished)] = unfinished
        unfinished = None  # Frees its memory.
      total[:, x : x + tw] += logits * np.outer(down[i], share)[..., None]
    assert total is not None  # There is at least one column.
    yield total[: next_y - y]
    unfinished = total[next_y - y :]


def _interpolate(x: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
  """Linear interpolation of `x` at positions along an axis."""
  low = np.minimum(at.astype(int), max(x.shape[axis] - 2, 0))
  high = np.minimum(low + 1, x.shape[axis] - 1)
  share = (at - low).astype(np.float32).reshape(-1, *[1] * (2 - axis))
  return (1 - share) * x.take(low, axis) + share * x.take(high, axis)


def resized(x: np.ndarray, size: Sequence[int]) -> Iterator[np.ndarray]:
  """Yields bands of one [h, w, k] at (height, width), as models.resizing."""
  height, width = size
  rows = np.linspace(0, len(x) - 1, height)
  columns = np.linspace(0, x.shape[1] - 1, width)
  for first in range(0, height, _ROWS):
    band = _interpolate(x, rows[first : first + _ROWS], 0)
    yield _interpolate(band, columns, 1)
