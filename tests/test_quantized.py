# SPDX-License-Identifier: Apache-2.0
"""int8 files keep the scores of float ones, and both run as a network does."""

import errno
import json
import os
import pathlib
import shutil
import types

from absl import flags
import jax
import numpy as np
from PIL import Image
import pytest
import tiny_run

from attnfd_jax.errors import InputError
from attnfd_jax.exporting import agreement, student
from attnfd_jax.inference import (
  image_files,
  onnx_model,
  options,
  scoring,
)
from attnfd_jax.inference.predictor import Predictor
from attnfd_jax.models import deeplab
from attnfd_jax.models import network as networks
from attnfd_jax.runs import conversion, loading

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
# Their import needs both.
from attnfd_jax.exporting import onnx_graph, quantized  # noqa: E402


@pytest.fixture(scope='session')
def stage(tmp_path_factory):
  return tiny_run.make_stage(tmp_path_factory)


def _export(stage, path, **options):
  # In this process what is loaded is loaded.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(agreement, 'run_fresh', _run_here)
    return student.export_student(stage, path, kind='onnx', **options)


def _run_here(kind, path, images, options):
  assert (kind, options) == ('onnx', {})
  network = onnx_model.OnnxNetwork(path)
  return [network.find(x) for x in images], [1.0] * len(images)


@pytest.fixture(scope='module')
def files(stage, tmp_path_factory):
  """A float and an int8 file, bytes -> logits, and the lines of the latter."""
  folder = tmp_path_factory.mktemp('files')
  paths = [folder / 'float.onnx', folder / 'int8.onnx']
  _export(stage, paths[0], uint8=True)
  lines = _export(stage, paths[1], uint8=True, quantize='int8', max_drop=0.1)
  return types.SimpleNamespace(float=paths[0], int8=paths[1], lines=lines)


@pytest.fixture
def images(tmp_path):
  """A folder with images of three sizes."""
  folder = tmp_path / 'images'
  folder.mkdir()
  for i, size in enumerate(((48, 64), (40, 90), (33, 32))):
    Image.fromarray(_image(size, i)).save(folder / f'{i}.png')
  return folder


def _image(size, seed=0):
  """Four blocks of color and noise."""
  generator = np.random.default_rng(seed)
  blocks = generator.integers(0, 256, (2, 2, 3), np.uint8)
  image = Image.fromarray(blocks).resize(size[::-1], Image.Resampling.BILINEAR)
  noise = generator.integers(-20, 20, (*size, 3))
  return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def _constants(path):
  model = onnx.load(path)
  return {
    x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer
  }


def _kernels(path):
  """{layer: (name, array) of its kernel} as it is stored."""
  model, constants = onnx.load(path), _constants(path)
  sources = {node.output[0]: node for node in model.graph.node}
  found = {}
  for node in model.graph.node:
    if node.op_type == 'Conv':
      name = node.input[1]
      name = name if name in constants else sources[name].input[0]
      found[node.name] = name, constants[name]
  return found


def test_kernels_are_integers_with_a_scale_by_channel(files):
  before, after = _kernels(files.float), _kernels(files.int8)
  assert before.keys() == after.keys() and len(after) > 20
  constants = _constants(files.int8)
  for layer, (name, values) in after.items():
    exact = before[layer][1]
    if layer in ('backbone/stem', 'classifier'):
      np.testing.assert_array_equal(values, exact)
      continue
    # 7 bits, which do not overflow anywhere.
    assert values.dtype == np.int8 and np.max(np.abs(values)) <= 64
    scale = constants[name.replace('_quantized', '_scale')]
    assert scale.shape == (len(exact),)
    step = scale[:, None, None, None]
    assert np.all(np.abs(values * step - exact) <= 0.51 * step)


def test_the_file_is_smaller_and_says_what_it_was_made_of(files):
  sizes = [x.stat().st_size for x in (files.float, files.int8)]
  assert sizes[0] > 3 * sizes[1]
  known = [
    onnx_model.OnnxNetwork(x).metadata for x in (files.float, files.int8)
  ]
  quantized_by = known[1].pop('quantized')
  assert quantized_by == {
    'calibration': 'minmax',
    'images': 8,
    'keep_float': [],
  }
  assert known[0] == known[1]
  assert known[0]['dataset'] == 'scenes' and known[0]['protocol'] == 'native'
  assert len(known[0]['class_names']) == len(known[0]['palette']) == 9
  assert {'mean', 'std', 'short_side', 'training'} <= known[0].keys()


def test_paths_of_this_machine_are_not_in_the_file(stage):
  _, _, info = loading.load_network(stage)
  info['data'] |= {'root': '/home/me/data', 'sbd_root': 'data/sbd'}
  told = conversion.describe_stage(info)
  assert told['data']['root'] == '' and told['data']['sbd_root'] == 'data/sbd'


def test_what_is_printed(files):
  text = '\n'.join(files.lines)
  assert 'int8: 28 convolutions by minmax over 8 images of the train' in text
  for part in (
    'x smaller than float',
    ': medians of alternating calls on this CPU, which ',
    '% of the pixels of the calibration images',
    'In a fresh process, int8 against the network, on 2 images of the val',
  ):
    assert part in text
  (row,) = (x.split() for x in files.lines if x.startswith('  road'))
  name, before, after, change = row
  assert float(after) - float(before) == pytest.approx(float(change), abs=0.02)


@pytest.mark.parametrize('kind', ['float', 'int8'])
def test_scores_of_a_file(stage, files, kind):
  path = getattr(files, kind)
  counts, result = scoring.evaluate_checkpoint(onnx_model.load(path))
  expected, _ = scoring.evaluate_checkpoint(stage)
  assert counts.sum() == expected.sum()
  assert result['stage'] == 'student' and 'onnxruntime' in result['device']
  # The table that was printed has the same numbers.
  (line,) = (x for x in files.lines if x.startswith('val mIoU'))
  assert f'{100 * result["miou"]:.2f} with {kind}' in line
  if kind == 'float':
    assert np.abs(counts - expected).sum() <= 4


def test_tiles_of_a_file(stage, files):
  options = {'tile': (32, 32), 'overlap': 0.25}
  expected, _ = scoring.evaluate_checkpoint(stage, **options)
  found, _ = scoring.evaluate_checkpoint(
    onnx_model.load(files.float), **options
  )
  assert np.abs(found - expected).sum() <= 4


@pytest.mark.parametrize('size', [(50, 70), (64, 64)])
def test_a_file_predicts_what_its_stage_predicts(stage, files, size):
  image = _image(size)
  expected = Predictor(stage)(image)
  found = Predictor(onnx_model.load(files.float))(image)
  assert np.mean(found[0] == expected[0]) > 0.999
  np.testing.assert_allclose(*map(np.int32, (found[1], expected[1])), atol=1)
  assert len(np.unique(found[0])) > 1


@pytest.mark.parametrize('argmax', [False, True], ids=['logits', 'ids'])
@pytest.mark.parametrize('uint8', [False, True], ids=['floats', 'bytes'])
def test_every_form_finds_the_same(stage, files, tmp_path, uint8, argmax):
  network, variables, info = loading.load_network(stage)
  facts = conversion.describe_data(info)
  facts |= {'training': conversion.describe_stage(info)}
  variables = jax.device_get(variables)
  form = {'uint8': uint8, 'argmax': argmax}
  model = onnx_graph.make_model(network, variables, metadata=facts, **form)
  (tmp_path / 'a.onnx').write_bytes(model.SerializeToString())
  found = Predictor(onnx_model.load(tmp_path / 'a.onnx'))
  assert found.has_confidence is not argmax
  ids, confidence = found(image := _image((64, 80)))
  expected = Predictor(onnx_model.load(files.float))(image)
  assert np.mean(ids == expected[0]) > 0.999
  assert (confidence.min() == 255) == argmax


def test_ids_have_no_confidence(stage, files, images, tmp_path, monkeypatch):
  loaded = onnx_model.load(files.float)
  monkeypatch.setattr(loaded[0], 'has_logits', False)
  with pytest.raises(InputError, match='without --argmax'):
    image_files.predict_files(
      loaded, str(images), tmp_path / 'out', min_confidence=0.5
    )
  assert not (tmp_path / 'out').exists()


def test_a_file_has_one_view(files):
  with pytest.raises(InputError, match='--scales and --flip are for a stage'):
    Predictor(onnx_model.load(files.float), flip=True)


def test_ranges_are_those_of_all_images(files, images, tmp_path):
  network = onnx_model.OnnxNetwork(files.float)
  arrays = [np.asarray(Image.open(x))[None] for x in sorted(images.iterdir())]
  assert len({x.shape for x in arrays}) == 3

  def ranges(chosen):
    options = {'method': 'minmax', 'folder': tmp_path}
    found = quantized.find_ranges(files.float, chosen, **options)
    return {x: np.ravel(found[x].range_value) for x in found.keys()}

  single, together = [ranges([x]) for x in arrays], ranges(arrays)
  assert len(together) > 50
  for name, (low, high) in together.items():
    lows, highs = zip(*(x[name] for x in single), strict=True)
    assert (low, high) == (min(lows), max(highs))
  logits = [network.run(x) for x in arrays]
  assert together['classifier'][1] >= max(x.max() for x in logits) - 1e-3


@pytest.mark.parametrize('method', ['entropy', 'percentile'])
def test_methods_cut_ranges(files, images, tmp_path, method):
  arrays = [np.asarray(Image.open(x))[None] for x in sorted(images.iterdir())]
  found = [
    quantized.find_ranges(files.float, arrays, method=x, folder=tmp_path)
    for x in ('minmax', method)
  ]
  widths = [
    np.array([np.ptp(x[name].range_value) for name in x.keys()]) for x in found
  ]
  assert np.all(widths[1] <= widths[0] * 1.001)
  assert np.any(widths[1] < widths[0])


def test_one_image_is_enough(stage, images, tmp_path):
  path = tmp_path / 'a.onnx'
  lines = _export(
    stage,
    path,
    quantize='int8',
    calibrate=str(images / '1.png'),
    keep_float=['aspp', 'classifier', 'backbone/stem'],
    max_drop=1.0,
  )
  assert ' over 1 image of ' in '\n'.join(lines)
  kinds = {x: values.dtype.name for x, (_, values) in _kernels(path).items()}
  kept = {x for x, kind in kinds.items() if kind == 'float32'}
  aspp = {x for x in kinds if x.startswith('aspp/')}
  assert kept == {*aspp, 'classifier', 'backbone/stem'} and len(aspp) == 6


@pytest.mark.parametrize(
  ('backbone', 'form'),
  [
    ('resnet50', {'in_path_attention': True, 'width_multiplier': 0.25}),
    ('mobilenet_v2', {'output_stride': 8, 'width_multiplier': 0.5}),
    ('efficientnet_lite0', {'width_multiplier': 0.5}),
  ],
)
@pytest.mark.parametrize('uint8', [False, True], ids=['floats', 'bytes'])
def test_every_backbone(fill, tmp_path, backbone, form, uint8):
  channels = {'aspp_channels': 16, 'decoder_channels': 16}
  network = deeplab.DeepLabV3Plus(backbone, 5, **channels, **form)
  variables = fill(networks.abstract_variables(network))
  options = {'uint8': uint8, 'argmax': False, 'metadata': {}}
  model = onnx_graph.make_model(network, variables, **options)
  path = tmp_path / 'a.onnx'
  path.write_bytes(model.SerializeToString())
  exact = onnx_model.OnnxNetwork(path)
  image = _image((64, 96))[None]
  options = {'method': 'minmax', 'folder': tmp_path}
  ranges = quantized.find_ranges(path, [image], **options)
  layers = quantized.layers_of(model)
  errors = []
  for kept in ([], layers):
    made = quantized.make_int8(model, ranges, kept=kept)
    path.write_bytes(made.SerializeToString())
    kinds = {x: y.dtype.name for x, (_, y) in _kernels(path).items()}
    assert {x for x, kind in kinds.items() if kind == 'int8'} == (
      {*layers} - {*kept}
    )
    logits = [x.run(image) for x in (onnx_model.OnnxNetwork(path), exact)]
    errors.append(np.std(logits[0] - logits[1]) / np.std(logits[1]))
  assert 1e-3 < errors[0] < 0.3
  assert errors[1] < 1e-5  # With all layers in float nothing is rounded.
  gates = [x for x in kinds if x.startswith('attention_')]
  assert len(gates) == (15 if form.get('in_path_attention') else 0)


def _spoil(monkeypatch, layer):
  """Calibration that saw a hundredth of the range of a layer."""
  find = quantized.find_ranges

  def find_ranges(path, *args, **options):
    found = find(path, *args, **options)
    (map_after,) = (
      node.output[0]
      for node in onnx.load(path).graph.node
      if layer in node.input and node.op_type == 'Relu'
    )
    data = found[map_after]
    low, high = data.range_value
    high = np.array(high / 100, np.float32)
    found[map_after] = type(data)(lowest=low, highest=high)
    return found

  monkeypatch.setattr(quantized, 'find_ranges', find_ranges)


@pytest.mark.parametrize('scored', [True, False], ids=['val', 'no_val'])
def test_too_large_a_drop_names_its_layer(
  stage, images, tmp_path, monkeypatch, scored
):
  _spoil(monkeypatch, 'decoder/conv2')
  path = tmp_path / 'out' / 'a.onnx'
  given = {'calibrate': str(images), 'max_drop': 0.002 if scored else 0.2}
  if not scored:
    monkeypatch.setattr(agreement, 'split_source', lambda *_: None)
  with pytest.raises(InputError) as raised:
    _export(stage, path, uint8=True, quantize='int8', **given)
  assert not [*path.parent.iterdir()]
  text = str(raised.value)
  assert 'so no file was written' in text and '\n' not in text
  assert ('val mIoU' in text) is scored
  assert ('val cannot be read here' in text) is not scored
  assert 'kept in float: decoder/conv2 +' in text
  assert '--keep_float=decoder/conv2' in text
  if not scored:
    assert 'fixes it' in text
    found = text.partition('--keep_float=')[2].split()[0].split(',')
    given['keep_float'] = found
    _export(stage, path, uint8=True, quantize='int8', **given)
    assert [*path.parent.iterdir()] == [path]


def test_calibration_images_are_spread(stage, monkeypatch):
  _, _, info = loading.load_network(stage)
  monkeypatch.setattr(quantized, 'NUM_IMAGES', 3)
  source = agreement.split_source(info, 'train')
  found, text = quantized.calibration_images(None, info, short_side=0)
  assert text == '3 images of the train split of scenes'
  for image, i in zip(found, (0, 4, 7), strict=True):
    np.testing.assert_array_equal(image[0], source[i]['image'])
  found, _ = quantized.calibration_images(None, info, short_side=64)
  assert {x.shape for x in found} == {(1, 64, 96, 3)}


def _break(folder):
  (folder / '0.png').write_bytes((folder / '0.png').read_bytes()[:60])


def _empty(folder):
  for path in folder.iterdir():
    path.unlink()


def _shrink(folder):
  Image.fromarray(_image((20, 40))).save(folder / '0.png')


@pytest.mark.parametrize(
  ('change', 'given', 'message'),
  [
    (_break, {}, r'0.png: not a readable image'),
    (_empty, {}, r'--calibrate=images: no .*files in it'),
    (shutil.rmtree, {}, r'--calibrate=images: no such file'),
    (_shrink, {}, r'are 20x32 for the network; .* by --calibrate'),
    (None, {'calibration': 'mean'}, "--calibration='mean' must be one of"),
    (None, {'max_drop': 2.0}, '--max_drop=2.0 must be from 0 to 1'),
    (None, {'keep_float': ['asp']}, 'asp: no such layer; try aspp'),
    (None, {'keep_float': ['x']}, 'try aspp, backbone, decoder'),
    (None, {'quantize': 'int4'}, "--quantize='int4' must be one of int8"),
    (None, {'quantize': None}, '--calibrate needs --quantize=int8'),
    (None, {'output': 'images/0.png'}, 'exists; add --overwrite'),
  ],
  ids=(
    'broken none absent small calibration max_drop layer no_layer bits no_bits '
    'output'
  ).split(),
)
def test_refused(stage, images, tmp_path, monkeypatch, change, given, message):
  monkeypatch.chdir(tmp_path)
  if change:
    change(images)
  given = {'quantize': 'int8', 'calibrate': 'images', 'output': 'a'} | given
  before = {*tmp_path.rglob('*')}
  with pytest.raises(InputError, match=message):
    _export(stage, given.pop('output'), **given)
  assert {*tmp_path.rglob('*')} == before


def test_int8_is_of_onnx(stage, tmp_path):
  with pytest.raises(InputError, match='--quantize=int8 is for --format=onnx'):
    student.export_student(stage, tmp_path / 'a', kind='pth', quantize='int8')


def test_without_train_images_they_are_asked_for(stage, tmp_path, monkeypatch):
  monkeypatch.setattr(agreement, 'split_source', lambda *_: None)
  with pytest.raises(InputError, match='--calibrate is missing, and the train'):
    _export(stage, tmp_path / 'a.onnx', quantize='int8')
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('name', ['student.onnx', 'int8.onnx'])
def test_a_full_disk_leaves_what_was_there(stage, tmp_path, monkeypatch, name):
  path, write = tmp_path / 'a.onnx', pathlib.Path.write_bytes
  path.write_text('of before')

  def write_bytes(self, data):
    if self.name == name:
      write(self, data[:1000])
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
    return write(self, data)

  monkeypatch.setattr(pathlib.Path, 'write_bytes', write_bytes)
  with pytest.raises(OSError, match='No space left'):
    _export(stage, path, quantize='int8', overwrite=True)
  assert [*tmp_path.iterdir()] == [path]
  assert path.read_text() == 'of before'


def test_a_fresh_process_must_agree(stage, tmp_path, monkeypatch):
  calls = []

  def run_fresh(kind, path, images, options):
    found, seconds = _run_here(kind, path, images, options)
    calls.append(path.name)
    if path.name == 'int8.onnx':
      found = [np.roll(x, 1, -1) for x in found]
    return found, seconds

  monkeypatch.setattr(agreement, 'run_fresh', run_fresh)
  with pytest.raises(InputError, match='predicts other classes'):
    student.export_student(
      stage, tmp_path / 'a', kind='onnx', quantize='int8', max_drop=1.0
    )
  assert calls == ['student.onnx', 'int8.onnx']
  assert not [*tmp_path.iterdir()]


def test_dot_products(tmp_path):
  path = tmp_path / 'cpuinfo'
  for flag, begin in (
    ('sse2 avx512_vnni fma', 'has integer dot products (avx512_vnni)'),
    ('fp asimd asimddp', 'has integer dot products (asimddp)'),
    ('sse2 avx2 avx512f', 'has no integer dot products'),
  ):
    path.write_text(f'flags\t: {flag}\n')
    assert quantized.dot_products(path).startswith(begin)
  assert quantized.dot_products(tmp_path / 'gone').startswith('may have')


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (None, 'no such file'),
    (b'no model', 'is not a usable ONNX file'),
    ('of others', 'does not say what it was trained for; export the stage'),
  ],
  ids=['absent', 'damaged', 'others'],
)
def test_files_that_cannot_be_run(files, tmp_path, content, message):
  path = tmp_path / 'a.onnx'
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif content:
    model = onnx.load(files.float)
    del model.metadata_props[:]
    model.metadata_props.add(key='author', value='somebody')
    onnx.save(model, path)
  with pytest.raises(InputError, match=message) as raised:
    onnx_model.load(path)
  assert '\n' not in str(raised.value)


def test_onnxruntime_is_named_where_it_is_missing(files, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'onnxruntime', None)
  with pytest.raises(InputError, match=r"pip install 'attnfd_jax\[onnx\]'"):
    onnx_model.load(files.float)


def _values(*arguments):
  values = flags.FlagValues()
  for name in ('checkpoint', 'model', 'config', 'data_root', 'scales'):
    flags.DEFINE_string(name, None, '', flag_values=values)
  for name in ('flip', 'allow_code'):
    flags.DEFINE_bool(name, False, '', flag_values=values)
  flags.DEFINE_integer('step', None, '', flag_values=values)
  values(['command', *arguments])
  return values


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('--model=a', '--checkpoint=b'), '--checkpoint and --model: name one'),
    (('--model=a', '--config=b'), '--model and --config: name one'),
    (('--checkpoint=a', '--config=b'), '--checkpoint and --config: name one'),
    (('--model=a', '--scales=1,2'), '--scales goes with --checkpoint'),
    (('--model=a', '--flip'), '--flip goes with --checkpoint'),
    (('--model=a', '--step=3'), '--step goes with --checkpoint'),
    (('--model=a', '--data_root=b'), '--model=a: no such file'),
    (('--config=a', '--data_root=b'), '--data_root goes with --checkpoint'),
  ],
  ids=lambda x: ''.join(x) if isinstance(x, tuple) else None,
)
def test_one_network_is_named(arguments, message):
  values = _values(*arguments)
  with pytest.raises(InputError, match=message):
    options.checkpoint(values, load_teacher=pytest.fail)


def test_the_network_that_is_named(files):
  def found(*arguments):
    return options.checkpoint(_values(*arguments), load_teacher=lambda: 'it')

  assert found('--checkpoint=a') == 'a'
  assert found('--config=a') == 'it'
  network, _, info = found(f'--model={files.int8}')
  assert isinstance(network, onnx_model.OnnxNetwork)
  assert info['description'].endswith('of student, step 2, in int8')


def test_commands(stage, images, tmp_path):
  path = tmp_path / 'a.onnx'
  process = tiny_run.run_verb(
    'export',
    *(f'--checkpoint={stage}', '--format=onnx', f'--output={path}'),
    *('--quantize=int8', f'--calibrate={images}', '--max_drop=0.5'),
    *('--keep_float=aspp,decoder/conv2', '--calibration=percentile'),
  )
  assert process.returncode == 0, process.stderr
  assert 'by percentile over 3 images of' in process.stdout
  output = tmp_path / 'scores.json'
  process = tiny_run.run_verb(
    'evaluate', f'--model={path}', f'--output={output}'
  )
  assert process.returncode == 0, process.stderr
  assert json.loads(output.read_text())['images'] == 2
  process = tiny_run.run_verb(
    *('predict', f'--model={path}', f'--input={images}'),
    f'--output={tmp_path / "out"}',
  )
  assert process.returncode == 0, process.stderr
  ids = np.asarray(Image.open(tmp_path / 'out' / '1.png'))
  assert ids.shape == (40, 90) and ids.max() < 9
