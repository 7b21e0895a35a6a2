# SPDX-License-Identifier: Apache-2.0
"""A user's own images and masks, in the layouts that tools write.

pairs     images/<split>/ and masks/<split>/, or <split>/images and
          <split>/masks, or <split>/data and <split>/labels (FiftyOne)
voc       JPEGImages/, SegmentationClass/, ImageSets/Segmentation/<split>.txt;
          with labelmap.txt, as CVAT writes it, masks are of its colours
roboflow  <split>/ with images, <stem>_mask.png and _classes.csv
coco      annotations/instances_<split>.json or <split>/_annotations.coco.json
"""

import csv
import re

import numpy as np

from attnfd_jax.data import classes
from attnfd_jax.data import coco
from attnfd_jax.data import files
from attnfd_jax.data import voc
from attnfd_jax.data.masks import ColourLabels
from attnfd_jax.data.masks import IndexLabels
from attnfd_jax.data.pairs import absent
from attnfd_jax.data.pairs import by_stem
from attnfd_jax.data.pairs import check_root
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.data.pairs import empty
from attnfd_jax.data.pairs import IMAGE_ENDINGS
from attnfd_jax.data.pairs import make_source
from attnfd_jax.data.pairs import match
from attnfd_jax.data.pairs import match_folders
from attnfd_jax.errors import DataError
from attnfd_jax.errors import InputError

# What a folder of each split may be called; a set without test is fine.
SPLITS = {
  'train': ('train',),
  'val': ('val', 'valid', 'validation'),
  'test': ('test',),
}
_PAIRS = (
  ('images/{}', 'masks/{}'),
  ('{}/images', '{}/masks'),
  ('{}/data', '{}/labels'),
)
# Where the JSON file and the images of a split may be.
_COCO = (
  ('annotations/instances_{}.json', 'images/{}'),
  ('annotations/instances_{}.json', '{}'),
  ('annotations/instances_{}.json', 'images'),
  ('{}/_annotations.coco.json', '{}'),
)


def _places(root, patterns, *, half_a_test=False):
  """{split: (path, path)} of the first pattern of which train is there.

  Without train it is the first pattern of which a part is there, and a split
  that is absent has the first of its names: what is missing is told by path.

  Args:
    root: of the data set.
    patterns: pairs of paths with {} for the split.
    half_a_test: whether a test split of one path is a mistake to tell; else it
      is an absent one, such as images without annotations.
  """

  def there(count, pattern, name):
    paths = [root / part.format(name) for part in pattern]
    return sum(path.exists() for path in paths) >= count

  candidates = [p for n in (2, 1) for p in patterns if there(n, p, 'train')]
  pattern = (*candidates, *patterns)[0]
  found = {}
  for split, names in SPLITS.items():
    whole, half = (
      [name for name in names if there(count, pattern, name)]
      for count in (2, 1)
    )
    if whole or split != 'test' or (half and half_a_test):
      name = (*whole, *half, *names)[0]
      found[split] = tuple(root / part.format(name) for part in pattern)
  return found


def _is_colour(colour):
  return len(colour) == 3 and all(
    isinstance(x, int) and 0 <= x <= 255 for x in colour
  )


def _given_labels(config, names):
  """Palette of Dataset and read_label of masks that the config describes."""
  palette = tuple(
    tuple(colour) if isinstance(colour, (tuple, list)) else (colour,)
    for colour in config['palette']
  )
  id_map = tuple(config['id_map'])
  if palette and id_map:
    raise InputError(
      'config.data.palette is for masks of colours, config.data.id_map for '
      'masks of ids; give one of them.'
    )
  if palette:
    if (
      not all(map(_is_colour, palette))
      or len(set(palette)) != len(palette)
      or len(palette) < len(names)
    ):
      raise InputError(
        f'config.data.palette has {len(palette)} entries; needs a different '
        f'(r, g, b) of 0 to 255 for each of the {len(names)} class_names, then '
        'those to ignore.'
      )
    colours, ignored = palette[: len(names)], palette[len(names) :]
    return np.array(colours, np.uint8), ColourLabels(colours, ignored)
  if id_map:
    good = all(isinstance(i, int) and 0 <= i < 255 for i in id_map)
    if not good or len(set(id_map)) != len(id_map) or len(id_map) != len(names):
      raise InputError(
        f'config.data.id_map={id_map} must have a different id of 0 to 254 for '
        f'each of the {len(names)} class_names.'
      )
    ignored = tuple(set(range(256)) - set(id_map))
    return classes.voc_palette(len(names)), IndexLabels(id_map, ignored)
  ids = tuple(range(len(names)))
  return classes.voc_palette(len(names)), IndexLabels(ids)


def _check_names(names):
  if not (
    all(isinstance(name, str) and name.strip() for name in names)
    and len(set(names)) == len(names) <= classes.IGNORE_LABEL
  ):
    raise InputError(
      'config.data.class_names must be different names, at most '
      f"{classes.IGNORE_LABEL}, such as \"('background', 'road')\"."
    )


def _given_names(config):
  names = tuple(config['class_names'])
  if not names:
    raise InputError(
      'config.data.class_names is empty; name the classes in the order of '
      "their ids, e.g. --config.data.class_names=\"('background', 'road')\"."
    )
  return names


def _no_tables(config, layout):
  for key in ('palette', 'id_map'):
    if config[key]:
      raise InputError(
        f'config.data.{key} does not go with the layout {layout}, whose files '
        'say what the masks mean.'
      )


def _chosen(config, path, table):
  """Names and values of {name: value} in the order of config.data.class_names.

  Returns:
    names, their values, and the values of classes that were not chosen.
  """
  names = tuple(config['class_names']) or tuple(table)
  if len(names) > classes.IGNORE_LABEL:
    raise _annotation(
      path, f'{len(names)} classes, more than {classes.IGNORE_LABEL}'
    )
  lacking = [name for name in names if name not in table]
  if lacking:
    raise DataError(
      f'{path}: no class {lacking[0]!r} of config.data.class_names; it has '
      f'{", ".join(table)}.',
      'annotation',
      path,
    )
  rest = tuple(v for name, v in table.items() if name not in names)
  return names, tuple(table[name] for name in names), rest


def _annotation(path, what):
  return DataError(f'{path}: {what}.', 'annotation', path)


def read_labelmap(path):
  """{name: (r, g, b)} of CVAT's labelmap.txt, lines name:r,g,b:parts:actions.

  Raises:
    DataError: 'annotation'.
  """
  table = {}
  for line in files.read_lines(path):
    if not line or line.startswith('#'):
      continue
    number = r'(\d{1,3})'
    found = re.fullmatch(
      f'(.+?):{number},{number},{number}(:[^:]*){{0,2}}', line
    )
    colour = tuple(map(int, found.group(2, 3, 4))) if found else ()
    if not found or max(colour) > 255:
      raise _annotation(path, f'{line[:90]!r} is not name:red,green,blue::')
    if found[1] in table or colour in table.values():
      raise _annotation(
        path, f'{line[:90]!r} has a name or colour a second time'
      )
    table[found[1]] = colour
  if not table:
    raise _annotation(path, 'no classes in it')
  return table


def read_classes_csv(path):
  """{name: id} of Roboflow's _classes.csv, in the order of ids.

  Raises:
    DataError: 'annotation'.
  """
  try:
    rows = list(csv.reader(files.read_lines(path)))[1:]
  except csv.Error as error:
    raise _annotation(path, f'not a table of id, name ({error})') from error
  table = {}
  for row in rows:
    cells = [cell.strip() for cell in row]
    good = len(cells) > 1 and re.fullmatch(r'\d{1,3}', cells[0])
    if not good or int(cells[0]) > 254:
      raise _annotation(path, f'{",".join(row)[:90]!r} is not id, name')
    value, name = int(cells[0]), cells[1]
    if name in table or value in table.values():
      raise _annotation(path, f'{",".join(row)[:90]!r} has a name or id twice')
    table[name] = value
  if not table:
    raise _annotation(path, 'no classes in it')
  return dict(sorted(table.items(), key=lambda item: item[1]))


def _read_pairs(config, root):
  names, problems, splits = _given_names(config), [], {}
  palette, read_label = _given_labels(config, names)
  for split, where in _places(root, _PAIRS, half_a_test=True).items():
    pairs = match_folders(*where, problems)
    if pairs:
      splits[split] = make_source(config, pairs, read_label)
  return Dataset('folder', names, palette, splits, tuple(problems))


def _read_voc(config, root):
  labelmap = root / 'labelmap.txt'
  if labelmap.is_file():
    _no_tables(config, 'voc with labelmap.txt')
    names, colours, rest = _chosen(config, labelmap, read_labelmap(labelmap))
    palette = np.array(colours, np.uint8)
    read_label = ColourLabels(colours, rest)
  else:
    names = _given_names(config)
    palette, read_label = _given_labels(config, names)
  where = (root / 'JPEGImages', root / 'SegmentationClass')
  images, masks = (
    files.without_ending(files.list_tree(folder, IMAGE_ENDINGS))
    for folder in where
  )
  problems, splits = [], {}
  for split in SPLITS:
    path = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
    if split == 'test' and not path.exists():
      continue
    ids = voc.read_list(path, problems)
    pairs = voc.pair_listed(ids, images, masks, where, problems)
    if pairs:
      splits[split] = make_source(config, pairs, read_label)
  return Dataset('folder', names, palette, splits, tuple(problems))


def _read_roboflow(config, root):
  _no_tables(config, 'roboflow')
  problems, splits, known = [], {}, None
  places = _places(root, [('{}', '{}/_classes.csv')])
  for split, (folder, path) in places.items():
    if not path.is_file():
      problems.append(absent(path))
      continue
    try:
      table = read_classes_csv(path)
    except DataError as error:
      problems.append(error)
      continue
    if known is not None and table != known:
      problems.append(_annotation(path, 'other classes than those of train'))
      continue
    known = table
    found = by_stem(files.list_folder(folder, IMAGE_ENDINGS), problems)
    images, masks = {}, {}
    for stem, file in found.items():
      if stem.endswith('_mask'):
        masks[stem.removesuffix('_mask')] = file
      else:
        images[stem] = file
    if not images:
      problems.append(empty(folder, 'images'))
      continue
    splits[split] = match(images, masks, (folder, folder), problems)
  if known is None:
    raise problems[0]
  names, ids, rest = _chosen(config, path, known)
  read_label = IndexLabels(ids, rest)
  splits = {
    split: make_source(config, pairs, read_label)
    for split, pairs in splits.items()
    if pairs
  }
  palette = classes.voc_palette(len(names))
  return Dataset('folder', names, palette, splits, tuple(problems))


def _read_coco(config, root):
  _no_tables(config, 'coco')
  problems, splits, names = [], {}, tuple(config['class_names'])
  for split, (path, images) in _places(root, _COCO).items():
    gone = [place for place in (path, images) if not place.exists()]
    if gone:
      problems.append(absent(gone[0]))
      continue
    try:
      # The categories of train hold for all.
      labels = coco.draw_labels(path, class_names=names, limit=config['limit'])
    except DataError as error:
      problems.append(error)
      continue
    names = labels.class_names
    source = coco.make_coco_source(config, path, labels, images, problems)
    if source:
      splits[split] = source
  if not names:
    raise problems[0]
  palette = classes.voc_palette(len(names))
  return Dataset('folder', names, palette, splits, tuple(problems))


def _has(*patterns):
  """root -> whether one of the glob patterns is there."""
  return lambda root: any(True for p in patterns for _ in root.glob(p))


# Name -> (is it there, reader).
LAYOUTS = {
  'pairs': (
    _has('masks/train', 'train/masks', 'train/labels'),
    _read_pairs,
  ),
  'voc': (_has('SegmentationClass'), _read_voc),
  'roboflow': (_has('*/_classes.csv'), _read_roboflow),
  'coco': (
    _has('annotations/instances_*.json', '*/_annotations.coco.json'),
    _read_coco,
  ),
}


def folder(config):
  """The layout config.data.layout, or the only one that is there."""
  root, layout = check_root(config), config['layout']
  _check_names(config['class_names'])
  if layout == 'auto':
    found = [name for name, (is_there, _) in LAYOUTS.items() if is_there(root)]
    if len(found) > 1:
      raise InputError(
        f'{root}: could be {" or ".join(found)}; say --config.data.layout='
        f'{found[0]}, for example.'
      )
    layout = found[0] if found else 'pairs'
  if layout not in LAYOUTS:
    raise InputError(
      f'config.data.layout={layout!r} must be auto, {", ".join(LAYOUTS)}.'
    )
  return LAYOUTS[layout][1](config, root)
