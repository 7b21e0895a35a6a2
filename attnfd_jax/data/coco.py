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
import os
import pathlib
import tempfile
import zipfile

import cv2
import numpy as np

from attnfd_jax import user_cache
from attnfd_jax.data import classes, files, masks, pairs
from attnfd_jax.errors import DataError
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.progress import progress

_VERSION = 1  # Of the archives; another one makes them anew.
_BACKGROUND = 'background'
_NEEDED = 'pycocotools.mask', 'The format of COCO'
# What is read of the lists of a JSON file.
_FIELDS = {
  'images': {'id': int, 'file_name': str, 'height': int, 'width': int},
  'annotations': {'image_id': int, 'category_id': int},
  'categories': {'id': int, 'name': str},
}


def unsound(path, what):
  """The DataError of a file that says what masks mean."""
  return files.fault(path, 'annotation', what)


def _is_name(text):
  """Whether a file can have this name, and a terminal print it."""
  printed = text.encode(errors='replace').decode()  # No lone surrogates.
  return len(text) <= 4096 and '\0' not in text and text == printed


def _read_json(path):
  """The lists images, annotations and categories, whose fields are sound."""
  try:
    content = json.loads(path.read_bytes())
    # Of dicts only: else AttributeError.
    lists = [[x for x in content[key] if x.keys()] for key in _FIELDS]
  except (ValueError, RecursionError) as error:
    raise unsound(path, f'not JSON ({error})') from error
  except (AttributeError, KeyError, TypeError) as error:
    what = 'not COCO annotations: needs images, annotations and categories'
    raise unsound(path, what) from error
  for entries, fields in zip(lists, _FIELDS.values(), strict=True):
    for entry, (field, kind) in itertools.product(entries, fields.items()):
      value = entry.get(field)
      if type(value) is not kind:  # True would be a height.
        raise unsound(path, f'{field} is absent or no {kind.__name__}')
      if kind is str and not _is_name(value):
        raise unsound(path, f'{field} {value[:40]!r} cannot be a name')
  for image in lists[0]:
    height, width = image['height'], image['width']
    if min(height, width) < 1 or height * width > masks.MAX_PIXELS:
      limit = f'or more than {masks.MAX_PIXELS} pixels'
      raise unsound(path, f'an image has no height or width, {limit}')
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
      raise ValueError('its RLE is damaged')
    value |= (code & 31) << shift
    shift += 5
    if not code & 32:
      value -= (code & 16) << shift - 4  # Twice the sign bit.
      runs.append(value + (runs[-2] if len(runs) > 2 else 0))
      value = shift = 0
  if shift:
    raise ValueError('its RLE is cut off')
  return runs


def _area(segmentation, size):
  """Inside of polygons or an RLE, bool [h, w]; ValueError if it is wrong."""
  if isinstance(segmentation, list):
    # Two corners would be taken for a box.
    if not segmentation or any(len(x) < 6 or len(x) % 2 for x in segmentation):
      raise ValueError('needs polygons of at least three corners')
    # pycocotools walks along the edges, and NaN out of its memory.
    far = 10 * max(size)
    if not all(abs(x) <= far for polygon in segmentation for x in polygon):
      raise ValueError('has a corner far outside of the image')
    mask = files.need(*_NEEDED)
    segmentation = mask.merge(mask.frPyObjects(segmentation, *size))
  if tuple(segmentation['size']) != size:
    raise ValueError(f'its RLE is of size {segmentation["size"]}')
  runs = segmentation['counts']
  runs = runs.encode() if isinstance(runs, str) else runs
  runs = _decode_runs(runs) if isinstance(runs, bytes) else runs
  whole = all(type(n) is int and n >= 0 for n in runs)
  if not whole or sum(runs) != size[0] * size[1]:
    raise ValueError('its RLE does not fill the image')
  # Runs go down the columns; every second one is inside.
  inside = np.arange(len(runs)) % 2 > 0
  return np.repeat(inside, runs).reshape(size, order='F')


def draw_label(annotations, size, numbers):
  """Train ids, uint8 [h, w], and [(annotation left out, its error), ...].

  Where they overlap, the first one wins; `numbers` is {category id: train id}.
  """
  # By columns, as runs go; the last annotation first.
  label, wrong = np.zeros(size, np.uint8, order='F'), []
  for annotation in reversed(annotations):
    if number := numbers.get(annotation['category_id'], 0):
      try:
        label[_area(annotation.get('segmentation') or [], size)] = number
      except Exception as error:  # pycocotools raises many types.
        wrong.append((annotation, error))
  return np.ascontiguousarray(label), wrong[::-1]


def _draw_all(path, archive, class_names, min_pixels, limit):
  """Writes PNGs of the images that stay, and index.json, to an open zip."""
  images, annotations, categories = _read_json(path)
  known = [x['name'] for x in sorted(categories, key=lambda x: x['id'])]
  class_names = tuple(dict.fromkeys(class_names or (_BACKGROUND, *known)))
  # The first one is what no annotation covers, whatever its name.
  check_classes(path, class_names, dict.fromkeys((class_names[0], *known)))
  train_ids = {name: i for i, name in enumerate(class_names)}
  numbers = {x['id']: train_ids.get(x['name'], 0) for x in categories}
  problems, kept, groups = [], [], collections.defaultdict(list)
  for annotation in annotations:
    groups[annotation['image_id']].append(annotation)
  for key, entries in (('image', images), ('category', categories)):
    named = {annotation[f'{key}_id'] for annotation in annotations}
    problems += [
      f'annotations of {key} {i}, which the file does not list'
      for i in sorted(named - {entry['id'] for entry in entries})
    ]
  counts = collections.Counter(image['file_name'] for image in images)
  problems += [f'{name} is listed twice' for name in counts if counts[name] > 1]
  # Of an image that is listed twice the first entry counts.
  by_name = {image['file_name']: image for image in reversed(images)}
  with progress(len(by_name), f'Drawing {path.name}, once', delay=1) as bar:
    for name, image in sorted(by_name.items()):
      bar.update()
      size = image['height'], image['width']
      label, wrong = draw_label(groups[image['id']], size, numbers)
      problems += [
        f'annotation {a.get("id", "")} of {name}: {error}' for a, error in wrong
      ]
      if np.count_nonzero(label) > min_pixels:
        png = cv2.imencode('.png', label)[1].tobytes()
        archive.writestr(f'{name}.png', png)
        kept.append(name)
      if limit and len(kept) == limit:
        break
  index = {'class_names': class_names, 'images': kept, 'problems': problems}
  archive.writestr('index.json', json.dumps(index))


def draw_labels(path, *, class_names=(), min_pixels=-1, limit=0):
  """Class names, {path of an image: File of its mask}, [DataError, ...].

  Masks are drawn unless they were before; errors are those of what is left out.
  The first of `class_names` is background; () is all categories. Images with
  more labelled pixels than `min_pixels` are kept, the first `limit`, 0 for all.
  """
  stat, folder = path.stat(), user_cache.folder('coco')
  what = [_VERSION, str(path.resolve()), class_names, min_pixels, limit]
  what = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
  target = folder / f'{what}-{stat.st_size}-{stat.st_mtime_ns}.zip'
  if not target.exists():
    files.need(*_NEEDED)  # Or raise before the work starts.
    folder.mkdir(parents=True, exist_ok=True)
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
  return tuple(index['class_names']), labels, problems


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
      options['class_names'], *drawn = draw_labels(path, **options)
      splits[split] = _match(path, folder, *drawn)
    except DataError as error:
      splits[split] = [error]
  return options['class_names'], splits


def coco(config, splits):
  """{train,val}2017/ and annotations/instances_{train,val}2017.json.

  As in the reference (METHOD 4.5): categories that are no VOC class are
  background, crowds count, and images with 1000 labelled pixels or fewer are
  left out, of val too.
  """
  root, places = pairs.check_root(config), {}
  for split in [x for x in splits if x != 'test']:
    path = root / 'annotations' / f'instances_{split}2017.json'
    inner = root / 'images' / f'{split}2017'
    places[split] = path, inner if inner.is_dir() else root / f'{split}2017'
  names = (_BACKGROUND, *classes.COCO_NAMES)
  options = {'min_pixels': 1000, 'limit': config['limit']}
  _, splits = find_pairs(places, class_names=names, **options)
  ids = masks.IndexLabels(tuple(range(len(names))))
  return pairs.make_dataset(config, classes.VOC, splits, ids, upright=False)
