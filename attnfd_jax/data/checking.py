# SPDX-License-Identifier: Apache-2.0
"""Reads all pairs of a data set and reports problems and class frequencies."""

import collections
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
import contextlib
import hashlib
from typing import Any, TypeAlias

import numpy as np

from attnfd_jax.data import frequencies, masks
from attnfd_jax.data.pairs import Dataset, UNLABELED
from attnfd_jax.data.records import Size, Source
from attnfd_jax.errors import DataError
from attnfd_jax.progress import progress

# A part of the report, which can be written as JSON.
_Facts: TypeAlias = dict[str, Any]

# Headings by kind of DataError, in the order of the report.
KINDS = {
  'split': 'missing or empty splits',
  'annotation': 'annotations that cannot be used',
  'partner': 'files without a partner',
  'unreadable': 'files that cannot be read: empty, truncated or not an image',
  'size': 'masks whose size differs from that of their image',
  'mode': 'masks of colors where class ids are expected',
  'depth': 'images or masks with an unsupported bit depth',
  'values': 'mask values that are not classes',
  'lossy': 'masks in lossy formats, whose ids compression has changed',
  'exif': 'images that a viewer rotates (EXIF), unlike their masks',
  'classes': 'splits with too few classes to train or to score',
  'leak': 'unlabeled images that are in val or test',
}
# Headings of what does not prevent a run.
WARNINGS = {
  'duplicate': 'images that are in two splits',
  'copy': 'unlabeled images that occur twice',
  'unseen': 'classes without a usable pixel in train',
  'note': 'files that were skipped, or read as something else',
}
_SHOWN = 5  # Lines printed under each heading.
# Most frequent wrong values kept for each file: all ids, but not all colors.
_KEPT = 256


def digest(image: np.ndarray) -> bytes:
  """Hash of the shape and the pixels of an image."""
  data = repr(image.shape).encode() + image.tobytes()
  return hashlib.sha256(data).digest()


def _by_class(class_names: Sequence[str], values: np.ndarray) -> dict[str, Any]:
  return dict(zip(class_names, values.tolist(), strict=True))


def _read_split(
  source: Source, class_names: Sequence[str], threads: int, bar: Any
) -> tuple[_Facts, dict[int, DataError], dict[int, bytes], dict[str, float]]:
  """Reads all records of a split.

  Returns:
    Statistics for the report, the errors by index, the digests of the readable
    images by index, and median frequency weights by class.
  """
  k = len(class_names)

  def read(index: int) -> DataError | tuple[bytes, Size, np.ndarray]:
    try:
      record = source[index]
    except DataError as error:
      # A copy, since the traceback of the error references decoded pixels.
      values = collections.Counter(error.values).most_common(_KEPT)
      return DataError(str(error), error.kind, error.file, dict(values))
    image, label = record['image'], record['label']
    return digest(image), label.shape, frequencies.count_label(label, k)

  problems, digests, counts = {}, {}, []
  sizes: collections.Counter[Size] = collections.Counter()
  results = frequencies.map_records(read, range(len(source)), threads)
  for i, result in enumerate(results):
    if isinstance(result, DataError):
      problems[i] = result
    else:
      digests[i], size, row = result
      sizes[size] += 1
      counts.append(row)
    bar.update()
  rows = np.array(counts, np.int64).reshape(-1, k + 1)
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


def _repeated(
  sources: Mapping[str, Source], digests: Mapping[str, Mapping[int, bytes]]
) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
  """Yields (split, name) of an image, and those of a later copy of it.

  The copy is in another split or, if it is unlabeled, possibly in the same one.
  """
  originals: dict[bytes, tuple[str, str]] = {}
  for split, source in sources.items():
    for index, key in digests[split].items():
      image = split, source.name(index)
      original = originals.setdefault(key, image)
      # Copies of labeled images in their own split do no harm.
      if original != image and (original[0] != split or split == UNLABELED):
        yield original, image


def _judge_repeated(
  sources: Mapping[str, Source], digests: Mapping[str, Mapping[int, bytes]]
) -> tuple[list[DataError], dict[str, list[str]]]:
  """Errors, and lines for the report by kind, of repeated images."""
  leaks, lines = [], {'duplicate': [], 'copy': []}
  for (first, original), (split, name) in _repeated(sources, digests):
    if split == UNLABELED and first in ('val', 'test'):
      what = f'{name}: is {first} {original}, which must not be trained with'
      remedy = 'remove it from config.data.unlabeled'
      leaks.append(DataError(f'{what}; {remedy}.', 'leak', name))
    else:
      kind = 'duplicate' if first != split else 'copy'
      lines[kind].append(f'{first} {original} = {split} {name}')
  return leaks, lines


def _unseen(splits: Mapping[str, _Facts]) -> Iterator[str]:
  """Yields a line for each class that no usable pair of train shows."""
  train = splits.get('train')
  if train and train['usable_pairs']:
    for name, count in train['images'].items():
      others = [split for split, x in splits.items() if x['images'][name]]
      if not count:
        where = f'only in {", ".join(others)}' if others else 'nowhere'
        yield f'{name}: {where}'


def _unlabeled(splits: Mapping[str, _Facts]) -> Iterator[str]:
  """Yields a line if the test split has no labels."""
  pixels = splits.get('test', {}).get('pixels', {'': 1})
  if not any(pixels.values()):
    yield 'test: no pixel is labeled; it will not be scored'


def _judge_classes(
  dataset: Dataset, split: str, seen: Collection[int]
) -> DataError | str | None:
  """Judges whether the labels of a split show enough classes.

  Args:
    dataset: has the split.
    split: its name.
    seen: train ids that its labels show.

  Returns:
    None for two classes or more, else a DataError; but a text if the only class
    may be due to having fewer than one image for ten classes.
  """
  if len(seen) > 1:
    return None
  source: Any = dataset.splits[split]  # May have pairs.
  k, what = dataset.num_classes, f'no pixel of {split} is labeled'
  if seen:
    (only,) = seen
    what = f'labels of {split} show only {dataset.class_names[only]!r}'
    if 10 * len(source) < k:
      images = _count(len(source), 'image')
      return f'{what}, one of {k} classes: {images} may be too few'
  what = f'{what}; train and val need labels of two classes'
  with contextlib.suppress(AttributeError, DataError):  # If it has mask files.
    mask = source.pairs[0].mask
    values = np.unique(masks.read_mask(mask)).tolist()
    values = ', '.join(map(str, values[:8])) + ', ...' * (len(values) > 8)
    what = f'{what}; {mask} has the values {values}'
  if (left := len(getattr(source, 'pairs', ())) - len(source)) > 0:
    what = f'{what}; config.data.limit={len(source)} leaves {left} pairs unread'
  if dataset.name == 'folder':
    what = f'{what}; 255 is ignored, and so are ids that --config.data.id_map'
    what = f'{what} does not list: give the ids of your masks there, as in'
    what = f'{what} "(0, 255)", or their colors in --config.data.palette'
  return DataError(f'{dataset.name}: {what}.', 'classes', split)


def require_classes(
  dataset: Dataset, splits: Iterable[str], threads: int
) -> list[str]:
  """Reads labels of each of the splits until it shows two classes.

  Returns:
    A line for each split that shows fewer, but may be too small to tell.

  Raises:
    DataError: if any other split shows fewer.
  """
  notes = []
  for split in splits:
    source, k = dataset.splits[split], dataset.num_classes
    seen = frequencies.first_classes(source, k, threads)
    problem = _judge_classes(dataset, split, seen)
    if isinstance(problem, DataError):
      raise problem
    notes += filter(None, [problem])
  return notes


def check(
  dataset: Dataset,
  threads: int,
  *,
  required: Sequence[str] = ('train', 'val'),
) -> tuple[dict[str, Any], dict[str, dict[int, DataError]]]:
  """Reads every pair of a data set once and reports what is wrong.

  Args:
    dataset: from load_dataset with strict=False.
    threads: number of threads that read.
    required: names of the splits that must have pairs.

  Returns:
    The report, which can be written as JSON and which `as_text` formats, and
    the errors of pairs that cannot be used, by split and index.
  """
  splits, problems, digests, weights = {}, {}, {}, {}
  with progress(sum(map(len, dataset.splits.values())), 'checking') as bar:
    for name, source in dataset.splits.items():
      results = _read_split(source, dataset.class_names, threads, bar)
      splits[name], problems[name], digests[name], weights[name] = results
  listed = [('', problem) for problem in dataset.problems]
  # Problems of the layout explain why a split is missing.
  for name in () if listed else required:
    if name not in splits or not splits[name]['pairs']:
      text = f'{dataset.name}: no pairs in the split {name}.'
      listed.append((name, DataError(text, 'split', name)))
  listed += [(name, x) for name in problems for x in problems[name].values()]
  leaks, warnings = _judge_repeated(dataset.splits, digests)
  samples = []
  for name in () if listed else [x for x in required if x != 'test']:
    counts = splits[name]['pixels'].values()
    seen = {i for i, pixels in enumerate(counts) if pixels}
    problem = _judge_classes(dataset, name, seen)
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


def _verdict(splits: Mapping[str, _Facts], problems: int, warnings: int) -> str:
  """The last line of the report."""
  counts = {name: x['pairs'] for name, x in splits.items()}
  unlabeled = counts.pop(UNLABELED, 0)
  pairs = _count(sum(counts.values()), 'pair')
  more = f' and {_count(unlabeled, "unlabeled image")}' if unlabeled else ''
  if problems:
    what = f'{_count(problems, "problem")}, {pairs}{more} read'
    return f'not usable: {what}; fix the problems above and check again.'
  names = ', '.join(f'{count} {name}' for name, count in counts.items())
  return f'usable: {pairs} ({names}){more}, {_count(warnings, "warning")}.'


def _count(number: int, word: str) -> str:
  return f'{number} {word}' + ('' if number == 1 else 's')


def _values_text(problems: Iterable[_Facts], limit: int = 10) -> str:
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


def _shown(lines: Sequence[str]) -> list[str]:
  """The first lines, indented, and how many more there are."""
  more = len(lines) - _SHOWN
  shown = [f'  {line}' for line in lines[:_SHOWN]]
  return [*shown, f'  and {more} more'] if more > 0 else shown


def problem_lines(
  problems: Iterable[_Facts], warnings: Mapping[str, Sequence[str]]
) -> Iterator[str]:
  """Yields problems by kind, those not in KINDS last, then warnings by kind."""
  groups: dict[str, list[_Facts]] = {kind: [] for kind in KINDS}
  for problem in problems:
    groups.setdefault(problem['kind'], []).append(problem)
  for kind, group in groups.items():
    if group:
      yield f'problem: {KINDS.get(kind, kind)} ({len(group)})'
      if kind == 'values' and len(group) > 1:
        yield f'  in total: {_values_text(group)}'
      yield from _shown([problem['message'] for problem in group])
  for kind, lines in warnings.items():
    yield f'warning: {WARNINGS[kind]} ({len(lines)})'
    yield from _shown(lines)


def _size_text(sizes: Sequence[_Facts]) -> str:
  """Describes sizes as width x height, in the order of their areas."""
  order = sorted(sizes, key=lambda x: x['height'] * x['width'])
  texts = [
    f'{x["width"]}x{x["height"]}' for x in order for _ in range(x['images'])
  ]
  if len(sizes) == 1:
    return f'all {texts[0]}'
  limits, median = f'{texts[0]} to {texts[-1]}', texts[len(texts) // 2]
  return f'{len(sizes)} sizes from {limits}, median {median}'


def split_lines(splits: Mapping[str, _Facts]) -> Iterator[str]:
  """Yields a line for each split: number of pairs, sizes, ignored pixels."""
  for name, split in splits.items():
    labeled = name != UNLABELED
    text = f'{name}: {split["pairs"]} {"pairs" if labeled else "images"}'
    if broken := split['pairs'] - split['usable_pairs']:
      text += f', {broken} of them unusable'
    if split['usable_pairs']:
      text += f', {_size_text(split["sizes"])}'
    if split['usable_pairs'] and labeled:
      ignored = 1 - sum(split['pixels'].values()) / split['num_pixels']
      text += f', {100 * ignored:.2f} % ignored'
    yield text


def class_lines(
  weights: Mapping[str, float], splits: Mapping[str, _Facts]
) -> Iterator[str]:
  """Yields a table of the labeled pixels and the images of each class."""
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
    # A weight that is rounded to 0 would disable its class.
    given = tuple(
      round(x, 4) if x >= 0.01 else float(f'{x:.3g}') for x in weights.values()
    )
    what = 'median frequency weights of train, against class imbalance, as with'
    yield f'{what} --config.loss.weighting=auto:'
    flags = '--config.loss.weighting=given --config.loss.class_weights'
    yield f'  {flags}="{given}"'


def as_text(report: Mapping[str, Any]) -> str:
  """Formats the report of `check` for the terminal."""
  blocks = (
    split_lines(report['splits']),
    problem_lines(report['problems'], report['warnings']),
    class_lines(report['weights'], report['splits']),
    [report['verdict']],
  )
  return '\n\n'.join(filter(None, map('\n'.join, blocks)))
