# SPDX-License-Identifier: Apache-2.0
"""Augments and resizes uint8 images and labels with OpenCV and Pillow.

The AttnFD recipe (custom_transforms.py:50-123 of the authors): flip, random
scale, pad, random crop, blur. Here the crop is cut out before it is resized,
which is about five times faster and gives the same pixels, up to a shift of
image and label by less than a pixel. Rotation and photometric distortion are
additions and off by default.
"""

from collections.abc import Sequence
import dataclasses
import math

import cv2
import grain
import numpy as np
from PIL import Image

from attnfd_jax.data.records import Record, Size
from attnfd_jax.losses import IGNORE_LABEL

# With a smaller sigma OpenCV's 8-bit Gaussian blur changes nothing: all taps
# but the middle one round to 0.
_LEAST_SIGMA = 0.28


def pad_edges(
  x: np.ndarray, size: Size, value: int | None = None
) -> np.ndarray:
  """Pads an image or a label on the right and at the bottom.

  Args:
    x: of shape [h, w] or [h, w, c].
    size: of the result.
    value: of the padding. None repeats the edges: a constant color would look
      like one more object, and shift the mean that image pooling sees.
  """
  bottom, right = size[0] - x.shape[0], size[1] - x.shape[1]
  if not bottom and not right:
    return x
  border = cv2.BORDER_REPLICATE if value is None else cv2.BORDER_CONSTANT
  fill = (value or 0,) * (x.shape[2] if x.ndim == 3 else 1)
  return cv2.copyMakeBorder(x, 0, bottom, 0, right, border, value=fill)


def distort(
  image: np.ndarray, generator: np.random.Generator, *, strength: float
) -> np.ndarray:
  """Changes brightness, contrast, saturation and hue of an RGB image at random.

  At strength 1 brightness changes by up to 64 gray levels, contrast and
  saturation by up to half, and hue by up to 18 degrees, in both directions.
  """
  brightness, contrast, saturation, hue = strength * generator.uniform(-1, 1, 4)
  gray = np.arange(256, dtype=np.float32)
  table = (gray - 128) * (1 + 0.5 * contrast) + 128 + 64 * brightness
  image = cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))
  # OpenCV's 8-bit hue counts in steps of two degrees and wraps at 180.
  turn = (gray + round(9 * hue)) % 180
  stretch = np.clip(gray * (1 + 0.5 * saturation), 0, 255)
  table = np.stack([turn, stretch, gray], -1).astype(np.uint8)[None]
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
  return cv2.cvtColor(cv2.LUT(hsv, table), cv2.COLOR_HSV2RGB)


def _smoothed(image: np.ndarray, scale: float) -> np.ndarray:
  """Blurs an image so that linear interpolation shrinks it about like Pillow.

  Args:
    image: RGB.
    scale: size of the image over its size after shrinking, above 1.
  """
  # Pillow's triangle has variance scale^2 / 6; linear interpolation has 1 / 6.
  variance = (scale**2 - 1) / 6
  if variance > 0.5:
    return cv2.GaussianBlur(image, (0, 0), math.sqrt(variance))
  # The sigma for which OpenCV's taps are (v / 2, 1 - v, v / 2).
  sigma = (2 * math.log(2 * (1 - variance) / variance)) ** -0.5
  return cv2.GaussianBlur(image, (3, 3), sigma)


def _resized_window(
  record: Record, *, full: Size, start: Sequence[int], size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Image and label of the record, resized to `full` and cropped.

  Args:
    record: is cropped first, which is faster.
    full: size of the whole record after resizing.
    start: top left corner of the crop, (row, column).
    size: of the crop.
  """
  image, label = record['image'], record['label']
  window = tuple(
    slice(int(first * (n / new)), math.ceil((first + cut) * (n / new)))
    for n, new, first, cut in zip(label.shape, full, start, size, strict=True)
  )
  image, scale = image[window], min(label.shape) / min(full)
  interpolation = cv2.INTER_LINEAR
  # INTER_AREA is three times slower than blur and INTER_LINEAR, and aliases
  # more; but for scales below 1.3 it is closer to Pillow.
  if scale >= 1.3:
    image = _smoothed(image, scale)
  elif scale > 1:
    interpolation = cv2.INTER_AREA
  image = cv2.resize(image, size[::-1], interpolation=interpolation)
  interpolation = cv2.INTER_NEAREST_EXACT
  label = cv2.resize(label[window], size[::-1], interpolation=interpolation)
  return image, label


def _rotated_window(
  record: Record,
  *,
  full: Size,
  start: Sequence[int],
  size: Size,
  degrees: float,
) -> tuple[np.ndarray, np.ndarray]:
  """`_resized_window` rotated about its center; black and ignored outside."""
  cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  h, w = size
  center = np.array(start) + (h / 2 - 0.5, w / 2 - 0.5)
  along, across = abs(cos), abs(sin)
  reach = np.array([along * h + across * w, across * h + along * w]) / 2
  # The bounding box of the rotated window, and a pixel more to interpolate.
  low = np.maximum(np.floor(center - reach).astype(int) - 1, 0)
  high = np.minimum(np.ceil(center + reach).astype(int) + 2, full)
  image, label = _resized_window(
    record, full=full, start=low.tolist(), size=(high - low).tolist()
  )
  rotation = np.array([[cos, -sin], [sin, cos]])
  shift = (center - low)[::-1] - rotation @ ((w - 1) / 2, (h - 1) / 2)
  to_source = np.column_stack([rotation, shift])

  def rotate(x: np.ndarray, interpolation: int, border: int) -> np.ndarray:
    flags = interpolation | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(x, to_source, (w, h), flags=flags, borderValue=border)

  image = rotate(image, cv2.INTER_LINEAR, 0)
  return image, rotate(label, cv2.INTER_NEAREST, IGNORE_LABEL)


@dataclasses.dataclass(frozen=True)
class Augment(grain.transforms.RandomMap):
  """Scales, rotates, crops, flips, blurs and distorts a record at random.

  Attributes:
    base_size: short side of the image at scale 1, before it is cropped.
    crop_size: size of the result.
    scale_range: least and largest scale.
    label_fill: label of the padding; the authors pad VOC with background.
    flip: probability of a horizontal flip.
    blur: probability of a Gaussian blur, whose sigma is uniform in [0, 1).
    photometric: strength of `distort`; 0 is off.
    rotation: largest angle in degrees, in both directions; 0 is off.
  """

  base_size: int
  crop_size: Size
  scale_range: tuple[float, float] = (0.5, 2.0)
  label_fill: int = IGNORE_LABEL
  flip: float = 0.5
  blur: float = 0.5
  photometric: float = 0.0
  rotation: float = 0.0

  # Grain calls it by position; its annotations lack the result.
  def random_map(  # pyright: ignore[reportIncompatibleMethodOverride]
    self, record: Record, rng: np.random.Generator
  ) -> Record:
    """Returns an augmented copy of the record; called by Grain."""
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


def fit_short_side(size: Size, short_side: int) -> Size:
  """Scales a size to the given short side, rounding down; 0 keeps the size.

  As in the authors' custom_transforms.py.
  """
  h, w = (n * (short_side or min(size)) // min(size) for n in size)
  return h, w


def next_multiple(size: Size, multiple: int) -> Size:
  """Rounds height and width up to a multiple."""
  h, w = (-(-n // multiple) * multiple for n in size)
  return h, w


def resize(
  x: np.ndarray,
  size: Sequence[int],
  how: Image.Resampling = Image.Resampling.BILINEAR,
) -> np.ndarray:
  """Resizes an image or a label, antialiased, by Pillow.

  Args:
    x: uint8, of shape [h, w] or [h, w, 3].
    size: (height, width) of the result.
    how: filter; NEAREST for labels.
  """
  height, width = size
  if x.shape[:2] == (height, width):
    return x
  return np.asarray(Image.fromarray(x).resize((width, height), how))


def fit_image(image: np.ndarray, short_side: int) -> np.ndarray:
  """Resizes an image as `fit_short_side` says."""
  return resize(image, fit_short_side(image.shape[:2], short_side))


def fit_record(
  record: Record, short_side: int, *, resize_labels: bool
) -> Record:
  """Resizes the image of a record to what the network gets in evaluation.

  Args:
    record: is not changed.
    short_side: of the image; 0 keeps its size.
    resize_labels: whether to resize the label as well, as the evaluation
      protocol 'reference' does.
  """
  image, label = fit_image(record['image'], short_side), record['label']
  if resize_labels:
    label = resize(label, image.shape[:2], Image.Resampling.NEAREST)
  return {'image': image, 'label': label}
