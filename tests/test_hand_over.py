# SPDX-License-Identifier: Apache-2.0
"""`export --format=folder`: what is handed over says and computes the same."""

import re
import shutil

import jax
import numpy as np
import pytest
import tiny_run
import yaml

import attnfd_jax
from attnfd_jax.benchmarks import train
from attnfd_jax.errors import InputError
from attnfd_jax.exporting import folder
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.runs import loading, logs


@pytest.fixture(scope='module')
def stage(tmp_path_factory):
  return tiny_run.make_stage(tmp_path_factory)


@pytest.fixture(scope='module')
def handed(stage, tmp_path_factory):
  target = tmp_path_factory.mktemp('handed') / 'model'
  return target, folder.export_folder(stage, target)


def test_it_loads_back_bit_for_bit(stage, handed):
  target, _ = handed
  network, ours, info = attnfd_jax.load(stage)
  again, theirs, described = attnfd_jax.load(target)
  assert again == network
  jax.tree.map(np.testing.assert_array_equal, dict(ours), theirs)
  assert described['checkpoint_step'] == info['checkpoint_step']
  np.testing.assert_array_equal(described['palette'], info['palette'])


def test_it_predicts_the_same(stage, handed):
  image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
  (ours,) = attnfd_jax.predict([image], stage)
  (theirs,) = attnfd_jax.predict([image], handed[0])
  np.testing.assert_array_equal(ours, theirs)


def test_it_is_complete_and_says_so(handed):
  target, lines = handed
  names = sorted(x.name for x in target.iterdir())
  assert names == [
    *('README.md', 'config.json', 'model.safetensors', 'pictures'),
    'student.onnx',
  ]
  assert any('same class at 100' in line for line in lines)
  assert f'{target}: {", ".join(names)}' in lines
  assert not [x for x in target.parent.iterdir() if x != target]


def test_the_card_has_the_scores_in_the_order_of_ids(stage, handed):
  text = (handed[0] / 'README.md').read_text()
  result = logs.read_json(stage / 'result.json')
  assert f'mIoU {logs.percent(result["miou"])} % on val' in text
  names = loading.load_network(stage)[2]['class_names']
  rows = re.findall(r'^\| (\d+) \| (\w+) \| (\S+) \|$', text, re.M)
  assert rows == [
    (str(i), name, logs.percent(result['iou_per_class'][name]))
    for i, name in enumerate(names)
  ]
  head = yaml.safe_load(text.split('---')[1])
  assert head['pipeline_tag'] == 'image-segmentation'
  assert head['license_name'] == 'fill-in'


def test_the_card_of_a_distilled_student(stage):
  _, _, info = loading.load_network(stage)
  result = logs.read_json(stage / 'result.json') | {
    'method': {'name': 'kd', 'title': 'KD'},
    'teacher': {'name': 'resnet18', 'miou': 0.5},
    'labeled_images': 16,
    'unlabeled_images': 100,
    'test': {'miou': 0.25},
  }
  text = folder.make_card(info, result, 0.125)
  assert 'distilled from resnet18 (val mIoU 50.00 %)' in text
  assert '; 25.00 % on test' in text
  assert 'trained on labels alone: 12.50 %' in text
  assert 'scenes, 16 labeled images and 100 without labels' in text
  assert 'predictions.png' not in text


def test_no_place_of_this_machine_is_in_it(stage, tmp_path):
  """Also of a student with gates at some taps, outside its forward path."""
  copied = tmp_path / 'student'
  shutil.copytree(stage, copied)
  network, variables, _ = loading.load_network(stage)
  gated = network.clone(in_path_attention=True)
  shapes = networks.abstract_variables(gated)
  _, gates = torch_networks.split_gates(train.random_variables(shapes, 0))
  gates = {part: {'aspp': taps['aspp']} for part, taps in gates.items()}
  loading.write_attention(copied, gates)
  config = logs.read_json(copied / 'config.json')
  config['data']['root'] = str(tmp_path / 'secret' / 'images')
  logs.write_json(copied / 'config.json', config)
  result = logs.read_json(copied / 'result.json')
  result['pretrained'] = str(tmp_path / 'secret' / 'first.pth')
  logs.write_json(copied / 'result.json', result)
  folder.export_folder(copied, tmp_path / 'model')
  for name in ('config.json', 'README.md'):
    assert str(tmp_path) not in (tmp_path / 'model' / name).read_text()
  assert (
    '| Initial weights | first.pth |'
    in (tmp_path / 'model' / 'README.md').read_text()
  )
  _, again, info = loading.load_network(tmp_path / 'model')
  assert info['data']['root'] == ''
  jax.tree.map(np.testing.assert_array_equal, dict(variables), again)


def test_checkpoints_come_before_a_file_beside_them(stage, handed, tmp_path):
  copied = tmp_path / 'student'
  shutil.copytree(stage, copied)
  (copied / 'model.safetensors').write_bytes(b'of something else')
  _, variables, _ = loading.load_network(copied)
  _, ours, _ = loading.load_network(stage)
  jax.tree.map(np.testing.assert_array_equal, dict(ours), dict(variables))


def test_what_exists_stays(stage, tmp_path):
  (tmp_path / 'model').mkdir()
  with pytest.raises(InputError, match='exists; name another folder'):
    folder.export_folder(stage, tmp_path / 'model')
  assert not list((tmp_path / 'model').iterdir())


def test_nothing_half_written(stage, tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(folder, 'make_card', fail)
  with pytest.raises(OSError, match='No space'):
    folder.export_folder(stage, tmp_path / 'model')
  assert not list(tmp_path.iterdir())


def test_a_stage_without_scores_is_refused(stage, tmp_path):
  copied = tmp_path / 'student'
  shutil.copytree(stage, copied)
  (copied / 'result.json').unlink()
  with pytest.raises(InputError, match='no result.json'):
    folder.export_folder(copied, tmp_path / 'model')


def test_damaged_weights_are_one_line(handed, tmp_path):
  copied = tmp_path / 'model'
  shutil.copytree(handed[0], copied)
  with pytest.raises(InputError, match='has the weights of step'):
    loading.load_network(copied, step=12345)
  data = (copied / 'model.safetensors').read_bytes()
  (copied / 'model.safetensors').write_bytes(data[: len(data) // 2])
  with pytest.raises(InputError, match='model.safetensors'):
    loading.load_network(copied)


def test_other_options_are_refused():
  given = {'checkpoint': 'a', 'output': 'b', 'images': None, 'num_images': 8}
  given |= {'allow_code': False, 'uint8': False, 'weights': 'float32'}
  assert folder.options_of(given)['output'] == 'b'
  for name, value in (('uint8', True), ('quantize', 'int8')):
    with pytest.raises(
      InputError, match=f'--{name} is not for --format=folder'
    ):
      folder.options_of(given | {name: value})
