# SPDX-License-Identifier: Apache-2.0
"""Draws a contact sheet of a data set: image, label and overlay of records."""

import collections
from collections.abc import Iterable, Iterator, Mapping
import pathlib
from typing import TypeAlias
import unicodedata
import warnings

import cv2
import numpy as np
from PIL import Image, ImageDraw

from attnfd_jax.data import classes, masks
from attnfd_jax.data.files import File
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.errors import DataError

# In pixels: size of a cell, gap, height of a line of text, width of the sheet.
_CELL, _GAP, _LINE = (240, 180), 8, 14
_WIDTH = 3 * (_CELL[0] + _GAP) + _GAP
# Masks with much longer sides are subsampled: marking takes time that grows
# with the side.
_LONGEST = 8192
# Columns of the legend, rows per split, rows per kind of problem.
_COLUMNS, _ROWS, _ROWS_OF_KIND = 4, 3, 2
_CODE = np.array([1 << 16, 1 << 8, 1])  # Factors of red, green and blue.

# DataErrors by split and index.
_Problems: TypeAlias = Mapping[str, Mapping[int, DataError]]
# Image, label and overlay.
_Cells: TypeAlias = list[Image.Image | None]


def draw_sheet(dataset: Dataset, problems: _Problems) -> Image.Image:
  """Draws a legend, and rows of image, label and overlay.

  The rows are records of each split, then of each kind of problem, with wrong
  values in pink.

  Args:
    dataset: as from load_dataset.
    problems: records that cannot be used, {split: {index: DataError}}.
  """
  # Ignored pixels are black.
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


def _rows(
  splits: Mapping, problems: _Problems, palette: np.ndarray
) -> Iterator[tuple[str, _Cells]]:
  """Yields captions and cells, evenly spaced over each split, then problems."""
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


def _cells(image: np.ndarray | None, colors: np.ndarray | None) -> _Cells:
  """Returns image, label and overlay as thumbnails; None for a missing one."""
  photo, label = (
    None if x is None else Image.fromarray(x) for x in (image, colors)
  )
  cells: _Cells = [photo, label]
  if photo and label and photo.size == label.size:
    cells.append(Image.blend(photo, label, 0.5))
  filters = Image.Resampling
  for column, cell in enumerate(cells):
    if cell:
      # The colors of a label must not be interpolated.
      cell.thumbnail(_CELL, filters.NEAREST if column else filters.BILINEAR)
  return cells


def _decode(
  source, index: int, problem: DataError, palette: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
  """Reads image and label colors, uint8 [h, w, 3]; None if unreadable."""
  image, colors = _read_pixels(source.name(index)), None
  if image is not None and image.ndim == 2:  # A grayscale image.
    image = np.repeat(image[..., None], 3, -1).astype(np.uint8)
  try:
    # Some sources can read a label without its image.
    colors = palette[source.label(index)]
  except (AttributeError, DataError):
    if problem.file != source.name(index):
      mask = _read_pixels(problem.file)
      colors = None if mask is None else _mark(mask, problem.values or {})
  return image, colors


def _read_pixels(name: str) -> np.ndarray | None:
  """Reads uint8 [h, w, 3] or int64 ids [h, w]; None if that fails."""
  path, _, member = name.rpartition('!')
  if not path or pathlib.Path(name).exists():
    path, member = name, ''
  try:
    with warnings.catch_warnings(action='ignore'):  # About large images.
      with masks.open_image(File(path, member).read()) as image:
        if image.mode in ('1', 'L', 'P', 'I', 'I;16'):
          return np.asarray(image).astype(np.int64)
        return np.asarray(image.convert('RGB'))
  except Exception:  # Pillow raises many types.
    return None


def _mark(mask: np.ndarray, values: Iterable) -> np.ndarray:
  """Colors the values of a mask, those of a DataError in pink."""
  step = max(max(mask.shape[:2]) // _LONGEST, 1)
  mask = mask[::step, ::step]
  if mask.ndim == 2:
    codes, colors = mask, classes.voc_palette(256)[mask % 256]
  else:
    codes, colors = mask @ _CODE, mask.copy()
    values = [np.array(v.split(','), np.int64) @ _CODE for v in values]
  wrong = np.isin(codes, list(values)).astype(np.uint8)
  # Enlarged, so that single pixels are still visible in the thumbnail.
  reach = 2 * (max(mask.shape[:2]) // _CELL[0]) + 1
  colors[cv2.dilate(wrong, np.ones((reach, reach))) > 0] = (255, 0, 255)
  return colors


def _shorten(text: str, most: int) -> str:
  """Returns one line of ASCII with at most `most` characters.

  The built-in font has no others: accents are dropped, other scripts escaped.
  Long texts lose their middle.
  """
  text = unicodedata.normalize('NFKD', text)
  text = ''.join(x for x in text if not unicodedata.combining(x))
  text = ' '.join(text.encode('ascii', 'backslashreplace').decode().split())
  if len(text) <= most:
    return text
  return f'{text[: most // 5]}...{text[len(text) - most * 4 // 5 + 3 :]}'
