# SPDX-License-Identifier: Apache-2.0
"""Class masks of COCO annotations, and COCO 2017 with the classes of VOC.

Polygons and RLE are drawn once, into a zip of PNGs of train ids in the user's
cache folder, and again when the JSON file has another size or time. So neither
the JSON nor its polygons are in memory while training.
"""

import collections
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import tempfile
import zipfile

import cv2
import numpy as np

from attnfd_jax import user_cache
from attnfd_jax.data import classes, files, masks, pairs
from attnfd_jax.errors import DataError, InputError
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.progress import progress

_VERSION = 2  # Of the archives; another one makes them anew.
_BACKGROUND = 'background'
_WHOLE = r'(0|-?[1-9][0-9]{0,15})(\.0)?'
_NEEDED = 'pycocotools.mask', 'The format of COCO'
# What is read of the lists of a JSON file: {one: (list, {field: types})}.
_ID, _WORDS = (int, str), {int: 'a whole number', str: 'text'}
_LISTS = {
  'image': (
    'images',
    {'id': _ID, 'file_name': (str,), 'height': (int,), 'width': (int,)},
  ),
  'category': ('categories', {'id': _ID, 'name': (str,)}),
  'annotation': ('annotations', {'image_id': _ID, 'category_id': _ID}),
}
# What some tools write, and means one thing only.
_REPAIRS = {
  'lists': 'entries in nested lists or by id are read as plain lists',
  'numbers': 'numbers written as "48" or 48.0 are read as whole numbers',
  'blanks': 'blanks around the names of categories are removed',
  'twice': 'categories of one name are read as one class',
  'flat': 'segmentations of one flat list of numbers are read as one polygon',
  'pairs': 'segmentations of [x, y] pairs are read as polygons',
  'size': 'RLE without a size are read in the size of their images',
  'bytes': "RLE written as b'...' are read without these marks",
}


def unsound(path, what):
  """The DataError of a file that says what masks mean."""
  return files.fault(path, 'annotation', what)


def _is_name(text):
  """Whether a file can have this name, and a terminal print it."""
  printed = text.encode(errors='replace').decode()  # No lone surrogates.
  sound = len(text) <= 4096 and '\0' not in text and text == printed
  return sound and not text.isspace() and text != ''


def _text(value):
  """A value of the file, short and on one line."""
  names = {dict: 'an object', list: 'a list'}
  return names.get(type(value)) or json.dumps(value)[:60]


def _whole(value, repairs):
  """48 of 48.0, '48' and '48.0'; other values as they are."""
  number = value
  if isinstance(value, float) and value.is_integer():
    number = int(value)
  elif isinstance(value, str) and re.fullmatch(_WHOLE, value):
    number = int(value.removesuffix('.0'))
  repairs['numbers'] += number is not value
  return number


def _entries(value, repairs):
  """Objects of a list, of a list of lists, or of {id: object}."""
  if isinstance(value, dict):
    repairs['lists'] += 1
    value = [
      x if isinstance(x, list) else {'id': i, **x} for i, x in value.items()
    ]
  found = []
  for item in value:
    repairs['lists'] += isinstance(item, list)
    found += item if isinstance(item, list) else [item]
  return [x for x in found if x.keys()]  # Of dicts only: else AttributeError.


def _fault_of(entry, fields, repairs):
  """Makes whole numbers of ids and sizes; what is unsound in one, or ''."""
  for field, types in fields.items():
    value = entry.get(field)
    if type(value) is int and int in types:  # True would be a height.
      continue
    if int in types:
      value = _whole(value, repairs)
    if type(value) not in types:
      given = _text(value) if field in entry else 'absent'
      return f'{field} is {given}; needs {" or ".join(map(_WORDS.get, types))}'
    if type(value) is str and not _is_name(value):
      return f'{field} {value[:40]!r} cannot be a name'
    entry[field] = value
  if 'height' in fields:
    height, width = entry['height'], entry['width']
    if min(height, width) < 1 or height * width > masks.MAX_PIXELS:
      return f'no height or width, or more than {masks.MAX_PIXELS} pixels'
  return ''


def _called(kind, entry, number, names):
  """'image 3 (a.jpg)', 'annotation 7 of a.jpg'; `names` is {id: image}."""
  given = _text(entry['id']) if 'id' in entry else f'number {number}'
  name = entry.get('file_name')
  if kind == 'annotation' and isinstance(entry.get('image_id'), _ID):
    name = names.get(entry['image_id'])
  sound = isinstance(name, str) and _is_name(name)
  name = (f' of {name}' if kind == 'annotation' else f' ({name})') * sound
  return f'{kind} {given}{name}'


def _read_json(path, repairs):
  """The lists images, categories and annotations, whose fields are sound.

  `repairs` counts what was read in another way than COCO's, see _REPAIRS.
  """
  try:
    content = json.loads(path.read_bytes())
    lists = [_entries(content[name], repairs) for name, _ in _LISTS.values()]
  except (ValueError, RecursionError) as error:
    raise unsound(path, f'not JSON ({error})') from error
  except (AttributeError, KeyError, TypeError) as error:
    what = 'not COCO annotations: needs images, annotations and categories'
    what = f'{what}, each a list of objects'
    raise unsound(path, what) from error
  names = {}
  for entries, (kind, (_, fields)) in zip(lists, _LISTS.items(), strict=True):
    for number, entry in enumerate(entries, 1):
      if what := _fault_of(entry, fields, repairs):
        raise unsound(path, f'{_called(kind, entry, number, names)}: {what}')
      if kind == 'image':
        names[entry['id']] = entry['file_name']
      elif kind == 'category':
        name = entry['name'].strip()
        repairs['blanks'] += name != entry['name']
        entry['name'] = name
  return lists


def check_classes(path, class_names, known):
  """Raises the DataError of class names that are too many, or not known."""
  if len(class_names) > IGNORE_LABEL:
    what = f'{len(class_names)} classes, more than {IGNORE_LABEL}'
    raise unsound(path, f'{what}; choose by config.data.class_names')
  for name in class_names:
    if name not in known:
      what = f'no class {name!r}; it has {", ".join([*known][:90])}'
      raise unsound(path, what)


def _decode_runs(data):
  """Runs of a compressed RLE; pycocotools writes past the end of a damaged one.

  5 bits a byte from '0' on, low ones first; 32 says that more follow. From the
  fourth on runs are differences.
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


def _outline(annotation):
  """Its segmentation; None if it has a box alone."""
  found = annotation.get('segmentation')
  return None if found in ([], [[]], {}, '') else found


def _are_numbers(value):
  return isinstance(value, list) and {*map(type, value)} <= {int, float}


def _corner(value):
  """[x, y] of a pair, of OpenCV's [pair] or of {'x': x, 'y': y}; or None."""
  if isinstance(value, list) and len(value) == 1:
    value = value[0]
  if isinstance(value, dict):
    value = [value.get('x'), value.get('y')]
  is_pair = isinstance(value, list) and len(value) == 2
  return value if is_pair and _are_numbers(value) else None


def _polygons(value):
  """[[x, y, x, y, ...], ...] of those, of one of them, or of corners."""
  if _are_numbers(value):
    return [value]
  corners = [*map(_corner, value)]
  if None not in corners:
    return [[*itertools.chain(*corners)]]
  others = [x for x in value if type(x) not in (int, float, list)]
  if others or not all(isinstance(x, list) for x in value):
    given = _text(others[0]) if others else 'a list'
    raise InputError(f'its segmentation has {given} among the numbers')
  return [polygon for item in value for polygon in _polygons(item)]


def _area(segmentation, size, repairs):
  """Inside of polygons or an RLE, bool [h, w]; InputError if it is wrong."""
  if segmentation is None:
    what = 'has no segmentation, as polygons or RLE'
    raise InputError(f'{what}; draw its outline or remove it')
  if isinstance(segmentation, list):
    polygons, given = _polygons(segmentation), segmentation
    # Two corners would be taken for a box.
    if any(len(x) < 6 or len(x) % 2 for x in polygons):
      raise InputError('needs polygons of at least three corners')
    # pycocotools walks along the edges, and NaN out of its memory.
    far = 10 * max(size)
    if not all(abs(x) <= far for polygon in polygons for x in polygon):
      raise InputError('has a corner far outside of the image')
    mask = files.need(*_NEEDED)
    segmentation = mask.merge(mask.frPyObjects(polygons, *size))
    if polygons != given:
      repairs['flat' if _are_numbers(given) else 'pairs'] += 1
  if not isinstance(segmentation, dict) or 'counts' not in segmentation:
    given = _text(segmentation)
    raise InputError(f'its segmentation is {given}, no polygons and no RLE')
  given = segmentation.get('size')
  if given is None:
    repairs['size'] += 1
  elif [_whole(x, repairs) for x in given] != [*size]:
    raise InputError(f'its RLE is of size {given!r:.40}')
  runs = segmentation['counts']
  if isinstance(runs, str):
    if runs[:2] == "b'":  # str() of bytes; no RLE has such a mark.
      repairs['bytes'] += 1
      runs = runs[2:-1].replace('\\\\', '\\')
    runs = runs.encode()
  if isinstance(runs, bytes):
    runs = _decode_runs(runs)
  else:
    runs = [_whole(n, repairs) for n in runs]
  whole = all(type(n) is int and n >= 0 for n in runs)
  if not whole or sum(runs) != size[0] * size[1]:
    raise InputError('its RLE does not fill the image')
  # Runs go down the columns; every second one is inside.
  inside = np.arange(len(runs)) % 2 > 0
  return np.repeat(inside, runs).reshape(size, order='F')


def draw_label(annotations, size, numbers, repairs=None):
  """Train ids, uint8 [h, w], and [(annotation left out, its error), ...].

  Where they overlap, the first one wins; `numbers` is {category id: train id},
  `repairs` a Counter of _REPAIRS to add to.
  """
  repairs = collections.Counter() if repairs is None else repairs
  # By columns, as runs go; the last annotation first.
  label, wrong = np.zeros(size, np.uint8, order='F'), []
  for annotation in reversed(annotations):
    if number := numbers.get(annotation['category_id'], 0):
      try:
        label[_area(_outline(annotation), size, repairs)] = number
      except InputError as error:
        wrong.append((annotation, error))
      except Exception:  # pycocotools raises many types.
        what = 'its segmentation is no polygons and no RLE'
        wrong.append((annotation, InputError(what)))
  return np.ascontiguousarray(label), wrong[::-1]


def _in_order(entry):
  """By number; ids that are text stay in the order of the file."""
  return entry['id'] if isinstance(entry['id'], int) else math.inf


def _draw_all(path, archive, class_names, min_pixels, limit):
  """Writes PNGs of the images that stay, and index.json, to an open zip."""
  repairs = collections.Counter()
  images, categories, annotations = _read_json(path, repairs)
  if annotations and all(_outline(x) is None for x in annotations):
    boxes = ', only a box' if all('bbox' in x for x in annotations) else ''
    what = f'none of its {len(annotations)} annotations has a segmentation'
    remedy = 'masks need polygons or RLE, as exports for segmentation have them'
    raise unsound(path, f'{what}{boxes}; {remedy}')
  known = [x['name'] for x in sorted(categories, key=_in_order)]
  repairs['twice'] = len(known) - len({*known})
  names = (name.strip() for name in class_names or (_BACKGROUND, *known))
  class_names = tuple(dict.fromkeys(names))
  # The first one is what no annotation covers, whatever its name.
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
    named = {annotation[f'{key}_id']: 0 for annotation in annotations}
    listed = dict.fromkeys((entry['id'], entry[name]) for entry in entries)
    counts = collections.Counter(i for i, _ in listed)
    problems += [
      f'annotations of {key} {_text(i)}, which the file does not list'
      for i in named
      if i not in counts
    ]
    problems += [
      f'{key} id {_text(i)} is of different entries; number them anew'
      for i in counts
      if counts[i] > 1
    ]
  counts = collections.Counter(image['file_name'] for image in images)
  problems += [f'{name} is listed twice' for name in counts if counts[name] > 1]
  # Of an image that is listed twice the first entry counts.
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


def draw_labels(path, *, class_names=(), min_pixels=-1, limit=0):
  """Class names, {path of an image: File of its mask}, DataErrors, Notes.

  Masks are drawn unless they were before; errors are those of what is left out,
  notes of what was read in another way than COCO's.
  The first of `class_names` is background; () is all categories. Images with
  more labelled pixels than `min_pixels` are kept, the first `limit`, 0 for all.
  """
  stat, folder = path.stat(), user_cache.folder('coco')
  what = [_VERSION, str(path.resolve()), class_names, min_pixels, limit]
  what = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
  target = folder / f'{what}-{stat.st_size}-{stat.st_mtime_ns}.zip'
  if not target.exists():
    files.need(*_NEEDED)  # Or raise before the work starts.
    user_cache.made('coco')
    # Renamed when complete, so that nobody sees half of it.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
      partial = pathlib.Path(temporary) / 'labels.zip'
      with zipfile.ZipFile(partial, 'w') as archive:
        _draw_all(path, archive, class_names, min_pixels, limit)
      for old in folder.glob(f'{what}-*.zip'):
        old.unlink()
      partial.replace(target)
  member = functools.partial(files.File, str(target))
  index = json.loads(member('index.json').read())
  labels = {name: member(f'{name}.png') for name in index['images']}
  problems = [unsound(path, problem) for problem in index['problems']]
  notes = [pairs.Note(f'{path}: {note}.') for note in index['notes']]
  return tuple(index['class_names']), labels, problems, notes


def _match(path, folder, labels, problems):
  """Yields what a split has, from `draw_labels` and the folder of images."""
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


def find_pairs(places, **options):
  """Class names, those of the first split, and the splits of `make_dataset`.

  `places` is {split: (JSON file, folder of images)}; options: `draw_labels`.
  """
  splits = {}
  for split, (path, folder) in places.items():
    try:
      for place in (path, folder):
        if not place.exists():
          raise pairs.absent(place)
      options['class_names'], *drawn, notes = draw_labels(path, **options)
      splits[split] = itertools.chain(notes, _match(path, folder, *drawn))
    except DataError as error:
      splits[split] = [error]
  return options['class_names'], splits


def _images(root, split):
  inner = root / 'images' / f'{split}2017'
  return inner if inner.is_dir() else root / f'{split}2017'


def unlabeled(config):
  """{name: File} of unlabeled2017/."""
  folder = _images(pairs.check_root(config), 'unlabeled')
  found = files.walk(folder).files
  if not found:
    raise pairs.absent(folder, 'not found or empty')
  return found


def coco(config, splits):
  """{train,val}2017/ and annotations/instances_{train,val}2017.json.

  As in the reference (METHOD 4.5): categories that are no VOC class are
  background, crowds count, and images with 1000 labelled pixels or fewer are
  left out, of val too.
  """
  root, places = pairs.check_root(config), {}
  for split in [x for x in splits if x != 'test']:
    path = root / 'annotations' / f'instances_{split}2017.json'
    places[split] = path, _images(root, split)
  names = (_BACKGROUND, *classes.COCO_NAMES)
  options = {'min_pixels': 1000, 'limit': config['limit']}
  _, splits = find_pairs(places, class_names=names, **options)
  ids = masks.IndexLabels(tuple(range(len(names))))
  return pairs.make_dataset(config, classes.VOC, splits, ids, upright=False)
