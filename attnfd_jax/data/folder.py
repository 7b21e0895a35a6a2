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
from attnfd_jax.errors import InputError, one_of
from attnfd_jax.losses import IGNORE_LABEL

# Splits, and other names of their folders; a set without test is fine.
SPLITS = {'train': (), 'val': ('valid', 'validation'), 'test': ()}
# Where the images and the masks of a split may be.
_PAIRS = 'images/{} masks/{}', '{}/images {}/masks', '{}/data {}/labels'
_NAMES = (
  'config.data.class_names must be different names by id, at most '
  f"{IGNORE_LABEL}: --config.data.class_names=\"('sky', 'road')\"."
)
# Where the JSON file and the images of a split may be.
_COCO = (
  'annotations/instances_{}.json images/{}',
  'annotations/instances_{}.json {}',
  'annotations/instances_{}.json images',
  '{}/_annotations.coco.json {}',
)


def _find_paths(root, patterns, *, half_a_test=False):
  """{split: (path, path)} by the pattern with the most existing paths of train.

  A test split may lack both paths, and without `half_a_test` one: its labels.
  """

  def locate(pattern, name):
    return tuple(root / part.format(name) for part in pattern.split())

  def count(paths):
    return sum(path.exists() for path in paths)

  pattern = max(patterns, key=lambda pattern: count(locate(pattern, 'train')))
  found = {}
  for split, others in SPLITS.items():
    paths = max((locate(pattern, x) for x in (split, *others)), key=count)
    if split != 'test' or count(paths) >= (1 if half_a_test else 2):
      found[split] = paths
  return found


def _is_byte(x):
  return isinstance(x, int) and 0 <= x <= 255


def _is_colour(x):
  return isinstance(x, (tuple, list)) and len(x) == 3 and all(map(_is_byte, x))


def _as_labels(chosen, ignored):
  """{class: colour} and read_label of {class: id or colour in the masks}."""
  values = tuple(chosen.values())
  if isinstance(values[0], tuple):
    return chosen, masks.ColourLabels(values, ignored)
  return classes.with_voc_colours(chosen), masks.IndexLabels(values, ignored)


def _given_labels(config):
  """`_as_labels` of what the config says of the masks."""
  names, id_map = config['class_names'], tuple(config['id_map'])
  palette, k = tuple(config['palette']), len(names)
  if not names:
    raise InputError(_NAMES)
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
    sound = all(_is_byte(i) and i != IGNORE_LABEL for i in id_map)
    if not sound or not len({*id_map}) == len(id_map) == k:
      what = f'must have a different id of 0 to 254 for {each}'
      raise InputError(f'config.data.id_map={id_map} {what}.')
    ignored = tuple(i for i in range(256) if i not in id_map)
  return _as_labels(dict(zip(names, values, strict=False)), ignored)


def _chosen_labels(config, path, table):
  """`_as_labels` of the config's classes among those of the file `path`."""
  names = config['class_names'] or tuple(table)
  coco.check_classes(path, names, table)
  others = tuple(table[name] for name in table if name not in names)
  return _as_labels({name: table[name] for name in names}, others)


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


def _read_pairs(config, root):
  table, read_label = _given_labels(config)
  paths = _find_paths(root, _PAIRS, half_a_test=True)
  splits = {s: pairs.match_folders(*folders) for s, folders in paths.items()}
  return pairs.make_dataset(config, table, splits, read_label)


def _read_voc(config, root):
  path = root / 'labelmap.txt'
  if path.is_file():
    table, read_label = _chosen_labels(config, path, read_labelmap(path))
  else:
    table, read_label = _given_labels(config)
  names = [x for x in SPLITS if x != 'test' or voc.list_path(root, x).exists()]
  splits = {name: voc.read_split(root, name) for name in names}
  return pairs.make_dataset(config, table, splits, read_label)


def _match_roboflow(folder, path, tables):
  """Pairs of a folder; its table at `path` joins equal ones in `tables`."""
  if not path.is_file():
    raise pairs.absent(path)
  tables[path] = read_classes_csv(path)
  if tables[path] != next(iter(tables.values())):
    raise coco.unsound(path, 'other classes than those of train')
  both = files.list_folder(folder, pairs.IMAGE_ENDINGS)
  images = [file for file in both if not file.inner.stem.endswith('_mask')]
  yield from pairs.match((folder, folder), (images, both), ('', '_mask'))


def _read_roboflow(config, root):
  tables = {}
  splits = {
    split: list(pairs.with_error(_match_roboflow(*paths, tables)))
    for split, paths in _find_paths(root, ['{} {}/_classes.csv']).items()
  }
  if not tables:
    raise splits['train'][0]
  table, read_label = _chosen_labels(config, *next(iter(tables.items())))
  return pairs.make_dataset(config, table, splits, read_label)


def _read_coco(config, root):
  options = {key: config[key] for key in ('class_names', 'limit')}
  names, splits = coco.find_pairs(_find_paths(root, _COCO), **options)
  if not names:
    raise splits['train'][0]
  table, read_label = _as_labels({x: i for i, x in enumerate(names)}, ())
  return pairs.make_dataset(config, table, splits, read_label)


# Name -> (reader, *glob patterns, one of which is there).
LAYOUTS = {
  'pairs': (_read_pairs, 'masks/train', 'train/masks', 'train/labels'),
  'voc': (_read_voc, 'SegmentationClass'),
  'roboflow': (_read_roboflow, '*/_classes.csv'),
  'coco': (_read_coco, 'annotations/instances_*', '*/_annotations.coco.json'),
}


def folder(config):
  """The layout config.data.layout, or the only one that is there."""
  root, layout = pairs.check_root(config), config['layout']
  names = config['class_names']
  sound = all(isinstance(name, str) and name.strip() for name in names)
  if not sound or not len({*names}) == len(names) <= IGNORE_LABEL:
    raise InputError(_NAMES)
  one_of('config.data.layout', layout, ('auto', *LAYOUTS))
  if layout == 'auto':
    layouts = [
      name
      for name, (_, *patterns) in LAYOUTS.items()
      if any(next(root.glob(p), None) for p in patterns)
    ]
    if len(layouts) > 1:
      flag = f'say --config.data.layout={layouts[0]}, for example'
      raise InputError(f'{root}: could be {" or ".join(layouts)}; {flag}.')
    layout = (*layouts, 'pairs')[0]
  labelmap = layout == 'voc' and (root / 'labelmap.txt').is_file()
  for key in ('palette', 'id_map'):
    if config[key] and (labelmap or layout in ('roboflow', 'coco')):
      what = f'config.data.{key} does not go with the layout {layout}'
      raise InputError(f'{what}, whose files say what the masks mean.')
  return LAYOUTS[layout][0](config, root)
