# SPDX-License-Identifier: Apache-2.0
"""What the values in masks mean: by the config, or by the table of a tool."""

import csv
import re

import numpy as np

from attnfd_jax.data import classes, coco, files, frequencies, masks
from attnfd_jax.errors import DataError, InputError
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.progress import progress

# Ids of masks of two classes as most programs export them.
BLACK_AND_WHITE = (0, 255)
_NAMES = (
  'config.data.class_names must be 2 or more different names by id, at most '
  f"{IGNORE_LABEL}: --config.data.class_names=\"('background', 'road')\""
)


def check_names(names):
  """Raises InputError unless they are different, and two at least if any."""
  sound = all(isinstance(name, str) and name.strip() for name in names)
  if not sound or not len({*names}) == len(names) <= IGNORE_LABEL:
    raise InputError(f'{_NAMES}.')
  if len(names) == 1:
    (name,) = names
    what = f'{_NAMES}; {name!r} alone leaves nothing to tell apart'
    if ',' in name:
      what = f'{_NAMES}, with brackets and quotes; {name!r} is a single name'
    raise InputError(f'{what}.')


def _is_byte(x):
  return isinstance(x, int) and 0 <= x <= 255


def _is_colour(x):
  return isinstance(x, (tuple, list)) and len(x) == 3 and all(map(_is_byte, x))


def as_labels(chosen, ignored):
  """{class: colour} and read_label of {class: id or colour in the masks}."""
  values = tuple(chosen.values())
  if isinstance(values[0], tuple):
    return chosen, masks.ColourLabels(values, ignored)
  return classes.with_voc_colours(chosen), masks.IndexLabels(values, ignored)


def given_labels(config):
  """`as_labels` of what the config says of the masks."""
  names, id_map = config['class_names'], tuple(config['id_map'])
  palette, k = tuple(config['palette']), len(names)
  if not names:
    raise InputError(f'{_NAMES}.')
  if palette and id_map:
    what = 'config.data.palette is of colours, config.data.id_map of ids'
    raise InputError(f'{what}; give one of them.')
  values, ignored, each = id_map or range(k), (), f'each of {k} class_names'
  if palette:
    sound = all(map(_is_colour, palette))
    values = tuple(map(tuple, palette)) if sound else ()
    if not len({*values}) == len(values) >= k:
      what = f'has {len(palette)} entries; needs a different (r, g, b) of'
      what = f'{what} 0 to 255 for {each}, then those to ignore'
      raise InputError(f'config.data.palette {what}.')
    ignored = values[k:]
  elif id_map:
    sound = all(map(_is_byte, id_map))
    if not sound or not len({*id_map}) == len(id_map) == k:
      what = f'must have a different id of 0 to 255 for {each}'
      raise InputError(f'config.data.id_map={id_map} {what}.')
    ignored = tuple(i for i in range(256) if i not in id_map)
    if id_map == BLACK_AND_WHITE:
      ignored = ()  # Greys come from a smoothed border, and are errors.
  return as_labels(dict(zip(names, values, strict=False)), ignored)


def chosen_labels(config, path, table):
  """`as_labels` of the config's classes among those of the file `path`."""
  names = config['class_names'] or tuple(table)
  coco.check_classes(path, names, table)
  others = tuple(table[name] for name in table if name not in names)
  return as_labels({name: table[name] for name in names}, others)


def _make_table(path, rows):
  """{name: value} of (text, name, value), none of which may come twice."""
  table = {}
  for text, name, value in rows:
    if name in table or value in table.values():
      what = f'{text[:90]!r} has a name, colour or id a second time'
      raise coco.unsound(path, what)
    table[name] = value
  if not table:
    raise coco.unsound(path, 'no classes in it')
  return table


def read_labelmap(path):
  """{name: (r, g, b)} of CVAT's labelmap.txt, lines name:r,g,b:x:y."""
  rows, number = [], r'(\d{1,3})'
  pattern = f'(.+?):{number},{number},{number}(:[^:]*){{0,2}}'
  for line in files.read_lines(path):
    if line and not line.startswith('#'):
      match = re.fullmatch(pattern, line)
      colour = tuple(map(int, match.group(2, 3, 4))) if match else ()
      if not _is_colour(colour):
        raise coco.unsound(path, f'{line[:90]!r} is not name:red,green,blue::')
      rows.append((line, match[1], colour))
  return _make_table(path, rows)


def read_classes_csv(path):
  """{name: id} of Roboflow's _classes.csv, in the order of ids."""
  rows = []
  try:
    for row in list(csv.reader(files.read_lines(path)))[1:]:
      text, cells = ','.join(row), [cell.strip() for cell in row]
      number = len(cells) > 1 and re.fullmatch(r'\d{1,3}', cells[0])
      if not number or int(cells[0]) >= IGNORE_LABEL:
        raise coco.unsound(path, f'{text[:90]!r} is not id, name')
      rows.append((text, cells[1], int(cells[0])))
  except csv.Error as error:
    raise coco.unsound(path, f'not a table of id, name ({error})') from error
  table = _make_table(path, rows)
  return dict(sorted(table.items(), key=lambda item: item[1]))


def are_black_and_white(config, files_of_masks):
  """Whether two classes are named, and masks have 0 and 255 and nothing else.

  Files are read until another value is seen, for beside 1 255 is ignored.
  """
  given = config['palette'] or config['id_map']
  if given or len(config['class_names']) != 2:
    return False

  def values_of(file):
    try:
      return {*np.unique(masks.read_mask(file)).tolist()}
    except DataError:  # Raised again where the pair is used.
      return set()

  seen, count = set(), len(files_of_masks)
  rows = frequencies.map_records(values_of, files_of_masks, config['threads'])
  for values in progress(count, 'reading ids', iterable=rows, delay=1):
    seen |= values
    if not seen <= {*BLACK_AND_WHITE}:
      return False
  return seen == {*BLACK_AND_WHITE}
