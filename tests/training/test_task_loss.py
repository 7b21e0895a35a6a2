# SPDX-License-Identifier: Apache-2.0
"""The group `loss`: which function it makes, and its class weights."""

import json

import jax
import numpy as np
import pytest

from attnfd_jax import losses
from attnfd_jax.config import default_config, resolve
from attnfd_jax.data import frequencies
from attnfd_jax.data.sources import Dataset
from attnfd_jax.errors import InputError
from attnfd_jax.training import task_loss

NAMES = ('road', 'car', 'sky')


class Source:
  """Labels alone; counts how often one is read."""

  def __init__(self, labels):
    self.labels, self.reads = labels, 0

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    self.reads += 1
    return {'label': self.labels[index]}


@pytest.fixture
def dataset():
  generator = np.random.default_rng(0)
  labels = generator.choice([0, 0, 0, 0, 1, 2, 2, 255], (3, 8, 9))
  labels[1, labels[1] == 1] = 0
  source = Source(labels.astype(np.uint8))
  return Dataset('tiny', NAMES, np.zeros((3, 3), np.uint8), {'train': source})


def make_config(**options):
  config = default_config()
  for key, value in options.items():
    config.loss[key] = value
  return resolve(config)


def draw():
  generator = np.random.default_rng(0)
  logits = generator.normal(size=(2, 5, 4, 3)).astype(np.float32)
  labels = generator.integers(0, 3, (2, 5, 4)).astype(np.uint8)
  labels[0, 0] = 255
  return logits, labels


def assert_terms(options, expected):
  """The terms of a group `loss` for drawn pixels, bit by bit."""
  found = task_loss.make_task_loss(options)(*draw())
  assert list(found) == options.name.split('+')
  for ours, theirs in zip(found.values(), expected, strict=True):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_default_is_the_cross_entropy_itself():
  options = make_config().loss
  assert_terms(options, [losses.softmax_cross_entropy(*draw())])
  assert task_loss.is_plain(options)


WEIGHTS = {'weighting': 'given', 'class_weights': (1.0, 2.5, 0.0)}


@pytest.mark.parametrize(
  ('options', 'expected'),
  [
    (
      WEIGHTS,
      [lambda *x: losses.softmax_cross_entropy(*x, class_weights=(1, 2.5, 0))],
    ),
    (
      {'name': 'ohem', 'ohem_threshold': 0.3, 'ohem_min_kept': 0.4},
      [lambda *x: losses.ohem_cross_entropy(*x, threshold=0.3, min_kept=0.4)],
    ),
    (
      WEIGHTS | {'name': 'ohem'},
      [lambda *x: losses.ohem_cross_entropy(*x, class_weights=(1, 2.5, 0))],
    ),
    (
      WEIGHTS | {'name': 'focal', 'focal_gamma': 1.5},
      [lambda *x: losses.focal_loss(*x, gamma=1.5, class_weights=(1, 2.5, 0))],
    ),
    ({'name': 'dice'}, [losses.dice_loss]),
    (
      WEIGHTS | {'name': 'ce+dice'},
      [
        lambda *x: losses.softmax_cross_entropy(*x, class_weights=(1, 2.5, 0)),
        losses.dice_loss,
      ],
    ),
  ],
  ids=['weights', 'ohem', 'ohem_weights', 'focal', 'dice', 'ce+dice'],
)
def test_each_name_and_its_parameters(options, expected):
  options = make_config(**options).loss
  terms = [loss(*draw()) for loss in expected]
  assert_terms(options, terms)
  assert not task_loss.is_plain(options)
  plain = losses.softmax_cross_entropy(*draw()).value
  assert sum(term.value for term in terms) != plain


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'name': 'lovasz'}, r"loss\.name='lovasz' must be one of ce, ohem, focal"),
    ({'weighting': 'yes'}, r"loss\.weighting='yes' must be one of none, given"),
    ({'weighting': 'given'}, r"loss\.weighting='given' needs a number for eac"),
    (
      {'class_weights': (1.0, 2.0)},
      r"class_weights=\(1.0, 2.0\) needs .*not 'none'",
    ),
    (WEIGHTS | {'class_weights': (1, -1)}, 'class_weights=-1 must be from 0'),
    (WEIGHTS | {'class_weights': ('a',)}, 'class_weights=a must be from 0'),
    (WEIGHTS | {'class_weights': (float('nan'),)}, 'weights=nan must be from'),
    (WEIGHTS | {'class_weights': (float('inf'),)}, 'weights=inf must be from'),
    (WEIGHTS | {'class_weights': (0, 0.0)}, 'a number for each class, not all'),
    (
      WEIGHTS | {'name': 'dice'},
      "name='dice' has no class weights",
    ),
    ({'ohem_threshold': 0.0}, 'ohem_threshold=0.0 must be from 1e-30 to 1'),
    ({'ohem_min_kept': 1.5}, 'ohem_min_kept=1.5 must be from 0 to 1'),
    ({'focal_gamma': -1.0}, 'focal_gamma=-1.0 must be 0 or more'),
  ],
  ids=str,
)
def test_wrong_values_are_named(options, message):
  options = make_config(**options).loss
  with pytest.raises(InputError, match=rf'^config\..*{message}'):
    task_loss.check(options, ('road', 'car', 'sky'))


def test_counted_weights_are_not_given(dataset):
  config = make_config(weighting='auto', class_weights=(1.0, 2.0, 3.0))
  with pytest.raises(InputError, match="needs loss.weighting=given, not 'auto"):
    task_loss.check(config.loss, dataset.class_names)


def test_given_weights_must_be_as_many_as_classes(dataset, tmp_path):
  config = make_config(weighting='given', class_weights=(1.0, 2.0))
  message = r'class_weights has 2 numbers for the 3 classes road, car, sky'
  with pytest.raises(InputError, match=message):
    task_loss.check(config.loss, dataset.class_names)
  config = make_config(**WEIGHTS)
  assert task_loss.with_class_weights(config, dataset, tmp_path) is config
  assert dataset.splits['train'].reads == 0


def by_hand(labels):
  """median(f) / f, f over the images with the class."""
  shares = []
  for c in range(3):
    images = [label for label in labels if np.any(label == c)]
    found = sum(np.sum(label == c) for label in images)
    shares.append(found / sum(label.size for label in images))
  return np.median(shares) / np.array(shares)


def test_auto_weights_are_counted_once_in_a_run(dataset, tmp_path, capfd):
  source = dataset.splits['train']
  config = make_config(weighting='auto')
  first = task_loss.with_class_weights(config, dataset, tmp_path)
  assert source.reads == len(source)
  # Written with four digits.
  np.testing.assert_allclose(
    first.loss.class_weights, by_hand(source.labels), rtol=1e-3
  )
  assert config.loss.class_weights == () and first.is_locked
  assert first.batch_size == config.batch_size
  assert capfd.readouterr().out.startswith('class weights: road ')
  # As a stage writes it down; the next one does not read the data again.
  (tmp_path / 'teacher').mkdir()
  info = json.loads(first.to_json_best_effort()) | {'stage': 'teacher'}
  (tmp_path / 'teacher' / 'config.json').write_text(json.dumps(info))
  (tmp_path / 'older').mkdir()
  (tmp_path / 'older' / 'config.json').write_text(json.dumps({'seed': 0}))
  again = task_loss.with_class_weights(config, dataset, tmp_path)
  assert again.loss.class_weights == first.loss.class_weights
  assert source.reads == len(source)
  expected = losses.softmax_cross_entropy(
    *draw(), class_weights=first.loss.class_weights
  )
  assert_terms(again.loss, [expected])
  # A role that has other labels counts them.
  task_loss.with_class_weights(config, dataset, tmp_path, labeled_limit=2)
  assert source.reads == 2 * len(source)


def test_auto_weights_equal_those_of_the_frequencies(dataset, tmp_path):
  rows = frequencies.count_labels(dataset.splits['train'], 3, 2)
  expected = frequencies.median_frequency_weights(rows)
  config = make_config(weighting='auto', name='focal')
  found = task_loss.with_class_weights(config, dataset, tmp_path)
  np.testing.assert_allclose(found.loss.class_weights, expected, rtol=1e-3)
