# SPDX-License-Identifier: Apache-2.0
"""Draws COCO annotations as masks; COCO 2017 with the classes of VOC.

Polygons and RLE are drawn once, into a zip of PNGs of train ids in the user's
cache folder, and again when the size or time of the JSON file changes. So
neither the JSON nor its polygons are in memory during training.
"""

import collections
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import tempfile
from typing import Any, TypeAlias
import zipfile

import cv2
import numpy as np

from attnfd_jax import user_cache
from attnfd_jax.data import classes, files, masks, pairs
from attnfd_jax.data.records import DataConfig, Size
from attnfd_jax.errors import DataError, InputError
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.progress import progress
from attnfd_jax.types import StrPath

_VERSION = 2  # Of the archives; increment it to draw all masks again.
_BACKGROUND = 'background'
_WHOLE = r'(0|-?[1-9][0-9]{0,15})(\.0)?'
_NEEDED = 'pycocotools.mask', 'The format of COCO'
_ID, _TYPE_NAMES = (int, str), {int: 'a whole number', str: 'text'}
# The parts of a JSON file that are read: {entry: (list, {field: types})}.
_LISTS: dict[str, tuple[str, dict[str, tuple[type, ...]]]] = {
  'image': (
    'images',
    {'id': _ID, 'file_name': (str,), 'height': (int,), 'width': (int,)},
  ),
  'category': ('categories', {'id': _ID, 'name': (str,)}),
  'annotation': ('annotations', {'image_id': _ID, 'category_id': _ID}),
}
# Deviations from COCO's format that some tools write and that are unambiguous.
_REPAIRS = {
  'lists': 'entries in nested lists or by id are read as plain lists',
  'numbers': 'numbers written as "48" or 48.0 are read as whole numbers',
  'blanks': 'spaces around category names are removed',
  'twice': 'categories with the same name are read as one class',
  'flat': 'segmentations of one flat list of numbers are read as one polygon',
  'pairs': 'segmentations of [x, y] pairs are read as polygons',
  'size': 'RLEs without a size get the size of their images',
  'bytes': "RLEs written as b'...' are read without b''",
}

_Entry: TypeAlias = dict[str, Any]  # An object in the JSON file.
_Repairs: TypeAlias = collections.Counter[str]  # Keys are those of _REPAIRS.
_Wrong: TypeAlias = list[tuple[_Entry, InputError]]


def annotation_error(path: StrPath, what: str) -> DataError:
  """Returns the DataError of a file that defines classes or masks."""
  return files.data_error(path, 'annotation', what)


def _is_name(text: str) -> bool:
  """Whether a file can have this name and a terminal can print it."""
  printed = text.encode(errors='replace').decode()  # No lone surrogates.
  valid = len(text) <= 4096 and '\0' not in text and text == printed
  return valid and not text.isspace() and text != ''


def _text(value: object) -> str:
  """Formats a JSON value for messages: short, on one line."""
  names = {dict: 'an object', list: 'a list'}
  return names.get(type(value)) or json.dumps(value)[:60]


def _whole(value: Any, repairs: _Repairs) -> Any:
  """Converts 48.0, '48' and '48.0' to 48; returns other values unchanged."""
  number = value
  if isinstance(value, float) and value.is_integer():
    number = int(value)
  elif isinstance(value, str) and re.fullmatch(_WHOLE, value):
    number = int(value.removesuffix('.0'))
  repairs['numbers'] += number is not value
  return number


def _entries(value: Any, repairs: _Repairs) -> list[_Entry]:
  """Returns the objects in a list, in nested lists, or in {id: object}."""
  if isinstance(value, dict):
    repairs['lists'] += 1
    value = [
      x if isinstance(x, list) else {'id': i, **x} for i, x in value.items()
    ]
  entries = []
  for item in value:
    repairs['lists'] += isinstance(item, list)
    entries += item if isinstance(item, list) else [item]
  return [
    x for x in entries if x.keys()
  ]  # AttributeError unless all are dicts.


def _fault_of(
  entry: _Entry, fields: Mapping[str, tuple[type, ...]], repairs: _Repairs
) -> str:
  """Converts ids and sizes to integers; returns what is wrong with an entry."""
  for field, types in fields.items():
    value = entry.get(field)
    if type(value) is int and int in types:  # isinstance would accept True.
      continue
    if int in types:
      value = _whole(value, repairs)
    if type(value) not in types:
      given = _text(value) if field in entry else 'absent'
      needs = ' or '.join(_TYPE_NAMES[x] for x in types)
      return f'{field} is {given}; needs {needs}'
    if type(value) is str and not _is_name(value):
      return f'{field} {value[:40]!r} cannot be a name'
    entry[field] = value
  if 'height' in fields:
    height, width = entry['height'], entry['width']
    if min(height, width) < 1 or height * width > masks.MAX_PIXELS:
      return f'no height or width, or more than {masks.MAX_PIXELS} pixels'
  return ''


def _describe(
  kind: str, entry: _Entry, number: int, names: Mapping[int | str, str]
) -> str:
  """Returns 'image 3 (a.jpg)' or 'annotation 7 of a.jpg' for messages.

  Args:
    kind: a key of _LISTS.
    entry: may have any content.
    number: position in its list, from 1.
    names: file names of the images by id.
  """
  given = _text(entry['id']) if 'id' in entry else f'number {number}'
  name = entry.get('file_name')
  if kind == 'annotation' and isinstance(entry.get('image_id'), _ID):
    name = names.get(entry['image_id'])
  valid = isinstance(name, str) and _is_name(name)
  name = (f' of {name}' if kind == 'annotation' else f' ({name})') * valid
  return f'{kind} {given}{name}'


def _read_json(path: pathlib.Path, repairs: _Repairs) -> list[list[_Entry]]:
  """Reads and validates the lists images, categories and annotations.

  Args:
    path: of the JSON file.
    repairs: incremented for each deviation from COCO's format.

  Raises:
    DataError: for the first invalid entry.
  """
  try:
    content = json.loads(path.read_bytes())
    lists = [_entries(content[name], repairs) for name, _ in _LISTS.values()]
  except (ValueError, RecursionError) as error:
    raise annotation_error(path, f'not JSON ({error})') from error
  except (AttributeError, KeyError, TypeError) as error:
    what = 'not COCO annotations: needs images, annotations and categories'
    what = f'{what}, each a list of objects'
    raise annotation_error(path, what) from error
  names: dict[int | str, str] = {}
  for entries, (kind, (_, fields)) in zip(lists, _LISTS.items(), strict=True):
    for number, entry in enumerate(entries, 1):
      if what := _fault_of(entry, fields, repairs):
        raise annotation_error(
          path, f'{_describe(kind, entry, number, names)}: {what}'
        )
      if kind == 'image':
        names[entry['id']] = entry['file_name']
      elif kind == 'category':
        name = entry['name'].strip()
        repairs['blanks'] += name != entry['name']
        entry['name'] = name
  return lists


def check_classes(
  path: StrPath, class_names: Collection[str], known: Collection[str]
) -> None:
  """Raises a DataError if there are too many or unknown class names."""
  if len(class_names) > IGNORE_LABEL:
    what = f'{len(class_names)} classes, more than {IGNORE_LABEL}'
    raise annotation_error(
      path, f'{what}; select some with config.data.class_names'
    )
  for name in class_names:
    if name not in known:
      what = f'no class {name!r}; it has {", ".join([*known][:90])}'
      raise annotation_error(path, what)


def _decode_runs(data: bytes) -> list[int]:
  """Decodes the runs of a compressed RLE.

  A byte minus '0' has 5 bits of a run, low bits first, and 32 if more follow.
  From the fourth on, a run is stored as the difference to the one two before.
  pycocotools writes out of bounds when it decodes a damaged RLE.
  """
  runs, value, shift = [], 0, 0
  for code in data:
    code -= ord('0')
    if not 0 <= code < 64 or shift > 30:
      raise InputError('its RLE is damaged')
    value |= (code & 31) << shift
    shift += 5
    if not code & 32:
      value -= (code & 16) << shift - 4  # Twice the sign bit.
      runs.append(value + (runs[-2] if len(runs) > 2 else 0))
      value = shift = 0
  if shift:
    raise InputError('its RLE is cut off')
  return runs


def _outline(annotation: _Entry) -> Any:
  """Returns its segmentation; None if it is empty, as of a box."""
  segmentation = annotation.get('segmentation')
  return None if segmentation in ([], [[]], {}, '') else segmentation


def _are_numbers(value: Any) -> bool:
  return isinstance(value, list) and {*map(type, value)} <= {int, float}


def _corner(value: Any) -> list[float] | None:
  """Parses [x, y], OpenCV's [[x, y]] or {'x': x, 'y': y}; else None."""
  if isinstance(value, list) and len(value) == 1:
    value = value[0]
  if isinstance(value, dict):
    value = [value.get('x'), value.get('y')]
  is_pair = isinstance(value, list) and len(value) == 2
  return value if is_pair and _are_numbers(value) else None


def _polygons(value: list[Any]) -> list[list[float]]:
  """Converts one or more polygons to [[x, y, x, y, ...], ...].

  They may be flat lists of numbers or lists of corners.
  """
  if _are_numbers(value):
    return [value]
  corners = [x for x in map(_corner, value) if x]
  if len(corners) == len(value):
    return [[*itertools.chain(*corners)]]
  others = [x for x in value if type(x) not in (int, float, list)]
  if others or not all(isinstance(x, list) for x in value):
    given = _text(others[0]) if others else 'a list'
    raise InputError(f'its segmentation has {given} among the numbers')
  return [polygon for item in value for polygon in _polygons(item)]


def _area(segmentation: Any, size: Size, repairs: _Repairs) -> np.ndarray:
  """Draws polygons or an RLE as a mask, bool [h, w].

  Raises:
    InputError: if the segmentation is invalid. Malformed values raise other
      types, in pycocotools as well, which draw_label catches.
  """
  if segmentation is None:
    what = 'has no segmentation, as polygons or RLE'
    raise InputError(f'{what}; draw its outline or remove it')
  if isinstance(segmentation, list):
    polygons, given = _polygons(segmentation), segmentation
    # pycocotools takes two corners for a box.
    if any(len(x) < 6 or len(x) % 2 for x in polygons):
      raise InputError('needs polygons of at least three corners')
    # pycocotools walks along the edges pixel by pixel; NaN corrupts memory.
    far = 10 * max(size)
    if not all(abs(x) <= far for polygon in polygons for x in polygon):
      raise InputError('has a corner far outside of the image')
    mask = files.require_module(*_NEEDED)
    segmentation = mask.merge(mask.frPyObjects(polygons, *size))
    if polygons != given:
      repairs['flat' if _are_numbers(given) else 'pairs'] += 1
  if not isinstance(segmentation, dict) or 'counts' not in segmentation:
    given = _text(segmentation)
    raise InputError(f'its segmentation is {given}, not polygons or RLE')
  given = segmentation.get('size')
  if given is None:
    repairs['size'] += 1
  elif [_whole(x, repairs) for x in given] != [*size]:
    raise InputError(f'its RLE has size {given!r:.40}, its image {[*size]}')
  runs = segmentation['counts']
  if isinstance(runs, str):
    if runs[:2] == "b'":  # str() of bytes; no RLE contains a quote.
      repairs['bytes'] += 1
      runs = runs[2:-1].replace('\\\\', '\\')
    runs = runs.encode()
  if isinstance(runs, bytes):
    runs = _decode_runs(runs)
  else:
    runs = [_whole(n, repairs) for n in runs]
  valid = all(type(n) is int and n >= 0 for n in runs)
  if not valid or sum(runs) != size[0] * size[1]:
    raise InputError('its RLE does not fill the image')
  # Runs are in column-major order, alternately outside and inside.
  inside = np.arange(len(runs)) % 2 > 0
  return np.repeat(inside, runs).reshape(size, order='F')


def draw_label(
  annotations: Sequence[_Entry],
  size: Size,
  numbers: Mapping[int | str, int],
  repairs: _Repairs | None = None,
) -> tuple[np.ndarray, _Wrong]:
  """Draws the annotations of an image; the first one wins where they overlap.

  Args:
    annotations: entries of the JSON file.
    size: height and width of the image.
    numbers: train ids by category id.
    repairs: incremented for each deviation from COCO's format.

  Returns:
    Train ids, uint8 [h, w], and the invalid annotations with their errors.
  """
  repairs = collections.Counter() if repairs is None else repairs
  # Column-major, as runs are; the last annotation is drawn first.
  label, wrong = np.zeros(size, np.uint8, order='F'), []
  for annotation in reversed(annotations):
    if number := numbers.get(annotation['category_id'], 0):
      try:
        label[_area(_outline(annotation), size, repairs)] = number
      except InputError as error:
        wrong.append((annotation, error))
      except Exception:  # pycocotools raises many types.
        what = 'its segmentation is not polygons or RLE'
        wrong.append((annotation, InputError(what)))
  return np.ascontiguousarray(label), wrong[::-1]


def _in_order(entry: _Entry) -> float:
  """Sort key: by id; ids that are text last, in the order of the file."""
  return entry['id'] if isinstance(entry['id'], int) else math.inf


def _draw_all(
  path: pathlib.Path,
  archive: zipfile.ZipFile,
  class_names: Iterable[str],
  min_pixels: int,
  limit: int,
) -> None:
  """Writes the masks as PNGs and index.json to an open zip, see draw_labels."""
  repairs: _Repairs = collections.Counter()
  images, categories, annotations = _read_json(path, repairs)
  if annotations and all(_outline(x) is None for x in annotations):
    boxes = ', only a box' if all('bbox' in x for x in annotations) else ''
    what = f'none of its {len(annotations)} annotations has a segmentation'
    remedy = 'masks need polygons or RLE, as exports for segmentation have them'
    raise annotation_error(path, f'{what}{boxes}; {remedy}')
  known = [x['name'] for x in sorted(categories, key=_in_order)]
  repairs['twice'] = len(known) - len({*known})
  names = (name.strip() for name in class_names or (_BACKGROUND, *known))
  class_names = tuple(dict.fromkeys(names))
  # The first one is the background, whatever its name.
  check_classes(path, class_names, dict.fromkeys((class_names[0], *known)))
  train_ids = {name: i for i, name in enumerate(class_names)}
  numbers = {x['id']: train_ids.get(x['name'], 0) for x in categories}
  problems, kept, groups = [], [], collections.defaultdict(list)
  for annotation in annotations:
    groups[annotation['image_id']].append(annotation)
  for key, entries, name in (
    ('image', images, 'file_name'),
    ('category', categories, 'name'),
  ):
    used = dict.fromkeys(x[f'{key}_id'] for x in annotations)
    listed = dict.fromkeys((entry['id'], entry[name]) for entry in entries)
    counts = collections.Counter(i for i, _ in listed)
    problems += [
      f'annotations of {key} {_text(i)}, which the file does not list'
      for i in used
      if i not in counts
    ]
    problems += [
      f'{key} id {_text(i)} is used by different entries; renumber them'
      for i in counts
      if counts[i] > 1
    ]
  counts = collections.Counter(image['file_name'] for image in images)
  problems += [f'{name} is listed twice' for name in counts if counts[name] > 1]
  # If an image is listed twice, its first entry is used.
  by_name = {image['file_name']: image for image in reversed(images)}
  with progress(len(by_name), f'Drawing {path.name}, once', delay=1) as bar:
    for name, image in sorted(by_name.items()):
      bar.update()
      size = image['height'], image['width']
      label, wrong = draw_label(groups[image['id']], size, numbers, repairs)
      problems += [
        f'annotation {_text(a.get("id"))} of {name}: {error}'
        for a, error in wrong
      ]
      if np.count_nonzero(label) > min_pixels:
        png = cv2.imencode('.png', label)[1].tobytes()
        archive.writestr(f'{name}.png', png)
        kept.append(name)
      if limit and len(kept) == limit:
        break
  notes = [f'{_REPAIRS[x]} ({repairs[x]})' for x in _REPAIRS if repairs[x]]
  index = {'class_names': class_names, 'images': kept}
  index |= {'problems': problems, 'notes': notes}
  archive.writestr('index.json', json.dumps(index))


def draw_labels(
  path: pathlib.Path,
  *,
  class_names: Sequence[str] = (),
  min_pixels: int = -1,
  limit: int = 0,
) -> tuple[
  tuple[str, ...], dict[str, files.File], list[DataError], list[pairs.Note]
]:
  """Draws the masks of a JSON file, or reuses those in the cache folder.

  Args:
    path: of the JSON file.
    class_names: categories to draw; the first name is the background. All
      categories if empty.
    min_pixels: images with this many labeled pixels or fewer are left out.
    limit: maximum number of images, 0 for all.

  Returns:
    The class names; the mask of each image by file name; errors of annotations
    that were left out; notes on deviations from COCO's format.

  Raises:
    DataError: if the file is invalid.
  """
  stat, folder = path.stat(), user_cache.folder('coco')
  options = [_VERSION, str(path.resolve()), class_names, min_pixels, limit]
  digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
  target = folder / f'{digest}-{stat.st_size}-{stat.st_mtime_ns}.zip'
  if not target.exists():
    files.require_module(*_NEEDED)  # Raises before the work starts.
    user_cache.made('coco')
    # Renamed when complete, so that other processes never see a part of it.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
      partial = pathlib.Path(temporary) / 'labels.zip'
      with zipfile.ZipFile(partial, 'w') as archive:
        _draw_all(path, archive, class_names, min_pixels, limit)
      for old in folder.glob(f'{digest}-*.zip'):
        old.unlink()
      partial.replace(target)
  member = functools.partial(files.File, str(target))
  index = json.loads(member('index.json').read())
  labels = {name: member(f'{name}.png') for name in index['images']}
  problems = [annotation_error(path, problem) for problem in index['problems']]
  notes = [pairs.Note(f'{path}: {note}.') for note in index['notes']]
  return tuple(index['class_names']), labels, problems, notes


def _match(
  path: pathlib.Path,
  folder: pathlib.Path,
  labels: Mapping[str, files.File],
  problems: Iterable[DataError],
) -> Iterator[pairs.Entry]:
  """Yields the entries of a split.

  Args:
    path: of the JSON file.
    folder: of the images.
    labels: see draw_labels.
    problems: see draw_labels.
  """
  yield from problems
  images = files.walk(folder).files
  if not images:
    raise pairs.no_images(folder)
  images, notes = pairs.renamed(images, labels, all_items=False)
  yield from notes
  stems = collections.Counter(os.path.splitext(name)[0] for name in labels)
  for name, mask in labels.items():
    if name not in images:
      yield pairs.no_partner(folder, name, ', which has annotations')
    elif images[name].target:
      yield images[name].broken()
    else:
      stem = os.path.splitext(name)[0]
      key = stem if stems[stem] == 1 else name
      yield pairs.Pair(key, images[name], mask, f'{path} ({name})')


def find_pairs(
  places: Mapping[str, tuple[pathlib.Path, pathlib.Path]],
  *,
  class_names: Sequence[str],
  min_pixels: int = -1,
  limit: int = 0,
) -> tuple[Sequence[str], dict[str, Iterable[pairs.Entry]]]:
  """Draws masks and pairs them with images.

  Args:
    places: JSON file and folder of images of each split.
    class_names: see draw_labels; if empty, all splits use those of the first.
    min_pixels: see draw_labels.
    limit: see draw_labels.

  Returns:
    The class names, and the entries of each split for pairs.make_dataset.
  """
  splits: dict[str, Iterable[pairs.Entry]] = {}
  for split, (path, folder) in places.items():
    try:
      for place in (path, folder):
        if not place.exists():
          raise pairs.absent(place)
      class_names, labels, problems, notes = draw_labels(
        path, class_names=class_names, min_pixels=min_pixels, limit=limit
      )
      matched = _match(path, folder, labels, problems)
      splits[split] = itertools.chain(notes, matched)
    except DataError as error:
      splits[split] = [error]
  return class_names, splits


def _images(root: pathlib.Path, split: str) -> pathlib.Path:
  inner = root / 'images' / f'{split}2017'
  return inner if inner.is_dir() else root / f'{split}2017'


def unlabeled(config: DataConfig) -> dict[str, files.File]:
  """Finds the images in unlabeled2017/, by name."""
  folder = _images(pairs.check_root(config), 'unlabeled')
  images = files.walk(folder).files
  if not images:
    raise pairs.absent(folder, 'not found or empty')
  return images


def coco(config: DataConfig, splits: Sequence[str]) -> pairs.Dataset:
  """Reads {train,val}2017/ and annotations/instances_{train,val}2017.json.

  As in the reference (METHOD 4.5): categories without a VOC class are
  background, crowds are included, and images with 1000 labeled pixels or fewer
  are left out, also of val.
  """
  root, places = pairs.check_root(config), {}
  for split in [x for x in splits if x != 'test']:
    path = root / 'annotations' / f'instances_{split}2017.json'
    places[split] = path, _images(root, split)
  names = (_BACKGROUND, *classes.COCO_NAMES)
  _, entries = find_pairs(
    places, class_names=names, min_pixels=1000, limit=config['limit']
  )
  ids = masks.IndexLabels(tuple(range(len(names))))
  return pairs.make_dataset(config, classes.VOC, entries, ids, upright=False)
