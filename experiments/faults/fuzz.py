# SPDX-License-Identifier: Apache-2.0
r"""Feeds damaged and hostile input to all that reads files, keys and flags.

  python experiments/faults/fuzz.py --count=10000 [--kinds=images,config] \
    [--seed=0] [--first=0] [--output=FILE]

A case is drawn from its number alone, runs in a process of its own kind, and
must end in a result or in an InputError of one line: no other exception, no
crash, nothing over TIME_LIMIT seconds or MEMORY_LIMIT bytes, and no file
outside of its own folder. Every distinct failure is printed with the number of
its first case; exit code 1 if there is one.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import math
import os
import pathlib
import pickle
import platform
import random
import resource
import runpy
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

# The line above must run first.
import cv2
import jax
from ml_collections import config_dict
import numpy as np
from PIL import Image

from attnfd_jax import cli
from attnfd_jax.config import debug, default_config, resolve
from attnfd_jax.data import checking, files, masks, pairs, pipeline, sources
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.reporting import contact_sheet
from attnfd_jax.training import experiment, task_loss
from attnfd_jax.training import stage as stage_module

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = pathlib.Path(__file__).parent / 'results'
TIME_LIMIT = 60  # Seconds a case.
# Bytes by which a case may let the process grow. Pixels that a file truly has
# cost 15 each while they are checked: half of masks.MAX_PIXELS may be read.
MEMORY_LIMIT = 3 << 29
SIZE = (24, 32)
# Names that must not lead anywhere, and text that no tool writes.
NAMES = (
  '../../x.png',
  '../images/train/0.png',
  '/etc/hostname',
  'a\0b.png',
  '',
  '.',
  '..',
  '~',
  ' ',
  '-rf',
  'C:\\x.png',
  'a/' * 300 + 'x.png',
  'x' * 1500,
  'a\nb.png',
  '\u202egnp.x',
  '\ud800.png',
  '\x1b[31m.png',
  '<script>alert(1)</script>',
  '{0.__class__}%s%n$HOME`id`',
)
NUMBERS = (
  *(0, 1, -1, 2, 255, 256, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 10**30),
  *(1.5, -0.5, 1e308, math.inf, -math.inf, math.nan, True, None, '7', [], {}),
)


# Images and masks.


def chunk(kind, body):
  """One chunk of a PNG, with its checksum."""
  checksum = zlib.crc32(kind + body)
  return (
    struct.pack('>I', len(body)) + kind + body + struct.pack('>I', checksum)
  )


def split_chunks(data):
  """[(kind, body), ...] of a PNG, as far as it goes."""
  found, at = [], 8
  while at + 8 <= len(data):
    size = int.from_bytes(data[at : at + 4], 'big')
    found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
    at += 12 + size
  return found


def join_chunks(chunks):
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*c) for c in chunks)


def make_png(width, height, *, depth=8, color=0, interlace=0, pixels=b''):
  """A PNG of any header; `pixels` are its rows, uncompressed."""
  head = struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, interlace)
  rest = [(b'IDAT', zlib.compress(pixels)), (b'IEND', b'')]
  return join_chunks([(b'IHDR', head), *rest])


def interlaced(ids):
  """An Adam7 PNG of uint8 [h, w]."""
  rows = b''
  for top, left, down, right in (
    *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
    *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
  ):
    part = ids[top::down, left::right]
    rows += b''.join(b'\0' + row.tobytes() for row in part if row.size)
  height, width = ids.shape
  return make_png(width, height, interlace=1, pixels=rows)


def _saved(array, form, mode=None, **options):
  image = Image.fromarray(array)
  if mode:
    image = image.convert(mode)
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


def make_seeds():
  """{name: bytes} of whole files: images, and masks of ids 0 to 3."""
  generator = np.random.default_rng(0)
  colors = generator.integers(0, 256, (*SIZE, 3), np.uint8)
  ids = generator.integers(0, 4, SIZE, np.uint8)
  palette = Image.fromarray(ids)
  palette.putpalette(bytes(range(12)))
  indexed = io.BytesIO()
  palette.save(indexed, 'PNG')
  exif = Image.Exif()
  exif[0x0112] = 6
  exif[0x010F] = 'camera'
  found = {
    'ids': _saved(ids, 'PNG'),
    'palette': indexed.getvalue(),
    'interlaced': interlaced(ids),
    'deep': _saved(ids.astype(np.uint16), 'PNG'),
    'twelve_bits': _saved(colors[..., 0].astype(np.uint16) * 16, 'PNG'),
    'deep_color': make_png(
      *SIZE[::-1],
      depth=16,
      color=2,
      pixels=b''.join(b'\0' + bytes(6 * SIZE[1]) for _ in range(SIZE[0])),
    ),
    **{
      f'gray_{depth}': make_png(
        *SIZE[::-1],
        depth=depth,
        pixels=(b'\0' + b'\x1b' * (SIZE[1] * depth // 8)) * SIZE[0],
      )
      for depth in (1, 2, 4)
    },
    'png_exif': _saved(colors, 'PNG', exif=exif),
    'jpeg': _saved(colors, 'JPEG'),
    'jpeg_exif': _saved(colors, 'JPEG', exif=exif),
    'jpeg_cmyk': _saved(colors, 'JPEG', 'CMYK'),
    'jpeg_gray': _saved(colors, 'JPEG', 'L'),
    'jpeg_progressive': _saved(colors, 'JPEG', progressive=True),
    'png_gray_alpha': _saved(colors, 'PNG', 'LA'),
    'png_alpha': _saved(colors, 'PNG', 'RGBA'),
    'png_one_bit': _saved(colors, 'PNG', '1'),
    'png_trns': _saved(colors, 'PNG', transparency=(1, 2, 3)),
    'png': _saved(colors, 'PNG'),
    'bmp': _saved(colors, 'BMP'),
    'gif': _saved(colors, 'GIF', 'P'),
    'tiff': _saved(colors, 'TIFF', compression='tiff_lzw'),
    'tiff_lab': _saved(colors, 'TIFF', 'LAB'),
    'tiff_float': _saved(ids.astype(np.float32), 'TIFF'),
    'tiff_signed': _saved(ids.astype(np.int32), 'TIFF'),
    'tiff_deep': _saved(ids.astype(np.uint16), 'TIFF'),
    'tiff_one_bit': _saved(colors, 'TIFF', '1', compression='group4'),
    'tiff_jpeg': _saved(colors, 'TIFF', compression='jpeg'),
    'bmp_one_bit': _saved(colors, 'BMP', '1'),
    'gif_ids': _saved(ids, 'GIF'),
    'webp': _saved(colors, 'WEBP'),
    'webp_ids': _saved(np.dstack([ids] * 3), 'WEBP', lossless=True),
    'ppm': _saved(colors, 'PPM'),
    'pbm': _saved(colors, 'PPM', '1'),
    'pgm_few': b'P5 %d %d 3\n' % SIZE[::-1] + ids.tobytes(),
    'pgm_deep': b'P5 %d %d 4095\n' % SIZE[::-1] + bytes(2 * ids.size),
    'pfm': _saved(ids.astype(np.float32), 'PPM'),
    'ico': _saved(colors, 'ICO'),
    'jpeg2000': _saved(colors, 'JPEG2000'),
    'eps': _saved(colors, 'EPS'),
    'pdf': _saved(colors, 'PDF'),
    'svg': b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    'empty': b'',
  }
  return found


_SEEDS = make_seeds()
_KINDS_OF_CHUNK = tuple(
  b'PLTE tRNS gAMA pHYs iCCP sRGB zTXt iTXt tEXt eXIf acTL fcTL fdAT IDAT IHDR'
  b' IEND cHRM sBIT bKGD hIST tIME zzzz'.split()
)
_FIELDS = [
  n.to_bytes(4, order)
  for n in (0, 1, 60000, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
  for order in ('big', 'little')
]


def mutate_bytes(rng, data):
  """`data` with one or a few random faults."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 5))):
    at = rng.randrange(len(data) + 1)
    near = rng.randrange(min(len(data), 64) + 1)
    action = rng.choice('flip byte cut drop repeat splice field head'.split())
    if action == 'flip' and at < len(data):
      data[at] ^= 1 << rng.randrange(8)
    elif action == 'byte' and at < len(data):
      data[at] = rng.randrange(256)
    elif action == 'head' and near < len(data):
      data[near] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    elif action == 'cut':
      del data[at:]
    elif action == 'drop':
      del data[at : at + rng.choice((1, 4, 50))]
    elif action == 'repeat':
      data[at:at] = data[at : at + rng.choice((1, 4, 50))]
    elif action == 'splice':
      other = _SEEDS[rng.choice(list(_SEEDS))]
      data[at:] = other[rng.randrange(len(other) + 1) :]
    elif action == 'field':
      place = rng.choice((at, near))
      data[place : place + 4] = rng.choice(_FIELDS)
  return bytes(data)


def mutate_chunks(rng, data):
  """A PNG with other chunks, whose checksums are right."""
  chunks = split_chunks(data)
  for _ in range(rng.choice((1, 1, 2, 4))):
    if not chunks:
      break
    i = rng.randrange(len(chunks))
    kind, body = chunks[i]
    action = rng.choice('drop twice move body head new pixels palette'.split())
    if action == 'drop':
      del chunks[i]
    elif action == 'twice':
      chunks.insert(rng.randrange(len(chunks) + 1), chunks[i])
    elif action == 'move':
      chunks.insert(rng.randrange(len(chunks)), chunks.pop(i))
    elif action == 'body':
      chunks[i] = kind, mutate_bytes(rng, body)
    elif action == 'head':
      head = bytearray(chunks[0][1].ljust(13, b'\0'))
      if rng.random() < 0.5:
        at = rng.choice((0, 4))
        head[at : at + 4] = rng.choice(_FIELDS[::2])
      else:
        head[rng.randrange(8, 13)] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
      chunks[0] = b'IHDR', bytes(head)
    elif action == 'new':
      body = rng.randbytes(rng.choice((0, 1, 3, 8, 9, 20, 26, 300)))
      place = rng.randrange(len(chunks) + 1)
      chunks.insert(place, (rng.choice(_KINDS_OF_CHUNK), body))
    elif action == 'palette':
      chunks = [c for c in chunks if c[0] != b'PLTE']
    elif kind == b'IDAT':
      with contextlib.suppress(zlib.error):
        body = zlib.compress(mutate_bytes(rng, zlib.decompress(body)))
        chunks[i] = kind, body
  return join_chunks(chunks)


def draw_file(rng):
  """Bytes of a damaged or odd image."""
  if rng.random() < 0.03:
    # Declares more than it has.
    size = rng.choice(((60000, 60000), (20000, 20000), (2**31 - 1, 1), (1, 0)))
    return make_png(*size, color=rng.choice((0, 2, 3, 6)))
  data = _SEEDS[rng.choice(list(_SEEDS))]
  if data.startswith(b'\x89PNG') and rng.random() < 0.6:
    return mutate_chunks(rng, data)
  return mutate_bytes(rng, data) if rng.random() < 0.95 else data


LABELS = (
  masks.IndexLabels((0, 1, 2, 3)),
  masks.IndexLabels((3, 0), (1, 2)),
  masks.ColorLabels(((0, 1, 2), (3, 4, 5)), ((6, 7, 8), (9, 10, 11))),
)


def tell(error):
  """Raises AssertionError unless the command would print one line."""
  text = cli._one_line(error)
  assert text and len(text.splitlines()) == 1, f'not a line: {text!r}'
  assert len(text) < 20000, f'a long line: {text[:99]!r}'


def refused(call, *arguments, **options):
  """Whether a call ends in one line of InputError, or in a result."""
  try:
    call(*arguments, **options)
  except (InputError, OSError) as error:  # As cli.run.
    tell(error)
    return True
  return False


def check_dataset(dataset):
  """check_data, as the command does it; whether it found a problem."""
  found, problems = checking.check(dataset, 1)
  for problem in found['problems']:
    tell(InputError(problem['message']))
  text = checking.as_text(found)
  text.encode(errors='backslashreplace')
  json.dumps(found)
  contact_sheet.draw_sheet(dataset, problems)
  return not found['usable']


def run_image(rng, folder):
  """One damaged file through all readers of images and masks."""
  data = draw_file(rng)
  ending = rng.choice(('.png', '.jpg'))
  bad = folder / f'bad{ending}'
  good_image, good_mask = folder / 'image.png', folder / 'mask.png'
  bad.write_bytes(data)
  good_image.write_bytes(_SEEDS['png'])
  good_mask.write_bytes(_SEEDS['ids'])
  read_label = rng.choice(LABELS)
  count = refused(sources.read_image, bad)  # As predict reads it.
  refused(masks.read_size, bad)
  refused(masks.check_upright, bad, data)
  refused(masks.read_mask, bad)
  image, mask, other = (
    files.File(str(path)) for path in (good_image, good_mask, bad)
  )
  source = pairs.PairSource(
    [pairs.Pair('0', other, mask), pairs.Pair('1', image, other)], read_label
  )
  for index in range(2):
    refused(source.encoded, index)
    refused(source.size, index)
    refused(source.label, index)
  palette = np.zeros((4, 3), np.uint8)
  dataset = pairs.Dataset('fuzz', tuple('abcd'), palette, {'train': source})
  check_dataset(dataset)
  return count


# Archives.


def make_zip(entries, method=zipfile.ZIP_STORED):
  """Bytes of a zip of [(name, bytes), ...]."""
  file = io.BytesIO()
  with warnings.catch_warnings(), zipfile.ZipFile(file, 'w', method) as archive:
    warnings.simplefilter('ignore')  # Of names that come twice.
    for name, data in entries:
      info = zipfile.ZipInfo(name)
      info.compress_type = method
      if data is None:  # A link.
        info.external_attr, data = 0o120777 << 16, b'/etc/passwd'
      archive.writestr(info, data)
  return file.getvalue()


def mutate_zip(rng, data):
  """A zip with faults in its headers, where they matter most."""
  data = bytearray(data)
  marks = [b'PK\x01\x02', b'PK\x03\x04', b'PK\x05\x06']
  at = data.rfind(rng.choice(marks), 0, rng.randrange(4, len(data) + 1))
  if at >= 0 and rng.random() < 0.8:
    at += rng.randrange(4, 46)
    value = rng.choice((*_FIELDS, bytes([rng.randrange(256)])))
    data[at : at + len(value)] = value
    return bytes(data)
  return mutate_bytes(rng, data)


def run_archive(rng, folder):
  """Cityscapes in two zips, hostile or damaged."""
  method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
  ending = {'leftImg8bit': 'leftImg8bit', 'gtFine': 'gtFine_labelIds'}
  for top, name in ending.items():
    entries = []
    for split in ('train', 'val'):
      for i in range(2):
        key = f'a_{i:06d}_000019_{name}.png'
        data = _SEEDS['png' if top == 'leftImg8bit' else 'ids']
        if rng.random() < 0.3:
          data = draw_file(rng)
        if rng.random() < 0.1:
          data = bytes(rng.choice((10, 1 << 22)))
        entries.append((f'{top}/{split}/a/{key}', data))
    for _ in range(rng.choice((0, 1, 3))):
      name = rng.choice([n for n in NAMES if n.isprintable() and len(n) < 999])
      data = rng.choice((_SEEDS['png'], None, b''))
      entries.append((rng.choice(('', f'{top}/train/a/')) + name, data))
    data = make_zip(entries, method)
    if rng.random() < 0.8:
      data = mutate_zip(rng, data)
    (folder / f'{top}_trainvaltest.zip').write_bytes(data)
  config = default_config().data.to_dict()
  config |= {'name': 'cityscapes', 'root': str(folder)}
  try:
    dataset = sources.load_dataset(config, strict=False)
  except InputError as error:
    tell(error)
    return True
  for source in dataset.splits.values():
    for i in range(len(source)):
      assert '/' not in source.key(i)
  return check_dataset(dataset)


# Weights.

_OPCODES = (
  *(b'N', b']', b'}', b')', b'(', b't', b'l', b'd', b'e', b'u', b's', b'a'),
  *(b'R', b'b', b'Q', b'\x85', b'\x86', b'\x87', b'\x88', b'0', b'2', b'\x94'),
  *(b'q\0', b'q\1', b'h\0', b'h\1', b'K\1', b'M\0\1', b'J\xff\xff\xff\xff'),
  *(b'\x8a\x09\0\0\0\0\0\0\0\0\1', b'U\1a', b'X\1\0\0\0b', b'I5\n', b'\x93'),
  b'ccollections\nOrderedDict\n',
  b'ctorch._utils\n_rebuild_tensor_v2\n',
  b'ctorch\nFloatStorage\n',
  b'ctorch\nSize\n',
  b'ctorch\ndevice\n',
  b'cnumpy\ndtype\n',
  b'c_codecs\nencode\n',
  b'cnumpy.core.multiarray\nscalar\n',
  b'cos\nsystem\n',
)


def repeated(rng, start, step, times):
  """A pickle that begins with `start` and goes on with `step`."""
  return b'\x80\x02' + start + step * rng.choice(times) + b'.'


def draw_pickle(rng):
  """A program of random opcodes, or one that grows."""
  length = 1 << rng.choice((4, 12, 20))
  text = b'X' + length.to_bytes(4, 'little') + b'a' * length + b'q\0'
  items = b'](' + b'N' * length + b'eq\0'
  nested = b']q\0' + b'](h\0h\0eq\0' * rng.choice((4, 64))
  times = (1, 100, 1000)
  return rng.choice(
    (
      lambda: (
        b'\x80\x02'
        + b''.join(rng.choices(_OPCODES, k=rng.randrange(40)))
        + b'.'
      ),
      lambda: repeated(rng, text, b'c_codecs\nencode\n(h\0tR', times),
      lambda: repeated(rng, items, b'ctorch\nSize\n(h\0tR', times),
      lambda: repeated(rng, items, b'ctorch\ndevice\n(h\0tR', times),
      lambda: repeated(rng, nested, b'ctorch\ndevice\n(h\0tR', (1,)),
      lambda: repeated(rng, nested, b'cnumpy\ndtype\n(h\0tR', (1,)),
      lambda: repeated(rng, nested, b'h\0\x93', (1,)),
      lambda: repeated(rng, nested, b'(h\0h\0h\0h\0h\0tQ', (1,)),
      lambda: repeated(rng, nested, b'c_codecs\nencode\n(U\1ah\0tR', (1,)),
    )
  )()


def make_weights():
  """Bytes of small files of torch.save, by our own writer, and their parts."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'a'
    tensors = {
      'conv1.weight': np.ones((4, 3, 2, 2), np.float32),
      'layer1.0.bn1.bias': np.arange(4, dtype=np.float32),
      'n': np.array(3),
    }
    torch_files.write_torch(path, {'state_dict': tensors, 'epoch': 3})
    torch_zip = path.read_bytes()
    torch_files.write_safetensors(path, tensors, {'a': 'b'})
    return torch_zip, path.read_bytes()


_WEIGHTS = make_weights()
_LEGACY = b''.join(pickle.dumps(v, 2) for v in (torch_files.MAGIC, 1001, {}))


def run_weights(rng, folder):
  """A checkpoint of others, hostile or damaged."""
  torch_zip, safe = _WEIGHTS
  actions = ('zip', 'inside', 'safe', 'program', 'legacy', 'head', 'index')
  action = rng.choice(actions)
  if action == 'zip':
    data = mutate_zip(rng, torch_zip)
  elif action == 'index':
    (folder / 'part').write_bytes(rng.choice((safe, torch_zip, b'{}', b'')))
    parts = dict.fromkeys(('layer1.0.bn1.bias', 'n'), 'part')
    index = mutate_json(rng, {'metadata': {}, 'weight_map': parts})
    data = _bytes(json.dumps(index))
    data = mutate_bytes(rng, data) if rng.random() < 0.3 else data
  elif action == 'safe':
    data = mutate_bytes(rng, safe)
  elif action == 'head':
    head = mutate_bytes(rng, safe[8 : safe.rfind(b'}') + 1])
    length = rng.choice((len(head), 2**62, 0)).to_bytes(8, 'little')
    data = length + head + bytes(300)
  elif action == 'legacy':
    data = _LEGACY + draw_pickle(rng) + pickle.dumps(['0'], 2) + bytes(20)
    if rng.random() < 0.3:
      data = b'\x80\x02' + draw_pickle(rng) * 3
  else:
    program = draw_pickle(rng)
    entries = []
    with zipfile.ZipFile(io.BytesIO(torch_zip)) as archive:
      if action == 'inside':
        program = mutate_bytes(rng, archive.read('archive/data.pkl'))
      for name in archive.namelist():
        content = archive.read(name)
        entries.append((name, content))
    entries[0] = ('archive/data.pkl', program)
    if rng.random() < 0.2:
      entries.append((rng.choice(('../../x', '/x', 'archive/../x')), b'x'))
    data = make_zip(entries)
  path = folder / 'weights.pth'
  path.write_bytes(data)
  count = refused(torch_files.read_torch, path)
  return refused(torch_models.read_network, path) or count


# Tables, lists and annotations.


def draw_text(rng):
  """A name or a number where a tool writes one."""
  return rng.choice(
    (
      lambda: rng.choice(NAMES),
      lambda: str(rng.choice(NUMBERS)),
      lambda: '9' * rng.choice((3, 20, 4400)),
      lambda: rng.choice(('a', 'road', 'train_0', 'background', '\u0663')),
      lambda: ''.join(chr(rng.randrange(1, 0x300)) for _ in range(9)),
    )
  )()


def _bytes(text):
  return text.encode('utf-8', 'surrogatepass')


def mutate_text(rng, text):
  """Lines of a table with faults, as bytes."""
  lines = text.splitlines()
  for _ in range(rng.choice((0, 1, 2, 6))):
    i = rng.randrange(len(lines) + 1)
    action = rng.choice('insert replace cell drop many'.split())
    if action == 'insert' or i == len(lines):
      lines.insert(i, draw_text(rng))
    elif action == 'replace':
      lines[i] = draw_text(rng)
    elif action == 'drop':
      del lines[i]
    elif action == 'many':
      lines += [f'{n},a{n}:{n},{n % 256},9::' for n in range(300)]
    else:
      mark = rng.choice(',:')
      cells = lines[i].split(mark)
      cells[rng.randrange(len(cells))] = draw_text(rng)
      lines[i] = mark.join(cells)
  data = _bytes('\n'.join(lines))
  return mutate_bytes(rng, data) if rng.random() < 0.2 else data


def mutate_json(rng, value):
  """`value` with another one somewhere inside."""
  if rng.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
    return rng.choice(
      (
        lambda: rng.choice(NUMBERS),
        lambda: draw_text(rng),
        lambda: [rng.choice(NUMBERS) for _ in range(rng.choice((1, 6, 8)))],
        lambda: {'size': list(SIZE), 'counts': [rng.choice(NUMBERS)] * 3},
        lambda: {'size': list(SIZE), 'counts': [-5, 5 + SIZE[0] * SIZE[1]]},
        lambda: {'size': list(SIZE), 'counts': draw_text(rng)},
        lambda: [[rng.choice(NUMBERS[:17]) for _ in range(6)]],
        lambda: [[rng.choice(NUMBERS[:17]) for _ in range(2)]] * 3,
        lambda: [{'x': rng.choice(NUMBERS), 'y': 1}] * 3,
        lambda: {'counts': [rng.choice(NUMBERS)] * 3},
        lambda: {'size': [24.0, '32'], 'counts': "b'05T3j1'"},
        lambda: {rng.choice(('0', '1', 'a')): value},
        lambda: [value],
      )
    )()
  keys = list(value) if isinstance(value, dict) else range(len(value))
  key = rng.choice(keys)
  changed = value.copy()
  if rng.random() < 0.1:
    del changed[key]
  else:
    changed[key] = mutate_json(rng, value[key])
  return changed


def _coco():
  height, width = SIZE
  images = [
    {'id': i, 'file_name': f'{i}.png', 'height': height, 'width': width}
    for i in range(2)
  ]
  runs = {'size': [height, width], 'counts': [100, 50, height * width - 150]}
  flat = [2, 2, 20, 2, 20, 20, 2, 20]
  squares, corners = [flat], [flat[i : i + 2] for i in range(0, 8, 2)]
  annotations = [
    {'id': 4, 'image_id': 0.0, 'category_id': '5', 'segmentation': flat},
    {'id': 5, 'image_id': 0, 'category_id': 6, 'segmentation': corners},
    {'id': 1, 'image_id': 0, 'category_id': 5, 'segmentation': squares},
    {'id': 2, 'image_id': 1, 'category_id': 6, 'segmentation': runs},
    {
      'id': 3,
      'image_id': 1,
      'category_id': 5,
      'segmentation': {'size': [height, width], 'counts': 'P`04O1N2'},
    },
  ]
  categories = [{'id': 5, 'name': 'road'}, {'id': 6, 'name': 'tree'}]
  return {
    'images': images,
    'annotations': annotations,
    'categories': categories,
  }


def run_table(rng, folder):
  """Lists, tables of classes and COCO's JSON, hostile or damaged."""
  kind = rng.choice(('voc', 'cvat', 'roboflow', 'coco', 'coco', 'names'))
  config = default_config().data.to_dict()
  config |= {'name': 'folder', 'root': str(folder)}
  image, mask = _SEEDS['png'], _SEEDS['ids']

  def write(path, data):
    path = folder / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)

  if kind in ('voc', 'cvat'):
    config['class_names'] = tuple('abcd') if kind == 'voc' else ()
    for name in ('train_0', 'val_0'):
      write(f'JPEGImages/{name}.png', image)
      data = mask if kind == 'voc' else _SEEDS['palette']
      write(f'SegmentationClass/{name}.png', data)
      path = f'ImageSets/Segmentation/{name[:-2]}.txt'
      write(path, mutate_text(rng, f'{name}\n'))
    if kind == 'cvat':
      text = '# label:r,g,b::\na:0,1,2::\nb:3,4,5::\nc:6,7,8::\nd:9,10,11::'
      write('labelmap.txt', mutate_text(rng, text))
  elif kind == 'roboflow':
    table = 'Pixel Value, Class\n0, a\n1, b\n2, c\n3, d'
    table = mutate_text(rng, table)
    for split in ('train', 'valid'):
      write(f'{split}/0.png', image)
      write(f'{split}/0_mask.png', mask)
      write(f'{split}/_classes.csv', table)
  elif kind == 'coco':
    for split in ('train', 'val'):
      content = _coco()
      for _ in range(rng.choice((1, 1, 3))):
        content = mutate_json(rng, content)
      data = json.dumps(content).encode()
      if rng.random() < 0.1:
        data = rng.choice((b'[' * 10**5, b'{"a":' * 10**5, b'9' * 10**4))
      if rng.random() < 0.1:
        data = mutate_bytes(rng, data)
      write(f'annotations/instances_{split}.json', data)
      for i in range(2):
        write(f'images/{split}/{i}.png', image)
  else:
    # Names of files that are no text, and long ones.
    config['class_names'] = tuple(draw_text(rng) for _ in range(4))
    name = rng.choice((b'\xff\xfe', b'a\nb', b'x' * 240, b'-a', b' ', b'a,"b'))
    for split in ('train', 'val'):
      for top, data in (('images', image), ('masks', mask)):
        write(f'{top}/{split}/0.png', data)
        place = os.fsencode(folder / top / split)
        with open(os.path.join(place, name + b'.png'), 'wb') as file:
          file.write(data)
  try:
    dataset = sources.load_dataset(config, strict=False)
  except InputError as error:
    tell(error)
    return True
  for problem in dataset.problems:
    tell(problem)
  for source in dataset.splits.values():
    source.fingerprint()
    for i in range(len(source)):
      assert '/' not in source.key(i) or kind in ('voc', 'cvat')
  return check_dataset(dataset)


# Configs.


def _flat_keys(config, prefix=''):
  for key in config:
    if isinstance(config.get_ref(key).get(), config_dict.ConfigDict):
      yield from _flat_keys(config[key], f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', config.get_ref(key)


# Objects of Python that are no network, no method and no teacher.
_CODE = ('json:nobody', 'collections:OrderedDict', 'builtins:list', 'nobody:x')
_CHOICES = {
  'recipe': ('clean', 'reference'),
  'stages': (('distill',), ('teacher', 'distill'), ('student',)),
  'teacher.backbone': ('resnet50', 'mobilenet_v2', 'resnet18'),
  'student.backbone': ('mobilenet_v2', 'resnet34'),
  'student.network': ('deeplabv3plus', 'gone.py:Net', 'json:loads', *_CODE),
  'teacher.network': ('deeplabv3plus', 'gone.py:Net', 'json:loads', *_CODE),
  'teacher.factory': ('gone.py:make', *_CODE),
  'teacher.output_stride': (8,),
  'distill.method': ('attnfd', 'kd', 'attnfd+kd', 'attnfd+attnfd', '+', *_CODE),
  'distill.kd.weight_schedule': ('linear_to_zero',),
  'distill.attnfd.match_size': ('to_teacher', 'to_student'),
  'distill.attnfd.norm_scope': ('image', 'pixel', 'channel'),
  'distill.attnfd.reduction': ('batchmean', 'unitmean', 'mean'),
  'distill.attnfd.student_attention': ('learnable', 'parameter_free', 'none'),
  'distill.attnfd.teacher_attention': (
    'checkpoint',
    'random',
    'in_path',
    'none',
  ),
  'loss.name': ('ohem', 'focal', 'dice', 'ce+dice'),
  'loss.weighting': ('given', 'auto'),
  'loss.class_weights': ((1.0,) * 9, (0,) * 9),
  'eval.protocol': ('native', 'reference'),
  'eval.test_split': ('val', 'train'),
  'optim.name': ('adamw',),
  'optim.dtype': ('bfloat16',),
  'data.name': ('folder', 'camvid', 'coco', 'pascal_voc', 'cityscapes'),
  'data.crop_size': ((32, 48), (65, 33)),
  'data.scale_range': ((1.0, 1.0), (0.1, 0.2)),
}
_BY_TYPE = {
  bool: (True, False),
  int: (0, 1, -1, 2, 7, 64, 10**6, 2**31, 2**63, 10**30),
  float: (0.0, 1.0, -1.0, 0.5, 2, 1e-30, 1e30, math.inf, -math.inf, math.nan),
  str: ('', 'x', 'none', '/gone', '../x', 'a\nb', 'x' * 300, '\udcff'),
  tuple: (
    *((), (1,), (0, 0), (64, 64), (-1, 5), (0.5, 2.0), (2.0, 0.5), (1e9, 1e9)),
    *((math.nan, 1.0), (math.inf, 1.0), ('a', 'b'), ('a', 'a'), ((1, 2, 3),)),
    *(('teacher', 'nobody'), (None,), (10**6, 10**6), (33.5, 40), ([], {})),
    *(tuple(str(i) for i in range(300)), ((0, 0, 0), (1, 1, 1)), (True, False)),
  ),
}


def draw_config(rng):
  """A small config with a few random values, and what was set."""
  config = debug(default_config())
  config.data.image_size = (40, 48)
  config.data.crop_size = (32, 48)
  config.data.base_size = 40
  config.data.train_scenes = config.data.val_scenes = 4
  config.batch_size = 2
  config.mesh.data = 1
  changes = {}
  keys = list(_flat_keys(config))
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    key, field = rng.choice(keys)
    kind = field.get_type()
    values = _BY_TYPE.get(kind, ())
    if rng.random() < 0.1:
      kind = rng.choice(list(_BY_TYPE))
      values = _BY_TYPE[kind]
    if key in _CHOICES and rng.random() < 0.4:
      values = _CHOICES[key]
    changes[key] = rng.choice((*values, None) if rng.random() < 0.1 else values)
  return config, changes


def build(config, workdir):
  """All that a run builds before its first compilation."""
  config = resolve(config)
  dataset = sources.load_dataset(config.data)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.spatial)
  experiment.check(config, dataset, mesh, workdir)
  for name in ('teacher', 'student'):
    if name in config.stages:
      _compute(stage_module.make_stage(name, config, dataset, mesh, workdir))


def _compute(stage):
  """What needs no compiler: one record each way, schedule, optimizer."""
  config, dataset = stage.config, stage.dataset
  json.dumps(stage.description())
  assert stage.num_steps > 0 and stage.eval_every > 0
  params = {'student': {'head': {'kernel': np.ones((2, 2), np.float32)}}}
  jax.eval_shape(stage.make_optimizer().init, params)
  lr = jax.eval_shape(stage.make_schedule(), jax.ShapeDtypeStruct((), np.int32))
  assert not lr.shape
  task_loss.make_task_loss(config.loss)
  pipeline.make_balance(config, dataset)
  if max(config.data.crop_size) < 1000:
    augment = pipeline.make_augment(config)
    for seed in range(3):
      made = augment.random_map(
        dataset.splits['train'][0], np.random.default_rng(seed)
      )
      assert made['label'].shape == tuple(config.data.crop_size)
  options = config.eval
  if max(options.short_side, options.size_multiple) < 1000:
    if options.batch_size < 1000 and config.data.threads < 1000:
      batches = pipeline.eval_batches(
        dataset.splits['val'],
        batch_size=options.batch_size,
        short_side=options.short_side,
        size_multiple=options.size_multiple,
        threads=config.data.threads,
      )
      next(iter(batches))


def run_config(rng, folder):
  """Random values of random keys."""
  config, changes = draw_config(rng)
  try:
    with config.unlocked():
      for key, value in changes.items():
        group, _, name = key.rpartition('.')
        (config[group] if group else config)[name] = value
  except (TypeError, ValueError):
    return True  # By the flag, which tells it in a line.
  try:
    return refused(build, config, folder)
  except Exception as error:
    error.add_note(f'config {changes!r:.300}')
    raise


# Commands.


def draw_command(rng, folder):
  """(module, arguments) with something wrong in them."""
  configs = [str(path) for path in sorted((ROOT / 'configs').glob('*.py'))]
  odd = [x for x in NAMES if '\0' not in x and '\ud800' not in x]
  gone = str(folder / 'gone')
  (folder / 'empty').mkdir(exist_ok=True)
  (folder / 'file.py').write_bytes(rng.choice((b'', b'1/0', b'\xff', b'def')))
  (folder / 'config.json').write_text(
    rng.choice(('{}', '[]', '{"stage": 3}', '', '{"stage": "student"}', '7'))
  )
  path = rng.choice((gone, str(folder), str(folder / 'empty'), *odd))
  value = rng.choice((*odd, *map(str, NUMBERS), path))
  verb = rng.choice(
    'main evaluate predict convert check_data prepare_data report benchmark'
    ' nothing'.split()
  )
  flags = {
    'main': 'workdir coordinator num_processes process_id config.seed',
    'evaluate': 'checkpoint data_root split protocol scales tile overlap step'
    ' output submission',
    'predict': 'checkpoint input output scales step tile overlap video fps',
    'convert': 'source target backbone num_classes class_names',
    'check_data': 'contact_sheet output threads config.data.name',
    'prepare_data': 'target workers config.data.layout',
    'report': 'output',
    'benchmark': 'rounds seconds config.data.threads',
  }.get(verb, 'x').split()
  arguments = []
  for _ in range(rng.choice((0, 1, 2, 3))):
    name = rng.choice(flags)
    arguments.append(f'--{name}={rng.choice((value, path, draw_odd(rng)))}')
  if verb in ('main', 'check_data', 'prepare_data', 'benchmark'):
    config = rng.choice((*configs, f'{configs[0]}:debug', *odd, path))
    config = rng.choice((config, str(folder / 'file.py')))
    arguments.insert(0, f'--config={config}')
    key = rng.choice([key for key, _ in _flat_keys(default_config())])
    arguments.append(f'--config.{key}={draw_odd(rng)}')
    # Else it would begin to work.
    arguments.append(
      rng.choice(('--config.data.root=gone', '--config.zzz=1', '--nothing=1'))
    )
    arguments.append('--config.data.name=folder')
    if verb == 'benchmark':
      arguments.insert(0, rng.choice(('data', 'nothing', '')))
  elif verb == 'report':
    arguments.append(path if os.path.exists(path) else gone)
  elif rng.random() < 0.3:
    arguments.append(rng.choice(('--nothing', '-x', 'word', '--step', '--')))
  rng.shuffle(arguments)
  return f'attnfd_jax.{verb}', arguments


def draw_odd(rng):
  """A value of a flag."""
  value = rng.choice(
    (*NUMBERS, *NAMES, (1, 2), ('a',), 'None', '(', '[1,', "'", '1e999')
  )
  return str(value).replace('\0', '0').replace('\ud800', '?')


def run_command(rng, folder):
  """A verb in a process that has imported everything."""
  module, arguments = draw_command(rng, folder)
  output, work = folder / 'output', folder / 'work'
  work.mkdir()
  process = os.fork()
  if not process:
    code = 70
    try:
      with open(output, 'wb', 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
      os.chdir(work)
      sys.argv = [module, *arguments]
      warnings.filterwarnings('ignore', module='runpy')
      try:
        runpy.run_module(module, run_name='__main__', alter_sys=True)
        code = 0
      except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 71
      except ImportError:
        code = 2 if module.endswith('nothing') else 72
        print(f'error: no verb {module}', file=sys.stderr)
      except BaseException:
        traceback.print_exc()
      sys.stdout.flush()
      sys.stderr.flush()
    finally:
      os._exit(code)
  _, status = os.waitpid(process, 0)
  code = os.waitstatus_to_exitcode(status)
  text = output.read_text(errors='replace')
  lines = [line for line in text.splitlines() if line.startswith('error: ')]
  what = f'{module} {arguments} ended with {code}: {text[-1500:]}'
  assert code == 2 and 'Traceback' not in text and len(lines) == 1, what
  return True


KINDS = {
  'images': (run_image, 10),
  'archives': (run_archive, 3),
  'weights': (run_weights, 4),
  'tables': (run_table, 6),
  'config': (run_config, 2),
  'commands': (run_command, 1),
}


def run_case(kind, seed, number):
  """One case in a folder of its own; True if its input was refused.

  Raises:
    Exception: whatever the code under test lets through, and AssertionError if
      a file was written elsewhere.
  """
  rng = random.Random(f'{seed} {kind} {number}')
  with tempfile.TemporaryDirectory() as top:
    top = pathlib.Path(top)
    folder = top / 'a' / 'b' / 'c'
    folder.mkdir(parents=True)
    try:
      return KINDS[kind][0](rng, folder)
    finally:
      strange = [p for p in top.rglob('*') if folder not in (p, *p.parents)]
      assert len(strange) == 2, f'written outside: {strange}'


# Runs of many cases.


def _peak():
  """Bytes that this process has held at most."""
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _where(error):
  """Type of an exception and the last line of ours that it passed."""
  frames = traceback.extract_tb(error.__traceback__)
  ours = [f for f in frames if f'{os.sep}attnfd_jax{os.sep}' in f.filename]
  frame = (ours or frames)[-1]
  name = pathlib.Path(frame.filename).name
  return f'{type(error).__name__} at {name}:{frame.name}'


def _work(kind, seed, numbers, pipe):
  """In a process of its own: a line of JSON before and after each case."""
  # Most configs have the same networks; their shapes take a second each.
  networks = stage_module.networks
  networks.abstract_variables = functools.lru_cache(networks.abstract_variables)
  limit = MEMORY_LIMIT * 4 + int(
    pathlib.Path('/proc/self/statm').read_text().split()[0]
  ) * os.sysconf('SC_PAGE_SIZE')
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
  warnings.simplefilter('ignore')
  with open(os.devnull, 'w') as quiet:
    os.dup2(quiet.fileno(), 1)
    os.dup2(quiet.fileno(), 2)  # libpng writes there.
  with open(pipe, 'w', buffering=1) as file:
    for number in numbers:
      file.write(json.dumps({'begin': number}) + '\n')
      before = _peak()
      found = {'end': number}
      try:
        found['refused'] = bool(run_case(kind, seed, number))
      except BaseException as error:
        found['failure'] = _where(error)
        notes = ' '.join(getattr(error, '__notes__', ()))
        found['text'] = f'{error!s:.1500} {notes}'
      grown = _peak() - before
      if grown > MEMORY_LIMIT:
        found['failure'] = f'memory; {found.get("failure", "")}'
        found['text'] = f'{grown / 1e9:.1f} GB'
      file.write(json.dumps(found) + '\n')
      if grown > MEMORY_LIMIT:
        return  # The next process starts small again.


def _lines(pipe, seconds):
  """Lines as they come; ends after a silence of so many seconds."""
  buffered = b''
  while select.select([pipe], [], [], seconds)[0]:
    data = os.read(pipe, 1 << 16)
    if not data:
      return
    *lines, buffered = (buffered + data).split(b'\n')
    yield from lines
  yield b'{"silent": true}'


def run_kind(kind, *, seed, first, count):
  """({refused, accepted, failed}, {failure: (number, text, times)})."""
  counts, failures = collections.Counter(), {}
  numbers = range(first, first + count)

  def fail(name, number, text):
    counts['failed'] += 1
    known = failures.setdefault(name, [number, text, 0])
    known[2] += 1

  while numbers:
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
      os.close(reader)
      _work(kind, seed, numbers, writer)
      os._exit(0)
    os.close(writer)
    current, silent = None, False
    for line in _lines(reader, TIME_LIMIT):
      found = json.loads(line)
      if 'begin' in found:
        current = found['begin']
      elif 'silent' in found:
        silent = True
        os.kill(process, signal.SIGKILL)
      elif 'failure' in found:
        fail(found['failure'], current, found['text'])
      else:
        counts['refused' if found['refused'] else 'accepted'] += 1
      if 'end' in found:
        numbers = range(found['end'] + 1, numbers.stop)
    os.close(reader)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    if numbers and current is not None and (silent or code):
      name = 'hang' if silent else f'process ended with {code}'
      fail(name, current, '')
      numbers = range(current + 1, numbers.stop)
  return counts, failures


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--count', type=int, default=10000)
  parser.add_argument('--kinds', default=','.join(KINDS))
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--first', type=int, default=0)
  parser.add_argument('--output')
  options = parser.parse_args()
  wanted = options.kinds.split(',')
  total = sum(KINDS[kind][1] for kind in wanted)
  results, failed = {}, False
  with tempfile.TemporaryDirectory() as cache:
    os.environ['XDG_CACHE_HOME'] = cache  # For COCO's drawn masks.
    for kind in wanted:
      began = time.perf_counter()
      counts, failures = run_kind(
        kind,
        seed=options.seed,
        first=options.first,
        count=-(-options.count * KINDS[kind][1] // total),
      )
      results[kind] = {
        **{k: counts[k] for k in ('refused', 'accepted', 'failed')},
        'seconds': round(time.perf_counter() - began, 1),
        'failures': {
          name: {'first': number, 'times': times, 'text': text}
          for name, (number, text, times) in sorted(failures.items())
        },
      }
      summary = {k: v for k, v in results[kind].items() if k != 'failures'}
      print(kind, summary, flush=True)
      for name, entry in results[kind]['failures'].items():
        failed = True
        print(f'  {name} (case {entry["first"]}, {entry["times"]} times)')
        print(f'    {entry["text"]}', flush=True)
  if options.output:
    content = {
      'command': f'fuzz.py --count={options.count} --seed={options.seed}',
      'machine': f'{os.cpu_count()} cores, Python {platform.python_version()}',
      'time_limit_seconds': TIME_LIMIT,
      'memory_limit_bytes': MEMORY_LIMIT,
      'kinds': results,
    }
    path = pathlib.Path(options.output)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + '\n')
  return failed


if __name__ == '__main__':
  sys.exit(main())
