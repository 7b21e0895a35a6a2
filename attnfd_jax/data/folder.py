# SPDX-License-Identifier: Apache-2.0
"""Reads a user's own images and masks, in the layouts of common tools.

pairs     images/<split>/ and masks/<split>/, or another of `_PAIRS`
voc       JPEGImages/, SegmentationClass/, ImageSets/Segmentation/<split>.txt;
          with CVAT's labelmap.txt, masks have its colors
roboflow  <split>/ with images, <stem>_mask.png and _classes.csv
coco      annotations/instances_<split>.json or <split>/_annotations.coco.json
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import itertools
import pathlib
from typing import Any, NoReturn, TypeAlias

from attnfd_jax.data import coco, files, mask_values, pairs, voc
from attnfd_jax.data.records import DataConfig
from attnfd_jax.errors import check_choice, DataError, InputError

_Entries: TypeAlias = Mapping[str, Iterable[pairs.Entry]]  # By split.
_Paths: TypeAlias = tuple[pathlib.Path, pathlib.Path]

# Splits, and alternative names of their folders; test is optional.
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


def _find_paths(
  root: pathlib.Path, patterns: Sequence[str], splits: Sequence[str]
) -> tuple[dict[str, _Paths], list[str]]:
  """Finds the two paths of each split.

  Uses the pattern of which the first split has the most paths; the second path,
  of masks or annotations, counts more. The split test is left out without the
  second path, unless it is the only one.

  Args:
    root: of the data set.
    patterns: see _PAIRS and _COCO.
    splits: names of the splits.

  Returns:
    The paths by split, and notes.
  """

  def exist(paths: _Paths) -> list[bool]:
    return [path.exists() for path in reversed(paths)]

  def best(pattern: str, split: str) -> _Paths:
    first, second = pattern.split()
    places = [
      (root / first.format(name), root / second.format(name))
      for name in _FOLDERS[split]
    ]
    return max(places, key=exist)

  pattern = max(patterns, key=lambda pattern: exist(best(pattern, splits[0])))
  paths, notes = {split: best(pattern, split) for split in splits}, []
  if splits[1:] and 'test' in paths and not paths['test'][1].exists():
    images, labels = paths.pop('test')
    if images.exists() and '{}' in pattern.split()[0]:
      notes.append(f'test: {images} is not used because there is no {labels}')
  return paths, notes


def _make_given(
  config: DataConfig, splits: _Entries, notes: Iterable[str] = ()
) -> pairs.Dataset:
  """Makes a Dataset whose config says what the values in masks mean."""
  entries = {x: [*pairs.with_error(y)] for x, y in splits.items()}
  detected: dict[str, Any] = {}
  label_files = [
    entry.mask
    for entry in itertools.chain(*entries.values())
    if isinstance(entry, pairs.Pair) and entry.mask
  ]
  if mask_values.are_black_and_white(config, label_files):
    detected['id_map'] = ids = mask_values.BLACK_AND_WHITE
    meaning = f'255 is read as {config["class_names"][1]!r}'
    note = f'masks have only the ids 0 and 255: {meaning}, as with'
    notes = (*notes, f'{note} --config.data.id_map="{ids}"')
  table, read_label = mask_values.given_labels({**config, **detected})
  return pairs.make_dataset(
    config, table, entries, read_label, notes=notes, detected=detected
  )


def _read_pairs(
  config: DataConfig, root: pathlib.Path, splits: Sequence[str]
) -> pairs.Dataset:
  paths, notes = _find_paths(root, _PAIRS, splits)
  if not any(x.exists() for both in paths.values() for x in both):
    raise _without_splits(root)
  entries = {s: pairs.match_folders(*folders) for s, folders in paths.items()}
  return _make_given(config, entries, notes)


def _without_splits(root: pathlib.Path) -> DataError:
  """Returns the DataError of a folder that matches none of `_PAIRS`."""
  listing = files.walk(root)
  counts = collections.Counter(
    str(pathlib.PurePosixPath(name).parent) for name in listing.files
  )
  seen = ', '.join(f'{n} images in {x}' for x, n in counts.most_common(4))
  what = f'no images/train and masks/train, found {seen or "no images"}'
  needed = 'images/train, images/val, masks/train and masks/val'
  hint = f'move each split to its own folders: {needed}; docs/own_data.md'
  return files.data_error(root, 'split', f'{what}; {hint} has other layouts')


def _read_voc(
  config: DataConfig, root: pathlib.Path, splits: Sequence[str]
) -> pairs.Dataset:
  names = [x for x in splits if x != 'test' or voc.list_path(root, x).exists()]
  entries = {name: voc.read_split(root, name) for name in names}
  path = root / 'labelmap.txt'
  if not path.is_file():
    return _make_given(config, entries)
  table, read_label = mask_values.chosen_labels(
    config, path, mask_values.read_labelmap(path)
  )
  return pairs.make_dataset(config, table, entries, read_label)


def _match_roboflow(
  folder: pathlib.Path,
  path: pathlib.Path,
  tables: dict[pathlib.Path, dict[str, int]],
) -> Iterator[pairs.Entry]:
  """Yields the entries of a folder.

  Args:
    folder: of images and masks.
    path: of its table of classes.
    tables: ids of the classes by path of their table; this one is added.
  """
  if not path.is_file():
    raise pairs.absent(path)
  tables[path] = mask_values.read_classes_csv(path)
  if tables[path] != next(iter(tables.values())):
    raise coco.annotation_error(path, 'its classes differ from those of train')
  both = files.walk(folder).files
  images = {k: x for k, x in both.items() if not x.inner.stem.endswith('_mask')}
  yield from pairs.match((folder, folder), (images, both), ('', '_mask'))


def _read_roboflow(
  config: DataConfig, root: pathlib.Path, splits: Sequence[str]
) -> pairs.Dataset:
  tables: dict[pathlib.Path, dict[str, int]] = {}
  paths, notes = _find_paths(root, [_ROBOFLOW], splits)
  entries = {
    split: list(pairs.with_error(_match_roboflow(*both, tables)))
    for split, both in paths.items()
  }
  if not tables:
    _raise_first(entries)
  table, read_label = mask_values.chosen_labels(
    config, *next(iter(tables.items()))
  )
  return pairs.make_dataset(config, table, entries, read_label, notes=notes)


def _raise_first(splits: _Entries) -> NoReturn:
  """Raises the error of the first split."""
  error = next(iter(next(iter(splits.values()))))
  assert isinstance(error, DataError)
  raise error


def _read_coco(
  config: DataConfig, root: pathlib.Path, splits: Sequence[str]
) -> pairs.Dataset:
  paths, notes = _find_paths(root, _COCO, splits)
  names, entries = coco.find_pairs(
    {split: (path, images) for split, (images, path) in paths.items()},
    class_names=config['class_names'],
    limit=config['limit'],
  )
  if not names:
    _raise_first(entries)
  table, read_label = mask_values.as_labels(
    {x: i for i, x in enumerate(names)}, ()
  )
  return pairs.make_dataset(config, table, entries, read_label, notes=notes)


_Reader: TypeAlias = Callable[
  [DataConfig, pathlib.Path, Sequence[str]], pairs.Dataset
]
# The reader of a layout, and glob patterns of which at least one matches.
LAYOUTS: dict[str, tuple[_Reader, *tuple[str, ...]]] = {
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


def folder(config: DataConfig, splits: Sequence[str]) -> pairs.Dataset:
  """Reads a folder in config.data.layout; with 'auto', detects the layout."""
  root, layout = pairs.check_root(config), config['layout']
  mask_values.check_names(config['class_names'])
  check_choice('config.data.layout', layout, ('auto', *LAYOUTS))
  if layout == 'auto':
    layouts = [
      name
      for name, (_, *patterns) in LAYOUTS.items()
      if any(next(root.glob(p), None) for p in patterns)
    ]
    if len(layouts) > 1:
      flag = f'set --config.data.layout={layouts[0]}, for example'
      raise InputError(f'{root}: could be {" or ".join(layouts)}; {flag}.')
    layout = (*layouts, 'pairs')[0]
  labelmap = layout == 'voc' and (root / 'labelmap.txt').is_file()
  for key in ('palette', 'id_map'):
    if config[key] and (labelmap or layout in ('roboflow', 'coco')):
      what = f'config.data.{key} cannot be used with the layout {layout}'
      raise InputError(f'{what}, whose files say what the masks mean.')
  return LAYOUTS[layout][0](config, root, splits)
