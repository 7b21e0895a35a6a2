# SPDX-License-Identifier: Apache-2.0
"""Whole runs of networks that compile fast: files, resume, refusals."""

import json
import math
import shutil

import numpy as np
import pytest
import small_run
import test_loggers

from attnfd_jax.errors import InputError
from attnfd_jax.inference import evaluation
from attnfd_jax.runs import logs
from attnfd_jax.training import experiment, loop

pytestmark = pytest.mark.usefixtures('kept_programs')
STAGES = small_run.STAGES


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of three stages, never interrupted."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  experiment.train(small_run.make_config(), workdir)
  return workdir


def test_files_of_a_run(finished):
  names = {path.name for path in finished.iterdir()}
  files = {'.lock', 'config.json', 'results.json', 'report.html'}
  assert names == {*files, *STAGES}
  table = json.loads((finished / 'results.json').read_text())
  assert set(table) == set(STAGES)
  for stage in STAGES:
    directory = finished / stage
    gates = {'attention.safetensors'} if stage == 'distill' else set()
    assert {path.name for path in directory.iterdir()} == gates | {
      'checkpoints',
      'config.json',
      'environment.json',
      'log.txt',
      'metrics.jsonl',
      'pictures.npz',
      'result.json',
    }
    result = json.loads((directory / 'result.json').read_text())
    assert table[stage] == result
    environment = json.loads((directory / 'environment.json').read_text())
    assert environment['versions'] == result['versions']
    info = json.loads((directory / 'config.json').read_text())
    assert info['stage'] == stage and len(info['class_names']) == 9
    assert 'finished: val mIoU' in (directory / 'log.txt').read_text()


@pytest.mark.parametrize('stage', STAGES)
def test_result_keys(finished, stage):
  result = json.loads((finished / stage / 'result.json').read_text())
  wanted = (
    'stage dataset split protocol miou pixel_accuracy class_accuracy fw_iou '
    'iou_per_class step seed params gflops train_seconds step_seconds device '
    'versions pretrained'
  ).split()
  if stage == 'distill':
    wanted += ['method', 'teacher']
  assert set(wanted) <= set(result)
  assert (result['stage'], result['dataset']) == (stage, 'scenes')
  assert (result['split'], result['protocol']) == ('val', 'native')
  assert 0 <= result['miou'] <= 1 and len(result['iou_per_class']) == 9
  assert result['step'] in (2, 4)
  assert result['train_seconds'] > 0 and result['gflops'] > 0
  if stage == 'distill':
    teacher = json.loads((finished / 'teacher' / 'result.json').read_text())
    assert result['teacher'] == {
      'name': 'resnet18 x0.5',
      'miou': teacher['miou'],
      'source': 'this run',
    }
    method = result['method']
    assert (method['name'], method['title']) == ('attnfd', 'AttnFD')
    options = method['options']['attnfd']
    assert (options['weight'], options['teacher_attention']) == (0.3, 'in_path')


@pytest.mark.parametrize('stage', STAGES)
def test_every_step_is_logged_once(finished, stage):
  records = small_run.read_lines(finished / stage)
  assert [(r['kind'], r['step']) for r in records] == [
    ('train', 1),
    ('train', 2),
    ('eval', 2),
    ('train', 3),
    ('train', 4),
    ('eval', 4),
  ]
  # The first step compiles: its time is not that of training.
  assert ['step_seconds' in r for r in records] == [
    False,
    *(r['kind'] == 'train' for r in records[1:]),
  ]
  scores = [r for r in records if r['kind'] == 'eval']
  terms = {'loss', 'ce', 'grad_norm', 'learning_rate'}
  if stage == 'distill':
    terms |= {'attnfd', 'attnfd_decoder'}
  for record in records:
    if record['kind'] == 'train':
      assert terms <= set(record)
      assert all(math.isfinite(record[term]) for term in terms)
  best = max(scores, key=lambda record: record['miou'])
  result = json.loads((finished / stage / 'result.json').read_text())
  # The kept checkpoint is the best one and scores what it scored then.
  assert (result['step'], result['miou']) == (best['step'], best['miou'])


def test_pictures_and_attention(finished):
  with np.load(finished / 'distill' / 'pictures.npz') as pictures:
    shapes = {name: pictures[name].shape for name in pictures.files}
  assert shapes['image'] == (1, 32, 48, 3)
  assert shapes['label'] == shapes['prediction'] == (1, 32, 48)
  for role in ('student', 'teacher'):
    assert shapes[f'map_{role}_decoder'] == (1, 8, 12)


def test_student_and_distilled_student_start_alike(finished):
  """So that the two rows of the table differ by the loss alone."""
  first = [
    small_run.read_lines(finished / s)[0]['ce'] for s in ('student', 'distill')
  ]
  # One start, one batch and one dropout, in two programs.
  np.testing.assert_allclose(*first, rtol=1e-5, atol=0)


def test_again_skips_everything(finished, capsys, monkeypatch):
  monkeypatch.setattr(experiment, 'make_stage', None)
  before = {path: path.stat().st_mtime_ns for path in finished.glob('*/**/*')}
  table = experiment.train(small_run.make_config(), finished)
  assert table == json.loads((finished / 'results.json').read_text())
  assert capsys.readouterr().out.count('already finished, skipped') == 3
  after = {path: path.stat().st_mtime_ns for path in finished.glob('*/**/*')}
  assert after == before


@pytest.mark.slow
def test_an_interrupted_run_ends_as_the_whole_one(
  finished, tmp_path, monkeypatch
):
  """Killed in the second epoch of the last stage, after a checkpoint; the
  stages before show that one seed gives one result, bit for bit.
  """
  workdir = tmp_path / 'interrupted'
  # Each stage scores twice, and once more at its end.
  interrupt = small_run.interrupting(evaluation.evaluate, 8)
  monkeypatch.setattr(evaluation, 'evaluate', interrupt)
  with pytest.raises(KeyboardInterrupt):
    experiment.train(small_run.make_config(), workdir)
  assert not (workdir / 'distill' / 'result.json').exists()
  assert [r['step'] for r in small_run.read_lines(workdir / 'distill')] == [
    1,
    2,
    2,
    3,
    4,
  ]
  with (workdir / 'distill' / 'metrics.jsonl').open('a') as file:
    file.write('{"kind": "tra')  # A process may be killed while it writes.
  config = small_run.make_config()
  # What does not change the result may change.
  config.data.threads = 1
  config.eval.batch_size = 4
  config.loggers = ('tensorboard',)
  experiment.train(config, workdir)
  shown = test_loggers.shown_by_tensorboard(workdir / 'distill')
  told = test_loggers.told(workdir / 'distill')
  assert shown == pytest.approx(told, rel=1e-6, nan_ok=True)
  log = (workdir / 'distill' / 'log.txt').read_text()
  assert 'resumed from step 2' in log
  for stage in STAGES:
    small_run.assert_same_run(workdir / stage, finished / stage)


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('seed', 1, r'started with another config \(seed: 0 -> 1\)'),
    ('optim.lr', 0.5, r'optim.lr: 0.05 -> 0.5; student.lr: 0.05 -> 0.5; teach'),
    ('data.flip', 0.0, r'\(data.flip: 0.5 -> 0.0\)\. Use another --workdir'),
  ],
  ids=['seed', 'lr', 'flip'],
)
def test_another_config_needs_another_folder(finished, key, value, message):
  before = (finished / 'config.json').read_text()
  config = small_run.make_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(InputError, match=message):
    experiment.train(config, finished)
  assert (finished / 'config.json').read_text() == before


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('distill.method', 'atnfd', "Unknown method 'atnfd'.*mean 'attnfd'"),
    ('student.backbone', 'resnet8', "Unknown backbone 'resnet8'.*mean 'resn"),
    ('teacher.backbone', 'vgg', "Unknown backbone 'vgg'"),
    ('student.output_stride', 32, 'output_stride=32 must be 8 or 16'),
    (
      'distill.attnfd.norm_scope',
      'layer',
      "norm_scope='layer' must be one of batch",
    ),
    (
      'distill.attnfd.reduction',
      'sum',
      "reduction='sum' must be one of batchmean",
    ),
    (
      'distill.attnfd.student_attention',
      'all',
      "student_attention='all' must be",
    ),
    ('distill.teacher_bn', 'eval', "teacher_bn='eval' must be one of"),
    (
      'distill.attnfd.connector_schedule',
      'never',
      "connector_schedule='never' must be one of always, first",
    ),
    ('optim.dtype', 'float16', "dtype='float16' must be one of float32, bfl"),
    ('optim.name', 'adam', r"name='adam' must be one of sgd, adamw\."),
    ('optim.lr', float('nan'), 'config.optim.lr=nan must be'),
    ('loggers', ('wandb', 'mlflow'), r"loggers=\('wandb', 'mlflow'\) must be"),
    ('data.name', 'camvit', "Unknown data set 'camvit'.*mean 'camvid'"),
    ('data.name', 'camvid', 'no such folder.*config.data.root'),
    ('eval.test_split', 'test', 'scenes has no images in test; have train, v'),
    ('mesh.data', 5, 'config.mesh.data=5 .*there are 4 devices.*=-1 takes'),
    ('mesh.data', 0, 'config.mesh.data=0 .*there are 4 devices'),
    ('batch_size', 6, 'config.batch_size=6 must be a multiple of the 4 device'),
    ('optim.accumulate', 2, 'multiple of the 4 devices times optim.accumulat'),
  ],
  ids=str,
)
def test_refused_before_anything_is_done(tmp_path, key, value, message):
  config = small_run.make_config()
  config.update_from_flattened_dict({key: value})
  workdir = tmp_path / 'new'
  with pytest.raises(InputError, match=message) as error:
    experiment.train(config, workdir)
  assert '\n' not in str(error.value)
  assert not workdir.exists()


def test_distilling_needs_a_teacher(tmp_path):
  config = small_run.make_config()
  config.stages = ('distill',)
  with pytest.raises(InputError, match=r'teacher: no config\.json'):
    experiment.train(config, tmp_path / 'run')


def test_a_teacher_of_other_classes_is_refused(finished, tmp_path):
  teacher = tmp_path / 'teacher'
  shutil.copytree(finished / 'teacher', teacher)
  info = json.loads((teacher / 'config.json').read_text())
  info['class_names'][0] = 'heaven'
  (teacher / 'config.json').write_text(json.dumps(info))
  config = small_run.make_config()
  config.stages, config.teacher.checkpoint = ('distill',), str(teacher)
  with pytest.raises(InputError, match="has 9 classes.*'heaven'"):
    experiment.train(config, tmp_path / 'run')


def test_a_loss_that_is_not_finite_stops(tmp_path, finished):
  """In a run: the checkpoints before it stay, and say so."""
  workdir = tmp_path / 'run'
  shutil.copytree(finished, workdir)
  shutil.rmtree(workdir / 'student')
  config = small_run.make_config()
  config.stages = ('student',)
  config.student.lr = 1e30
  (workdir / 'config.json').unlink()
  message = (
    r'Loss is not finite at step 2: .*ce nan.*Images: scene \d+, .*no che'
  )
  with pytest.raises(loop.NonFiniteLoss, match=message):
    experiment.train(config, workdir)
  assert not (workdir / 'student' / 'result.json').exists()
  # No network with such weights is kept.
  assert not small_run.stored_states(workdir / 'student')
  assert small_run.stored_states(workdir / 'teacher')


def test_durations():
  texts = [logs.duration(s) for s in (0, 59.6, 3599, 3600, -1)]
  assert texts == ['00:00', '01:00', '59:59', '1:00:00', '00:00']
