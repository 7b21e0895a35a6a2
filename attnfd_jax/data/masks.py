# SPDX-License-Identifier: Apache-2.0
"""Pixels of image and mask files, and what makes train ids of mask values."""

import collections
import dataclasses
import functools
import io
import struct

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from attnfd_jax.data import files
from attnfd_jax.losses import IGNORE_LABEL

MAX_PIXELS = 178_956_970  # Of an image: Pillow opens none that declares more.
# Pillow knows more, and starts programs for some of them.
_FORMATS = 'PNG JPEG BMP TIFF WEBP GIF PPM JPEG2000'.split()
_BAND = 1 << 22  # Pixels of a mask of colours that are looked up at a time.
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright.
_SIZE_KNOWN = 1 << 16  # So many bytes nearly always hold the header.


def open_image(data):
  """A Pillow image of which only the header was read.

  Raises:
    Exception: of many types, for what is no image, or damaged; Pillow's
      DecompressionBombError if it declares more than MAX_PIXELS.
  """
  return Image.open(io.BytesIO(data), formats=_FORMATS)


def _unreadable(file, error):
  """The DataError of an image from the exception of a decoder, or None."""
  what = 'not a readable image; replace or remove it'
  if isinstance(error, Image.DecompressionBombError):
    what = f'declares more than the {MAX_PIXELS} pixels allowed; cut it up'
  return files.fault(file, 'unreadable', what)


def _chunks_fit(data):
  """Whether the chunks of a PNG, as far as its end, lie inside of it."""
  at = 8
  while at + 8 <= len(data):
    if data[at + 4 : at + 8] == b'IEND':
      return True
    at += 12 + int.from_bytes(data[at : at + 4], 'big')
  return at <= len(data)


def _jpeg_pixels(data):
  """What the frame of a JPEG declares: Pillow takes ten times as long.

  Segments are followed up to the first frame, as decoders do; 0 where they are
  not one after the other.
  """
  at = 2
  while data[at : at + 1] == b'\xff' and at + 9 <= len(data):
    kind = data[at + 1]
    if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
      height, width = struct.unpack_from('>HH', data, at + 5)
      return height * width
    if kind < 0xC0 or 0xD0 <= kind <= 0xDA:  # No segment, or pixels.
      return 0
    at += 2 + int.from_bytes(data[at + 2 : at + 4], 'big')
  return 0


def _decode(data, how):
  """What OpenCV makes of the bytes of a file, None or an exception if nothing.

  It takes the memory that headers declare before it sees the pixels, so that
  they are looked at first.
  """
  small = data[:2] == b'\xff\xd8' and 0 < _jpeg_pixels(data) <= MAX_PIXELS
  if not small and open_image(data).format == 'PNG' and not _chunks_fit(data):
    return None
  return cv2.imdecode(np.frombuffer(data, np.uint8), how)


def decode_image(file, data):
  """Pixels as they are stored, uint8 [h, w, 3] RGB, from the bytes of `file`.

  Raises:
    DataError: 'unreadable', also if it declares more than MAX_PIXELS.
  """
  # EXIF rotation would turn the image and not its mask.
  how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
  try:
    image = _decode(data, how)
  except Exception as error:
    raise _unreadable(file, error) from error
  if image is None:
    raise _unreadable(file, None)
  return image


def read_image(path):
  """Pixels of a path or File as they are stored, uint8 [h, w, 3] RGB."""
  file = files.as_file(path)
  return decode_image(file, file.read())


def read_size(path):
  """(height, width) as stored, from the header alone."""
  file = files.as_file(path)
  for limit in (_SIZE_KNOWN, None):
    data = file.read(limit)
    try:
      width, height = open_image(data).size
      return height, width
    except Exception as error:
      problem = _unreadable(file, error)
  raise problem


def check_upright(file, data):
  """Raises DataError 'exif' if viewers would show the image rotated."""
  jpeg = data[:2] == b'\xff\xd8'
  exif = data.find(b'Exif\0\0', 0, _SIZE_KNOWN) >= 0
  if not exif and (jpeg or b'eXIf' not in data):
    return
  try:
    image = open_image(data)
    # Pillow would decode a PNG to look for a tag behind the pixels.
    turned = image.getexif().get(_ORIENTATION, 1) if 'exif' in image.info else 1
  except Exception:
    return  # Damaged tags turn nothing; damaged pixels are told elsewhere.
  if turned != 1:
    raise files.fault(
      file,
      'exif',
      f'the camera rotated it by EXIF orientation {turned}, its mask is stored '
      'as drawn; save the image upright, without the tag',
    )


def _grey_ids(data):
  """uint8 [h, w] of a PNG of 8-bit greys, else, or if damaged, None.

  OpenCV takes three quarters of Pillow's time. It gives colours for a palette.
  """
  # Behind the signature: its header ends in depth 8, colour type 0.
  if data[:8] != b'\x89PNG\r\n\x1a\n' or data[24:26] != b'\x08\0':
    return None
  try:
    ids = _decode(data, cv2.IMREAD_UNCHANGED)
  except Exception:
    return None
  # A transparent grey makes OpenCV return four channels.
  return ids if ids is not None and ids.ndim == 2 else None


def open_mask(file, data):
  """A Pillow image of a lossless file with the bytes `data`, decoded.

  Raises:
    DataError: 'unreadable', 'lossy' or 'depth'.
  """
  try:
    image = open_image(data)
    image.load()
  except Exception as error:
    # Pillow's message names an object in memory.
    unknown = isinstance(error, UnidentifiedImageError)
    what = f'not a readable mask ({"empty, or no image" if unknown else error})'
    raise files.fault(file, 'unreadable', what) from error
  if image.format in ('JPEG', 'MPO'):
    what = 'a JPEG mask; compression changes ids. Export the masks as PNG'
    raise files.fault(file, 'lossy', what)
  depth = None
  if image.mode in ('I', 'F') or ';16' in image.mode:
    depth = 16 if ';16' in image.mode else 32
  elif image.format == 'PNG' and data[25] == 0 and data[24] in (2, 4):
    depth = data[24]  # Grey of few bits: Pillow spreads it over 0 to 255.
  if depth:
    what = f'mask has {depth} bits a pixel; save ids as an 8-bit PNG'
    raise files.fault(file, 'depth', what)
  return image


def read_mask(path):
  """Class ids of an index or palette PNG, uint8 [h, w].

  Raises:
    DataError: as `open_mask`, or 'mode'.
  """
  file = files.as_file(path)
  data = file.read()
  ids = _grey_ids(data)
  if ids is not None:
    return ids
  image = open_mask(file, data)
  if image.mode not in ('L', 'P'):
    raise files.fault(
      file,
      'mode',
      f'mask has mode {image.mode}; expected an 8-bit PNG of class ids (L or '
      'P). Convert colours to ids, or pass their table: data set folder with '
      '--config.data.palette="((r,g,b), ...)"',
    )
  return np.asarray(image)


def _counted(values):
  """{value: how often it occurs}."""
  values, counts = np.unique(values, return_counts=True)
  return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _no_class(file, counts, expected):
  """The DataError of {value: pixels}; names the five most frequent values."""
  most = sorted(sorted(counts, key=counts.get, reverse=True)[:5])
  found = ', '.join(f'{value} ({counts[value]} pixels)' for value in most)
  more = f' and {len(counts) - 5} more' if len(counts) > 5 else ''
  what = f'values {found}{more} are no class; {expected}'
  return files.fault(file, 'values', what, counts)


def _ranges(ids):
  """'0 to 10, 255' of any set of ids."""
  ids, found = sorted(set(ids)), []
  for value in ids:
    if found and value == found[-1][1] + 1:
      found[-1][1] = value
    else:
      found.append([value, value])
  return ', '.join(f'{a}' if a == b else f'{a} to {b}' for a, b in found)


@functools.lru_cache
def _index_tables(ids, ignored):
  """Train ids, uint8 [256], and whether an id must not occur, bool [256].

  The train id of those that must not is the number of classes.
  """
  # Of 255 classes nothing is forbidden, and their number is what is ignored.
  table = np.full(256, len(ids), np.uint8)
  table[[*ignored, *ids]] = [IGNORE_LABEL] * len(ignored) + [*range(len(ids))]
  forbidden = ~np.isin(np.arange(256), [*ids, *ignored])
  return table, forbidden


@dataclasses.dataclass(frozen=True)
class IndexLabels:
  """Masks of ids to train ids."""

  ids: tuple[
    int, ...
  ]  # The file's id of each class, in the order of train ids.
  ignored: tuple[int, ...] = ()  # Become 255, which itself may always occur.

  def __call__(self, file):
    return self.from_ids(file, read_mask(file))

  def from_ids(self, file, ids):
    """Train ids, uint8 [h, w], of the file's ids; DataError if none fits."""
    ignored = (*self.ignored, IGNORE_LABEL)
    table, forbidden = _index_tables(self.ids, ignored)
    label = cv2.LUT(ids, table)  # Several times as fast as NumPy's indexing.
    if forbidden.any() and (label == len(self.ids)).any():
      expected = f'classes are {_ranges(self.ids)}, ignored {_ranges(ignored)}'
      raise _no_class(file, _counted(ids[forbidden[ids]]), expected)
    return label


def _codes(colours):
  """uint8 [..., 3] to int32 [...]."""
  red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
  return red << 16 | green << 8 | blue


@functools.lru_cache
def _colour_tables(colours, ignored):
  """Codes of all colours, sorted, and their train ids."""
  codes = _codes(np.array([*colours, *ignored], np.uint8))
  ids = [*range(len(colours))] + [IGNORE_LABEL] * len(ignored)
  order = np.argsort(codes)
  return codes[order], np.array(ids, np.uint8)[order]


@dataclasses.dataclass(frozen=True)
class ColourLabels:
  """Masks of colours to train ids; grey and palette files have colours, too."""

  colours: tuple[tuple[int, int, int], ...]  # In the order of train ids.
  ignored: tuple[tuple[int, int, int], ...] = ()  # Further ones; become 255.

  def __call__(self, file):
    image = open_mask(file, file.read())
    try:
      pixels = np.asarray(image.convert('RGB'))
    except ValueError as error:
      what = f'mask has mode {image.mode}; save its colours as an RGB PNG'
      raise files.fault(file, 'mode', what) from error
    known, ids = _colour_tables(self.colours, self.ignored)
    label = np.empty(pixels.shape[:2], np.uint8)
    wrong = collections.Counter()
    # By bands: what is computed takes seven times the memory of the colours.
    rows = max(_BAND // label.shape[1], 1)
    for top in range(0, len(label), rows):
      codes = _codes(pixels[top : top + rows])
      found = np.searchsorted(known, codes)
      found[found == len(known)] = 0
      label[top : top + rows] = ids[found]
      wrong.update(_counted(codes[known[found] != codes]))
    if wrong:
      counts = {
        f'{code >> 16},{code >> 8 & 255},{code & 255}': count
        for code, count in sorted(wrong.items())
      }
      expected = (
        f'the {len(known)} colours are those of config.data.palette or of '
        'labelmap.txt'
      )
      raise _no_class(file, counts, expected)
    return label
