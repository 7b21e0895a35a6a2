# SPDX-License-Identifier: Apache-2.0
"""One picture of a data set: image, label and overlay of a few records."""

import collections
import pathlib
import unicodedata
import warnings

import cv2
import numpy as np
from PIL import Image, ImageDraw

from attnfd_jax.data import classes, masks
from attnfd_jax.data.files import File
from attnfd_jax.errors import DataError

_CELL, _GAP, _LINE = (240, 180), 8, 14  # Pixels, as the next two.
_WIDTH = 3 * (_CELL[0] + _GAP) + _GAP
_LONGEST = 8192  # Much longer sides are read in steps: reach grows with them.
_COLUMNS, _ROWS, _ROWS_OF_KIND = 4, 3, 2  # Of legend, split, kind of problem.
_CODE = np.array([1 << 16, 1 << 8, 1])  # Of red, green, blue.


def draw_sheet(dataset, problems):
  """A PIL image: under a legend rows of image, label and overlay, of records of
  each split, then of each kind of problem, with wrong values in pink.

  `problems` has for each split {index: DataError}.
  """
  # What is ignored is black.
  palette = np.pad(dataset.palette, ((0, 256 - dataset.num_classes), (0, 0)))
  rows = list(_rows(dataset.splits, problems, palette))
  top = -(-len(dataset.class_names) // _COLUMNS) * _LINE + 2 * _GAP
  step = _CELL[1] + _LINE + _GAP
  sheet = Image.new('RGB', (_WIDTH, top + len(rows) * step), 'white')
  draw = ImageDraw.Draw(sheet)
  for i, name in enumerate(dataset.class_names):
    x = _GAP + i % _COLUMNS * (_WIDTH // _COLUMNS)
    y = _GAP + i // _COLUMNS * _LINE
    box = (x, y + 1, x + 16, y + _LINE - 3)
    draw.rectangle(box, tuple(palette[i].tolist()), 'black')
    draw.text((x + 22, y), _shorten(f'{i} {name}', 24), 'black')
  for row, (caption, cells) in enumerate(rows):
    y = top + row * step
    draw.text((_GAP, y), _shorten(caption, 110), 'black')
    for column, cell in enumerate(cells):
      if cell:
        sheet.paste(cell, (_GAP + column * (_CELL[0] + _GAP), y + _LINE))
  return sheet


def _rows(splits, problems, palette):
  """(caption, cells) of records spread over each split, then of problems."""
  for split, source in splits.items():
    good = [i for i in range(len(source)) if i not in problems[split]]
    for i in np.linspace(0, len(good) - 1, min(_ROWS, len(good)), dtype=int):
      record, name = source[good[i]], source.name(good[i])
      cells = _cells(record['image'], palette[record['label']])
      yield f'{split}: {name}', cells
  shown = collections.Counter()
  for split, source in splits.items():
    for index, problem in problems[split].items():
      if shown[problem.kind] < _ROWS_OF_KIND:
        cells = _cells(*_decode(source, index, problem, palette))
        if any(cells):
          shown[problem.kind] += 1
          yield f'{split}, {problem.kind}: {problem.file}', cells


def _cells(image, colors):
  """Image, label and both mixed, small; None for one that is unknown."""
  cells = [None if x is None else Image.fromarray(x) for x in (image, colors)]
  if all(cells) and image.shape == colors.shape:
    cells.append(Image.blend(*cells, 0.5))
  for column, cell in enumerate(cells):
    if cell:
      # Colors of a label must not be mixed with each other.
      cell.thumbnail(_CELL, Image.NEAREST if column else Image.BILINEAR)
  return cells


def _decode(source, index, problem, palette):
  """Image and colors of the label, both uint8 [h, w, 3], None if unreadable."""
  image, colors = _read_pixels(source.name(index)), None
  if image is not None and image.ndim == 2:  # A gray photograph.
    image = np.repeat(image[..., None], 3, -1).astype(np.uint8)
  try:
    # Sources of files read labels alone, too.
    colors = palette[source.label(index)]
  except (AttributeError, DataError):
    if problem.file != source.name(index):
      mask = _read_pixels(problem.file)
      colors = None if mask is None else _mark(mask, problem.values or {})
  return image, colors


def _read_pixels(name):
  """uint8 [h, w, 3] or int64 ids [h, w] of a file, None if not readable."""
  path, _, member = name.rpartition('!')
  if not path or pathlib.Path(name).exists():
    path, member = name, ''
  try:
    with warnings.catch_warnings(action='ignore'):  # Of large images.
      with masks.open_image(File(path, member).read()) as image:
        if image.mode in ('1', 'L', 'P', 'I', 'I;16'):
          return np.asarray(image).astype(np.int64)
        return np.asarray(image.convert('RGB'))
  except Exception:  # Pillow raises many types.
    return None


def _mark(mask, values):
  """Colors of a mask's own values, with `values` of a DataError in pink."""
  step = max(max(mask.shape[:2]) // _LONGEST, 1)
  mask = mask[::step, ::step]
  if mask.ndim == 2:
    codes, colors = mask, classes.voc_palette(256)[mask % 256]
  else:
    codes, colors = mask @ _CODE, mask.copy()
    values = [np.array(v.split(','), np.int64) @ _CODE for v in values]
  wrong = np.isin(codes, list(values)).astype(np.uint8)
  # Single pixels would be lost when it is made small.
  reach = 2 * (max(mask.shape[:2]) // _CELL[0]) + 1
  colors[cv2.dilate(wrong, np.ones((reach, reach))) > 0] = (255, 0, 255)
  return colors


def _shorten(text, most):
  """One line of ASCII, all the built-in font has, without its middle; letters
  lose their accents, other scripts are escaped.
  """
  text = unicodedata.normalize('NFKD', text)
  text = ''.join(x for x in text if not unicodedata.combining(x))
  text = ' '.join(text.encode('ascii', 'backslashreplace').decode().split())
  if len(text) <= most:
    return text
  return f'{text[: most // 5]}...{text[len(text) - most * 4 // 5 + 3 :]}'
