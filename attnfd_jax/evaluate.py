# SPDX-License-Identifier: Apache-2.0
r"""Scores a trained network on a split of its data set.

  python -m attnfd_jax.evaluate --checkpoint=runs/camvid/distill \
    [--split=test] [--scales=0.75,1,1.25 --flip] [--output=scores.json] \
    [--tile=512x1024 --overlap=0.25] [--boundary] [--submission=DIR]

--checkpoint is the folder of a stage; its config.json names the data set.
--tile is for images larger than memory, --boundary adds the IoU along the
contours, --submission writes what the Cityscapes server takes.
"""

import dataclasses
import math
import pathlib

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax import cli
from attnfd_jax import metrics
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.inference import evaluation
from attnfd_jax.inference import submission as submissions
from attnfd_jax.models import network as networks
from attnfd_jax.progress import progress
from attnfd_jax.runs import loading
from attnfd_jax.runs import logs

PROTOCOLS = {
  'native': 'scored at the size of the untouched labels',
  'reference': (
    'images and labels resized to a short side of '
    f'{evaluation.REFERENCE_SHORT_SIDE} first, as the authors do'
  ),
}


@dataclasses.dataclass(frozen=True)
class Averaged:
  """A network whose probabilities are means over scales and mirror images.

  Takes the place of a network wherever `apply` is called for its logits;
  hashable, so that compiled steps are shared.

  Attributes:
    network: called with (variables, image, train=False).
    scales: of height and width; each is one more forward pass, or two.
    flip: average with the mirror image as well.
  """

  network: object
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False

  def apply(self, variables, image, *, train):
    """Log of the mean probabilities, float32 [b, h, w, k], as 'logits' and,
    there being no coarser map, as 'coarse_logits'.
    """
    b, h, w, _ = image.shape
    total = 0.0
    for scale in self.scales:
      # Antialiased when it shrinks, half-pixel centres there and back.
      size = [max(round(n * scale), 1) for n in (h, w)]
      scaled = jax.image.resize(image, (b, *size, 3), 'linear')
      for mirrored in (False, True)[: 1 + self.flip]:
        x = scaled[:, :, ::-1] if mirrored else scaled
        logits = self.network.apply(variables, x, train=train)['logits']
        logits = logits[:, :, ::-1] if mirrored else logits
        logits = jax.image.resize(logits, (b, h, w, logits.shape[-1]), 'linear')
        total = total + jax.nn.softmax(logits)
    mean = total / (len(self.scales) * (1 + self.flip))
    logits = jnp.log(jnp.maximum(mean, jnp.finfo(mean.dtype).tiny))
    return {'logits': logits, 'coarse_logits': logits}


def parse_scales(text):
  """(0.75, 1.0) of '0.75,1'.

  Raises:
    InputError: for anything else than positive numbers.
  """
  try:
    scales = tuple(float(part) for part in text.split(','))
  except ValueError:
    scales = ()
  if not scales or not all(0 < scale < math.inf for scale in scales):
    raise InputError(
      f'--scales={text}: expected positive numbers between commas, such as '
      '--scales=0.75,1,1.25.'
    )
  return scales


def parse_tile(text):
  """(512, 1024) of '512x1024', height first; None of None.

  Raises:
    InputError: for anything else than two numbers of at least 32.
  """
  if text is None:
    return None
  parts = text.lower().split('x')
  sizes = tuple(int(part) for part in parts if part.strip().isdecimal())
  if len(parts) != 2 or len(sizes) != 2 or min(sizes) < 32:
    raise InputError(
      f'--tile={text}: expected HEIGHTxWIDTH, both at least 32, such as '
      '--tile=512x1024.'
    )
  return sizes


def overlap_of(tile, overlap):
  """`overlap` of tiles; 0.25 of None.

  Raises:
    InputError: if it is not in [0, 1), or there are no tiles.
  """
  if overlap is None:
    return 0.25
  if not 0 <= overlap < 1:
    raise InputError(f'--overlap={overlap} must be from 0 to below 1.')
  if tile is None:
    raise InputError('--overlap is of tiles; add --tile=HEIGHTxWIDTH.')
  return overlap


def load_network(
  checkpoint, *, scales=(1.0,), flip=False, step=None, **options
):
  """As loading.load_network, with the arithmetic of the stage's own score.

  Args:
    checkpoint: folder of a stage.
    scales, flip: see `Averaged`; the bare network if they change nothing.
    step: which checkpoint; the best by default.
    **options: of loading.load_network.

  Raises:
    InputError: if the folder is no stage, or has no such checkpoint.
  """
  if not checkpoint:
    raise InputError(
      '--checkpoint is missing; name the folder of a stage, such as '
      '--checkpoint=runs/quickstart/distill.'
    )
  network, variables, info = loading.load_network(
    checkpoint, step=step, **options
  )
  if tuple(scales) != (1.0,) or flip:
    network = Averaged(network, tuple(scales), flip)
  return network, variables, info


def describe(checkpoint, info):
  """'runs/quickstart/distill, step 320: resnet18 x0.125'."""
  name = networks.describe(info[loading.role_of(info)])
  return f'{checkpoint}, step {info["checkpoint_step"]}: {name}'


def seen_short_side(info, protocol):
  """Short side of the images that the network sees; 0 leaves their size."""
  if protocol == 'reference':
    return evaluation.REFERENCE_SHORT_SIDE
  return info['eval'].get('short_side', 0)


class _Counted:
  """A source that tells a progress bar what was read."""

  def __init__(self, source, bar):
    self._source, self._bar = source, bar

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    record = self._source[index]
    self._bar.update()
    return record

  def size(self, index):
    return self._source.size(index)


def _load_split(info, data_root, split, *, unlabelled=False):
  if data_root is not None:
    # Else a run that was trained from shards would go on reading them.
    data = info['data'] | {'root': data_root, 'prepared': ''}
    info = info | {'data': data}
  try:
    dataset = load_dataset(info['data'])
  except InputError as error:
    # The flag has another name here.
    text = str(error).replace('--config.data.root', '--data_root')
    raise InputError(text) from error
  splits = dict(dataset.splits)
  wanted = (dataset.name, split) == ('cityscapes', 'test')
  if unlabelled and wanted and split not in splits:
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


def _evaluate_each(
  pairs, source, bar, *, num_classes, boundary=False, submission=None
):
  """Sums what is computed on the host, from pairs of (class ids, label).

  Returns:
    confusion matrix and, if asked for, boundary matrix, or None.
  """
  counts = np.zeros((num_classes,) * 2, np.int64)
  edges = np.zeros((num_classes + 1,) * 2, np.int64) if boundary else None
  for index, (ids, label) in enumerate(pairs):
    counts += metrics.host_confusion_matrix(ids, label, num_classes=num_classes)
    if boundary:
      edges += metrics.boundary_matrix(ids, label, num_classes=num_classes)
    if submission is not None:
      submission.write(source.name(index), ids)
    bar.update()
  return counts, edges


def evaluate_checkpoint(
  checkpoint,
  *,
  data_root=None,
  split='val',
  protocol=None,
  scales=(1.0,),
  flip=False,
  step=None,
  tile=None,
  overlap=None,
  boundary=False,
  submission=None,
):
  """Scores of a stage's network on one split of its data set.

  Args:
    checkpoint: folder of a stage.
    data_root: where the data set is; by default where it was in training.
    split: 'train', 'val' or 'test', as far as the data set has it.
    protocol: 'native' or 'reference', see PROTOCOLS; by default that of the
      stage.
    scales, flip: see `Averaged`.
    step: which checkpoint; the best by default.
    tile: (height, width) of what the network sees at a time, or None; see
      evaluation.predictions.
    overlap: of tiles, in [0, 1); 0.25 by default.
    boundary: boundary IoU as well.
    submission: folder for the files of submission.py, or None. It allows the
      split 'test' of Cityscapes, whose scores are all absent.

  Returns:
    confusion matrix int64 [k, k] (rows are labels), and a dict: the entries of
    metrics.summarise and metrics.summarise_boundary, and what they depend on.
    NaN is None, so it is JSON.

  Raises:
    InputError: whenever the user can mend it.
  """
  if protocol is not None and protocol not in PROTOCOLS:
    raise InputError(
      f'--protocol={protocol} must be one of {", ".join(PROTOCOLS)}.'
    )
  overlap = overlap_of(tile, overlap)
  mesh = sharding.make_mesh()
  network, variables, info = load_network(
    checkpoint,
    scales=scales,
    flip=flip,
    step=step,
    sharding=sharding.replicated(mesh),
  )
  dataset, source = _load_split(
    info, data_root, split, unlabelled=submission is not None
  )
  protocol = protocol or info['eval']['protocol']
  short_side = seen_short_side(info, protocol)
  if submission is not None:
    submission = submissions.Writer(
      submission, dataset=dataset.name, protocol=protocol
    )
  options = {
    'protocol': protocol,
    'short_side': short_side,
    'size_multiple': info['eval']['size_multiple'],
    'threads': info['data']['threads'],
  }
  edges = None
  print(
    f'{describe(checkpoint, info)}, on the {len(source)} images of the '
    f'{split} split of {dataset.name}'
  )
  with progress(len(source)) as bar:
    if tile is None and not boundary and submission is None:
      counts = evaluation.evaluate(
        network,
        variables,
        _Counted(source, bar),
        num_classes=dataset.num_classes,
        mesh=mesh,
        batch_size=info['eval']['batch_size'],
        **options,
      )
    else:
      counts, edges = _evaluate_each(
        evaluation.predictions(
          network, variables, source, tile=tile, overlap=overlap, **options
        ),
        source,
        bar,
        num_classes=dataset.num_classes,
        boundary=boundary,
        submission=submission,
      )
  result = metrics.summarise(counts, dataset.class_names) | {
    'checkpoint': str(checkpoint),
    'stage': info['stage'],
    'dataset': dataset.name,
    'split': split,
    'images': len(source),
    'protocol': protocol,
    'short_side': short_side,
    'scales': list(scales),
    'flip': flip,
    'tile': list(tile) if tile else None,
    'overlap': overlap if tile else None,
    'step': info['checkpoint_step'],
    'device': logs.device_name(),
    'versions': logs.versions(),
  }
  if edges is not None:
    result |= metrics.summarise_boundary(edges, dataset.class_names)
  return counts, {
    key: None if isinstance(value, float) and math.isnan(value) else value
    for key, value in result.items()
  }


def _percent(value):
  absent = value is None or math.isnan(value)
  return f'{"absent" if absent else f"{100 * value:.2f}":>7}'


def describe_protocol(result):
  """'protocol native: ...' and what else the scores depend on, for texts."""
  words = f'protocol {result["protocol"]}: {PROTOCOLS[result["protocol"]]}'
  if result['protocol'] == 'native' and result['short_side']:
    words += f'; images seen at a short side of {result["short_side"]}'
  if result['scales'] != [1]:
    averaged = ', '.join(f'{scale:g}' for scale in result['scales'])
    words += f'; mean over scales {averaged}'
  if result['flip']:
    words += '; mean with the mirror image'
  if result['tile']:
    height, width = result['tile']
    words += f'; tiles of {height}x{width}, overlap {result["overlap"]:g}'
  return words


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
      lines.append(f'{name:16}{_percent(result[key])} %')
  labelled = counts.sum(1)
  with np.errstate(invalid='ignore'):
    share = labelled / labelled.sum()
  columns = {
    'IoU %': result['iou_per_class'].values(),
    'accuracy %': result['accuracy_per_class'].values(),
    'share %': share,
  }
  if 'boundary_iou_per_class' in result:
    columns['boundary %'] = result['boundary_iou_per_class'].values()
  names = ['class', *result['iou_per_class']]
  table = [names] + [
    [title, *map(_percent, values)] for title, values in columns.items()
  ]
  widths = [max(map(len, column)) for column in table]
  lines.append('')
  for name, *values in zip(*table, strict=True):
    row = [f'{name:{widths[0]}}']
    row += [f'{x:>{n}}' for x, n in zip(values, widths[1:], strict=True)]
    lines.append('  '.join(row))
  return '\n'.join(lines)


def main(argv):
  del argv
  cli.enable_compilation_cache()
  options = flags.FLAGS
  scales, tile = parse_scales(options.scales), parse_tile(options.tile)
  output = pathlib.Path(options.output) if options.output else None
  if output is not None:  # Known to be writable before the long part.
    if output.is_dir():
      raise InputError(f'--output={output} is a folder; name a .json file.')
    output.parent.mkdir(parents=True, exist_ok=True)
  counts, result = evaluate_checkpoint(
    options.checkpoint,
    data_root=options.data_root,
    split=options.split,
    protocol=options.protocol,
    scales=scales,
    flip=options.flip,
    step=options.step,
    tile=tile,
    overlap=options.overlap,
    boundary=options.boundary,
    submission=options.submission,
  )
  print(as_text(counts, result))
  if output is not None:
    logs.write_json(output, result)
    print(f'\nscores: {output}')
  if options.submission:
    print(f'\n{result["images"]} files for the server: {options.submission}')


if __name__ == '__main__':
  # Defined here, so that the verbs can be imported together.
  flags.DEFINE_string('checkpoint', None, 'Folder of a stage.')
  flags.DEFINE_string('data_root', None, 'Data set, if not where it was.')
  flags.DEFINE_string('split', 'val', 'train, val or test.')
  flags.DEFINE_string(
    'protocol', None, 'native or reference; that of the stage by default.'
  )
  flags.DEFINE_string('scales', '1', 'Mean over these, e.g. 0.75,1,1.25.')
  flags.DEFINE_bool('flip', False, 'Mean with the mirror image.')
  flags.DEFINE_string('tile', None, 'HEIGHTxWIDTH seen at a time.')
  flags.DEFINE_float('overlap', None, 'Share of a tile; 0.25 by default.')
  flags.DEFINE_bool('boundary', False, 'Boundary IoU as well.')
  flags.DEFINE_string('submission', None, 'Folder for the Cityscapes server.')
  flags.DEFINE_integer('step', None, 'Checkpoint; the best by default.')
  flags.DEFINE_string('output', None, 'JSON file to write.')
  cli.run(main)
