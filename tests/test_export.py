# SPDX-License-Identifier: Apache-2.0
"""Files for other programs find what the network finds, or are not left."""

import functools
import json
import os
import subprocess
import sys

from flax import linen as nn
import jax
import numpy as np
from PIL import Image
import pytest
import tiny_run

from attnfd_jax.config import default_config, resolve
from attnfd_jax.data import synthetic
from attnfd_jax.errors import InputError
from attnfd_jax.exporting import agreement, fresh_process, stablehlo, student
from attnfd_jax.models import deeplab, efficientnet_lite, mobilenet_v2
from attnfd_jax.models import network as networks
from attnfd_jax.models.resnet import ResNet
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.runs import conversion, loading

# Fewer blocks of the same kinds compile faster.
SHORT = {
  'resnet': functools.partial(ResNet, (1, 1, 1, 1), False),
  'bottleneck': functools.partial(ResNet, (1, 1, 1, 2), True),
}
STAGES = [
  (expansion, channels, 2 if channels == 24 else 1, strides)
  for expansion, channels, _, strides in mobilenet_v2.STAGES[:-1]
]
# Kernels of 5 after strides that are taken, and after one that is not.
LITE_STAGES = [
  (*form, 2 if form[1] == 5 else 1, strides)
  for *form, _, strides in efficientnet_lite.STAGES
]
NETWORKS = {
  'resnet': {},
  'bottleneck': {'in_path_attention': True},
  'mobilenet_v2': {'output_stride': 8},
  'efficientnet_lite0': {},
}
SHAPES = ((1, 49, 64, 3), (2, 32, 75, 3))


CHANNELS = {
  'width_multiplier': 0.125,
  'aspp_channels': 8,
  'decoder_channels': 8,
  'low_level_channels': 4,
}


@pytest.fixture(scope='module', autouse=True)
def quick_compilation():
  """Programs that run once are not worth optimizing; also in processes."""
  name = 'JAX_DISABLE_MOST_OPTIMIZATIONS'
  jax.config.update(name.lower(), True)
  os.environ[name] = '1'
  yield
  jax.config.update(name.lower(), False)
  del os.environ[name]


@pytest.fixture(autouse=True)
def short_networks(monkeypatch):
  monkeypatch.setattr(deeplab, 'BACKBONES', deeplab.BACKBONES | SHORT)
  monkeypatch.setattr(mobilenet_v2, 'STAGES', STAGES)
  monkeypatch.setattr(efficientnet_lite, 'STAGES', LITE_STAGES)


@pytest.fixture
def make(fill):
  """Name -> narrow network and its variables, of NumPy."""

  def make(name):
    options = CHANNELS | NETWORKS.get(name, {})
    network = deeplab.DeepLabV3Plus(name, 9, **options)
    return network, fill(networks.abstract_variables(network))

  return make


@pytest.fixture
def stage(make, tmp_path_factory):
  """Folder of a stage with two drawn scenes as its val split; not trained."""
  folder = tmp_path_factory.getbasetemp() / 'export'
  if not folder.exists():
    folder.mkdir()
    network, variables = make('resnet18')
    tensors = torch_models.export_torch(variables, backbone='resnet18')
    torch_files.write_safetensors(folder / 'a.safetensors', tensors)
    config = json.loads(resolve(default_config()).to_json_best_effort())
    conversion.import_stage(
      folder / 'a.safetensors', folder / 'stage', config=config
    )
    path = folder / 'stage' / 'config.json'
    info = json.loads(path.read_text())
    info['class_names'] = synthetic.CLASS_NAMES
    info['data'] |= {
      'name': 'scenes',
      'image_size': (32, 48),
      'val_scenes': 2,
      'train_scenes': 1,
    }
    path.write_text(json.dumps(info))
  return folder / 'stage'


class Dots:
  """A network of one 1x1 convolution with `k` classes; compiles fast."""

  def apply(self, variables, image, *, train):
    del train
    return {'logits': image @ variables['kernel'][0, 0]}


def _dots(k):
  generator = np.random.default_rng(0)
  return {'kernel': np.float32(generator.normal(size=(1, 1, 3, k)))}


def _images(shape, seed=0):
  generator = np.random.default_rng(seed)
  return generator.integers(0, 256, shape, np.uint8)


_known = {}


@pytest.fixture
def cases(make):
  """Name -> pairs of images and logits of the network, computed once."""

  def cases(name):
    if name not in _known:
      network, variables = make(name)
      forward = stablehlo.make_forward(network, uint8=True, argmax=False)
      shapes = SHAPES[: 1 if name == 'bottleneck' else 2]
      images = [_images(shape) for shape in shapes]
      _known[name] = [(x, np.asarray(forward(variables, x))) for x in images]
    return _known[name]

  return cases


def _assert_close(found, expected):
  # Norms are parts of kernels, and ASPP sums in another order. Some of these
  # networks have large logits.
  scale = np.max(np.abs(expected))
  np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5)


@pytest.mark.parametrize(
  'name', ['resnet', 'mobilenet_v2', 'efficientnet_lite0']
)
def test_stablehlo_at_any_size(make, cases, name):
  pytest.importorskip('flatbuffers')
  network, variables = make(name)
  forward = stablehlo.make_forward(network, uint8=True, argmax=False)
  data = stablehlo.make_program(forward, variables, uint8=True)
  program = jax.export.deserialize(data)
  assert set(program.platforms) == {'cpu', 'cuda', 'tpu'}
  run = jax.jit(program.call)
  for image, expected in cases(name):
    _assert_close(run(image), expected)


@pytest.mark.parametrize('name', NETWORKS)
def test_onnx_at_any_size(make, cases, name):
  pytest.importorskip('onnx')
  onnxruntime = pytest.importorskip('onnxruntime')
  from attnfd_jax.exporting import onnx_graph as onnx_writer

  network, variables = make(name)
  model = onnx_writer.make_model(
    network, variables, uint8=True, argmax=False, metadata={'short_side': 32}
  )
  session = onnxruntime.InferenceSession(model.SerializeToString())
  properties = session.get_modelmeta().custom_metadata_map
  assert properties == {'short_side': '32'}
  for image, expected in cases(name):
    (found,) = session.run(None, {'image': image})
    _assert_close(found, expected)


@pytest.mark.parametrize('weights', stablehlo.WEIGHTS)
def test_weights_in_fewer_bits(make, weights):
  _, variables = make('resnet18')
  stored = stablehlo.shrink(variables, weights)
  grown = stablehlo.grow(stored)
  bits = {'float32': 0, 'bfloat16': 2.0**-8, 'int8': 1 / 254}[weights]

  def check(before, after):
    assert after.dtype == np.float32
    # Half a step of a channel; norms and biases are exact.
    step = 0.0
    if before.ndim == 4:
      step = bits * np.max(np.abs(before), (0, 1, 2), keepdims=True)
    assert np.all(np.abs(after - before) <= 1.001 * step)

  jax.tree.map(check, variables, grown)
  if weights == 'float32':
    return
  values = stored['params']['classifier']['kernel'].values
  assert values.dtype == weights
  if weights == 'int8':
    # The whole range of each channel is used.
    np.testing.assert_array_equal(np.max(np.abs(values), (0, 1, 2)), 127)


def test_kernels_of_zeros_stay_zeros():
  zeros = {'kernel': np.zeros((1, 1, 2, 3), np.float32)}
  grown = stablehlo.grow(stablehlo.shrink(zeros, 'int8'))
  np.testing.assert_array_equal(grown['kernel'], zeros['kernel'])


def test_small_weights_are_small_in_the_file():
  pytest.importorskip('flatbuffers')
  forward = stablehlo.make_forward(Dots(), uint8=False, argmax=True)
  variables = _dots(10_000)
  sizes = [
    len(
      stablehlo.make_program(
        forward, stablehlo.shrink(variables, x), uint8=False
      )
    )
    for x in stablehlo.WEIGHTS
  ]
  # int8 has a float32 scale for each column of three.
  saved = (sizes[0] - np.array(sizes)) / variables['kernel'].nbytes
  np.testing.assert_allclose(saved, [0, 1 / 2, 3 / 4 - 1 / 3], atol=0.02)


def test_compare():
  logits = np.float32([[[[0.0, 1.0], [3.0, 2.0]]]])
  other = logits + np.float32([0.0, 1.5])
  assert agreement.compare([logits], [logits]) == (0, 3, 1, 2)
  assert agreement.compare([logits], [other]) == (1.5, 3, 0.5, 2)
  ids = logits.argmax(-1).astype(np.uint8)
  assert agreement.compare([ids], [1 - ids]) == (0, 0, 0, 2)
  assert np.isnan(agreement.compare([logits], [logits * np.nan])[0])


def test_stablehlo_needs_jax_and_numpy_alone(tmp_path):
  pytest.importorskip('flatbuffers')
  forward = stablehlo.make_forward(Dots(), uint8=True, argmax=True)
  variables = _dots(5)
  path = tmp_path / 'a.stablehlo'
  path.write_bytes(stablehlo.make_program(forward, variables, uint8=True))
  folder = tmp_path / 'images'
  folder.mkdir()
  np.savez(folder / 'images.npz', _images(SHAPES[0]))
  program = (
    'import runpy, sys\n'
    f'sys.argv[1:] = ["stablehlo", {str(path)!r}, {str(folder)!r}, "{{}}"]\n'
    f'runpy.run_path({fresh_process.__file__!r}, run_name="__main__")\n'
    'found = {"attnfd_jax", "flax", "cv2", "orbax"} & {*sys.modules}\n'
    'assert not found, found\n'
  )
  process = subprocess.run(
    [sys.executable, '-P', '-c', program],
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  with np.load(folder / 'found.npz') as arrays:
    found, _ = arrays.values()
  assert found.dtype == np.uint8
  expected = forward(variables, _images(SHAPES[0]))
  np.testing.assert_array_equal(found, expected)


def test_command(stage, tmp_path):
  pytest.importorskip('flatbuffers')
  path = tmp_path / 'new' / 'a.stablehlo'
  arguments = (f'--checkpoint={stage}', f'--output={path}')
  options = ('--weights=int8', '--uint8', '--argmax')
  process = tiny_run.run_verb('export', *arguments, *options)
  assert process.returncode == 0, process.stderr
  assert [*path.parent.iterdir()] == [path]
  text = process.stdout
  assert 'images of the val split of scenes: same class at ' in text
  assert 'Rounding to int8: same class at ' in text
  assert 'with float32 weights, ' in text
  assert f'{path}: ' in text.splitlines()[-1]
  before = path.read_bytes()
  with pytest.raises(InputError, match='exists; add --overwrite to replace it'):
    student.export_student(stage, path, kind='stablehlo')
  assert path.read_bytes() == before


def test_bad_input_of_the_command_is_one_line(tmp_path):
  process = tiny_run.run_verb('export', '--format=tflite', '--output=a')
  assert (process.returncode, process.stdout) == (2, '')
  (line,) = process.stderr.splitlines()
  assert line.startswith("error: --format='tflite' must be one of stablehlo")


@pytest.mark.parametrize('kind', ['pth', 'onnx'])
def test_files_are_checked_in_a_fresh_process(stage, tmp_path, kind):
  if kind == 'onnx':
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
  path = tmp_path / f'a.{kind}'
  lines = student.export_student(stage, path, kind=kind)
  assert 'largest logit difference ' in lines[1]
  assert [*tmp_path.iterdir()] == [path]
  assert path.stat().st_size > 10_000


@pytest.mark.parametrize('wrong', ['classes', 'nan', 'shape'])
def test_files_that_disagree_are_not_left(stage, tmp_path, monkeypatch, wrong):
  path = tmp_path / 'a.pth'
  path.write_text('of before')

  def run_fresh(kind, path, images, options):
    assert path.stat().st_size > 10_000
    shapes = [(*x.shape[:3], options['num_classes']) for x in images]
    value = {'classes': 0.0, 'nan': np.nan, 'shape': 0.0}[wrong]
    found = [np.full(shape, value, np.float32) for shape in shapes]
    found = [x[:, 1:] for x in found] if wrong == 'shape' else found
    return found, [1.0] * len(images)

  monkeypatch.setattr(agreement, 'run_fresh', run_fresh)
  message = 'The file returns' if wrong == 'shape' else 'no file was writ'
  with pytest.raises(InputError, match=message):
    student.export_student(stage, path, kind='pth', overwrite=True)
  assert [*tmp_path.iterdir()] == [path]
  assert path.read_text() == 'of before'


def test_files_that_cannot_be_loaded(tmp_path):
  path = tmp_path / 'a.stablehlo'
  path.write_bytes(bytes(64))
  with pytest.raises(InputError, match='cannot be run by a fresh process: '):
    agreement.run_fresh('stablehlo', path, [_images(SHAPES[0])], {})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'kind': 'tflite'}, 'must be one of stablehlo, onnx, safetensors, pth'),
    ({'kind': 'pth', 'uint8': True}, '--uint8 needs a program'),
    ({'kind': 'pth', 'argmax': True}, '--argmax needs a program'),
    ({'kind': 'pth', 'weights': 'int8'}, 'is for --format=stablehlo'),
    ({'kind': 'pth', 'weights': 'int4'}, 'must be one of float32'),
    ({'kind': 'pth', 'output': 'a.onnx'}, 'ends in .onnx, but --format is'),
    ({'kind': 'pth', 'output': ''}, '--output is missing'),
    ({'kind': 'pth', 'output': '.'}, 'is a folder'),
    ({'kind': 'pth', 'checkpoint': 'gone'}, 'no config.json'),
    ({'kind': 'pth', 'checkpoint': None}, '--checkpoint is missing'),
    ({'kind': 'pth', 'images': 'gone'}, '--images=gone: no such file'),
  ],
  ids=lambda x: None if isinstance(x, str) else '-'.join(x),
)
def test_refused(stage, tmp_path, monkeypatch, options, message):
  monkeypatch.chdir(tmp_path)
  options = {'checkpoint': stage, 'output': 'a.pth'} | options
  with pytest.raises(InputError, match=message):
    student.export_student(
      options.pop('checkpoint'), options.pop('output'), **options
    )
  assert not [*tmp_path.iterdir()]


def test_extras_are_named(tmp_path, monkeypatch):
  monkeypatch.setattr(student.importlib.util, 'find_spec', lambda name: None)
  for kind, extra in (('stablehlo', 'export'), ('onnx', 'onnx')):
    with pytest.raises(InputError, match=rf'attnfd_jax\[{extra}\]'):
      student.export_student('gone', tmp_path / 'a', kind=kind)


def test_small_images_are_refused(stage, tmp_path):
  path = tmp_path / 'a.png'
  Image.fromarray(_images((16, 40, 3))).save(path)
  with pytest.raises(InputError, match='are 16x40 for the network'):
    student.export_student(
      stage, tmp_path / 'a.pth', kind='pth', images=str(path)
    )


class Own(nn.Module):
  """A network that a user might bring: no DeepLabV3+, no coarse_logits."""

  num_classes: int
  dtype: object = None

  @nn.compact
  def __call__(self, image, *, train):
    del train
    x = nn.relu(nn.Conv(4, (3, 3), dtype=self.dtype, name='stem')(image))
    logits = nn.Conv(self.num_classes, (1, 1), name='head')(x)
    return {'logits': logits, 'features': {'stem': x}}


@pytest.fixture
def own_stage(fill, stage, tmp_path, monkeypatch):
  """Folder of a stage of `Own`."""
  network = Own(len(synthetic.CLASS_NAMES))
  variables = fill(networks.abstract_variables(network))
  info = json.loads((stage / 'config.json').read_text())
  info['student'] |= {'network': '/here/own.py:Own', 'options': {'width': 4}}
  info |= {'checkpoint_step': 0, 'palette': np.array(info['palette'], np.uint8)}

  def load_network(directory, *, allow_code=False):
    assert directory == stage and allow_code
    return network, variables, info

  monkeypatch.setattr(loading, 'load_network', load_network)
  return stage


@pytest.mark.parametrize('kind', ['stablehlo', 'safetensors'])
def test_a_network_of_the_user(own_stage, tmp_path, kind):
  if kind == 'stablehlo':
    pytest.importorskip('flatbuffers')
  path = tmp_path / f'a.{kind}'
  lines = student.export_student(own_stage, path, kind=kind, allow_code=True)
  where = 'Read back array by array' if kind == 'safetensors' else 'In a fresh'
  assert lines[1].startswith(where)
  if kind == 'safetensors':
    checkpoint = torch_files.read_torch(path)
    assert set(checkpoint['state_dict']) == {
      f'params/{module}/{leaf}'
      for module in ('stem', 'head')
      for leaf in ('kernel', 'bias')
    }
    found = {k: json.loads(x) for k, x in checkpoint['metadata'].items()}
    assert found['class_names'] == list(synthetic.CLASS_NAMES)
    assert found['network'] == 'own.py:Own' and found['options'] == {'width': 4}
    assert {'palette', 'mean', 'std'} <= found.keys()


@pytest.mark.parametrize('kind', ['onnx', 'pth'])
def test_formats_of_deeplab_alone(own_stage, tmp_path, kind):
  if kind == 'onnx':
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
  path = tmp_path / f'a.{kind}'
  message = f'{kind} is written for DeepLabV3Plus only; use --format=stablehlo'
  with pytest.raises(InputError, match=message):
    student.export_student(own_stage, path, kind=kind, allow_code=True)
  if kind == 'pth':
    with pytest.raises(InputError, match=message):
      conversion.export_stage(own_stage, path, allow_code=True)
  assert not [*tmp_path.iterdir()]


def test_weights_that_differ_in_the_file_are_refused(own_stage, tmp_path):
  path = tmp_path / 'a.safetensors'
  conversion.export_stage(own_stage, path, allow_code=True)
  _, variables, _ = loading.load_network(own_stage, allow_code=True)
  restored = agreement.read_back(path, variables)
  jax.tree.map(np.testing.assert_array_equal, restored, variables)
  variables['params']['head']['bias'][0] += 1
  with pytest.raises(InputError, match='params/head/bias: the file differs'):
    agreement.read_back(path, variables)
