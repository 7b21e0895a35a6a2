# SPDX-License-Identifier: Apache-2.0
"""Scores a stored stage on a split of its data set, and prints the scores."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from attnfd_jax import metrics
from attnfd_jax.data.records import Source
from attnfd_jax.data.sources import Dataset, load_dataset, SPLITS
from attnfd_jax.devices import sharding
from attnfd_jax.errors import check_choice, InputError
from attnfd_jax.inference import evaluation, predictor
from attnfd_jax.inference import submission as submissions
from attnfd_jax.inference.onnx_model import OnnxNetwork
from attnfd_jax.progress import progress
from attnfd_jax.runs import loading, logs
from attnfd_jax.types import StrPath

PROTOCOLS = {
  'native': 'scored at the size of the original labels',
  'reference': 'images and labels resized to a short side of '
  f'{predictor.REFERENCE_SHORT_SIDE} first, as the authors do',
}


class _Counted:
  """A source that advances a progress bar with each image that is read."""

  def __init__(self, source: Source, bar: tqdm):
    self._source, self._bar = source, bar
    self.size, self.name, self.key = source.size, source.name, source.key

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    self._bar.update()
    return self._source[index]


def load_split(
  info: Mapping[str, Any],
  data_root: StrPath | None,
  split: str,
  *,
  hidden: bool = False,
) -> tuple[Dataset, Source]:
  """The data set of a stage and the source of one of its splits.

  Args:
    info: config.json of the stage.
    data_root: where the data set is; by default where it was in training.
    split: 'train', 'val' or 'test'.
    hidden: allow the test split of Cityscapes, whose labels are not public.

  Raises:
    InputError: if the data set or the split is not there, or its classes are
      not those of the stage.
  """
  if data_root is not None:
    # Without this, a run that was trained from shards would read those.
    data = info['data'] | {'root': data_root, 'prepared': ''}
    info = {**info, 'data': data}
  check_choice('--split', split, SPLITS)
  try:
    dataset = load_dataset(info['data'], splits=(split,))
    splits = dict(dataset.splits)
    hidden = hidden and (dataset.name, split) == ('cityscapes', 'test')
    if hidden and split not in splits:
      splits[split] = submissions.test_images(info['data']['root'])
  except InputError as error:  # The flag has a different name here.
    text = str(error).replace('--config.data.root', '--data_root')
    raise InputError(text) from error
  if split not in splits:
    others = f'; it has {", ".join(splits)}' if splits else ''
    raise InputError(
      f'--split={split}: {dataset.name} has no such split{others}.'
    )
  for note in dataset.notes:
    print(note)
  trained, given = list(info['class_names']), list(dataset.class_names)
  if trained != given:
    raise InputError(
      f'The network was trained with the classes {trained}, but the data set '
      f'has {given}; give the data set that it was trained with.'
    )
  return dataset, splits[split]


def evaluate_checkpoint(
  checkpoint: StrPath | loading.Loaded,
  *,
  data_root: StrPath | None = None,
  split: str = 'val',
  protocol: str | None = None,
  boundary: bool = False,
  submission: StrPath | None = None,
  **options: Any,
) -> tuple[np.ndarray, dict[str, Any]]:
  """Scores of a stage's network on one split of its data set.

  Args:
    checkpoint: as of predictor.Predictor.
    data_root: where the data set is; by default where it was in training.
    split: 'train', 'val' or 'test', if the data set has it.
    protocol: a key of PROTOCOLS; by default that of the stage.
    boundary: compute the boundary IoU as well.
    submission: folder for the files of submission.py. It allows the split
      'test' of Cityscapes, where all scores are absent.
    **options: scales, flip, tile, overlap and others; see predictor.Predictor.

  Returns:
    confusion matrix, int64 [k, k] (rows are labels), and a dict for a JSON
    file: the scores (None where no pixel is labeled) and the settings.
  """
  if protocol is not None:
    check_choice('--protocol', protocol, PROTOCOLS)
  stage = predictor.Predictor(checkpoint, **options)
  info, settings = stage.info, stage.info['eval']
  dataset, source = load_split(info, data_root, split, hidden=bool(submission))
  protocol = settings['protocol'] = protocol or settings['protocol']
  short_side = predictor.stage_short_side(info)
  seen = {'protocol': protocol, 'short_side': short_side}
  reading = seen | {'size_multiple': settings['size_multiple']}
  reading['threads'], name = info['data']['threads'], dataset.name
  facts = {'dataset': name, 'protocol': protocol}
  write = submissions.make_writer(submission, **facts) if submission else None
  images = logs.count_text(len(source), 'image')
  print(f'{stage.description}, on the {images} of the {split} split of {name}')
  num_classes = dataset.num_classes
  counts = np.zeros((num_classes,) * 2, np.int64)
  edges = np.zeros((num_classes + 1,) * 2, np.int64)
  with progress(len(source)) as bar:
    given = (stage.network, stage.variables, _Counted(source, bar))
    # In batches, unless single predictions are needed.
    batched = not (stage.tiles['tile'] or boundary or write)
    if batched and not isinstance(stage.network, OnnxNetwork):
      sizes = {'num_classes': num_classes, 'batch_size': settings['batch_size']}
      mesh = sharding.make_mesh()
      counts = evaluation.evaluate(*given, mesh=mesh, **sizes, **reading)
    else:
      pairs = evaluation.predictions(*given, **reading, **stage.tiles)
      for index, pair in enumerate(pairs):
        counts += metrics.host_confusion_matrix(*pair, num_classes=num_classes)
        if boundary:
          edges += metrics.boundary_matrix(*pair, num_classes=num_classes)
        if write:
          write(source.name(index), pair[0])
  result = metrics.summarize(counts, dataset.class_names)
  if boundary:
    result |= metrics.summarize_boundary(edges, dataset.class_names)
  return counts, logs.without_nan(result) | seen | stage.views | stage.tiles | {
    'checkpoint': info.get('description') or str(checkpoint),
    'stage': info['stage'],
    'dataset': dataset.name,
    'split': split,
    'images': len(source),
    'step': info['checkpoint_step'],
    'device': getattr(stage.network, 'device', None) or logs.device_name(),
    'versions': logs.versions(),
  }


def _describe_protocol(result: Mapping[str, Any]) -> str:
  """'protocol native: ...' and the other settings."""
  words = [f'protocol {result["protocol"]}: {PROTOCOLS[result["protocol"]]}']
  if result['protocol'] == 'native' and result['short_side']:
    words.append(f'images resized to a short side of {result["short_side"]}')
  if result['scales'] != [1]:
    scales = ', '.join(f'{scale:g}' for scale in result['scales'])
    words.append(f'averaged over scales {scales}')
  if result['flip']:
    words.append('averaged with the mirror image')
  if result['tile']:
    height, width = result['tile']
    words.append(f'tiles of {height}x{width}, overlap {result["overlap"]:g}')
  return '; '.join(words)


def as_text(counts: np.ndarray, result: Mapping[str, Any]) -> str:
  """The scores in percent with a table of classes, for the terminal."""
  lines = [f'{result["split"]} split, {_describe_protocol(result)}', '']
  for key, name in (
    ('miou', 'mIoU'),
    ('class_accuracy', 'class accuracy'),
    ('pixel_accuracy', 'pixel accuracy'),
    ('fw_iou', 'fwIoU'),
    ('boundary_miou', 'boundary mIoU'),
  ):
    if key in result:
      lines.append(f'{name:16}{logs.percent(result[key]):>7} %')
  shares = counts.sum(1) / (counts.sum() or np.nan)
  columns = {
    'IoU %': result['iou_per_class'],
    'accuracy %': result['accuracy_per_class'],
    'pixels %': dict(zip(result['iou_per_class'], shares, strict=True)),
  }
  if 'boundary_iou_per_class' in result:
    columns['boundary %'] = result['boundary_iou_per_class']
  table = [['class', *columns]]
  for name in result['iou_per_class']:
    table.append([name, *(logs.percent(x[name]) for x in columns.values())])
  width = max(len(name) for name, *_ in table)
  lines.append('')
  for name, *cells in table:
    lines.append(f'{name:{width}}' + ''.join(f'{cell:>12}' for cell in cells))
  return '\n'.join(lines)
