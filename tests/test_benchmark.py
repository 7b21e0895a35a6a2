# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures what it says; broken data end in one line."""

import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import cv2
from data import fixtures
from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest
import xla_flags

from attnfd_jax.benchmarks import data, predict, train
from attnfd_jax.config import default_config, resolve
from attnfd_jax.data import pipeline
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.data.transforms import Augment
from attnfd_jax.distill import METHODS
from attnfd_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
CAMVID = ROOT.parent / 'shared' / 'camvid'


def benchmark(*arguments):
  """The command as a user has it, on one CPU device.

  Warnings are no errors here: ml_collections has some on loading a config.
  """
  environment = os.environ | {
    'XLA_FLAGS': xla_flags.quick(),
    'PYTHONPATH': str(ROOT),
  }
  return subprocess.run(
    [sys.executable, '-m', 'attnfd_jax.benchmark', *map(str, arguments)],
    capture_output=True,
    text=True,
    env=environment,
    check=False,
  )


def options(**changes):
  config = default_config()
  config.batch_size = 2
  config.data.image_size = (32, 48)
  config.data.train_scenes = config.data.val_scenes = 4
  config.data.base_size, config.data.crop_size = 32, (32, 32)
  config.data.threads = 2
  found = {'config': config, 'rounds': 2, 'seconds': 0.02}
  return ConfigDict(found | changes)


def test_numbers_fit_together(capsys):
  found = data.run(options())
  assert 'round 2' in capsys.readouterr().out
  assert 1e7 < found['peak_memory_bytes'] < 1e11
  # No more seconds than the cores have, but for the clock's steps.
  busy = found['images_per_second'] * found['cpu_seconds_per_image']
  assert 0 < busy < 2 * found['cores']
  assert found['images'] == 4 and found['batch_size'] == 2
  assert found['threads'] == 2 and found['workers'] == 0


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'config': None}, '--config is missing'),
    ({'rounds': 0}, '--rounds=0 must be 1 or more'),
    ({'seconds': float('nan')}, '--seconds=nan must be 1e-09 or more'),
  ],
  ids=['config', 'rounds', 'seconds'],
)
def test_bad_options(changes, message):
  with pytest.raises(InputError, match=message):
    data.run(options(**changes))


def test_last_line_is_json():
  process = benchmark(
    'data',
    f'--config={ROOT}/configs/quickstart.py',
    '--config.data.train_scenes=8',
    '--config.data.val_scenes=2',
    '--config.batch_size=2',
    '--rounds=1',
    '--seconds=0.01',
    '--json',
  )
  assert process.returncode == 0, process.stderr
  found = json.loads(process.stdout.splitlines()[-1])
  assert found['benchmark'] == 'data' and found['images'] == 8
  assert found['images_per_second'] > 0 and 'ratio' not in found
  assert found['versions']['grain'] and found['device'].startswith('1 x CPU')


def test_unknown_commands_are_one_line():
  process = benchmark('dat')
  assert process.returncode == 2 and process.stdout == ''
  (line,) = process.stderr.splitlines()
  assert (
    line.startswith('error: Expected one of train, data, predict')
    and 'got dat' in line
  )


@pytest.mark.parametrize(
  'workers', [0, pytest.param(1, marks=pytest.mark.slow)], ids=str
)
def test_a_bad_pixel_is_one_line(tmp_path, workers):
  """Out of a thread or a process of Grain, with the name of the file."""
  for split in ('train', 'val'):
    for kind in ('images', 'masks'):
      (tmp_path / kind / split).mkdir(parents=True)
    for i in range(4):
      label = np.zeros((40, 48), np.uint8)
      label[3, 4:6] = 7 if (split, i) == ('train', 2) else 1
      Image.fromarray(label).save(tmp_path / 'masks' / split / f'{i}.png')
      image = Image.fromarray(np.stack([label] * 3, -1))
      image.save(tmp_path / 'images' / split / f'{i}.png')
  process = benchmark(
    'data',
    f'--config={ROOT}/configs/folder.py',
    f'--config.data.root={tmp_path}',
    "--config.data.class_names=('a', 'b')",
    '--config.data.crop_size=(32, 32)',
    '--config.batch_size=2',
    f'--config.data.workers={workers}',
  )
  assert process.returncode == 2, process.stderr
  (line,) = process.stderr.splitlines()
  mask = tmp_path / 'masks' / 'train' / '2.png'
  assert line.startswith(f'error: {mask}: ')
  assert '7 (2 pixels)' in line


def test_pipelines_of_others_are_not_waited_for():
  release = threading.Event()
  foreign = threading.Thread(target=release.wait, name='grain-left-open')
  foreign.start()
  measuring = threading.Thread(target=data.run, args=(options(rounds=1),))
  measuring.daemon = True
  measuring.start()
  measuring.join(timeout=60)
  finished = not measuring.is_alive()
  release.set()
  foreign.join()
  assert finished


TRAIN = (
  'train',
  f'--config={ROOT}/configs/cityscapes.py:debug',
  '--batch=4',
  '--height=33',
  '--width=48',
)


@pytest.mark.slow
def test_train_measures_a_step(tmp_path):
  process = benchmark(
    *TRAIN, '--teacher=resnet18', '--steps=3', '--json', f'--trace={tmp_path}'
  )
  assert process.returncode == 0, process.stderr
  found = json.loads(process.stdout.splitlines()[-1])
  assert len(found['step_seconds_all']) == 3
  assert found['images_per_second'] == pytest.approx(4 / found['step_seconds'])
  assert found['batch_size'] == 4 and found['image_size'] == [33, 48]
  share = found['gflops_per_step'] / found['step_seconds']
  assert found['flop_utilization'] == pytest.approx(
    share / found['device_peak_gflops']
  )
  # Weights, their gradients and momentum at least.
  assert found['peak_memory_bytes'] > 1e6
  assert 0 < found['compile_seconds'] < found['seconds_to_first_step']
  assert list(tmp_path.rglob('*.xplane.pb'))


@pytest.mark.parametrize('method', METHODS)
def test_every_method_is_counted(method):
  """Also those that draw at random, as CIRKD from its memories."""
  config = options().config
  config.distill.method = method
  config.data.crop_size = (64, 64)
  config.distill.cirkd.pixel_memory = config.distill.cirkd.region_memory = 20
  for network in (config.teacher, config.student):
    network.backbone, network.width_multiplier = 'resnet18', 0.125
    network.aspp_channels = network.decoder_channels = 8
  flops = train.model_flops(train.make_stage(resolve(config), 3))
  config.distill.method = 'none'
  alone = train.model_flops(train.make_stage(resolve(config), 3))
  assert flops > alone > 0


@pytest.mark.parametrize(
  'wrong, words',
  [
    ('--steps=0', '--steps=0 must be 1 or more'),
    ('--dtype=half', "config.optim.dtype='half'"),
    ('--method=attnfdd', "Did you mean 'attnfd'"),
    ('--student=resnet19', "Did you mean 'resnet18'"),
    ('--teacher_checkpoint=nowhere', 'nowhere'),
  ],
)
def test_train_refuses(wrong, words):
  values = {
    'teacher': '',
    'teacher_checkpoint': '',
    'student': '',
    'method': '',
    'dtype': '',
    'recipe': '',
    'batch': 0,
    'height': 0,
    'width': 0,
    'num_classes': 5,
    'steps': 1,
    'trace': '',
  }
  name, _, value = wrong.removeprefix('--').partition('=')
  values[name] = type(values[name])(value)
  with pytest.raises(InputError, match=re.escape(words)):
    train.run(options(**values))


def test_predict_measures_an_image(capsys):
  config = default_config()
  config.student.width_multiplier = 0.125
  config.student.aspp_channels = config.student.decoder_channels = 8
  values = {
    'config': config,
    **dict.fromkeys(('teacher', 'teacher_checkpoint', 'student', 'method'), ''),
    **{'dtype': '', 'recipe': '', 'batch': 0, 'num_classes': 5, 'steps': 3},
    **{'height': 40, 'width': 56},
  }
  found = predict.run(ConfigDict(values))
  assert found['image_size'] == [40, 56] and len(found['step_seconds_all']) == 3
  assert found['step_seconds'] in found['step_seconds_all']
  assert 'resnet18 x0.125, 40 x 56' in capsys.readouterr().out
  with pytest.raises(InputError, match='--batch=2'):
    predict.run(ConfigDict(values | {'batch': 2}))


@functools.cache
def load_compare(name='compare'):
  path = ROOT / 'experiments' / 'speed' / f'{name}.py'
  spec = importlib.util.spec_from_file_location(f'speed_{name}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_ratios_are_of_the_same_round(monkeypatch):
  """Without PyTorch: what the two programs would print."""
  compare = load_compare()
  ours, peers = iter((1.0, 2.0, 4.0)), iter((2.0, 6.0, 16.0))

  def last_json(command):
    seconds = next(peers if 'peer.py' in str(command) else ours)
    return {'step_seconds': seconds, 'peak_memory_bytes': None}

  monkeypatch.setattr(compare, 'last_json', last_json)
  monkeypatch.setattr(sys, 'argv', ['compare.py', '--recipes=clean'])
  rounds = compare.compare('resnet18', ['authors'], compare.parse(gpu=False))
  *_, found = rounds
  assert found['ratios'] == {
    'clean, authors': {'median': 3.0, 'lowest': 2.0, 'highest': 4.0}
  }


def pil_augment(record, seed, **changes):
  compare_data = load_compare('compare_data')
  augment = compare_data.PilAugment(Augment(32, (32, 40), **changes))
  record = {key: Image.fromarray(value) for key, value in record.items()}
  return augment.random_map(record, np.random.default_rng(seed))


def make_record(h, w):
  rng = np.random.default_rng(0)
  return {
    'image': rng.integers(0, 256, (h, w, 3), np.uint8),
    'label': rng.integers(0, 5, (h, w), np.uint8),
  }


def test_the_pil_form_is_the_recipe():
  still = {'flip': 0.0, 'blur': 0.0, 'scale_range': (1.0, 1.0)}
  record = make_record(32, 36)
  found = pil_augment(record, 0, label_fill=7, **still)
  assert found['image'].dtype == np.float32
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  image = np.zeros((32, 40, 3))
  image[:, :36] = record['image'] / 255
  np.testing.assert_allclose(found['image'], (image - mean) / std, atol=1e-5)
  np.testing.assert_array_equal(found['label'][:, :36], record['label'])
  assert np.all(found['label'][:, 36:] == 7)
  # A flip comes before the padding.
  flipped = pil_augment(record, 0, **still | {'flip': 1.0})
  np.testing.assert_array_equal(
    flipped['label'][:, :36], record['label'][:, ::-1]
  )
  # Blur leaves the label.
  blurred = pil_augment(record, 1, **still | {'blur': 1.0})
  np.testing.assert_array_equal(blurred['label'][:, :36], record['label'])
  assert np.std(blurred['image'][:, :36]) < np.std(found['image'][:, :36])


def test_the_pil_form_scales_and_crops():
  record = make_record(32, 48)
  shares = []
  for seed in range(50):
    found = pil_augment(record, seed)
    assert found['image'].shape == (32, 40, 3)
    assert found['label'].shape == (32, 40)
    shares.append(np.mean(found['label'] != 255))
  assert min(shares) < 0.4 and max(shares) == 1


def test_pil_reads_the_same_records(tmp_path):
  fixtures.make_camvid(tmp_path)
  config = default_config().data
  config.update({'name': 'camvid', 'root': str(tmp_path)})
  source = load_dataset(config).splits['train']
  with pytest.MonkeyPatch.context() as patch:
    found = load_compare('compare_data').PilSource(source)
    patch.setattr(cv2, 'imdecode', None)  # By Pillow alone.
    records = [found[i] for i in range(len(found))]
  for i, record in enumerate(records):
    for key, value in source[i].items():
      np.testing.assert_array_equal(np.asarray(record[key]), value)


def test_both_pipelines_are_of_the_recipe_of_the_authors(capsys):
  config = options().config
  config.data.photometric = 0.5
  seen = []
  original = pipeline.make_augment

  def spy(config):
    seen.append(original(config).photometric)
    return original(config)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, 'make_augment', spy)
    found = load_compare('compare_data').compare(config, rounds=2, seconds=0.02)
  assert set(seen) == {0.0} and len(seen) == 2
  assert config.data.photometric == 0.5
  assert 'median ratio: ' in capsys.readouterr().out
  assert len(found['rounds']) == 2
  for x in found['rounds']:
    ratio = x['images_per_second'] / x['pil_images_per_second']
    assert x['ratio'] == pytest.approx(ratio)
    assert x['cpu_ratio'] > 0


@pytest.mark.slow
@pytest.mark.skipif(not CAMVID.is_dir(), reason=f'no CamVid at {CAMVID}')
def test_camvid_within_its_memory(tmp_path):
  command = (
    *(sys.executable, ROOT / 'experiments' / 'speed' / 'compare_data.py'),
    *(f'--config={ROOT}/configs/camvid.py', f'--root={CAMVID}', '--batch=8'),
    *('--rounds=3', '--seconds=0.5', f'--output={tmp_path}/found.json'),
  )
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  subprocess.run(command, check=True, env=environment)
  found = json.loads((tmp_path / 'found.json').read_text())
  assert found['peak_memory_bytes'] < 1.5e9
  # The bar is 4 on a machine without other work.
  assert found['ratio'] > 1.5 and found['cpu_ratio'] > 1.5
