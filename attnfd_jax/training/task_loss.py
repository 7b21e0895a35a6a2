# SPDX-License-Identifier: Apache-2.0
"""The loss that compares scores with labels, from the group `loss`."""

import functools
import json
import pathlib

from attnfd_jax import losses
from attnfd_jax.data import frequencies
from attnfd_jax.errors import InputError
from attnfd_jax.progress import progress


def make_task_loss(options):
  """(logits, labels) -> scalar of the group `loss` of a config.

  `losses.softmax_cross_entropy` itself unless something else is asked for.
  """
  weights = tuple(options['class_weights']) or None
  if options['name'] == 'ce' and weights is None:
    return losses.softmax_cross_entropy
  cross_entropy = functools.partial(
    losses.softmax_cross_entropy, class_weights=weights
  )
  made = {
    'ce': cross_entropy,
    'ohem': functools.partial(
      losses.ohem_cross_entropy,
      threshold=options['ohem_threshold'],
      min_kept=options['ohem_min_kept'],
      class_weights=weights,
    ),
    'focal': functools.partial(
      losses.focal_loss, gamma=options['focal_gamma'], class_weights=weights
    ),
    'dice': losses.dice_loss,
    'ce+dice': lambda logits, labels: (
      cross_entropy(logits, labels) + losses.dice_loss(logits, labels)
    ),
  }
  return made[options['name']]


def check_class_weights(options, class_names):
  """Given weights must be as many as classes.

  Raises:
    InputError: if they are not.
  """
  found, wanted = len(options['class_weights']), len(class_names)
  if options['weighting'] == 'given' and found != wanted:
    raise InputError(
      f'config.loss.class_weights has {found} numbers for the {wanted} classes '
      f'{", ".join(class_names)}.'
    )


def _counted_before(workdir):
  """Weights that another stage, or a part before a restart, wrote down."""
  for path in sorted(pathlib.Path(workdir).glob('*/config.json')):
    options = json.loads(path.read_text()).get('loss', {})
    if options.get('weighting') == 'auto' and options['class_weights']:
      return tuple(options['class_weights'])
  return None


def with_class_weights(config, dataset, workdir):
  """`config` with numbers in loss.class_weights where weighting is 'auto'.

  Median-frequency weights of the training split. It is read once in a run:
  the stages of `workdir` keep the numbers in their config.json.

  Raises:
    InputError: if given weights do not fit the classes.
  """
  check_class_weights(config.loss, dataset.class_names)
  if config.loss.weighting != 'auto':
    return config
  weights = _counted_before(workdir)
  if weights is None:
    source = dataset.splits['train']
    with progress(len(source), 'class weights') as bar:
      counts = frequencies.count_classes(
        source,
        dataset.num_classes,
        config.data.threads,
        on_record=bar.update,
      )
    found = frequencies.median_frequency_weights(
      counts.pixels, counts.present_pixels
    )
    weights = tuple(float(f'{x:.4g}') for x in found)
  named = zip(dataset.class_names, weights, strict=True)
  print(
    f'class weights: {", ".join(f"{n} {x:g}" for n, x in named)}', flush=True
  )
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.loss.class_weights = weights
  return config.lock()
