# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set, or odd, after reading every pair of it."""

import collections
import contextlib
import hashlib

import numpy as np

from attnfd_jax.data import frequencies, masks
from attnfd_jax.data.pairs import UNLABELED
from attnfd_jax.errors import DataError
from attnfd_jax.progress import progress

# In the order of the report: {kind of DataError: heading}.
KINDS = {
  'split': 'absent or empty splits',
  'annotation': 'annotations that cannot be used',
  'partner': 'files without a partner',
  'unreadable': 'files that cannot be read: empty, cut off or no image',
  'size': 'masks of another size than their image',
  'mode': 'masks of colours where class ids are expected',
  'depth': 'images or masks of a depth that is not read',
  'values': 'mask values that are no class',
  'lossy': 'masks in lossy formats, whose ids compression has changed',
  'exif': 'images that a viewer turns (EXIF), unlike their masks',
  'classes': 'splits that leave nothing to learn or to score',
  'leak': 'unlabeled images that are in val or test',
}
# What does not hinder a run.
WARNINGS = {
  'duplicate': 'images that are in two splits',
  'copy': 'unlabeled images that are there twice',
  'unseen': 'classes without a usable pixel in train',
  'note': 'files that were left out, or read as something else',
}
_SHOWN = 5
_KEPT = 256  # Values of a file, the most frequent: all ids, not all colours.


def digest(image):
  """Hash of the shape and the pixels of an image."""
  data = repr(image.shape).encode() + image.tobytes()
  return hashlib.sha256(data).digest()


def _by_class(class_names, values):
  return dict(zip(class_names, values.tolist(), strict=True))


def _read_split(source, class_names, threads, bar):
  """Facts of a split, {index: DataError}, {index: digest}, {class: weight}."""
  k = len(class_names)

  def read(index):
    try:
      record = source[index]
    except DataError as error:
      # A copy: its traceback would hold what was decoded.
      values = collections.Counter(error.values).most_common(_KEPT)
      return DataError(str(error), error.kind, error.file, dict(values))
    image, label = record['image'], record['label']
    return digest(image), label.shape, frequencies.count_label(label, k)

  problems, digests, sizes, rows = {}, {}, collections.Counter(), []
  records = frequencies.map_records(read, range(len(source)), threads)
  for i, found in enumerate(records):
    if isinstance(found, DataError):
      problems[i] = found
    else:
      digests[i], size, row = found
      sizes[size] += 1
      rows.append(row)
    bar.update()
  rows = np.array(rows, np.int64).reshape(-1, k + 1)
  facts = {
    'pairs': len(source),
    'usable_pairs': len(rows),
    'num_pixels': int(rows.sum()),
    'pixels': _by_class(class_names, rows[:, :-1].sum(0)),
    'images': _by_class(class_names, (rows[:, :-1] > 0).sum(0)),
    'sizes': [
      {'height': h, 'width': w, 'images': n}
      for (h, w), n in sorted(sizes.items())
    ],
  }
  weights = frequencies.median_frequency_weights(rows)
  return facts, problems, digests, _by_class(class_names, weights)


def _repeated(sources, digests):
  """Where an image was first: ((split, name), (split, name)) of each that an
  earlier split or, unlabeled, the same one has, too.
  """
  first = {}
  for split, source in sources.items():
    for index, key in digests[split].items():
      here = split, source.name(index)
      before = first.setdefault(key, here)
      # Copies of labeled images in their own split do no harm.
      if before != here and (before[0] != split or split == UNLABELED):
        yield before, here


def _judge_repeated(sources, digests):
  """DataErrors and {kind of WARNINGS: lines} of images that are there twice."""
  leaks, lines = [], {'duplicate': [], 'copy': []}
  for (where, original), (split, name) in _repeated(sources, digests):
    if split == UNLABELED and where in ('val', 'test'):
      what = f'{name}: is {where} {original}, and would be learned from'
      remedy = 'take it out of config.data.unlabeled'
      leaks.append(DataError(f'{what}; {remedy}.', 'leak', name))
    else:
      kind = 'duplicate' if where != split else 'copy'
      lines[kind].append(f'{where} {original} = {split} {name}')
  return leaks, lines


def _unseen(splits):
  """A line for each class that the usable pairs of train do not show."""
  train = splits.get('train')
  if train and train['usable_pairs']:
    for name, count in train['images'].items():
      others = [split for split, x in splits.items() if x['images'][name]]
      if not count:
        where = f'only in {", ".join(others)}' if others else 'nowhere'
        yield f'{name}: {where}'


def _unlabeled(splits):
  """A line for a test split without labels."""
  pixels = splits.get('test', {}).get('pixels', {'': 1})
  if not any(pixels.values()):
    yield 'test: no pixel is labeled; it will not be scored'


def _judge_classes(dataset, split, found):
  """What is to be said of a split whose labels show the classes `found`, train
  ids: a DataError where they are too few, None where they are enough, and a
  text where a few images may well show a single class of so many, with fewer
  than one for ten classes. Masks of a few classes are never excused.
  """
  if len(found) > 1:
    return None
  source, k = dataset.splits[split], dataset.num_classes
  what = f'no pixel of {split} is labeled'
  if found:
    (only,) = found
    what = f'labels of {split} show only {dataset.class_names[only]!r}'
    if 10 * len(source) < k:
      images = _count(len(source), 'image')
      return f'{what}, one of {k} classes: {images} cannot tell'
  what = f'{what}; train and val need labels of two classes'
  with contextlib.suppress(AttributeError, DataError):  # Of masks in files.
    mask = source.pairs[0].mask
    values = np.unique(masks.read_mask(mask)).tolist()
    values = ', '.join(map(str, values[:8])) + ', ...' * (len(values) > 8)
    what = f'{what}; {mask} has the values {values}'
  if (left := len(getattr(source, 'pairs', ())) - len(source)) > 0:
    what = f'{what}; config.data.limit={len(source)} leaves {left} pairs unread'
  if dataset.name == 'folder':
    what = f'{what}; 255 is ignored, and what --config.data.id_map leaves out'
    what = f'{what}: name other ids by it, as "(0, 255)"'
    what = f'{what}, and colors by --config.data.palette'
  return DataError(f'{dataset.name}: {what}.', 'classes', split)


def require_classes(dataset, splits, threads):
  """Reads labels of each of the splits until it shows two classes.

  Raises DataError if one never does. Returns a line for each that may be too
  small a sample to tell.
  """
  notes = []
  for split in splits:
    source, k = dataset.splits[split], dataset.num_classes
    found = frequencies.first_classes(source, k, threads)
    problem = _judge_classes(dataset, split, found)
    if isinstance(problem, DataError):
      raise problem
    notes += filter(None, [problem])
  return notes


def check(dataset, threads, *, required=('train', 'val')):
  """Reads every pair of a Dataset of load_dataset(strict=False), once.

  Without the `required` splits there is no run.

  Returns:
    The report, a dict that JSON can hold and `as_text` shows, and
    {split: {index: DataError}} of the pairs that cannot be used.
  """
  splits, problems, digests, weights = {}, {}, {}, {}
  with progress(sum(map(len, dataset.splits.values())), 'checking') as bar:
    for name, source in dataset.splits.items():
      found = _read_split(source, dataset.class_names, threads, bar)
      splits[name], problems[name], digests[name], weights[name] = found
  listed = [('', problem) for problem in dataset.problems]
  # What the layout lacks is the better reason.
  for name in () if listed else required:
    if name not in splits or not splits[name]['pairs']:
      text = f'{dataset.name}: no pairs in the split {name}.'
      listed.append((name, DataError(text, 'split', name)))
  listed += [(name, x) for name in problems for x in problems[name].values()]
  leaks, warnings = _judge_repeated(dataset.splits, digests)
  samples = []
  for name in () if listed else [x for x in required if x != 'test']:
    counts = splits[name]['pixels'].values()
    found = {i for i, pixels in enumerate(counts) if pixels}
    problem = _judge_classes(dataset, name, found)
    if isinstance(problem, DataError):
      listed.append((name, problem))
    else:
      samples += filter(None, [problem])
  listed += [(UNLABELED, leak) for leak in leaks]
  warnings['unseen'] = [*_unseen(splits)]
  warnings['note'] = [*dataset.notes, *samples, *_unlabeled(splits)]
  warnings = {kind: lines for kind, lines in warnings.items() if lines}
  report = {
    'dataset': dataset.name,
    'class_names': list(dataset.class_names),
    'usable': not listed,
    'verdict': _verdict(splits, len(listed), sum(map(len, warnings.values()))),
    'problems': [
      {'split': split, 'message': str(x), **vars(x), 'values': x.values or {}}
      for split, x in listed
    ],
    'warnings': warnings,
    'weights': weights.get('train', dict.fromkeys(dataset.class_names, 1.0)),
    'splits': splits,
  }
  return report, problems


def _verdict(splits, problems, warnings):
  counts = {name: x['pairs'] for name, x in splits.items()}
  unlabeled = counts.pop(UNLABELED, 0)
  pairs = _count(sum(counts.values()), 'pair')
  more = f' and {_count(unlabeled, "unlabeled image")}' if unlabeled else ''
  if problems:
    what = f'{_count(problems, "problem")}, {pairs}{more} read'
    return f'not usable: {what}; fix what is listed and check again.'
  names = ', '.join(f'{count} {name}' for name, count in counts.items())
  return f'usable: {pairs} ({names}){more}, {_count(warnings, "warning")}.'


def _count(number, word):
  return f'{number} {word}' + ('' if number == 1 else 's')


def _values_text(problems, limit=10):
  """'12 (30 pixels in 2 files), ...', the most frequent first."""
  pixels, files = collections.Counter(), collections.Counter()
  for problem in problems:
    pixels.update(problem['values'])
    files.update([*problem['values']])
  parts = [
    f'{value} ({_count(number, "pixel")} in {_count(files[value], "file")})'
    for value, number in pixels.most_common(limit)
  ]
  more = len(pixels) - len(parts)
  return ', '.join(parts) + (f' and {more} more values' if more else '')


def _shown(lines):
  more = len(lines) - _SHOWN
  shown = [f'  {line}' for line in lines[:_SHOWN]]
  return [*shown, f'  and {more} more'] if more > 0 else shown


def problem_lines(problems, warnings):
  """By kind, in the order of KINDS and others last."""
  groups = {kind: [] for kind in KINDS}
  for problem in problems:
    groups.setdefault(problem['kind'], []).append(problem)
  for kind, group in groups.items():
    if group:
      yield f'problem: {KINDS.get(kind, kind)} ({len(group)})'
      if kind == 'values' and len(group) > 1:
        yield f'  in all: {_values_text(group)}'
      yield from _shown([problem['message'] for problem in group])
  for kind, lines in warnings.items():
    yield f'warning: {WARNINGS[kind]} ({len(lines)})'
    yield from _shown(lines)


def _size_text(sizes):
  """Sizes as width x height, ordered by area."""
  order = sorted(sizes, key=lambda x: x['height'] * x['width'])
  texts = [
    f'{x["width"]}x{x["height"]}' for x in order for _ in range(x['images'])
  ]
  if len(sizes) == 1:
    return f'all {texts[0]}'
  limits, median = f'{texts[0]} to {texts[-1]}', texts[len(texts) // 2]
  return f'{len(sizes)} sizes from {limits}, median {median}'


def split_lines(splits):
  """One line for each split: pairs, sizes, ignored pixels."""
  for name, split in splits.items():
    labeled = name != UNLABELED
    text = f'{name}: {split["pairs"]} {"pairs" if labeled else "images"}'
    if broken := split['pairs'] - split['usable_pairs']:
      text += f', {broken} of them not usable'
    if split['usable_pairs']:
      text += f', {_size_text(split["sizes"])}'
    if split['usable_pairs'] and labeled:
      ignored = 1 - sum(split['pixels'].values()) / split['num_pixels']
      text += f', {100 * ignored:.2f} % ignored'
    yield text


def class_lines(weights, splits):
  """Table of classes: share of the labelled pixels and images of each split."""
  totals = {name: sum(x['pixels'].values()) for name, x in splits.items()}
  totals = {name: total for name, total in totals.items() if total}
  if not totals:
    return
  width = max(map(len, ('class', *weights)))
  head = ''.join(f'{name + " %":>10}{"images":>8}' for name in totals)
  yield f'{"class":{width}}{head}{"weight":>10}'
  for name, weight in weights.items():
    cells = ''.join(
      f'{100 * splits[split]["pixels"][name] / total:>10.2f}'
      f'{splits[split]["images"][name]:>8}'
      for split, total in totals.items()
    )
    yield f'{name:{width}}{cells}{weight:>10.4f}'
  if 'train' in totals:
    # Rounded to 0 a weight would switch its class off.
    given = tuple(
      round(x, 4) if x >= 0.01 else float(f'{x:.3g}') for x in weights.values()
    )
    what = 'weights by median frequency in train, against imbalance; as with'
    yield f'{what} --config.loss.weighting=auto:'
    flags = '--config.loss.weighting=given --config.loss.class_weights'
    yield f'  {flags}="{given}"'


def as_text(report):
  """The report of `check` for the screen."""
  blocks = (
    split_lines(report['splits']),
    problem_lines(report['problems'], report['warnings']),
    class_lines(report['weights'], report['splits']),
    [report['verdict']],
  )
  return '\n\n'.join(filter(None, map('\n'.join, blocks)))
