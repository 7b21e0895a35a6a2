# SPDX-License-Identifier: Apache-2.0
"""Augmentation of the AttnFD recipe with OpenCV, uint8 in and uint8 out.

The recipe (custom_transforms.py:50-123 of the authors): flip, random scale,
pad, random crop, blur. Here the window is cut before it is resized, about five
times as fast and the same up to a common shift of under one pixel. Rotation and
photometric distortion are additions, off by default.
"""

import dataclasses
import math

import cv2
import grain
import numpy as np
from PIL import Image

from attnfd_jax.losses import IGNORE_LABEL

# Of a Gaussian with less, all taps but one are 0 in OpenCV's 8 bits.
_LEAST_SIGMA = 0.28


def pad_edges(x, size, value=None):
  """Pads [h, w] or [h, w, c] right and bottom to `size`, by default with edges.

  Another color would be one more object, and its mean enter the pooled branch.
  """
  bottom, right = size[0] - x.shape[0], size[1] - x.shape[1]
  if not bottom and not right:
    return x
  how = cv2.BORDER_REPLICATE if value is None else cv2.BORDER_CONSTANT
  fill = (value or 0,) * (x.shape[2] if x.ndim == 3 else 1)
  return cv2.copyMakeBorder(x, 0, bottom, 0, right, how, value=fill)


def distort(image, generator, *, strength):
  """Random brightness, contrast, saturation and hue of uint8 [h, w, 3] RGB.

  By `strength` times 25 %, a half, a half and 18 degrees at most, either way.
  """
  brightness, contrast, saturation, hue = strength * generator.uniform(-1, 1, 4)
  grey = np.arange(256, dtype=np.float32)
  table = (grey - 128) * (1 + 0.5 * contrast) + 128 + 64 * brightness
  image = cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))
  # OpenCV's 8-bit hue counts in steps of two degrees and wraps at 180.
  turn = (grey + round(9 * hue)) % 180
  stretch = np.clip(grey * (1 + 0.5 * saturation), 0, 255)
  table = np.stack([turn, stretch, grey], -1).astype(np.uint8)[None]
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
  return cv2.cvtColor(cv2.LUT(hsv, table), cv2.COLOR_HSV2RGB)


def _smoothed(image, scale):
  """uint8 [h, w, 3] that linear interpolation shrinks about as Pillow does."""
  # Pillow's triangle has variance scale^2 / 6; linear interpolation has 1 / 6.
  variance = (scale**2 - 1) / 6
  if variance > 0.5:
    return cv2.GaussianBlur(image, (0, 0), math.sqrt(variance))
  # Taps (v / 2, 1 - v, v / 2); OpenCV wants the sigma that they have.
  sigma = (2 * math.log(2 * (1 - variance) / variance)) ** -0.5
  return cv2.GaussianBlur(image, (3, 3), sigma)


def _resized_window(record, *, full, start, size):
  """The window of `size` at `start` of the record resized to `full`."""
  image, label = record['image'], record['label']
  window = tuple(
    slice(int(first * (n / new)), math.ceil((first + cut) * (n / new)))
    for n, new, first, cut in zip(label.shape, full, start, size, strict=True)
  )
  image, scale = image[window], min(label.shape) / min(full)
  how = cv2.INTER_LINEAR
  # INTER_AREA takes three times as long, and keeps more of what should be
  # averaged away; below 1.3 it is nearer to Pillow all the same.
  if scale >= 1.3:
    image = _smoothed(image, scale)
  elif scale > 1:
    how = cv2.INTER_AREA
  image = cv2.resize(image, size[::-1], interpolation=how)
  how = cv2.INTER_NEAREST_EXACT
  return image, cv2.resize(label[window], size[::-1], interpolation=how)


def _rotated_window(record, *, full, start, size, degrees):
  """`_resized_window` turned about its centre; black and ignored outside."""
  cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  h, w = size
  centre = np.array(start) + (h / 2 - 0.5, w / 2 - 0.5)
  along, across = abs(cos), abs(sin)
  reach = np.array([along * h + across * w, across * h + along * w]) / 2
  # What the turned window touches, and a pixel more to interpolate with.
  low = np.maximum(np.floor(centre - reach).astype(int) - 1, 0)
  high = np.minimum(np.ceil(centre + reach).astype(int) + 2, full)
  image, label = _resized_window(
    record, full=full, start=low.tolist(), size=(high - low).tolist()
  )
  turned = np.array([[cos, -sin], [sin, cos]])
  shift = (centre - low)[::-1] - turned @ ((w - 1) / 2, (h - 1) / 2)
  to_source = np.column_stack([turned, shift])

  def turn(x, how, border):
    options = {'flags': how | cv2.WARP_INVERSE_MAP, 'borderValue': border}
    return cv2.warpAffine(x, to_source, (w, h), **options)

  image = turn(image, cv2.INTER_LINEAR, 0)
  return image, turn(label, cv2.INTER_NEAREST, IGNORE_LABEL)


@dataclasses.dataclass(frozen=True)
class Augment(grain.transforms.RandomMap):
  """Random scale, rotation, crop, flip, blur and distortion of a record."""

  base_size: int  # The short side is an integer in this times scale_range.
  crop_size: tuple[int, int]  # (height, width) of the result.
  scale_range: tuple[float, float] = (0.5, 2.0)
  label_fill: int = IGNORE_LABEL  # The reference pads VOC with background.
  flip: float = 0.5  # Probability.
  blur: float = 0.5  # Probability.
  photometric: float = 0.0  # Strength, see `distort`; 0 is off.
  rotation: float = 0.0  # At most so many degrees, either way; 0 is off.

  def random_map(self, record, rng):
    low, high = (int(scale * self.base_size) for scale in self.scale_range)
    short = int(rng.integers(low, high + 1))
    full = fit_short_side(record['label'].shape, short)
    size = tuple(map(min, self.crop_size, full))
    free = np.subtract(full, size).tolist()
    start = [int(rng.integers(n + 1)) for n in free]
    window = {'full': full, 'start': start, 'size': size}
    if self.rotation:
      degrees = rng.uniform(-self.rotation, self.rotation)
      image, label = _rotated_window(record, degrees=degrees, **window)
    else:
      image, label = _resized_window(record, **window)
    if rng.random() < self.flip:
      image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    sigma = rng.random()
    if rng.random() < self.blur and sigma > _LEAST_SIGMA:
      image = cv2.GaussianBlur(image, (0, 0), sigma)
    if self.photometric:
      image = distort(image, rng, strength=self.photometric)
    return {
      'image': pad_edges(image, self.crop_size, 0),
      'label': pad_edges(label, self.crop_size, self.label_fill),
    }


def fit_short_side(size, short_side):
  """(height, width) with this short side (custom_transforms.py); 0 is none."""
  return tuple(n * (short_side or min(size)) // min(size) for n in size)


def next_multiple(size, multiple):
  """(height, width), each rounded up to a multiple."""
  return tuple(-(-n // multiple) * multiple for n in size)


def resize(x, size, how=Image.Resampling.BILINEAR):
  """uint8 [h, w] or [h, w, 3] at (height, width), antialiased, by Pillow."""
  if x.shape[:2] == tuple(size):
    return x
  return np.asarray(Image.fromarray(x).resize(size[::-1], how))


def fit_image(image, short_side):
  """An image at the size of `fit_short_side`."""
  return resize(image, fit_short_side(image.shape[:2], short_side))


def fit_record(record, short_side, *, resize_labels):
  """A record with its image as the network sees it in evaluation.

  The label has that size only if resize_labels, as protocol `reference` has it.
  """
  image, label = fit_image(record['image'], short_side), record['label']
  if resize_labels:
    label = resize(label, image.shape[:2], Image.Resampling.NEAREST)
  return {'image': image, 'label': label}
