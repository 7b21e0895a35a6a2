# SPDX-License-Identifier: Apache-2.0
"""Scores of a stored stage on a split of its data set, and their text."""

import math

import numpy as np

from attnfd_jax import metrics
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.inference import evaluation
from attnfd_jax.inference import submission as submissions
from attnfd_jax.inference.predictor import (
  Predictor,
  REFERENCE_SHORT_SIDE,
  seen_short_side,
)
from attnfd_jax.progress import progress
from attnfd_jax.runs import logs

PROTOCOLS = {
  'native': 'scored at the size of the untouched labels',
  'reference': 'images and labels resized to a short side of '
  f'{REFERENCE_SHORT_SIDE} first, as the authors do',
}


class _Counted:
  """A source that advances a progress bar by each image that is read."""

  def __init__(self, source, bar):
    self._source, self._bar = source, bar
    self.size = source.size

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    record = self._source[index]
    self._bar.update()
    return record


def load_split(info, data_root, split, *, unlabeled=False):
  """The data set of a stage, and the source of one of its splits.

  `unlabeled` allows the test split of Cityscapes, whose labels nobody has.
  """
  if data_root is not None:
    # A run that was trained from shards would otherwise still read them.
    info = info | {'data': info['data'] | {'root': data_root, 'prepared': ''}}
  try:
    dataset = load_dataset(info['data'])
  except InputError as error:
    # The flag has another name here.
    text = str(error).replace('--config.data.root', '--data_root')
    raise InputError(text) from error
  splits = dict(dataset.splits)
  hidden = (dataset.name, split) == ('cityscapes', 'test')
  if unlabeled and hidden and split not in splits:
    splits[split] = submissions.test_images(info['data']['root'])
  if split not in splits:
    raise InputError(
      f'--split={split}: {dataset.name} has {", ".join(splits)}.'
    )
  if list(dataset.class_names) != list(info['class_names']):
    raise InputError(
      f'The network knows the classes {list(info["class_names"])}, the data '
      f'set {list(dataset.class_names)}.'
    )
  return dataset, splits[split]


def evaluate_checkpoint(
  checkpoint,
  *,
  data_root=None,
  split='val',
  protocol=None,
  boundary=False,
  submission=None,
  scales=(1.0,),
  flip=False,
  tile=None,
  overlap=0.25,
  **options,
):
  """Scores of a stage's network on one split of its data set.

  Args:
    checkpoint: folder of a stage.
    data_root: where the data set is; by default where it was in training.
    split: 'train', 'val' or 'test', as far as the data set has it.
    protocol: a key of PROTOCOLS; by default that of the stage.
    boundary: boundary IoU as well.
    submission: folder for the files of submission.py, or None. It allows the
      split 'test' of Cityscapes, whose scores are all absent.
    scales, flip, tile, overlap, **options: see predictor.Predictor.

  Returns:
    confusion matrix int64 [k, k] (rows are labels), and a dict for a JSON file:
    scores, None where no pixel counts, and what they depend on.
  """
  if protocol is not None and protocol not in PROTOCOLS:
    raise InputError(
      f'--protocol={protocol} must be one of {", ".join(PROTOCOLS)}.'
    )
  views = {'scales': list(scales), 'flip': flip}
  tiles = {'tile': tile, 'overlap': overlap}
  stage = Predictor(checkpoint, **views, **tiles, **options)
  dataset, source = load_split(
    stage.info, data_root, split, unlabeled=submission is not None
  )
  settings, num_classes = stage.info['eval'], dataset.num_classes
  protocol = protocol or settings['protocol']
  seen = {
    'protocol': protocol,
    'short_side': seen_short_side(protocol, settings.get('short_side', 0)),
  }
  reading = {
    'size_multiple': settings['size_multiple'],
    'threads': stage.info['data']['threads'],
  }
  write = None
  if submission is not None:
    write = submissions.make_writer(
      submission, dataset=dataset.name, protocol=protocol
    )
  print(
    f'{stage.description}, on the {len(source)} images of the {split} split of '
    f'{dataset.name}'
  )
  counts = np.zeros((num_classes,) * 2, np.int64)
  edges = np.zeros((num_classes + 1,) * 2, np.int64)
  with progress(len(source)) as bar:
    given = (stage.network, stage.variables, _Counted(source, bar))
    if tile is None and not boundary and write is None:
      counts = evaluation.evaluate(
        *given,
        num_classes=num_classes,
        mesh=sharding.make_mesh(),
        batch_size=settings['batch_size'],
        **seen,
        **reading,
      )
    else:
      pairs = evaluation.predictions(*given, **seen, **reading, **tiles)
      for index, pair in enumerate(pairs):
        counts += metrics.host_confusion_matrix(*pair, num_classes=num_classes)
        if boundary:
          edges += metrics.boundary_matrix(*pair, num_classes=num_classes)
        if write is not None:
          write(source.name(index), pair[0])
  result = metrics.summarise(counts, dataset.class_names)
  if boundary:
    result |= metrics.summarise_boundary(edges, dataset.class_names)
  result = {
    key: None if isinstance(value, float) and math.isnan(value) else value
    for key, value in result.items()
  }
  return counts, result | seen | views | {
    'checkpoint': str(checkpoint),
    'stage': stage.info['stage'],
    'dataset': dataset.name,
    'split': split,
    'images': len(source),
    'tile': list(tile) if tile else None,
    'overlap': overlap if tile else None,
    'step': stage.info['checkpoint_step'],
    'device': logs.device_name(),
    'versions': logs.versions(),
  }


def describe_protocol(result):
  """'protocol native: ...' and what else the scores depend on, for texts."""
  words = [f'protocol {result["protocol"]}: {PROTOCOLS[result["protocol"]]}']
  if result['protocol'] == 'native' and result['short_side']:
    words.append(f'images seen at a short side of {result["short_side"]}')
  if result['scales'] != [1]:
    scales = ', '.join(f'{scale:g}' for scale in result['scales'])
    words.append(f'mean over scales {scales}')
  if result['flip']:
    words.append('mean with the mirror image')
  if result['tile']:
    height, width = result['tile']
    words.append(f'tiles of {height}x{width}, overlap {result["overlap"]:g}')
  return '; '.join(words)


def as_text(counts, result):
  """The scores in percent with a table of classes, for the screen."""
  lines = [f'{result["split"]} split, {describe_protocol(result)}', '']
  for key, name in (
    ('miou', 'mIoU'),
    ('class_accuracy', 'class accuracy'),
    ('pixel_accuracy', 'pixel accuracy'),
    ('fw_iou', 'fwIoU'),
    ('boundary_miou', 'boundary mIoU'),
  ):
    if key in result:
      lines.append(f'{name:16}{logs.percent(result[key]):>7} %')
  with np.errstate(invalid='ignore'):
    share = counts.sum(1) / counts.sum()
  columns = {
    'IoU %': result['iou_per_class'].values(),
    'accuracy %': result['accuracy_per_class'].values(),
    'share %': share,
  }
  if 'boundary_iou_per_class' in result:
    columns['boundary %'] = result['boundary_iou_per_class'].values()
  table = [['class', *columns]]
  for name, *values in zip(
    result['iou_per_class'], *columns.values(), strict=True
  ):
    table.append([name, *map(logs.percent, values)])
  width = max(len(name) for name, *_ in table)
  lines.append('')
  for name, *cells in table:
    lines.append(f'{name:{width}}' + ''.join(f'{cell:>12}' for cell in cells))
  return '\n'.join(lines)
