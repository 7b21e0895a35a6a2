# SPDX-License-Identifier: Apache-2.0
"""A user's own images and masks, in the layouts that tools write.

pairs     images/<split>/ and masks/<split>/, or another of `_PAIRS`
voc       JPEGImages/, SegmentationClass/, ImageSets/Segmentation/<split>.txt;
          with labelmap.txt, as CVAT writes it, masks are of its colours
roboflow  <split>/ with images, <stem>_mask.png and _classes.csv
coco      annotations/instances_<split>.json or <split>/_annotations.coco.json
"""

import collections
import itertools
import pathlib

from attnfd_jax.data import coco, files, mask_values, pairs, voc
from attnfd_jax.errors import InputError, one_of

# Splits, and other names of their folders; a set without test is fine.
_FOLDERS = {
  'train': ('train', 'training'),
  'val': ('val', 'valid', 'validation'),
  'test': ('test', 'testing'),
}
# Where the images and the masks of a split may be.
_PAIRS = (
  'images/{} masks/{}',
  '{}/images {}/masks',
  '{}/data {}/labels',  # FiftyOne.
  'img_dir/{} ann_dir/{}',  # mmsegmentation.
  'images/{} annotations/{}',  # ADE20K.
  'images/{} labels/{}',
  '{}/images {}/labels',
  '{} {}_masks',  # Carvana.
  '{} {}_labels',
  '{} {}annot',
)
_ROBOFLOW = '{} {}/_classes.csv'
# Where the images and the JSON file of a split may be.
_COCO = (
  'images/{} annotations/instances_{}.json',
  '{} annotations/instances_{}.json',
  'images annotations/instances_{}.json',
  '{} {}/_annotations.coco.json',
)


def _find_paths(root, patterns, splits):
  """{split: (path, path)} by the pattern of which the first split has the most,
  and notes. The second path, of masks or annotations, decides; without it test
  is left out, unless it is all that is asked for.
  """

  def exist(paths):
    return [path.exists() for path in reversed(paths)]

  def best(pattern, split):
    parts, names = pattern.split(), _FOLDERS[split]
    places = [[root / part.format(name) for part in parts] for name in names]
    return max(places, key=exist)

  pattern = max(patterns, key=lambda pattern: exist(best(pattern, splits[0])))
  found, notes = {split: best(pattern, split) for split in splits}, []
  if splits[1:] and 'test' in found and not found['test'][1].exists():
    images, labels = found.pop('test')
    if images.exists() and '{}' in pattern.split()[0]:
      notes.append(f'test: {images} is not used, for there is no {labels}')
  return found, notes


def _make_given(config, splits, notes=()):
  """The Dataset of splits whose masks mean what the config says."""
  splits, settled = {x: [*pairs.with_error(y)] for x, y in splits.items()}, {}
  entries = itertools.chain(*splits.values())
  found = [x.mask for x in entries if isinstance(x, pairs.Pair)]
  if mask_values.are_black_and_white(config, found):
    settled['id_map'] = ids = mask_values.BLACK_AND_WHITE
    meant = f'255 is {config["class_names"][1]!r}'
    note = f'masks have no ids but 0 and 255: {meant}, as by'
    notes = (*notes, f'{note} --config.data.id_map="{ids}"')
  table, read_label = mask_values.given_labels({**config, **settled})
  more = {'notes': notes, 'settled': settled}
  return pairs.make_dataset(config, table, splits, read_label, **more)


def _read_pairs(config, root, splits):
  paths, notes = _find_paths(root, _PAIRS, splits)
  if not any(x.exists() for both in paths.values() for x in both):
    raise _without_splits(root)
  splits = {s: pairs.match_folders(*folders) for s, folders in paths.items()}
  return _make_given(config, splits, notes)


def _without_splits(root):
  """The DataError of a folder that has none of `_PAIRS`."""
  listing = files.walk(root)
  counts = collections.Counter(
    str(pathlib.PurePosixPath(name).parent) for name in listing.files
  )
  seen = ', '.join(f'{n} images in {x}' for x, n in counts.most_common(4))
  what = f'no images/train and masks/train, found {seen or "no images"}'
  need = 'images/train, images/val, masks/train and masks/val'
  hint = f'move each split into folders of its own: {need}; docs/own_data.md'
  return files.fault(root, 'split', f'{what}; {hint} has other layouts')


def _read_voc(config, root, splits):
  names = [x for x in splits if x != 'test' or voc.list_path(root, x).exists()]
  splits = {name: voc.read_split(root, name) for name in names}
  path = root / 'labelmap.txt'
  if not path.is_file():
    return _make_given(config, splits)
  table, read_label = mask_values.chosen_labels(
    config, path, mask_values.read_labelmap(path)
  )
  return pairs.make_dataset(config, table, splits, read_label)


def _match_roboflow(folder, path, tables):
  """Pairs of a folder; its table at `path` joins equal ones in `tables`."""
  if not path.is_file():
    raise pairs.absent(path)
  tables[path] = mask_values.read_classes_csv(path)
  if tables[path] != next(iter(tables.values())):
    raise coco.unsound(path, 'other classes than those of train')
  both = files.walk(folder).files
  images = {k: x for k, x in both.items() if not x.inner.stem.endswith('_mask')}
  yield from pairs.match((folder, folder), (images, both), ('', '_mask'))


def _read_roboflow(config, root, splits):
  tables = {}
  paths, notes = _find_paths(root, [_ROBOFLOW], splits)
  splits = {
    split: list(pairs.with_error(_match_roboflow(*both, tables)))
    for split, both in paths.items()
  }
  if not tables:
    raise next(iter(splits.values()))[0]
  table, read_label = mask_values.chosen_labels(
    config, *next(iter(tables.items()))
  )
  return pairs.make_dataset(config, table, splits, read_label, notes=notes)


def _read_coco(config, root, splits):
  options = {key: config[key] for key in ('class_names', 'limit')}
  places, notes = _find_paths(root, _COCO, splits)
  places = {split: both[::-1] for split, both in places.items()}
  names, splits = coco.find_pairs(places, **options)
  if not names:
    raise next(iter(splits.values()))[0]
  table, read_label = mask_values.as_labels(
    {x: i for i, x in enumerate(names)}, ()
  )
  return pairs.make_dataset(config, table, splits, read_label, notes=notes)


# Name -> (reader, *glob patterns, one of which is there).
LAYOUTS = {
  'pairs': (
    _read_pairs,
    *(
      pattern.split()[1].format(name)
      for pattern in _PAIRS
      for names in _FOLDERS.values()
      for name in names
    ),
  ),
  'voc': (_read_voc, 'SegmentationClass'),
  'roboflow': (_read_roboflow, '*/_classes.csv'),
  'coco': (_read_coco, 'annotations/instances_*', '*/_annotations.coco.json'),
}


def folder(config, splits):
  """The layout config.data.layout, or the only one that is there."""
  root, layout = pairs.check_root(config), config['layout']
  mask_values.check_names(config['class_names'])
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
  return LAYOUTS[layout][0](config, root, splits)
