# SPDX-License-Identifier: Apache-2.0
"""Decodes image and mask files, and maps mask values to train ids."""

import collections
from collections.abc import Iterable, Iterator
import contextlib
import ctypes
import dataclasses
import io
import itertools
import re
from typing import Any
import warnings

import cv2
import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from attnfd_jax.data import files
from attnfd_jax.data.classes import Color
from attnfd_jax.data.records import Size
from attnfd_jax.errors import DataError, first_line
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.types import StrPath

MAX_PIXELS = 178_956_970  # Of an image: Pillow refuses larger ones.
# Pillow supports more formats, but runs external programs for some of them.
_FORMATS = tuple('PNG JPEG BMP TIFF WEBP GIF PPM JPEG2000'.split())
_BAND = 1 << 22  # Pixels of a color mask that are looked up at a time.
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright.
_HEADER_BYTES = 1 << 16  # Nearly always enough for the header.
_TIFF = b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'
_BITS, _CHANNELS, _SAMPLES = 258, 277, 339  # TIFF tags.
# Width, height and maximum value of a PGM or PPM, between comments.
_PPM = re.compile(rb'P[2356](?:(?:\s|#[^\n]*\n)+0*([1-9]\d{0,4})){3}')


def tune_process(*_: object) -> None:
  """Tunes OpenCV, malloc and warnings of this process for loading images."""
  cv2.setNumThreads(0)  # Grain's threads already run in parallel.
  # Images are allocated and freed all the time; glibc would return the pages
  # to the system and fault them in again, 1/7 of the time of the pipeline.
  libc = ctypes.CDLL(None)
  if hasattr(libc, 'mallopt'):
    libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD in bytes: the maximum.
    libc.mallopt(-1, 1 << 27)  # M_TRIM_THRESHOLD of each arena in bytes.
  # Large images are intended; Pillow still refuses those over twice its limit.
  warnings.simplefilter('ignore', Image.DecompressionBombWarning)


def open_image(data: bytes) -> ImageFile.ImageFile:
  """Opens a Pillow image, reading its header only; raises many types."""
  return Image.open(io.BytesIO(data), formats=_FORMATS)


@contextlib.contextmanager
def decoding(file: files.File | StrPath, kind: str) -> Iterator[None]:
  """Converts all exceptions in its context to a DataError of the file."""
  try:
    yield
  except DataError:
    raise
  except Exception as error:
    reason = first_line(error)
    if isinstance(error, UnidentifiedImageError):
      reason = 'empty or not an image'  # Pillow's would name a Python object.
    what = f'not a readable {kind} ({reason}); replace or remove it'
    raise files.data_error(file, 'unreadable', what) from error


def _chunks_fit(data: bytes) -> bool:
  """Whether no chunk of a PNG extends past the end of the file."""
  at = 8
  while at + 8 <= len(data):
    if data[at + 4 : at + 8] == b'IEND':
      return True
    at += 12 + int.from_bytes(data[at : at + 4], 'big')
  return at <= len(data)


def _max_value(header: Any, data: bytes) -> int:
  """Returns the largest value of a channel that the header allows."""
  if header.mode == '1':
    return 1
  if header.format == 'PPM' and (match := _PPM.match(data)):
    return int(match[1])
  bits = 8
  if header.format == 'PNG':
    bits = data[data.find(b'IHDR') + 12]
  elif header.format == 'TIFF':
    bits = max(header.tag_v2.get(_BITS, (1,)))
  elif header.format == 'JPEG2000':  # Ssiz, after the markers SOC and SIZ.
    bits = 1 + (data[data.find(b'\xff\x4f\xff\x51') + 42] & 127)
  return 2**bits - 1


def _too_deep(file: files.File | StrPath, what: str) -> DataError:
  remedy = 'save all images, scaled by one rule, as gray or RGB of 8 bits'
  return files.data_error(file, 'depth', f'{what}; {remedy} or the full 16')


def _check_tiff(file: files.File | StrPath, data: bytes) -> None:
  """Raises DataError if OpenCV would not decode all values correctly."""
  head = io.BytesIO(data)
  size = 16 if b'+' in data[2:4] else 8
  tags = TiffImagePlugin.ImageFileDirectory_v2(head.read(size))
  head.seek(tags.next)
  tags.load(head)
  bits, kind = max(tags.get(_BITS, (1,))), max(tags.get(_SAMPLES, (1,)))
  names = {1: 'integers', 3: 'floats', 4: 'integers', 6: 'complex floats'}
  name, count = names.get(kind, 'signed integers'), tags.get(_CHANNELS, 1)
  if name != 'integers' or 8 < bits != 16 or count > 4:
    raise _too_deep(file, f'TIFF of {count} x {bits}-bit {name} per pixel')


def _check_used(file: files.File | StrPath, data: bytes) -> None:
  """Raises DataError if a 16-bit image does not use its two highest bits."""
  pixels = np.frombuffer(data, np.uint8)
  pixels = cv2.imdecode(pixels, cv2.IMREAD_UNCHANGED)
  # Without the alpha channel.
  most = 0 if pixels is None else int(np.atleast_3d(pixels)[..., :3].max())
  if 0 < most < 1 << 14:
    bits = most.bit_length()
    what = f'16-bit image whose values end at {most} ({bits} bits)'
    raise _too_deep(file, f'{what} would be nearly black')


def decode_image(file: files.File | StrPath, data: bytes) -> np.ndarray:
  """Decodes an image, uint8 [h, w, 3] RGB; EXIF rotation is ignored.

  16-bit values are reduced to their upper 8 bits.

  Args:
    file: for messages.
    data: content of the file.

  Raises:
    DataError: of kind 'depth', if the upper 8 bits would be nearly black, or
      the values are floats, signed or larger; of kind 'unreadable'.
  """
  # EXIF rotation would turn the image but not its mask.
  flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
  with decoding(file, 'image'):
    if data[:4] in _TIFF:  # Pillow reads few TIFFs of other depths.
      _check_tiff(file, data)
    # OpenCV allocates whatever a header declares, so let Pillow check it first.
    header = open_image(data)
    if header.mode == 'F':
      raise _too_deep(file, 'image of floats')
    if header.format == 'PNG' and not _chunks_fit(data):
      raise ValueError('a chunk is longer than the file')
    most = _max_value(header, data)
    # OpenCV scales by the declared maximum only for 8-bit text formats.
    scaled = header.format == 'PPM' and most not in (255, 65535)
    scaled = scaled and (most > 255 or data[1] in b'56')
    flags |= cv2.IMREAD_ANYDEPTH if scaled else 0
    image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
      raise ValueError('cut off or damaged')
    if scaled:
      table = (np.arange(1 << 16) * 255 + most // 2) // most
      image = table.clip(max=255).astype(np.uint8)[image]
    elif most == 65535 and image.max() <= 64:  # Larger: bit 14 or 15 is used.
      _check_used(file, data)
    return image


def read_image(path: files.File | StrPath) -> np.ndarray:
  """Reads an image, uint8 [h, w, 3] RGB, see decode_image."""
  file = files.as_file(path)
  return decode_image(file, file.read())


def read_size(path: files.File | StrPath) -> Size:
  """Reads the height and width of an image from its header.

  EXIF rotation is ignored.
  """
  file = files.as_file(path)
  with contextlib.suppress(Exception):
    width, height = open_image(file.read(_HEADER_BYTES)).size
    return height, width
  data = file.read()
  with decoding(file, 'image'):
    width, height = open_image(data).size
  return height, width


def check_upright(file: files.File | StrPath, data: bytes) -> None:
  """Raises DataError of kind 'exif' if viewers would rotate the image."""
  orientation = 1
  # Damaged tags have no effect; damaged pixels are reported elsewhere.
  with contextlib.suppress(Exception):
    image = open_image(data)
    if 'exif' in image.info:  # Otherwise Pillow would decode a PNG to its end.
      orientation = image.getexif().get(_ORIENTATION, 1)
  if orientation != 1:
    what = f'rotated by EXIF orientation {orientation}, unlike its mask'
    remedy = 'save the image upright, without the tag'
    raise files.data_error(file, 'exif', f'{what}; {remedy}')


def _lossy(image: ImageFile.ImageFile, data: bytes) -> str:
  """Returns the name of a lossy format, or ''."""
  if image.format == 'WEBP':
    match: Any = re.search(rb'VP8[ L]', data)
    return 'lossy WebP' if match[0] == b'VP8 ' else ''
  if image.format == 'TIFF':
    packed = image.info.get('compression', '')
    return 'JPEG-compressed TIFF' if 'jpeg' in packed else ''
  # JPEG 2000 can be lossless, but the file does not say so.
  names = {'JPEG': 'JPEG', 'MPO': 'JPEG', 'JPEG2000': 'JPEG 2000'}
  return names.get(image.format or '', '')


def _open_mask(file: files.File) -> tuple[Image.Image, int]:
  """Decodes a lossless file; returns the image and its `_max_value`."""
  data = file.read()
  with decoding(file, 'mask'):
    image: Any = open_image(data)
    most = _max_value(image, data)
    # Several pages are fine in a TIFF: they may be thumbnails of the first.
    if image.format in ('GIF', 'PNG', 'WEBP') and image.is_animated:
      raise ValueError(f'{image.n_frames} frames instead of one')
    image.load()
  if name := _lossy(image, data):
    what = f'a {name} mask; compression changes ids. Export the masks as PNG'
    raise files.data_error(file, 'lossy', what)
  if image.mode[0] in 'IF':
    what = f'mask has {most.bit_length()} bits per pixel'
    raise files.data_error(file, 'depth', f'{what}; save ids as an 8-bit PNG')
  return image, most


def read_mask(path: files.File | StrPath) -> np.ndarray:
  """Reads the class ids, uint8 [h, w], of a grayscale or palette file.

  In grayscale files of 1, 2 or 4 bits, white is id 1, 3 or 15.

  Raises:
    DataError: for any other file.
  """
  file = files.as_file(path)
  image, most = _open_mask(file)
  if image.mode in ('1', 'L'):
    ids = np.asarray(image.convert('L'))
    # Pillow scales smaller bit depths to 0 to 255.
    return ids if most >= 255 else np.rint(ids * (most / 255)).astype(np.uint8)
  if image.mode == 'P':
    return np.asarray(image)
  what = f'mask has mode {image.mode}; expected an 8-bit PNG of class ids'
  if image.mode in ('LA', 'RGB', 'RGBA'):
    pixels = np.asarray(image.convert('RGB'))
    if (pixels == pixels[..., :1]).all():
      extrema: Any = image.getextrema()
      opaque = extrema[-1][0] == 255 or image.mode == 'RGB'
      if image.format == 'WEBP' and opaque:  # WebP has no grayscale mode.
        return pixels[..., 0].copy()
      what += '. Its channels are equal: if they are ids, save one of them'
      what += ', in Pillow with getchannel(0)'
  remedy = "Convert colors to ids, or, with the data set 'folder', add"
  flag = '--config.data.palette="((r,g,b), ...)"'
  raise files.data_error(file, 'mode', f'{what}. {remedy} {flag}')


def _count(values: np.ndarray) -> dict[int, int]:
  """Returns {value: number of occurrences}."""
  values, counts = np.unique(values, return_counts=True)
  return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _no_class(
  file: files.File, counts: dict[Any, int], expected: str
) -> DataError:
  """Returns the DataError of {value: pixels}; lists the five most frequent."""
  most = sorted(sorted(counts, key=lambda x: counts[x], reverse=True)[:5])
  listed = ', '.join(f'{value} ({counts[value]} pixels)' for value in most)
  more = f' and {len(counts) - 5} more' if len(counts) > 5 else ''
  what = f'values {listed}{more} are not classes; {expected}'
  return files.data_error(file, 'values', what, counts)


def _ranges(ids: Iterable[int]) -> str:
  """Formats a set of ids as '0 to 10, 255'."""
  # Within a run of consecutive ids, id minus position is constant.
  order = enumerate(sorted({*ids}))
  groups = itertools.groupby(order, lambda item: item[1] - item[0])
  runs = [[value for _, value in group] for _, group in groups]
  return ', '.join(f'{x[0]} to {x[-1]}' if x[1:] else f'{x[0]}' for x in runs)


@dataclasses.dataclass(frozen=True)
class IndexLabels:
  """Reads masks of class ids as train ids."""

  ids: tuple[int, ...]  # Ids in masks, in the order of train ids.
  ignored: tuple[int, ...] = ()  # Become 255; 255 itself is always allowed.

  def __call__(self, file: files.File) -> np.ndarray:
    """Reads a mask as train ids, uint8 [h, w]."""
    return self.from_ids(file, read_mask(file))

  def from_ids(self, file: files.File, ids: np.ndarray) -> np.ndarray:
    """Converts the ids of a file to train ids, uint8 [h, w].

    Raises:
      DataError: of kind 'values', if an id is neither a class nor ignored.
    """
    k = len(self.ids)
    ignored = [*({*self.ignored, IGNORE_LABEL} - {*self.ids})]
    table = np.full(256, k, np.uint8)
    table[ignored] = IGNORE_LABEL
    table[[*self.ids]] = range(k)
    # Several times faster than indexing in NumPy.
    label = np.asarray(cv2.LUT(ids, table))
    wrong = label == k
    if k < IGNORE_LABEL and wrong.any():  # 255 classes use all ids.
      expected = f'classes are {_ranges(self.ids)}'
      expected += f', ignored {_ranges(ignored)}' * bool(ignored)
      raise _no_class(file, _count(ids[wrong]), expected)
    return label


def _codes(colors: np.ndarray) -> np.ndarray:
  """Packs colors, uint8 [..., 3], into int32 [...]."""
  red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
  return red << 16 | green << 8 | blue


@dataclasses.dataclass(frozen=True)
class ColorLabels:
  """Reads masks of colors, also grayscale and palette files, as train ids."""

  colors: tuple[Color, ...]  # In the order of train ids.
  ignored: tuple[Color, ...] = ()  # Become 255.

  def __call__(self, file: files.File) -> np.ndarray:
    """Reads a mask as train ids, uint8 [h, w].

    Raises:
      DataError: of kind 'values', if a color is neither a class nor ignored.
    """
    image, _ = _open_mask(file)
    with decoding(file, 'mask'):
      pixels = np.asarray(image.convert('RGB'))
    valid = _codes(np.array([*self.colors, *self.ignored], np.uint8))
    order, k = np.argsort(valid), len(self.colors)
    ids = np.where(order < k, order, IGNORE_LABEL).astype(np.uint8)
    valid = valid[order]
    label = np.empty(pixels.shape[:2], np.uint8)
    wrong: collections.Counter[int] = collections.Counter()
    # In bands: temporary arrays take seven times the memory of the colors.
    rows = max(_BAND // pixels.shape[1], 1)
    for top in range(0, len(label), rows):
      codes = _codes(pixels[top : top + rows])
      nearest = np.minimum(np.searchsorted(valid, codes), len(valid) - 1)
      label[top : top + rows] = ids[nearest]
      wrong.update(_count(codes[valid[nearest] != codes]))
    if wrong:
      counts = {
        f'{code >> 16},{code >> 8 & 255},{code & 255}': count
        for code, count in sorted(wrong.items())
      }
      expected = f'the {len(valid)} colors are from config.data.palette or '
      raise _no_class(file, counts, f'{expected}labelmap.txt')
    return label
