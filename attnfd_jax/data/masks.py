# SPDX-License-Identifier: Apache-2.0
"""Pixels of image and mask files, and what makes train ids of mask values."""

import collections
import contextlib
import ctypes
import dataclasses
import io
import itertools
import re
import warnings

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from attnfd_jax.data import files
from attnfd_jax.errors import DataError, first_line
from attnfd_jax.losses import IGNORE_LABEL

MAX_PIXELS = 178_956_970  # Of an image: Pillow opens none that declares more.
# Pillow knows more, and starts programs for some of them.
_FORMATS = 'PNG JPEG BMP TIFF WEBP GIF PPM JPEG2000'.split()
_BAND = 1 << 22  # Pixels of a mask of colours that are looked up at a time.
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright.
_SIZE_KNOWN = 1 << 16  # So many bytes nearly always hold the header.
_TIFF = b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'
_BITS, _CHANNELS, _SAMPLES = 258, 277, 339  # Tags of a TIFF.
# Size and largest value of a PGM or PPM, among comments.
_PPM = re.compile(rb'P[2356](?:(?:\s|#[^\n]*\n)+0*([1-9]\d{0,4})){3}')


def tune_process(*_):
  """Makes a whole process fast at images: a command's or a Grain worker's."""
  cv2.setNumThreads(0)  # Grain's threads are the parallelism.
  # Images are allocated and freed all the time; glibc would give the pages
  # back and fault them in again, a seventh of the time of the pipeline.
  libc = ctypes.CDLL(None)
  if hasattr(libc, 'mallopt'):
    libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, in bytes: the most allowed.
    libc.mallopt(-1, 1 << 27)  # M_TRIM_THRESHOLD: kept by each arena.
  # Large images are large on purpose; twice Pillow's limit is still refused.
  warnings.simplefilter('ignore', Image.DecompressionBombWarning)


def open_image(data):
  """A Pillow image of which only the header was read; raises many types."""
  return Image.open(io.BytesIO(data), formats=_FORMATS)


@contextlib.contextmanager
def decoding(file, kind):
  """Whatever a decoder raises becomes a DataError."""
  try:
    yield
  except DataError:
    raise
  except Exception as error:
    reason = first_line(error)
    if isinstance(error, UnidentifiedImageError):
      reason = 'empty, or no image'  # Pillow's names an object in memory.
    what = f'not a readable {kind} ({reason}); replace or remove it'
    raise files.fault(file, 'unreadable', what) from error


def _chunks_fit(data):
  """Whether the chunks of a PNG, as far as its end, lie inside of it."""
  at = 8
  while at + 8 <= len(data):
    if data[at + 4 : at + 8] == b'IEND':
      return True
    at += 12 + int.from_bytes(data[at : at + 4], 'big')
  return at <= len(data)


def _largest(header, data):
  """The largest value that a channel of the file can have, as it states."""
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


def _too_deep(file, what):
  remedy = 'save all images, scaled by one rule, as grey or RGB of 8 bits'
  return files.fault(file, 'depth', f'{what}; {remedy} or the full 16')


def _check_tiff(file, data):
  """Raises DataError unless OpenCV shows what is there."""
  head = io.BytesIO(data)
  size = 16 if b'+' in data[2:4] else 8
  tags = TiffImagePlugin.ImageFileDirectory_v2(head.read(size))
  head.seek(tags.next)
  tags.load(head)
  bits, kind = max(tags.get(_BITS, (1,))), max(tags.get(_SAMPLES, (1,)))
  names = {1: 'integers', 3: 'floats', 4: 'integers', 6: 'complex floats'}
  name, count = names.get(kind, 'signed integers'), tags.get(_CHANNELS, 1)
  if name != 'integers' or 8 < bits != 16 or count > 4:
    raise _too_deep(file, f'TIFF of {count} x {bits}-bit {name} a pixel')


def _check_used(file, data):
  """Raises DataError if an image of 16 bits leaves the top two unused."""
  pixels = np.frombuffer(data, np.uint8)
  pixels = cv2.imdecode(pixels, cv2.IMREAD_UNCHANGED)
  # Not of alpha.
  most = 0 if pixels is None else int(np.atleast_3d(pixels)[..., :3].max())
  if 0 < most < 1 << 14:
    bits = most.bit_length()
    what = f'16-bit image whose values end at {most} ({bits} bits)'
    raise _too_deep(file, f'{what} would be nearly black')


def decode_image(file, data):
  """Pixels of the bytes of `file`, as stored, uint8 [h, w, 3] RGB.

  Of 16 bits these are the upper 8; DataError 'depth' where they would not show
  what is there, or if the samples are floats, signed or larger.
  """
  # EXIF rotation would turn the image and not its mask.
  how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
  with decoding(file, 'image'):
    if data[:4] in _TIFF:  # Pillow knows few of the others.
      _check_tiff(file, data)
    # OpenCV takes what headers declare of memory: Pillow looks at them first.
    header = open_image(data)
    if header.mode == 'F':
      raise _too_deep(file, 'image of floats')
    if header.format == 'PNG' and not _chunks_fit(data):
      raise ValueError('a chunk is longer than the file')
    most = _largest(header, data)
    # OpenCV scales by the stated maximum only what is text of 8 bits.
    scaled = header.format == 'PPM' and most not in (255, 65535)
    scaled = scaled and (most > 255 or data[1] in b'56')
    how |= cv2.IMREAD_ANYDEPTH if scaled else 0
    image = cv2.imdecode(np.frombuffer(data, np.uint8), how)
    if image is None:
      raise ValueError('cut off or damaged')
    if scaled:
      table = (np.arange(1 << 16) * 255 + most // 2) // most
      image = table.clip(max=255).astype(np.uint8)[image]
    elif most == 65535 and image.max() <= 64:  # Else bit 14 is set somewhere.
      _check_used(file, data)
    return image


def read_image(path):
  """Pixels of a path or File as they are stored, uint8 [h, w, 3] RGB."""
  file = files.as_file(path)
  return decode_image(file, file.read())


def read_size(path):
  """(height, width) as stored, from the header alone."""
  file = files.as_file(path)
  with contextlib.suppress(Exception):
    return open_image(file.read(_SIZE_KNOWN)).size[::-1]
  data = file.read()
  with decoding(file, 'image'):
    return open_image(data).size[::-1]


def check_upright(file, data):
  """Raises DataError 'exif' if viewers would show the image rotated."""
  turned = 1
  # Damaged tags turn nothing; damaged pixels are told elsewhere.
  with contextlib.suppress(Exception):
    image = open_image(data)
    if 'exif' in image.info:  # Else Pillow would decode a PNG to look behind.
      turned = image.getexif().get(_ORIENTATION, 1)
  if turned != 1:
    what = f'rotated by EXIF orientation {turned}, unlike its mask'
    remedy = 'save the image upright, without the tag'
    raise files.fault(file, 'exif', f'{what}; {remedy}')


def _lossy(image, data):
  """Name of a format that does not keep each value; '' if it does."""
  if image.format == 'WEBP':
    return 'lossy WebP' if re.search(rb'VP8[ L]', data)[0] == b'VP8 ' else ''
  if image.format == 'TIFF':
    packed = image.info.get('compression', '')
    return 'JPEG-compressed TIFF' if 'jpeg' in packed else ''
  # JPEG 2000 may be exact, which only its writer knows.
  names = {'JPEG': 'JPEG', 'MPO': 'JPEG', 'JPEG2000': 'JPEG 2000'}
  return names.get(image.format, '')


def _open_mask(file):
  """A Pillow image of a lossless file, decoded, and `_largest` of it."""
  data = file.read()
  with decoding(file, 'mask'):
    image = open_image(data)
    most = _largest(image, data)
    # Pages of a TIFF may be smaller copies of the first.
    if image.format in ('GIF', 'PNG', 'WEBP') and image.is_animated:
      raise ValueError(f'{image.n_frames} frames instead of one')
    image.load()
  if name := _lossy(image, data):
    what = f'a {name} mask; compression changes ids. Export the masks as PNG'
    raise files.fault(file, 'lossy', what)
  if image.mode[0] in 'IF':
    what = f'mask has {most.bit_length()} bits a pixel'
    raise files.fault(file, 'depth', f'{what}; save ids as an 8-bit PNG')
  return image, most


def read_mask(path):
  """Class ids, uint8 [h, w], of a grey or palette file; else DataError.

  Greys of 1, 2 and 4 bits are ids 0 to 1, 3 and 15, white the last one.
  """
  file = files.as_file(path)
  image, most = _open_mask(file)
  if image.mode in ('1', 'L'):
    ids = np.asarray(image.convert('L'))
    # Pillow spreads few bits over 0 to 255.
    return ids if most >= 255 else np.rint(ids * (most / 255)).astype(np.uint8)
  if image.mode == 'P':
    return np.asarray(image)
  what = f'mask has mode {image.mode}; expected an 8-bit PNG of class ids'
  if image.mode in ('LA', 'RGB', 'RGBA'):
    pixels = np.asarray(image.convert('RGB'))
    if (pixels == pixels[..., :1]).all():
      opaque = image.getextrema()[-1][0] == 255 or image.mode == 'RGB'
      if image.format == 'WEBP' and opaque:  # It has no greys.
        return pixels[..., 0].copy()
      what += '. Its channels are equal: if they are ids, save one of them'
      what += ', in Pillow by getchannel(0)'
  remedy = 'Convert colours to ids, or, with the data set folder, add'
  flag = '--config.data.palette="((r,g,b), ...)"'
  raise files.fault(file, 'mode', f'{what}. {remedy} {flag}')


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
  # Ids in a row are as far from their places in the order.
  order = enumerate(sorted({*ids}))
  runs = itertools.groupby(order, lambda item: item[1] - item[0])
  runs = [[value for _, value in run] for _, run in runs]
  return ', '.join(f'{x[0]} to {x[-1]}' if x[1:] else f'{x[0]}' for x in runs)


@dataclasses.dataclass(frozen=True)
class IndexLabels:
  """Masks of ids to train ids."""

  ids: tuple[int, ...]  # In the file, in the order of train ids.
  ignored: tuple[int, ...] = ()  # Become 255, which itself may always occur.

  def __call__(self, file):
    return self.from_ids(file, read_mask(file))

  def from_ids(self, file, ids):
    """Train ids, uint8 [h, w], of the file's ids; DataError if none fits."""
    k = len(self.ids)
    ignored = [*({*self.ignored, IGNORE_LABEL} - {*self.ids})]
    table = np.full(256, k, np.uint8)
    table[ignored] = IGNORE_LABEL
    table[[*self.ids]] = range(k)
    label = cv2.LUT(ids, table)  # Several times as fast as NumPy's indexing.
    wrong = label == k
    if k < IGNORE_LABEL and wrong.any():  # Of 255 classes no id is left.
      expected = f'classes are {_ranges(self.ids)}'
      expected += f', ignored {_ranges(ignored)}' * bool(ignored)
      raise _no_class(file, _counted(ids[wrong]), expected)
    return label


def _codes(colours):
  """uint8 [..., 3] to int32 [...]."""
  red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
  return red << 16 | green << 8 | blue


@dataclasses.dataclass(frozen=True)
class ColourLabels:
  """Masks of colours to train ids; grey and palette files have colours, too."""

  colours: tuple[tuple[int, int, int], ...]  # In the order of train ids.
  ignored: tuple[tuple[int, int, int], ...] = ()  # Further ones; become 255.

  def __call__(self, file):
    image, _ = _open_mask(file)
    with decoding(file, 'mask'):
      pixels = np.asarray(image.convert('RGB'))
    known = _codes(np.array([*self.colours, *self.ignored], np.uint8))
    order, k = np.argsort(known), len(self.colours)
    ids = np.where(order < k, order, IGNORE_LABEL).astype(np.uint8)
    known = known[order]
    label = np.empty(pixels.shape[:2], np.uint8)
    wrong = collections.Counter()
    # By bands: what is computed takes seven times the memory of the colours.
    rows = max(_BAND // label.shape[1], 1)
    for top in range(0, len(label), rows):
      codes = _codes(pixels[top : top + rows])
      found = np.minimum(np.searchsorted(known, codes), len(known) - 1)
      label[top : top + rows] = ids[found]
      wrong.update(_counted(codes[known[found] != codes]))
    if wrong:
      counts = {
        f'{code >> 16},{code >> 8 & 255},{code & 255}': count
        for code, count in sorted(wrong.items())
      }
      of = f'the {len(known)} colours are those of config.data.palette or of '
      raise _no_class(file, counts, f'{of}labelmap.txt')
    return label
