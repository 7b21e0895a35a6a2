# SPDX-License-Identifier: Apache-2.0
"""The task loss, which compares logits with labels, from the group `loss`."""

from collections.abc import Callable, Sequence
import contextlib
import functools
import json
from typing import TypeAlias

from etils import epath
import jax

from attnfd_jax import losses
from attnfd_jax.data import frequencies
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.errors import check_choice, check_range, InputError
from attnfd_jax.runs import loading
from attnfd_jax.types import Config

NAMES = ('ce', 'ohem', 'focal', 'dice', 'ce+dice')

TaskLoss: TypeAlias = Callable[[jax.Array, jax.Array], dict[str, losses.Mean]]
# Terms that take class weights; dice weighs all classes the same.
_WEIGHTED = ('ce', 'ohem', 'focal')


def make_task_loss(options: Config) -> TaskLoss:
  """Returns a function from logits and labels to {term: Mean}.

  Args:
    options: the group `loss` of a config.
  """
  weights = {'class_weights': tuple(options['class_weights']) or None}
  ohem = {key: options[f'ohem_{key}'] for key in ('threshold', 'min_kept')}
  gamma = options['focal_gamma']
  functions = {
    'ce': functools.partial(losses.softmax_cross_entropy, **weights),
    'ohem': functools.partial(losses.ohem_cross_entropy, **ohem, **weights),
    'focal': functools.partial(losses.focal_loss, gamma=gamma, **weights),
    'dice': losses.dice_loss,
  }
  terms = options['name'].split('+')
  return lambda logits, labels: {
    term: functions[term](logits, labels) for term in terms
  }


def is_plain(options: Config) -> bool:
  """Whether the loss is the cross-entropy without class weights."""
  return options['name'] == 'ce' and not options['class_weights']


def check(options: Config, class_names: Sequence[str]) -> None:
  """Raises InputError if the options, or options and classes, do not fit."""
  given, weighting = tuple(options['class_weights']), options['weighting']
  check_choice('config.loss.name', options['name'], NAMES)
  check_choice('config.loss.weighting', weighting, ('none', 'given', 'auto'))
  check_range('config.loss.ohem_threshold', options['ohem_threshold'], 1e-30, 1)
  check_range('config.loss.ohem_min_kept', options['ohem_min_kept'], 0, 1)
  check_range('config.loss.focal_gamma', options['focal_gamma'], 0)
  for value in given:
    check_range('config.loss.class_weights', value, 0, 1e30)
  if weighting == 'given' and not any(given):
    raise InputError(
      "config.loss.weighting='given' needs a number for each class, not all 0, "
      'such as --config.loss.class_weights="(1.0, 2.5)".'
    )
  if given and weighting != 'given':
    raise InputError(
      f'config.loss.class_weights={given} needs loss.weighting=given, not '
      f'{weighting!r}.'
    )
  if given and len(given) != len(class_names):
    raise InputError(
      f'config.loss.class_weights has {len(given)} numbers for the '
      f'{len(class_names)} classes {", ".join(class_names)}.'
    )
  terms = options['name'].split('+')
  if weighting != 'none' and not {*terms} & {*_WEIGHTED}:
    raise InputError(
      f'config.loss.name={options["name"]!r} has no class weights, so '
      f"config.loss.weighting={weighting!r} would do nothing; use 'none', or "
      f'one of the losses {", ".join(_WEIGHTED)}, ce+dice.'
    )


def with_class_weights(
  config: Config,
  dataset: Dataset,
  workdir: epath.Path,
  labeled_limit: int = 0,
) -> Config:
  """Fills in loss.class_weights of a config if loss.weighting is 'auto'.

  The median-frequency weights of the training split. A run reads the split once
  for each value of `labeled_limit`: the stages of `workdir` store the weights
  in their config.json.
  """
  if config.loss.weighting != 'auto':
    return config
  weights = _stored_weights(workdir, labeled_limit)
  if weights is None:
    source, threads = dataset.splits['train'], config.data.threads
    rows = frequencies.count_labels(
      source, dataset.num_classes, threads, 'class weights'
    )
    exact = frequencies.median_frequency_weights(rows)
    weights = tuple(float(f'{x:.4g}') for x in exact)
  pairs = zip(dataset.class_names, weights, strict=True)
  named = ', '.join(f'{name} {x:g}' for name, x in pairs)
  print(f'class weights: {named}', flush=True)
  config = config.copy_and_resolve_references()
  config.loss.class_weights = weights
  return config


def _stored_weights(
  workdir: epath.Path, labeled_limit: int
) -> tuple[float, ...] | None:
  """Weights stored by another stage, or by this one before a restart."""
  for path in sorted(workdir.glob('*/config.json')):
    # A damaged file is going to be overwritten.
    with contextlib.suppress(ValueError, KeyError):
      info = json.loads(path.read_text())
      options = info.get('loss', {})
      if info[loading.role_of(info)]['labeled_limit'] != labeled_limit:
        continue
      if options.get('weighting') == 'auto' and options['class_weights']:
        return tuple(options['class_weights'])
  return None
