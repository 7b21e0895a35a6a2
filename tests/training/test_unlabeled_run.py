# SPDX-License-Identifier: Apache-2.0
"""Runs whose distilled student also sees images without labels."""

import json

import numpy as np
import pytest
import small_run

from attnfd_jax.data import pairs
from attnfd_jax.errors import InputError
from attnfd_jax.inference import evaluation
from attnfd_jax.training import experiment, task_loss

pytestmark = pytest.mark.usefixtures('kept_programs')


def make_config(**data):
  """4 of the 8 scenes have labels for the student."""
  config = small_run.make_config()
  config.data.unlabeled = 'rest'
  config.student.labeled_limit = 4
  config.distill.attnfd.connector_schedule = 'always'
  for key, value in data.items():
    config.data[key] = value
  return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  experiment.train(make_config(), workdir)
  return workdir


def test_which_stage_sees_what(finished):
  logs = {x: (finished / x / 'log.txt').read_text() for x in small_run.STAGES}
  assert 'label' not in logs['teacher']
  assert '4 labeled images (labeled_limit=4)' in logs['student']
  line = '4 labeled and 4 unlabeled images; 2 of the 4 images of a batch are '
  line += 'unlabeled'
  assert line in logs['distill']
  # All images make the epochs: with few labels there are as many steps.
  steps = {x: small_run.read_lines(finished / x)[-1]['step'] for x in logs}
  assert steps == {'teacher': 4, 'student': 4, 'distill': 4}
  results = json.loads((finished / 'results.json').read_text())
  assert {
    x: (results[x]['labeled_images'], results[x]['unlabeled_images'])
    for x in results
  } == {'teacher': (8, 0), 'student': (4, 0), 'distill': (4, 4)}


def test_a_student_is_as_without_unlabeled_images(finished, tmp_path):
  config = make_config(unlabeled='')
  config.stages = ('student',)
  experiment.train(config, tmp_path)
  small_run.assert_same_run(tmp_path / 'student', finished / 'student')


def test_resumes_bit_for_bit(finished, tmp_path, monkeypatch):
  # Each stage scores twice, and once more at its end.
  interrupt = small_run.interrupting(evaluation.evaluate, 8)
  monkeypatch.setattr(evaluation, 'evaluate', interrupt)
  with pytest.raises(KeyboardInterrupt):
    experiment.train(make_config(), tmp_path)
  assert not (tmp_path / 'distill' / 'result.json').exists()
  experiment.train(make_config(), tmp_path)
  small_run.assert_same_run(tmp_path / 'distill', finished / 'distill')


def test_batches_without_labels_in_parts(tmp_path):
  """With all that looks at labels, and 3 of 4 rows that have none."""
  config = make_config(unlabeled_share=0.75, balanced=0.5)
  config.optim.accumulate, config.batch_size = 2, 8
  config.loss.name, config.loss.weighting = 'ohem', 'auto'
  config.distill.method = 'ifv+kd+pseudo'
  config.distill.ifv.taps = ('decoder',)
  config.distill.pseudo.min_confidence = 0.2
  experiment.train(config, tmp_path)
  for record in small_run.read_lines(tmp_path / 'distill'):
    values = [x for x in record.values() if isinstance(x, float)]
    assert np.isfinite(values).all()
    if record['kind'] == 'train':
      assert record['pseudo_kept'] > 0
  weights = [
    json.loads((tmp_path / x / 'config.json').read_text())['loss']
    for x in small_run.STAGES
  ]
  teacher, student, distill = (x['class_weights'] for x in weights)
  # Of the labels that each role has.
  assert teacher != student == distill


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'student.labeled_limit': 0},
      'config.data.unlabeled=rest: all 8 pairs of train are labeled',
    ),
    (
      {'data.unlabeled': '', 'distill.method': 'pseudo'},
      'pseudo needs unlabeled images, and there are none',
    ),
    ({'data.unlabeled': 'nowhere'}, 'nowhere: not found'),
    ({'student.labeled_limit': -1}, 'config.student.labeled_limit=-1'),
    ({'data.unlabeled_share': 1.5}, 'config.data.unlabeled_share=1.5'),
  ],
)
def test_refusals(tmp_path, change, message):
  config = make_config()
  config.update_from_flattened_dict(change)
  with pytest.raises(InputError, match=message):
    experiment.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name', task_loss.NAMES)
@pytest.mark.parametrize('weights', [(), (1.0, 2.5, 0.3)])
def test_the_task_loss_is_that_of_the_labeled_part(name, weights):
  options = make_config().loss
  options.name = name
  if weights and name != 'dice':
    options.class_weights = weights
  generator = np.random.default_rng(0)
  logits = generator.normal(size=(6, 5, 4, 3)).astype(np.float32)
  labels = generator.integers(0, 3, (6, 5, 4)).astype(np.uint8)
  labels[0, :2] = 255
  unlabeled = np.array([False, True, True, False, True, False])
  labels[unlabeled] = pairs.no_label((5, 4))
  loss_fn = task_loss.make_task_loss(options)
  whole = loss_fn(logits, labels)
  part = loss_fn(logits[~unlabeled], labels[~unlabeled])
  for term in whole:
    np.testing.assert_allclose(
      whole[term].value, part[term].value, rtol=1e-6, atol=0
    )
