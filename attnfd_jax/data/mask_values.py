# SPDX-License-Identifier: Apache-2.0
"""Maps the values in masks to classes, by the config or a table of a tool."""

from collections.abc import Collection, Iterable, Mapping, Sequence
import csv
import pathlib
import re
from typing import Any, TypeVar

import numpy as np

from attnfd_jax.data import classes, coco, files, frequencies, masks
from attnfd_jax.data.classes import Color
from attnfd_jax.data.pairs import ReadLabel
from attnfd_jax.data.records import DataConfig
from attnfd_jax.errors import DataError, InputError
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.progress import progress
from attnfd_jax.types import StrPath

# Ids in masks of two classes, as most programs export them.
BLACK_AND_WHITE = (0, 255)
_NAMES = (
  'config.data.class_names must be 2 or more different names in the order of '
  f'ids, at most {IGNORE_LABEL}: '
  "--config.data.class_names=\"('background', 'road')\""
)
_Value = TypeVar('_Value', int, Color)  # Of a class in masks.


def check_names(names: Collection[Any]) -> None:
  """Checks class names; an empty list is accepted.

  Raises:
    InputError: if there is only one or more than 255, or if they are not
      different strings.
  """
  valid = all(isinstance(name, str) and name.strip() for name in names)
  if not valid or not len({*names}) == len(names) <= IGNORE_LABEL:
    raise InputError(f'{_NAMES}.')
  if len(names) == 1:
    (name,) = names
    what = f'{_NAMES}; {name!r} is only one class'
    if ',' in name:
      what = f'{_NAMES}, with parentheses and quotes; {name!r} is a single name'
    raise InputError(f'{what}.')


def _is_byte(x: object) -> bool:
  return isinstance(x, int) and 0 <= x <= 255


def _is_color(x: object) -> bool:
  return isinstance(x, (tuple, list)) and len(x) == 3 and all(map(_is_byte, x))


def as_labels(
  chosen: Mapping[str, Any], ignored: tuple[Any, ...]
) -> tuple[Mapping[str, Color], ReadLabel]:
  """Returns the colors of classes, and how their masks are read.

  Args:
    chosen: id or color of each class in masks, in the order of train ids.
    ignored: other ids or colors in masks, to be ignored.
  """
  values = tuple(chosen.values())
  if isinstance(values[0], tuple):
    return chosen, masks.ColorLabels(values, ignored)
  return classes.with_voc_colors(chosen), masks.IndexLabels(values, ignored)


def given_labels(
  config: DataConfig,
) -> tuple[Mapping[str, Color], ReadLabel]:
  """Returns `as_labels` with the ids or colors in the config.

  Raises:
    InputError: if they are invalid.
  """
  names, id_map = config['class_names'], tuple(config['id_map'])
  palette, k = tuple(config['palette']), len(names)
  if not names:
    raise InputError(f'{_NAMES}.')
  if palette and id_map:
    what = 'config.data.palette is for colors in masks, config.data.id_map for'
    raise InputError(f'{what} ids; set only one of them.')
  needed = f'for each of {k} class_names'
  values: Sequence[Any] = id_map or range(k)
  ignored: Sequence[Any] = ()
  if palette:
    valid = all(map(_is_color, palette))
    values = tuple(map(tuple, palette)) if valid else ()
    if not len({*values}) == len(values) >= k:
      what = f'has {len(palette)} entries; needs a different (r, g, b) of'
      what = f'{what} 0 to 255 {needed}, then the colors to ignore'
      raise InputError(f'config.data.palette {what}.')
    ignored = values[k:]
  elif id_map:
    valid = all(map(_is_byte, id_map))
    if not valid or not len({*id_map}) == len(id_map) == k:
      what = f'must have a different id of 0 to 255 {needed}'
      raise InputError(f'config.data.id_map={id_map} {what}.')
    ignored = tuple(i for i in range(256) if i not in id_map)
    if id_map == BLACK_AND_WHITE:
      ignored = ()  # Grays come from smoothed borders and are errors.
  return as_labels(dict(zip(names, values, strict=False)), tuple(ignored))


def chosen_labels(
  config: DataConfig, path: StrPath, table: Mapping[str, Any]
) -> tuple[Mapping[str, Color], ReadLabel]:
  """Returns `as_labels` of the config's classes, or of all in a table.

  Args:
    config: the group `data`.
    path: of the table, for messages.
    table: id or color of each class in masks.

  Raises:
    DataError: if the table does not have a class of the config.
  """
  names = config['class_names'] or tuple(table)
  coco.check_classes(path, names, table)
  others = tuple(table[name] for name in table if name not in names)
  return as_labels({name: table[name] for name in names}, others)


def _make_table(
  path: pathlib.Path, rows: Iterable[tuple[str, str, _Value]]
) -> dict[str, _Value]:
  """Returns {name: value} of rows (line, name, value).

  Raises:
    DataError: if a name or value is repeated, or there are no rows.
  """
  table: dict[str, _Value] = {}
  for text, name, value in rows:
    if name in table or value in table.values():
      what = f'{text[:90]!r} repeats a name, color or id'
      raise coco.annotation_error(path, what)
    table[name] = value
  if not table:
    raise coco.annotation_error(path, 'no classes in it')
  return table


def read_labelmap(path: pathlib.Path) -> dict[str, Color]:
  """Reads the colors in CVAT's labelmap.txt, with lines name:r,g,b:x:y."""
  rows, number = [], r'(\d{1,3})'
  pattern = f'(.+?):{number},{number},{number}(:[^:]*){{0,2}}'
  for line in files.read_lines(path):
    if line and not line.startswith('#'):
      match = re.fullmatch(pattern, line)
      color = tuple(map(int, match.group(2, 3, 4))) if match else ()
      if not match or not _is_color(color):
        raise coco.annotation_error(
          path, f'{line[:90]!r} is not name:red,green,blue::'
        )
      rows.append((line, match[1], color))
  return _make_table(path, rows)


def read_classes_csv(path: pathlib.Path) -> dict[str, int]:
  """Reads the ids of classes in Roboflow's _classes.csv, ordered by id."""
  rows = []
  try:
    for row in list(csv.reader(files.read_lines(path)))[1:]:
      text, cells = ','.join(row), [cell.strip() for cell in row]
      number = len(cells) > 1 and re.fullmatch(r'\d{1,3}', cells[0])
      if not number or int(cells[0]) >= IGNORE_LABEL:
        raise coco.annotation_error(path, f'{text[:90]!r} is not id, name')
      rows.append((text, cells[1], int(cells[0])))
  except csv.Error as error:
    raise coco.annotation_error(
      path, f'not a table of id, name ({error})'
    ) from error
  table = _make_table(path, rows)
  return dict(sorted(table.items(), key=lambda item: item[1]))


def are_black_and_white(
  config: DataConfig, files_of_masks: Sequence[files.File]
) -> bool:
  """Whether the config names two classes and masks have the ids 0 and 255 only.

  Masks are read until another id occurs: with an id 1, 255 is the ignore label.
  False if `palette` or `id_map` is set.
  """
  given = config['palette'] or config['id_map']
  if given or len(config['class_names']) != 2:
    return False

  def values_of(file: files.File) -> set[int]:
    try:
      return {*np.unique(masks.read_mask(file)).tolist()}
    except DataError:  # Raised again when the pair is used.
      return set()

  seen: set[int] = set()
  count = len(files_of_masks)
  rows = frequencies.map_records(values_of, files_of_masks, config['threads'])
  for values in progress(count, 'reading ids', iterable=rows, delay=1):
    seen |= values
    if not seen <= {*BLACK_AND_WHITE}:
      return False
  return seen == {*BLACK_AND_WHITE}
