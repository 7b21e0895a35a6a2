# SPDX-License-Identifier: Apache-2.0
"""One picture of a data set: image, label and overlay of a few records."""

import collections
import pathlib
import warnings

import cv2
import numpy as np
from PIL import Image
from PIL import ImageDraw

from attnfd_jax.data import classes
from attnfd_jax.data import masks
from attnfd_jax.data.files import File
from attnfd_jax.errors import DataError

# Pixels.
_CELL, _GAP, _LINE = (240, 180), 8, 14
_ROWS = 3  # Of each split.
_ROWS_OF_KIND = 2
_LONGEST = 8192  # Much longer sides are read in steps: reach grows with them.
_WRONG = (255, 0, 255)
_CODE = np.array([1 << 16, 1 << 8, 1])  # Of red, green, blue.


def _open(name):
  """uint8 [h, w, 3] or int64 ids [h, w] of a file, None if not readable."""
  path, _, member = name.rpartition('!')
  if not path or pathlib.Path(name).exists():
    path, member = name, ''
  try:
    with warnings.catch_warnings():
      # Pillow's about large images.
      warnings.simplefilter('ignore')
      with masks.open_image(File(path, member).read()) as image:
        if image.mode in ('1', 'L', 'P', 'I', 'I;16'):
          return np.asarray(image).astype(np.int64)
        return np.asarray(image.convert('RGB'))
  except Exception:  # Pillow raises many types.
    return None


def _wrong_in_pink(mask, values):
  """Colours of a mask's own values; those of a DataError stand out."""
  step = max(max(mask.shape[:2]) // _LONGEST, 1)
  mask = mask[::step, ::step]
  if mask.ndim == 2:
    codes, colours = mask, classes.voc_palette(256)[mask % 256]
  else:
    codes, colours = mask @ _CODE, mask.copy()
    values = [np.array(v.split(','), np.int64) @ _CODE for v in values]
  wrong = np.isin(codes, list(values)).astype(np.uint8)
  # Single pixels would be lost when it is made small.
  reach = 2 * (max(mask.shape[:2]) // _CELL[0]) + 1
  colours[cv2.dilate(wrong, np.ones((reach, reach))) > 0] = _WRONG
  return colours


def _colours(label, palette):
  """Of train ids; what is ignored is black."""
  table = np.zeros((256, 3), np.uint8)
  table[: len(palette)] = palette
  return table[label]


def _cells(image, colours):
  """Image, label and both mixed, small; None where there is nothing."""
  mixed = None
  if image is not None and colours is not None:
    if image.shape == colours.shape:
      mixed = cv2.addWeighted(image, 0.5, colours, 0.5, 0)
  cells = []
  for pixels in (image, colours, mixed):
    if pixels is not None:
      cell = Image.fromarray(pixels)
      # Colours of a label must not be mixed with each other.
      cell.thumbnail(_CELL, Image.NEAREST if cells else Image.BILINEAR)
    cells.append(None if pixels is None else cell)
  return cells


def _broken_cells(source, index, problem, palette):
  """As `_cells`, of what can be decoded of a record with a problem."""
  image, colours = _open(source.name(index)), None
  if image is not None and image.ndim == 2:  # A grey photograph.
    image = np.repeat(image[..., None], 3, -1).astype(np.uint8)
  try:
    # Sources of files read labels alone, too.
    colours = _colours(source.label(index), palette)
  except (AttributeError, DataError):
    mask = None
    if problem.file != source.name(index):
      mask = _open(problem.file)
    if mask is not None:
      colours = _wrong_in_pink(mask, problem.values or {})
  return _cells(image, colours)


def _sheet_rows(dataset, problems):
  """(caption, cells) of records spread over each split, then of problems."""
  for name, source in dataset.splits.items():
    good = [i for i in range(len(source)) if i not in problems[name]]
    picked = np.linspace(0, len(good) - 1, min(_ROWS, len(good)))
    for index in (good[int(i)] for i in picked):
      record = source[index]
      colours = _colours(record['label'], dataset.palette)
      caption = f'{name}: {source.name(index)}'
      yield caption, _cells(record['image'], colours)
  shown = collections.Counter()
  for name, source in dataset.splits.items():
    for index, problem in problems[name].items():
      if shown[problem.kind] < _ROWS_OF_KIND:
        cells = _broken_cells(source, index, problem, dataset.palette)
        if any(cell is not None for cell in cells):
          shown[problem.kind] += 1
          yield f'{name}, {problem.kind}: {problem.file}', cells


def _write_text(draw, place, text, width):
  # The built-in font knows ASCII; the end of a path says more than its start.
  text = ' '.join(text.encode('ascii', 'replace').decode().split())
  if len(text) > 300:  # More than fits, and slow to measure.
    text = text[:100] + text[-200:]
  while len(text) > 9 and draw.textlength(text) > width:
    head, _, tail = text.partition(': ')
    text = f'{head}: ...{tail[8:]}' if tail else text[:-4]
  draw.text(place, text, fill=(0, 0, 0))


def draw_sheet(dataset, problems):
  """Rows of image, label and overlay under a legend, a PIL image.

  Three records of each split, then the first two of each kind of problem that
  can still be decoded, with wrong values in pink.

  Args:
    dataset: Dataset.
    problems: split -> {index: DataError}, as in Split.
  """
  rows = list(_sheet_rows(dataset, problems))
  width = 3 * (_CELL[0] + _GAP) + _GAP
  columns = 4
  legend = -(-len(dataset.class_names) // columns) * _LINE + _GAP
  height = _CELL[1] + _LINE + _GAP
  size = (width, legend + _GAP + len(rows) * height)
  sheet = Image.new('RGB', size, (255, 255, 255))
  draw = ImageDraw.Draw(sheet)
  for i, name in enumerate(dataset.class_names):
    x = _GAP + i % columns * (width // columns)
    y = _GAP + i // columns * _LINE
    colour = tuple(int(c) for c in dataset.palette[i])
    draw.rectangle((x, y + 1, x + 16, y + _LINE - 3), colour, (0, 0, 0))
    _write_text(draw, (x + 22, y), name, width // columns - 26)
  for row, (caption, cells) in enumerate(rows):
    y = legend + _GAP + row * height
    _write_text(draw, (_GAP, y), caption, width - 2 * _GAP)
    for column, cell in enumerate(cells):
      if cell is not None:
        x = _GAP + column * (_CELL[0] + _GAP)
        sheet.paste(cell, (x, y + _LINE))
  return sheet
