# SPDX-License-Identifier: Apache-2.0
"""Augmentation of the AttnFD recipe with OpenCV, uint8 in and uint8 out.

The recipe (custom_transforms.py:50-123 of the authors): flip, random scale,
pad, random crop, blur. Here the window is cut before it is resized, about five
times as fast and the same up to a common shift of under one pixel.
"""

import dataclasses

import cv2
import grain
import numpy as np
from PIL import Image

from attnfd_jax.data.sources import IGNORE_LABEL

# Grain's threads are the parallelism; workers import this module too.
cv2.setNumThreads(0)


def pad(x, size, value):
  """Pads [h, w] or [h, w, c] right and bottom to `size` with `value`."""
  bottom, right = size[0] - x.shape[0], size[1] - x.shape[1]
  if not bottom and not right:
    return x
  fill = (value,) * (x.shape[2] if x.ndim == 3 else 1)
  return cv2.copyMakeBorder(
    x, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=fill
  )


def distort(image, generator, *, strength):
  """Random brightness, contrast, saturation and hue.

  Args:
    image: uint8 [h, w, 3] RGB.
    generator: np.random.Generator.
    strength: 1 is brightness +-25 %, contrast and saturation 0.5 to 1.5, hue
      +-18 degrees; smaller values shrink the ranges in proportion.
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


@dataclasses.dataclass(frozen=True)
class Augment(grain.transforms.RandomMap):
  """Random scale, crop, flip, blur and photometric distortion of a record.

  Attributes:
    base_size: the short side becomes an integer in base times scale_range.
    crop_size: (height, width) of the result.
    label_fill: label of padded pixels; the reference pads VOC with background.
    flip, blur: probabilities.
    photometric: strength, 0 is off; see `distort`.
  """

  base_size: int
  crop_size: tuple[int, int]
  scale_range: tuple[float, float] = (0.5, 2.0)
  label_fill: int = IGNORE_LABEL
  flip: float = 0.5
  blur: float = 0.5
  photometric: float = 0.0

  def random_map(self, record, rng):
    image, label = record['image'], record['label']
    h, w = label.shape
    low, high = (int(scale * self.base_size) for scale in self.scale_range)
    short = int(rng.integers(low, high + 1))
    full = (h * short // min(h, w), w * short // min(h, w))
    size = [min(c, n) for c, n in zip(self.crop_size, full, strict=True)]
    window = []
    for n, new, cut in zip((h, w), full, size, strict=True):
      start, scale = int(rng.integers(new - cut + 1)), n / new
      window.append(
        slice(int(start * scale), int(np.ceil((start + cut) * scale)))
      )
    window = tuple(window)
    # Linear interpolation would skip pixels when shrinking.
    how = cv2.INTER_AREA if short < min(h, w) else cv2.INTER_LINEAR
    image = cv2.resize(image[window], size[::-1], interpolation=how)
    label = cv2.resize(
      label[window], size[::-1], interpolation=cv2.INTER_NEAREST_EXACT
    )
    if rng.random() < self.flip:
      image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    sigma = rng.random()
    if rng.random() < self.blur and sigma > 0.05:  # OpenCV needs sigma > 0.
      image = cv2.GaussianBlur(image, (0, 0), sigma)
    if self.photometric:
      image = distort(image, rng, strength=self.photometric)
    return {
      'image': pad(image, self.crop_size, 0),
      'label': pad(label, self.crop_size, self.label_fill),
    }


def fit_short_side(size, short_side):
  """(height, width) with the given short side, as custom_transforms.py."""
  return tuple(n * short_side // min(size) for n in size)


def resize_image(image, size):
  """Pillow's antialiased bilinear, as the reference evaluates."""
  return _resize(image, size, Image.Resampling.BILINEAR)


def resize_label(label, size):
  """Nearest neighbour."""
  return _resize(label, size, Image.Resampling.NEAREST)


def _resize(x, size, how):
  if x.shape[:2] == tuple(size):
    return x
  return np.asarray(Image.fromarray(x).resize(size[::-1], how))
