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

from attnfd_jax.data import classes, coco, files, masks, pairs, voc
from attnfd_jax.errors import DataError, InputError
from attnfd_jax.losses import IGNORE_LABEL

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
  that is absent has the first of its names: what is missing is told by path. A
  test split of one path, such as images without annotations, is an absent one
  unless half_a_test says that it is a mistake to tell.
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


def _is_byte(x):
  return isinstance(x, int) and 0 <= x <= 255


def _is_colour(x):
  return isinstance(x, (tuple, list)) and len(x) == 3 and all(map(_is_byte, x))


def _with_voc_colours(names):
  return dict(zip(names, classes.voc_palette(len(names)), strict=True))


def _given_labels(config, names):
  """{name: colour} and read_label of masks that the config describes."""
  palette, id_map = tuple(config['palette']), tuple(config['id_map'])
  k = len(names)
  if palette and id_map:
    raise InputError(
      'config.data.palette is for masks of colours, config.data.id_map for '
      'masks of ids; give one of them.'
    )
  if palette:
    sound = all(map(_is_colour, palette))
    colours = tuple(map(tuple, palette)) if sound else ()
    if not len({*colours}) == len(colours) >= k:
      raise InputError(
        f'config.data.palette has {len(palette)} entries; needs a different '
        f'(r, g, b) of 0 to 255 for each of the {k} class_names, then those to '
        'ignore.'
      )
    table = dict(zip(names, colours, strict=False))
    return table, masks.ColourLabels(colours[:k], colours[k:])
  ids, ignored = id_map or tuple(range(k)), ()
  if id_map:
    ignored = tuple(i for i in range(256) if i not in ids)
    if not all(map(_is_byte, ids)) or not len({*ids} - {255}) == len(ids) == k:
      raise InputError(
        f'config.data.id_map={ids} must have a different id of 0 to 254 for '
        f'each of the {k} class_names.'
      )
  return _with_voc_colours(names), masks.IndexLabels(ids, ignored)


def _given_names(config):
  names = tuple(config['class_names'])
  if not names:
    raise InputError(
      'config.data.class_names is empty; name the classes in the order of '
      "their ids, e.g. --config.data.class_names=\"('background', 'road')\"."
    )
  return names


def _refuse_tables(config, layout):
  for key in ('palette', 'id_map'):
    if config[key]:
      raise InputError(
        f'config.data.{key} does not go with the layout {layout}, whose files '
        'say what the masks mean.'
      )


def _chosen(config, path, table):
  """{name: value} in the order of config.data.class_names, and other values."""
  names = tuple(config['class_names']) or tuple(table)
  if len(names) > IGNORE_LABEL:
    what = f'{len(names)} classes, more than {IGNORE_LABEL}'
    raise coco.unsound(path, what)
  lacking = [name for name in names if name not in table]
  if lacking:
    what = f'no class {lacking[0]!r} of config.data.class_names; it has '
    raise coco.unsound(path, what + ', '.join(table))
  rest = tuple(v for name, v in table.items() if name not in names)
  return {name: table[name] for name in names}, rest


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
  for line in files.read_lines(path):
    if not line or line.startswith('#'):
      continue
    found = re.fullmatch(
      f'(.+?):{number},{number},{number}(:[^:]*){{0,2}}', line
    )
    colour = tuple(map(int, found.group(2, 3, 4))) if found else ()
    if not _is_colour(colour):
      raise coco.unsound(path, f'{line[:90]!r} is not name:red,green,blue::')
    rows.append((line, found[1], colour))
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


def _read_pairs(config, root):
  names, problems = _given_names(config), []
  table, read_label = _given_labels(config, names)
  places = _places(root, _PAIRS, half_a_test=True)
  found = {
    split: pairs.match_folders(*where, problems)
    for split, where in places.items()
  }
  return pairs.make_dataset(config, table, found, read_label, problems)


def _read_voc(config, root):
  labelmap = root / 'labelmap.txt'
  if labelmap.is_file():
    _refuse_tables(config, 'voc with labelmap.txt')
    table, rest = _chosen(config, labelmap, read_labelmap(labelmap))
    read_label = masks.ColourLabels(tuple(table.values()), rest)
  else:
    table, read_label = _given_labels(config, _given_names(config))
  where = (root / 'JPEGImages', root / 'SegmentationClass')
  endings = (pairs.IMAGE_ENDINGS, pairs.IMAGE_ENDINGS)
  problems, found = [], {}
  for split in SPLITS:
    path = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
    if split != 'test' or path.exists():
      ids = voc.read_list(path, problems)
      found[split] = voc.pair_listed(ids, where, endings, problems)
  return pairs.make_dataset(config, table, found, read_label, problems)


def _pair_roboflow(folder, problems):
  """[Pair, ...] of images and their <stem>_mask in one folder."""
  found = files.list_folder(folder, pairs.IMAGE_ENDINGS)
  images, labels = {}, {}
  for stem, file in pairs.by_stem(found, problems).items():
    group = labels if stem.endswith('_mask') else images
    group[stem.removesuffix('_mask')] = file
  if not images:
    problems.append(pairs.empty(folder, 'images'))
    return []
  return pairs.match(images, labels, (folder, folder), problems)


def _read_roboflow(config, root):
  _refuse_tables(config, 'roboflow')
  problems, found, known = [], {}, None
  places = _places(root, [('{}', '{}/_classes.csv')])
  for split, (folder, path) in places.items():
    if not path.is_file():
      problems.append(pairs.absent(path))
      continue
    try:
      table = read_classes_csv(path)
    except DataError as error:
      problems.append(error)
      continue
    known = known or table
    if table != known:
      problems.append(coco.unsound(path, 'other classes than those of train'))
    else:
      found[split] = _pair_roboflow(folder, problems)
  if known is None:
    raise problems[0]
  ids, rest = _chosen(config, path, known)
  read_label = masks.IndexLabels(tuple(ids.values()), rest)
  table = _with_voc_colours(tuple(ids))
  return pairs.make_dataset(config, table, found, read_label, problems)


def _read_coco(config, root):
  _refuse_tables(config, 'coco')
  problems, names = [], config['class_names']
  names, found = coco.find_pairs(
    _places(root, _COCO), problems, class_names=names, limit=config['limit']
  )
  if not names:
    raise problems[0]
  read_label = masks.IndexLabels(tuple(range(len(names))))
  table = _with_voc_colours(names)
  return pairs.make_dataset(config, table, found, read_label, problems)


# Name -> (reader, *glob patterns, one of which is there).
LAYOUTS = {
  'pairs': (_read_pairs, 'masks/train', 'train/masks', 'train/labels'),
  'voc': (_read_voc, 'SegmentationClass'),
  'roboflow': (_read_roboflow, '*/_classes.csv'),
  'coco': (
    _read_coco,
    'annotations/instances_*.json',
    '*/_annotations.coco.json',
  ),
}


def folder(config):
  """The layout config.data.layout, or the only one that is there."""
  root, layout = pairs.check_root(config), config['layout']
  names = config['class_names']
  if not all(isinstance(name, str) and name.strip() for name in names) or not (
    len({*names}) == len(names) <= IGNORE_LABEL
  ):
    raise InputError(
      'config.data.class_names must be different names, at most '
      f"{IGNORE_LABEL}, such as \"('background', 'road')\"."
    )
  if layout == 'auto':
    found = [
      name
      for name, (_, *patterns) in LAYOUTS.items()
      if any(next(root.glob(p), None) for p in patterns)
    ]
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
  return LAYOUTS[layout][0](config, root)
