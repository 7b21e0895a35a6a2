# SPDX-License-Identifier: Apache-2.0
r"""Reads every pair of a data set, before a training run meets the broken one.

  python -m attnfd_jax.check_data --config=configs/folder.py \
    --config.data.root=PATH [--contact_sheet=sheet.png] [--output=found.json]

Tells what is wrong by kind with file names, how often the classes occur, and
weights against imbalance. Exit code 0 if the data can be used, 2 if not;
images in two splits and classes that train never shows are only warnings.
"""

import collections
import dataclasses
import hashlib
import pathlib
import sys

from absl import flags
import cv2
from ml_collections import config_flags
import numpy as np

from attnfd_jax import cli
from attnfd_jax.config import resolve
from attnfd_jax.data import frequencies
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import DataError
from attnfd_jax.errors import InputError
from attnfd_jax.progress import progress
from attnfd_jax.reporting import contact_sheet
from attnfd_jax.runs import logs

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
  """What the pairs of a split hold.

  Attributes:
    names: of the images, all of them.
    problems: index -> DataError.
    sizes: (h, w) -> number of images; of those without problem, as the rest.
    digests: index -> hash of the decoded image.
    counts: frequencies.ClassCounts.
  """

  names: list
  problems: dict
  sizes: collections.Counter
  digests: dict
  counts: frequencies.ClassCounts


@dataclasses.dataclass(frozen=True)
class Found:
  """What is wrong, or odd, with a data set: DataErrors and their words.

  Attributes:
    splits: name -> Split.
    problems: list of (name of the split or '', DataError).
    warnings: kind of WARNINGS -> lines.
    weights: of the classes by their frequency in train, float64 [k].
  """

  splits: dict
  problems: list
  warnings: dict
  weights: np.ndarray


def _digest(image):
  head = repr(image.shape).encode()
  return hashlib.sha256(head + np.ascontiguousarray(image).data).digest()


def _without_pixels(error):
  """A copy: with its traceback an error would hold what was decoded."""
  values = error.values
  if values and len(values) > _KEPT:
    # A photograph taken for a mask has 100000 colours.
    most = sorted(values, key=values.get, reverse=True)[:_KEPT]
    values = {value: values[value] for value in most}
  return DataError(str(error), error.kind, error.file, values)


def read_split(source, num_classes, threads, *, on_record=None):
  """Opens every pair of a source once; returns its Split.

  Args:
    source: see data.sources.
    num_classes: k.
    threads, on_record: of frequencies.map_records.
  """

  def read(index):
    try:
      record = source[index]
    except DataError as error:
      return _without_pixels(error)
    label = record['label']
    counts = frequencies.count_label(label, num_classes)
    return label.shape, _digest(record['image']), counts

  found = frequencies.map_records(read, source, threads, on_record=on_record)
  problems = {i: x for i, x in enumerate(found) if isinstance(x, DataError)}
  good = {i: x for i, x in enumerate(found) if i not in problems}
  return Split(
    names=[source.name(i) for i in range(len(source))],
    problems=problems,
    sizes=collections.Counter(size for size, _, _ in good.values()),
    digests={i: digest for i, (_, digest, _) in good.items()},
    counts=frequencies.sum_counts([x[2] for x in good.values()], num_classes),
  )


def find_duplicates(splits):
  """[((split, index), (later split, index)), ...] of equal images.

  Args:
    splits: name -> {index: digest}, in the order of the report. Copies inside
      a split do no harm and are left out.
  """
  first, pairs = {}, []
  for name, digests in splits.items():
    for index, digest in digests.items():
      where = first.setdefault(digest, (name, index))
      if where[0] != name:
        pairs.append((where, (name, index)))
  return pairs


def find_unseen(class_names, splits):
  """Class -> splits that show it, of the classes that train does not.

  Args:
    class_names: k names.
    splits: name -> ClassCounts, with 'train'.
  """
  return {
    name: [split for split in splits if splits[split].pixels[i]]
    for i, name in enumerate(class_names)
    if not splits['train'].pixels[i]
  }


def check(dataset, threads, *, wanted=('train', 'val'), on_record=None):
  """Everything `Found` about a Dataset of load_dataset(strict=False).

  Args:
    dataset: its problems are the first ones.
    threads: that read.
    wanted: splits without which there is no run.
    on_record: called after each pair.
  """
  k = dataset.num_classes
  splits = {
    name: read_split(source, k, threads, on_record=on_record)
    for name, source in dataset.splits.items()
  }
  problems = [('', problem) for problem in dataset.problems]
  for name in wanted:
    # What the layout lacks is the better reason.
    if not dataset.problems and not (name in splits and splits[name].names):
      text = f'{dataset.name}: no pairs in the split {name}.'
      problems.append((name, DataError(text, 'split', name)))
  for name, split in splits.items():
    problems += [(name, problem) for problem in split.problems.values()]

  warned = {}
  pairs = find_duplicates({name: x.digests for name, x in splits.items()})
  if pairs:
    warned['duplicate'] = [
      f'{a} {splits[a].names[i]} = {b} {splits[b].names[j]}'
      for (a, i), (b, j) in pairs
    ]
  counts = {name: split.counts for name, split in splits.items()}
  train = counts.get('train', frequencies.sum_counts([], k))
  unseen = find_unseen(dataset.class_names, {'train': train} | counts)
  if train.num_images and unseen:
    warned['unseen'] = [
      f'{name}: ' + (f'only in {", ".join(where)}' if where else 'nowhere')
      for name, where in unseen.items()
    ]
  weights = frequencies.median_frequency_weights(
    train.pixels, train.present_pixels
  )
  return Found(splits, problems, warned, weights)


def _count(number, word):
  return f'{number} {word}' + ('' if number == 1 else 's')


def group(problems):
  """kind -> [DataError, ...] in the order of KINDS, others last.

  Args:
    problems: as in Found.
  """
  kinds = collections.defaultdict(list)
  for _, problem in problems:
    kinds[problem.kind].append(problem)
  order = [*KINDS, *kinds]
  return {kind: kinds[kind] for kind in sorted(kinds, key=order.index)}


def sum_values(problems):
  """value -> (pixels, files) over the DataErrors that have values."""
  pixels, files = collections.Counter(), collections.Counter()
  for problem in problems:
    pixels.update(problem.values or {})
    files.update((problem.values or {}).keys())
  return {value: (pixels[value], files[value]) for value in pixels}


def verdict(found):
  """(usable, one line)."""
  pairs = sum(len(split.names) for split in found.splits.values())
  if found.problems:
    return False, (
      f'not usable: {_count(len(found.problems), "problem")}, '
      f'{_count(pairs, "pair")} read; mend what is listed and check again.'
    )
  names = ', '.join(f'{len(x.names)} {k}' for k, x in found.splits.items())
  warned = _count(sum(map(len, found.warnings.values())), 'warning')
  return True, f'usable: {_count(pairs, "pair")} ({names}), {warned}.'


def _listed(lines):
  shown = [f'  {line}' for line in lines[:_SHOWN]]
  more = len(lines) - len(shown)
  return shown + ([f'  and {more} more'] if more else [])


def _values_text(values, limit=10):
  """'12 (30 pixels in 2 files), ...', the most frequent first."""
  order = sorted(values, key=lambda value: -values[value][0])
  parts = [
    f'{value} ({_count(pixels, "pixel")} in {_count(files, "file")})'
    for value, (pixels, files) in ((x, values[x]) for x in order[:limit])
  ]
  more = len(order) - len(parts)
  return ', '.join(parts) + (f' and {more} more values' if more else '')


def problem_lines(found):
  """Problems and warnings by kind, a heading and at most five lines each."""
  lines = []
  for kind, problems in group(found.problems).items():
    lines.append(f'problem: {KINDS.get(kind, kind)} ({len(problems)})')
    values = sum_values(problems)
    if values and len(problems) > 1:
      lines.append(f'  in all: {_values_text(values)}')
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


def class_lines(class_names, found):
  """Table of classes: share of the labelled pixels and images of each split."""
  splits = {
    name: split.counts
    for name, split in found.splits.items()
    if split.counts.pixels.sum()
  }
  if not splits:
    return []
  width = max(len(name) for name in ('class', *class_names))
  head = ''.join(f'{name + " %":>10}{"images":>8}' for name in splits)
  lines = [f'{"class":{width}}{head}{"weight":>10}']
  for i, name in enumerate(class_names):
    cells = ''.join(
      f'{100 * counts.pixels[i] / counts.pixels.sum():>10.2f}'
      f'{counts.present_images[i]:>8}'
      for counts in splits.values()
    )
    lines.append(f'{name:{width}}{cells}{found.weights[i]:>10.4f}')
  if 'train' in splits:
    # Rounded to 0 a weight would switch its class off.
    weights = tuple(
      round(x, 4) if x >= 0.01 else float(f'{x:.3g}')
      for x in found.weights.tolist()
    )
    lines += [
      'weights by median frequency in train, against imbalance; as with '
      '--config.loss.weighting=auto:',
      '  --config.loss.weighting=given '
      f'--config.loss.class_weights="{weights}"',
    ]
  return lines


def as_text(dataset, found):
  """The report for the screen."""
  blocks = [
    split_lines(found.splits),
    problem_lines(found),
    class_lines(dataset.class_names, found),
    [verdict(found)[1]],
  ]
  return '\n\n'.join('\n'.join(block) for block in blocks if block)


def as_json(dataset, found):
  """The same and all file names, for programs."""
  names = dataset.class_names

  def by_class(values):
    return dict(zip(names, values.tolist(), strict=True))

  usable, text = verdict(found)
  return {
    'dataset': dataset.name,
    'class_names': list(names),
    'usable': usable,
    'verdict': text,
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
    'splits': {
      name: {
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
      for name, split in found.splits.items()
    },
  }


def _output(flag, path, ending):
  """The path, known to be writable before the long part."""
  if not path:
    return None
  path = pathlib.Path(path)
  if path.suffix.lower() != ending or path.is_dir():
    raise InputError(f'--{flag}={path}: name a {ending} file.')
  path.parent.mkdir(parents=True, exist_ok=True)
  return path


def main(argv):
  del argv
  options = flags.FLAGS
  sheet = _output('contact_sheet', options.contact_sheet, '.png')
  output = _output('output', options.output, '.json')
  config = resolve(options.config)
  threads = options.threads
  if threads is None:
    threads = config.data.threads
  if threads < 1:
    raise InputError(f'--threads={threads} must be positive.')
  with config.unlocked():
    config.data.cache = False  # Each pair is read once; memory stays small.
  # What OpenCV would write about broken files is in the report.
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
  dataset = load_dataset(config.data, strict=False)
  if config.data.limit:
    print(
      f'config.data.limit={config.data.limit}: only the first pairs of each '
      'split are read.'
    )
  total = sum(len(source) for source in dataset.splits.values())
  with progress(total, 'checking') as bar:
    found = check(
      dataset,
      threads,
      wanted=[x for x in ('train', 'val', config.eval.test_split) if x],
      on_record=bar.update,
    )
  if output:
    logs.write_json(output, as_json(dataset, found))
  if sheet:
    problems = {name: split.problems for name, split in found.splits.items()}
    contact_sheet.draw_sheet(dataset, problems).save(sheet)
  print(as_text(dataset, found))
  if not verdict(found)[0]:
    sys.exit(2)


if __name__ == '__main__':
  # Defined here, so that the verbs can be imported together.
  config_flags.DEFINE_config_file(
    'config', None, 'configs/NAME.py or configs/NAME.py:VARIANT.'
  )
  flags.DEFINE_string('contact_sheet', None, 'PNG with examples, to write.')
  flags.DEFINE_string('output', None, 'JSON file with all that was found.')
  flags.DEFINE_integer('threads', None, 'As config.data.threads by default.')
  flags.mark_flag_as_required('config')
  cli.run(main)
