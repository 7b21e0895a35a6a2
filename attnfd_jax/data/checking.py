# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a data set, or odd, after reading every pair of it."""

import collections
import dataclasses
import hashlib

import numpy as np

from attnfd_jax.data import frequencies
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.errors import DataError

# In the order of the report: {kind of DataError: heading}.
KINDS = {
  'split': 'absent or empty splits',
  'annotation': 'annotations that cannot be used',
  'partner': 'files without a partner',
  'unreadable': 'files that cannot be read: empty, cut off or no image',
  'size': 'masks of another size than their image',
  'mode': 'masks of colours where class ids are expected',
  'depth': 'masks of 16 bits, or others than 8',
  'values': 'mask values that are no class',
  'lossy': 'JPEG masks, whose ids compression has changed',
  'exif': 'images that a viewer turns (EXIF), unlike their masks',
}
# What does not hinder a run.
WARNINGS = {
  'duplicate': 'images that are in two splits',
  'unseen': 'classes without a usable pixel in train',
}
_SHOWN = 5
_KEPT = 256  # Values of a file, the most frequent: all ids, not all colours.


@dataclasses.dataclass(frozen=True)
class Split:
  """What the pairs of a split hold."""

  names: list  # Of all images.
  problems: dict  # Index -> DataError; the rest is of the other pairs.
  sizes: collections.Counter  # (h, w) -> number of images.
  digests: list  # (index, hash of the decoded image).
  counts: frequencies.ClassCounts


@dataclasses.dataclass(frozen=True)
class Found:
  """What `check` found."""

  dataset: Dataset
  splits: dict  # Name -> Split.
  problems: list  # (Name of the split or '', DataError).
  warnings: dict  # Kind of WARNINGS -> lines.
  weights: np.ndarray  # By the frequency of classes in train, float64 [k].

  @property
  def usable(self):
    return not self.problems

  @property
  def verdict(self):
    """One line."""
    pairs = _count(sum(len(x.names) for x in self.splits.values()), 'pair')
    if self.problems:
      return (
        f'not usable: {_count(len(self.problems), "problem")}, {pairs} read; '
        'fix what is listed and check again.'
      )
    names = ', '.join(f'{len(x.names)} {k}' for k, x in self.splits.items())
    warned = _count(sum(map(len, self.warnings.values())), 'warning')
    return f'usable: {pairs} ({names}), {warned}.'


def digest(image):
  """Hash of the shape and the pixels of an image."""
  head = repr(image.shape).encode()
  return hashlib.sha256(head + np.ascontiguousarray(image).data).digest()


def _without_pixels(error):
  """A copy: with its traceback an error would hold what was decoded."""
  # A photograph taken for a mask has 100000 colours.
  values = collections.Counter(error.values).most_common(_KEPT)
  return DataError(str(error), error.kind, error.file, dict(values))


def read_split(source, num_classes, threads, *, on_record=None):
  """The Split of a source, of which every pair is opened once."""

  def read(index):
    try:
      record = source[index]
    except DataError as error:
      return _without_pixels(error)
    label = record['label']
    counts = frequencies.count_label(label, num_classes)
    return label.shape, digest(record['image']), counts

  indices = range(len(source))
  found = frequencies.map_records(read, indices, threads, on_record=on_record)
  problems = {i: x for i, x in enumerate(found) if isinstance(x, DataError)}
  good = [(i, *x) for i, x in enumerate(found) if i not in problems]
  return Split(
    names=[source.name(i) for i in indices],
    problems=problems,
    sizes=collections.Counter(size for _, size, _, _ in good),
    digests=[(i, key) for i, _, key, _ in good],
    counts=frequencies.sum_counts([x for *_, x in good], num_classes),
  )


def _find_warnings(class_names, splits, train):
  """kind -> lines, of {name: Split} and the ClassCounts of train."""
  first, duplicate, unseen = {}, [], []
  for name, split in splits.items():
    for index, key in split.digests:
      image = split.names[index]
      where, original = first.setdefault(key, (name, image))
      if where != name:  # Copies inside a split do no harm.
        duplicate.append(f'{where} {original} = {name} {image}')
  for i, name in enumerate(class_names):
    if train.num_images and not train.pixels[i]:
      where = [s for s, split in splits.items() if split.counts.pixels[i]]
      text = f'only in {", ".join(where)}' if where else 'nowhere'
      unseen.append(f'{name}: {text}')
  warnings = {'duplicate': duplicate, 'unseen': unseen}
  return {kind: lines for kind, lines in warnings.items() if lines}


def check(dataset, threads, *, required=('train', 'val'), on_record=None):
  """Everything `Found` about a Dataset of load_dataset(strict=False).

  Its own problems are the first ones. Without the `required` splits there is no
  run; `on_record` is called after each pair.
  """
  k = dataset.num_classes
  splits = {
    name: read_split(source, k, threads, on_record=on_record)
    for name, source in dataset.splits.items()
  }
  problems = [('', problem) for problem in dataset.problems]
  for name in required:
    # What the layout lacks is the better reason.
    if not dataset.problems and not (name in splits and splits[name].names):
      text = f'{dataset.name}: no pairs in the split {name}.'
      problems.append((name, DataError(text, 'split', name)))
  for name, split in splits.items():
    problems += [(name, problem) for problem in split.problems.values()]
  nothing = frequencies.sum_counts([], k)
  train = splits['train'].counts if 'train' in splits else nothing
  warnings = _find_warnings(dataset.class_names, splits, train)
  weights = frequencies.median_frequency_weights(
    train.pixels, train.present_pixels
  )
  return Found(dataset, splits, problems, warnings, weights)


def _count(number, word):
  return f'{number} {word}' + ('' if number == 1 else 's')


def group(problems):
  """kind -> [DataError, ...] in the order of KINDS, others last."""
  kinds = {kind: [] for kind in KINDS}
  for _, problem in problems:
    kinds.setdefault(problem.kind, []).append(problem)
  return {kind: listed for kind, listed in kinds.items() if listed}


def _listed(lines):
  shown = [f'  {line}' for line in lines[:_SHOWN]]
  more = len(lines) - len(shown)
  return shown + ([f'  and {more} more'] if more else [])


def _values_text(problems, limit=10):
  """'12 (30 pixels in 2 files), ...', the most frequent first."""
  pixels, files = collections.Counter(), collections.Counter()
  for problem in problems:
    pixels.update(problem.values)
    files.update(problem.values.keys())
  parts = [
    f'{value} ({_count(number, "pixel")} in {_count(files[value], "file")})'
    for value, number in pixels.most_common(limit)
  ]
  more = len(pixels) - len(parts)
  return ', '.join(parts) + (f' and {more} more values' if more else '')


def problem_lines(found):
  """Problems and warnings by kind, a heading and at most five lines each."""
  lines = []
  for kind, problems in group(found.problems).items():
    lines.append(f'problem: {KINDS.get(kind, kind)} ({len(problems)})')
    if kind == 'values' and len(problems) > 1:
      lines.append(f'  in all: {_values_text(problems)}')
    lines += _listed([str(problem) for problem in problems])
  for kind, texts in found.warnings.items():
    lines.append(f'warning: {WARNINGS[kind]} ({len(texts)})')
    lines += _listed(texts)
  return lines


def _size_text(sizes):
  """Sizes as width x height, ordered by area."""
  order = sorted(sizes.elements(), key=lambda size: (size[0] * size[1], size))
  low, middle, high = (
    f'{order[i][1]}x{order[i][0]}' for i in (0, len(order) // 2, -1)
  )
  if len(sizes) == 1:
    return f'all {low}'
  return f'{len(sizes)} sizes from {low} to {high}, median {middle}'


def split_lines(splits):
  """One line for each split: pairs, sizes, ignored pixels."""
  lines = []
  for name, split in splits.items():
    text = f'{name}: {len(split.names)} pairs'
    counts = split.counts
    if split.problems:
      text += f', {len(split.problems)} of them not usable'
    if counts.num_images:
      ignored = 1 - counts.pixels.sum() / counts.num_pixels
      text += f', {_size_text(split.sizes)}, {100 * ignored:.2f} % ignored'
    lines.append(text)
  return lines


def class_lines(class_names, splits, weights):
  """Table of classes: share of the labelled pixels and images of each split."""
  counts = {name: split.counts for name, split in splits.items()}
  counts = {name: x for name, x in counts.items() if x.pixels.any()}
  if not counts:
    return []
  width = max(len(name) for name in ('class', *class_names))
  head = ''.join(f'{name + " %":>10}{"images":>8}' for name in counts)
  lines = [f'{"class":{width}}{head}{"weight":>10}']
  for i, name in enumerate(class_names):
    cells = ''.join(
      f'{100 * x.pixels[i] / x.pixels.sum():>10.2f}{x.present_images[i]:>8}'
      for x in counts.values()
    )
    lines.append(f'{name:{width}}{cells}{weights[i]:>10.4f}')
  if 'train' in counts:
    # Rounded to 0 a weight would switch its class off.
    given = tuple(
      round(x, 4) if x >= 0.01 else float(f'{x:.3g}') for x in weights.tolist()
    )
    lines += [
      'weights by median frequency in train, against imbalance; as with '
      '--config.loss.weighting=auto:',
      f'  --config.loss.weighting=given --config.loss.class_weights="{given}"',
    ]
  return lines


def as_text(found):
  """The report for the screen."""
  blocks = [
    split_lines(found.splits),
    problem_lines(found),
    class_lines(found.dataset.class_names, found.splits, found.weights),
    [found.verdict],
  ]
  return '\n\n'.join('\n'.join(block) for block in blocks if block)


def as_json(found):
  """The same and all file names, for programs."""
  names = found.dataset.class_names

  def by_class(values):
    return dict(zip(names, values.tolist(), strict=True))

  def as_dict(split):
    return {
      'pairs': len(split.names),
      'usable_pairs': split.counts.num_images,
      'num_pixels': split.counts.num_pixels,
      'pixels': by_class(split.counts.pixels),
      'images': by_class(split.counts.present_images),
      'sizes': [
        {'height': h, 'width': w, 'images': n}
        for (h, w), n in sorted(split.sizes.items())
      ],
    }

  return {
    'dataset': found.dataset.name,
    'class_names': list(names),
    'usable': found.usable,
    'verdict': found.verdict,
    'problems': [
      {
        'split': split,
        'kind': problem.kind,
        'file': problem.file,
        'message': str(problem),
        'values': {str(k): int(n) for k, n in (problem.values or {}).items()},
      }
      for split, problem in found.problems
    ],
    'warnings': found.warnings,
    'weights': by_class(found.weights),
    'splits': {name: as_dict(x) for name, x in found.splits.items()},
  }
