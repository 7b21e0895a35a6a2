# SPDX-License-Identifier: Apache-2.0
"""PyTorch files to folders of ours and back, and as first weights."""

import functools
import json
import os
import pickle
import zipfile

import jax
import numpy as np
import pytest
import tiny_run

import attnfd_jax
from attnfd_jax.config import default_config, resolve
from attnfd_jax.data import classes
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.models import deeplab
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.models.resnet import ResNet
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import names as torch_names
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.runs import conversion, loading, logs
from attnfd_jax.teachers import sources
from attnfd_jax.training import experiment
from attnfd_jax.training.stage import Stage

# The names are those of full width; the files are small.
TINY = {
  'width_multiplier': 0.125,
  'aspp_channels': 16,
  'decoder_channels': 16,
  'low_level_channels': 8,
}


CONFIG = json.loads(resolve(default_config()).to_json_best_effort())
import_stage = functools.partial(conversion.import_stage, config=CONFIG)


@functools.cache
def shapes(backbone, num_classes=21, **options):
  """The network, shapes of its variables and of its three CBAMs."""
  network = DeepLabV3Plus(backbone, num_classes, **(options or TINY))
  gated = networks.abstract_variables(network.clone(in_path_attention=True))
  return network, *torch_models.split_gates(gated)


@pytest.fixture
def tensors(fill):
  """(backbone, number of classes) -> the authors' names with random arrays."""

  def tensors(backbone='resnet18', num_classes=21, *, gates=True):
    network, variables, attention = shapes(backbone, num_classes)
    return torch_models.export_torch(
      fill(variables, 1),
      fill(attention, 2) if gates else None,
      backbone=network.backbone,
    )

  return tensors


def write(path, tensors):
  torch_files.write_torch(path, {'state_dict': tensors})
  return path


def assert_same(left, right):
  assert left.keys() == right.keys()
  for name, value in left.items():
    assert value.dtype == right[name].dtype, name
    np.testing.assert_array_equal(value, right[name], name)


@pytest.mark.parametrize(
  ('backbone', 'ending', 'gates'),
  [
    ('resnet18', '.pth', True),
    ('mobilenet_v2', '.safetensors', True),
    ('mobilenet_v2', '.pth.tar', False),
    ('efficientnet_lite0', '.pth', False),
    ('efficientnet_lite1', '.safetensors', False),
    ('efficientnet_lite2', '.safetensors', True),
  ],
)
def test_round_trip_is_bit_exact(tmp_path, tensors, backbone, ending, gates):
  source = tensors(backbone, gates=gates)
  import_stage(write(tmp_path / 'a.pth', source), tmp_path / 'new' / 'ours')
  ours = tmp_path / 'new' / 'ours'
  assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == ['ours']
  network, _, info = loading.load_network(ours)
  assert (network.backbone, network.num_classes) == (backbone, 21)
  assert network.width_multiplier == 0.125
  assert info['stage'] == 'converted' and info['data']['name'] == 'pascal_voc'
  assert info['class_names'] == list(classes.VOC)
  target = tmp_path / f'b{ending}'
  conversion.export_stage(ours, target)
  assert_same(torch_files.read_state_dict(target), source)
  if ending == '.safetensors':
    metadata = torch_files.read_torch(target)['metadata']
    found = {key: json.loads(value) for key, value in metadata.items()}
    assert found['class_names'] == list(classes.VOC)
    assert found['palette'] == info['palette'].tolist()
    assert found['mean'] == [0.485, 0.456, 0.406]
    assert found['std'] == [0.229, 0.224, 0.225]
    assert found['backbone'] == backbone
  else:
    checkpoint = torch_files.read_torch(target)
    assert (checkpoint['epoch'], checkpoint['best_pred']) == (0, 0.0)


def test_classes_of_a_file_of_ours_come_back(tmp_path, tensors):
  source = write(tmp_path / 'a.pth', tensors(num_classes=3))
  given = ('sky', 'road', 'car')
  import_stage(source, tmp_path / 'a', class_names=given)
  conversion.export_stage(tmp_path / 'a', tmp_path / 'a.safetensors')
  import_stage(tmp_path / 'a.safetensors', tmp_path / 'b')
  info = json.loads((tmp_path / 'b' / 'config.json').read_text())
  assert info['class_names'] == list(given)
  import_stage(source, tmp_path / 'c')
  info = json.loads((tmp_path / 'c' / 'config.json').read_text())
  assert info['class_names'] == ['class_0', 'class_1', 'class_2']
  with pytest.raises(InputError, match='has 2 names'):
    import_stage(source, tmp_path / 'd', class_names=('a', 'b'))


def test_attention_in_the_forward_path_comes_back(tmp_path, tensors):
  source = write(tmp_path / 'a.pth', tensors())
  import_stage(source, tmp_path / 'a', in_path_attention=True)
  network, _, _ = loading.load_network(tmp_path / 'a')
  assert network.in_path_attention
  lines = conversion.export_stage(tmp_path / 'a', tmp_path / 'b.safetensors')
  assert any('forward path' in line for line in lines)
  assert_same(
    torch_files.read_state_dict(tmp_path / 'b.safetensors'), tensors()
  )
  import_stage(tmp_path / 'b.safetensors', tmp_path / 'c')
  network, _, _ = loading.load_network(tmp_path / 'c')
  assert network.in_path_attention


@pytest.mark.parametrize(
  ('backbone', 'count', 'aliases'),
  [
    ('resnet18', 206, 0),
    ('resnet101', 710, 0),
    ('mobilenet_v2', 698, 306),
    # 48 convolutions with five tensors and a counter each; the heads are those
    # of MobileNetV2, 698 - 2 * 306.
    ('efficientnet_lite0', 374, 0),
  ],
)
def test_counts_and_shapes_of_the_table(backbone, count, aliases):
  # METHOD section 3; at full width, without memory for the values.
  network, variables, gates = shapes(
    backbone, num_classes=21, width_multiplier=1.0
  )
  variables, gates = jax.tree.map(
    lambda x: np.broadcast_to(np.float32(0), x.shape), (variables, gates)
  )
  plain = torch_models.export_torch(variables, backbone=backbone)
  assert len(plain) == count - 30
  full = torch_models.export_torch(variables, gates, backbone=backbone)
  assert len(full) == count
  assert full['decoder.last_conv.8.weight'].shape == (21, 256, 1, 1)
  reduced = {'resnet18': (32, 512), 'resnet101': (128, 2048)}
  gate = full['backbone.cbam.ChannelGate.mlp.1.weight']
  assert gate.shape == reduced.get(backbone, (20, 320))
  assert full['aspp.cbam.SpatialGate.spatial.conv.weight'].shape == (1, 2, 7, 7)
  repeated = [name for name in full if '_level_features.' in name]
  assert len(repeated) == aliases
  assert torch_models.infer_options(full) == {
    'backbone': backbone,
    'num_classes': 21,
    'width_multiplier': 1.0,
    'aspp_channels': 256,
    'decoder_channels': 256,
    'low_level_channels': 48,
  }


def trunk(tensors):
  """The tensors of a backbone without its prefix, as others publish it."""
  return {
    name.removeprefix('backbone.'): value
    for name, value in tensors.items()
    if name.startswith('backbone.') and 'cbam' not in name
    if '_level_features.' not in name
  }


def torchvision_mobilenet(tensors):
  """Names of torchvision's nested blocks, METHOD section 3.3."""
  renamed = {}
  first = {'0': '0.0', '1': '0.1', '3': '1', '4': '2'}
  others = {'0': '0.0', '1': '0.1', '3': '1.0', '4': '1.1', '6': '2', '7': '3'}
  for name, value in trunk(tensors).items():
    parts = name.split('.')
    if parts[2] == 'conv':
      parts[3] = (first if parts[1] == '1' else others)[parts[3]]
    renamed['.'.join(parts)] = value
  return renamed


@pytest.mark.parametrize(
  ('kind', 'backbone'),
  [
    ('resnet', 'resnet18'),
    ('torchvision', 'mobilenet_v2'),
    ('tonylins', 'mobilenet_v2'),
    ('efficientnet', 'efficientnet_lite0'),
    ('efficientnet', 'efficientnet_lite2'),
  ],
)
def test_backbones_of_others_fill_exactly_the_backbone(
  tmp_path, tensors, kind, backbone
):
  full = tensors(backbone)
  others = torchvision_mobilenet if kind == 'torchvision' else trunk
  found = others(full) | {
    'fc.weight' if kind == 'resnet' else 'classifier.1.weight': np.ones((9, 9)),
  }
  if kind == 'efficientnet':
    for name in ('_conv_head', '_bn1', '_fc'):
      found[f'{name}.weight'] = np.ones((9, 9))
  elif kind != 'resnet':
    found['features.18.0.weight'] = np.ones((9, 9, 1, 1))
  path = write(tmp_path / 'a.pth', found)
  network, *_ = shapes(backbone)
  variables, line = torch_models.load_pretrained(path, network)
  assert line.startswith(f'starts from the backbone of {path}: loaded')
  expected, _, _ = torch_models.import_network(full, network)
  for part in ('params', 'batch_stats'):
    assert_same(
      torch_names.flatten(variables[part]['backbone']),
      torch_names.flatten(expected[part]['backbone']),
    )
    others = {k: v for k, v in variables[part].items() if k != 'backbone'}
    assert others and not jax.tree.leaves(others)


def test_a_differing_alias_is_refused(tensors):
  found = tensors('mobilenet_v2')
  name = 'backbone.low_level_features.0.0.weight'
  found[name] = found[name] + 1
  with pytest.raises(InputError, match=f'{name} differs from'):
    attnfd_jax.load_torch(
      found, backbone='mobilenet_v2', num_classes=21, **TINY
    )


def test_load_torch_gives_variables_and_attention(tensors):
  options = {'backbone': 'resnet18', 'num_classes': 21} | TINY
  found = tensors()
  variables, attention = attnfd_jax.load_torch(found, **options)
  assert_same(
    torch_models.export_torch(variables, attention, backbone='resnet18'), found
  )
  _, attention = attnfd_jax.load_torch(tensors(gates=False), **options)
  assert attention is None


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ('missing', ('missing 1', 'aspp.conv1.weight')),
    ('unexpected', ('unexpected 1', 'aspp.conv9.weight')),
    ('classes', ('reshaped 2', 'decoder.last_conv.8.weight')),
    ('foreign', ('holds a network (weight, ...)', 'teacher.factory')),
    ('trunk', ('does not show its num_classes', '--num_classes')),
  ],
)
def test_partial_files_are_refused(tmp_path, tensors, change, words):
  found, options = tensors(), {}
  if change == 'missing':
    del found['aspp.conv1.weight']
  elif change == 'unexpected':
    found['aspp.conv9.weight'] = np.ones(3, np.float32)
  elif change == 'classes':
    options['num_classes'] = 19
  elif change == 'foreign':
    found = {'weight': np.ones(3, np.float32)}
  else:
    found = trunk(found)
  path = write(tmp_path / 'a.pth', found)
  with pytest.raises(InputError) as error:
    import_stage(path, tmp_path / 'b', **options)
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)
  assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


def prefixed(prefix, tensors):
  return {prefix + name: value for name, value in tensors.items()}


def nested(keys, tensors):
  for key in reversed(keys.split('/')):
    tensors = {key: tensors, 'epoch': 3, 'loss': np.ones(())}
  return tensors


def read_same(source, expected):
  """What is said about `source`, which must hold just what is expected."""
  found = torch_models.read_network(source)
  assert not found.foreign
  assert_same(found.tensors, torch_models.read_network(expected).tensors)
  return '; '.join(found.remarks)


@pytest.mark.parametrize(
  ('prefix', 'removed'),
  [
    ('', ''),
    ('module.', "'module.'"),
    ('_orig_mod.module.', "'_orig_mod.', 'module.'"),
    ('model.', "'model.'"),
    ('net.network.', "'net.network.'"),
    ('student._orig_mod.', "'_orig_mod.', 'student.'"),
    ('model.module.student.', "'module.', 'model.student.'"),
    ('backbone.', "'backbone.'"),
    ('what ever.', "'what ever.'"),
  ],
)
@pytest.mark.parametrize(
  'backbone', ['resnet18', 'mobilenet_v2', 'efficientnet_lite0']
)
def test_any_prefix_is_taken_off(tensors, backbone, prefix, removed):
  found = tensors(backbone)
  words = f'removed {removed} from names' if removed else ''
  assert read_same(prefixed(prefix, found), found) == words
  beside = {
    'criterion.weight': np.ones(21),
    'loss.layers.0.weight': np.ones(2),
    'metrics.total': np.ones(()),
  }
  both = read_same(prefixed(prefix, found) | beside, found)
  assert both.startswith(words)
  assert 'ignored 3 other tensors: criterion.weight, loss.lay' in both
  trunk_only = {k: x for k, x in found.items() if k.startswith('backbone.')}
  assert words in read_same(prefixed(prefix, trunk_only), trunk_only)


@pytest.mark.parametrize(
  ('keys', 'prefix'),
  [
    *(('model_state_dict', ''), ('network', 'module.'), ('generator', '')),
    *(('ema/module', ''), ('state_dict/model', 'net.'), ('student', '')),
    ('state_dict_ema', '_orig_mod.'),
  ],
)
def test_any_key_is_unwrapped(tmp_path, tensors, keys, prefix):
  found = tensors()
  value = nested(keys, prefixed(prefix, found))
  value['optimizer'] = {'state': {0: {'layer1': found['aspp.bn1.weight']}}}
  path = tmp_path / 'a.pth'
  torch_files.write_torch(path, value)
  line = read_same(path, found)
  assert line.startswith(f"unwrapped '{keys}'")
  assert f'other tensors: {"loss" if "/" not in keys else "loss, "}' in line
  # Tensors in memory, too.
  assert read_same(value, found) == line


@pytest.mark.parametrize(
  'others',
  [
    {'ema': 1},
    {'model_ema/module': 1},
    {'best_model': 1},
    {'optimizer/state': 1, 'scheduler': 1},
    {'state_dict_ema': 1, 'teacher_ema': 1},
  ],
  ids=str,
)
def test_plain_weights_are_meant_and_others_named(tensors, others):
  found = tensors()
  value = {}
  for keys in others:
    value |= nested(keys, {name: x + 1 for name, x in found.items()})
  line = read_same(value | {'model': found}, found)
  assert line.startswith("unwrapped 'model'")
  assert 'ignored' in line


@pytest.mark.parametrize('prefix', ['', 'model.', 'student.'])
@pytest.mark.parametrize('other', ['ema.', 'model_ema.', 'ema_model.module.'])
def test_averaged_weights_of_the_same_mapping_are_left(tensors, prefix, other):
  found = tensors('mobilenet_v2')
  value = prefixed(other, found) | prefixed(prefix, found)
  assert f'other tensors: {other.split("module")[0]}' in read_same(value, found)
  # An AveragedModel, and a trunk within a loss.
  value = prefixed('module.', found) | {'n_averaged': np.array(3)}
  value |= prefixed('perceptual_loss.net.', trunk(tensors()))
  assert 'n_averaged' in read_same(value, found)


def test_parts_in_mappings_of_their_own(tensors):
  found, value = tensors(), {'epoch': 3}
  for name, x in found.items():
    part, _, rest = name.partition('.')
    value.setdefault(part, {})[rest] = x
  read_same(value, found)
  read_same({'state_dict': value}, found)


@pytest.mark.parametrize(
  ('first', 'second', 'words'),
  [
    ('student.', 'teacher.', ("'student.' and 'teacher.'", 'save one')),
    ('model.a.', 'model.b.', ("'model.a.' and 'model.b.'",)),
    ('', 'teacher.', ("'' and 'teacher.'",)),
    ('t_net.', 's_net.', ("'t_net.'", 'attnfd_jax.load_torch_distiller')),
    ('G/', 'D/', ("'G/' and 'D/'",)),
  ],
)
def test_two_networks_are_never_guessed_between(
  tmp_path, tensors, first, second, words
):
  value = prefixed(first, tensors()) | prefixed(second, tensors('resnet34'))
  if '/' in first:
    value = {'G': tensors(), 'D': tensors('mobilenet_v2')}
  path = tmp_path / 'a.pth'
  torch_files.write_torch(path, value)
  with pytest.raises(InputError, match='a.pth: has 2 networks') as error:
    import_stage(path, tmp_path / 'b')
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize(
  'odd', [np.nan, np.inf, -np.inf, 1e300], ids=['nan', 'inf', '-inf', 'huge']
)
@pytest.mark.parametrize('dtype', ['f2', 'f4', 'f8'])
def test_numbers_that_are_none_are_refused_everywhere(
  tmp_path, tensors, odd, dtype
):
  found = tensors()
  name = 'decoder.last_conv.8.weight'
  found[name] = np.full(found[name].shape, 2.0)
  with np.errstate(over='ignore'):
    found[name][0, 0] = odd
    found[name] = found[name].astype(dtype)
  path = write(tmp_path / 'a.pth', found)
  network, *_ = shapes('resnet18')
  options = {'backbone': 'resnet18', 'num_classes': 21} | TINY
  config = default_config()
  config.teacher.update(TINY | {'checkpoint': str(path)})
  config.teacher.backbone = 'resnet18'
  mesh = sharding.make_mesh()
  for load in (
    lambda: import_stage(path, tmp_path / 'b', allow_missing=True),
    lambda: torch_models.load_pretrained(path, network),
    lambda: attnfd_jax.load_torch(path, **options),
    lambda: sources.from_config(
      resolve(config), tmp_path, tuple(classes.VOC), mesh
    ),
  ):
    with pytest.raises(InputError, match=f'1 of .* NaN or inf.*: {name}; '):
      load()
  assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


HEADS = {
  'torchvision': ('backbone.', ('classifier.4.weight', 'aux_classifier.0.a')),
  'mmsegmentation': ('backbone.', ('decode_head.conv_seg.weight',)),
  "VainF's DeepLabV3Plus-Pytorch": (
    'backbone.',
    ('classifier.project.0.weight', 'classifier.classifier.3.bias'),
  ),
  'segmentation_models.pytorch': (
    'encoder.',
    ('decoder.blocks.0.conv1.0.weight', 'segmentation_head.0.bias'),
  ),
  '': ('features.', ('head.weight', 'neck.0.weight')),
}


@pytest.mark.parametrize('wrapped', ['', 'state_dict'])
@pytest.mark.parametrize('prefix', ['', 'module.', 'model.'])
@pytest.mark.parametrize('project', HEADS)
def test_networks_of_other_projects(
  tmp_path, tensors, project, prefix, wrapped
):
  begin, heads = HEADS[project]
  full = tensors()
  value = prefixed(begin, trunk(full)) | {name: np.ones(2) for name in heads}
  value = prefixed(prefix, value)
  path = tmp_path / 'a.pth'
  torch_files.write_torch(path, {wrapped: value} if wrapped else value)
  network, *_ = shapes('resnet18')
  config = default_config()
  config.teacher.update(TINY | {'checkpoint': str(path)})
  config.teacher.backbone = 'resnet18'
  options = {'backbone': 'resnet18', 'num_classes': 21}
  for load in (
    lambda: import_stage(path, tmp_path / 'b'),
    lambda: import_stage(path, tmp_path / 'b', allow_missing=True, **options),
    lambda: attnfd_jax.load_torch(path, **options, **TINY),
    lambda: sources.from_config(
      resolve(config), tmp_path, tuple(classes.VOC), sharding.make_mesh()
    ),
  ):
    with pytest.raises(InputError, match='a.pth: holds a network') as error:
      load()
    text = str(error.value)
    assert '\n' not in text and '--allow_missing' not in text
    assert f'network of {project} (' in text if project else 'network (' in text
    assert prefix.replace('module.', '') + heads[0] in text
    assert '--config.student.backbone=resnet18' in text
    assert '--config.student.pretrained=FILE' in text
    assert 'through PyTorch: config.teacher.factory' in text
    assert 'docs/any_teacher.md' in text
  # What the message says.
  variables, line = torch_models.load_pretrained(path, network)
  expected, _, _ = torch_models.import_network(full, network)
  assert line.startswith(f'starts from the backbone of {path}: loaded')
  assert f'ignored {len(heads)} other tensors: ' in line
  for part in ('params', 'batch_stats'):
    assert_same(
      torch_names.flatten(variables[part]['backbone']),
      torch_names.flatten(expected[part]['backbone']),
    )


@pytest.mark.parametrize('prefix', ['', 'module.', 'model.'])
def test_our_heads_over_another_trunk_are_not_foreign(tensors, prefix):
  found = tensors()
  layers = {x: found.pop(x) for x in [*found] if '.layer' in x}
  found['backbone.stage1.weight'] = np.ones(3, np.float32)
  network, *_ = shapes('resnet18')
  *_, report = torch_models.import_network(prefixed(prefix, found), network)
  used = {x for x in layers if not x.endswith('num_batches_tracked')}
  assert {*report.missing} == used
  assert report.unexpected == ['backbone.stage1.weight']


@pytest.mark.parametrize(
  ('project', 'keys'),
  [
    ('transformers', ('segformer.encoder.a.weight', 'decode_head.linear_c.0')),
    ('mmsegmentation', ('backbone.stem.0.weight', 'decode_head.conv_seg.bias')),
    ('torchvision', ('backbone.0.0.weight', 'classifier.cbr.0.weight')),
    ('', ('patch_embed.proj.weight', 'blocks.0.attn.qkv.weight')),
    ('', ('conv1.weight', 'fc.weight')),
    ('', ('features.0.weight', 'features.3.weight', 'classifier.6.weight')),
  ],
  ids=['segformer', 'stem', 'lraspp', 'vit', 'lenet', 'vgg'],
)
def test_networks_without_a_trunk_of_ours(tmp_path, project, keys):
  found = {name: np.ones((4, 3, 3, 3)) for name in keys}
  path = write(tmp_path / 'a.pth', found)
  network, *_ = shapes('resnet18')
  for load in (
    lambda: import_stage(path, tmp_path / 'b', backbone='resnet18'),
    lambda: torch_models.load_pretrained(path, network),
  ):
    with pytest.raises(InputError, match='a.pth: holds a network') as error:
      load()
    text = str(error.value)
    assert f'network of {project} (' in text if project else 'network (' in text
    assert keys[0] in text and 'pretrained' not in text


@pytest.mark.parametrize('prefix', ['', 'encoder.', 'model.backbone.', 'a.b.'])
@pytest.mark.parametrize('kind', ['resnet', 'torchvision', 'parts'])
def test_trunks_with_any_prefix(tmp_path, tensors, kind, prefix):
  backbone = 'resnet18' if kind == 'resnet' else 'mobilenet_v2'
  full = tensors(backbone)
  found = (trunk if kind == 'resnet' else torchvision_mobilenet)(full)
  if kind == 'parts':  # Of VainF's IntermediateLayerGetter.
    found = {
      f'{"low" if int(name.split(".")[1]) < 4 else "high"}_level_{name}': x
      for name, x in found.items()
    }
  network, *_ = shapes(backbone)
  path = write(tmp_path / 'a.pth', prefixed(prefix, found))
  variables, _ = torch_models.load_pretrained(path, network)
  expected, _, _ = torch_models.import_network(full, network)
  assert_same(
    torch_names.flatten(variables['params']['backbone']),
    torch_names.flatten(expected['params']['backbone']),
  )


def test_an_index_of_parts_is_a_source(tmp_path, tensors):
  found, parts = tensors(), {}
  for number, name in enumerate(found):
    parts.setdefault(f'model-{number % 3}.safetensors', []).append(name)
  for part, held in parts.items():
    torch_files.write_safetensors(tmp_path / part, {k: found[k] for k in held})
  index = {name: part for part, held in parts.items() for name in held}
  path = tmp_path / 'model.safetensors.index.json'
  path.write_text(json.dumps({'weight_map': index}))
  lines = import_stage(path, tmp_path / 'b')
  assert 'missing 0' in lines[0]
  conversion.export_stage(tmp_path / 'b', tmp_path / 'c.pth')
  assert_same(torch_files.read_state_dict(tmp_path / 'c.pth'), found)


def test_what_was_done_is_said_by_all(tmp_path, tensors):
  full = tensors()
  value = prefixed('student.', full) | {'criterion.weight': np.ones(21)}
  path = tmp_path / 'a.pth'
  torch_files.write_torch(path, {'weights': value})
  said = (
    "unwrapped 'weights'; removed 'student.' from names; "
    'ignored 1 other tensors: weights/criterion.weight'
  )
  network, *_ = shapes('resnet18')
  assert said in import_stage(path, tmp_path / 'b')[0]
  assert torch_models.load_pretrained(path, network)[1].endswith(said)
  config = default_config()
  options = {'backbone': 'resnet18', **TINY, 'checkpoint': str(path)}
  config.teacher.update(options)
  mesh = sharding.make_mesh()
  teacher = sources.from_config(
    resolve(config), tmp_path, tuple(classes.VOC), mesh
  )
  assert '; '.join(teacher.remarks) == said
  with pytest.raises(InputError, match='removed'):
    attnfd_jax.load_torch(path, backbone='resnet34', num_classes=21, **TINY)


def test_allow_missing_fills_the_rest_at_random(tmp_path, tensors):
  found = tensors()
  del found['decoder.conv1.weight']
  path = write(tmp_path / 'a.pth', found)
  with pytest.raises(InputError, match='--allow_missing'):
    import_stage(path, tmp_path / 'b')
  lines = import_stage(path, tmp_path / 'b', num_classes=19, allow_missing=True)
  assert any('tensors are random' in line for line in lines)
  _, variables, info = loading.load_network(tmp_path / 'b')
  assert info['class_names'] == list(classes.CITYSCAPES)
  back = torch_models.export_torch(variables, backbone='resnet18')
  assert back['decoder.last_conv.8.weight'].shape == (19, 16, 1, 1)
  same = {k for k, x in back.items() if np.array_equal(x, found.get(k))}
  assert back.keys() - same <= {
    'decoder.conv1.weight',
    'decoder.last_conv.8.weight',
    'decoder.last_conv.8.bias',
  }


def test_the_command(tmp_path, tensors):
  path = write(tmp_path / 'a.pth', tensors())
  ours = tmp_path / 'ours'
  done = tiny_run.run_verb('convert', f'--source={path}', f'--target={ours}')
  assert done.returncode == 0, done.stderr
  assert 'loaded ' in done.stdout and 'missing 0' in done.stdout
  back = tmp_path / 'b.pth'
  done = tiny_run.run_verb('convert', f'--source={ours}', f'--target={back}')
  assert done.returncode == 0, done.stderr
  assert_same(torch_files.read_state_dict(back), tensors())
  before = sorted(tmp_path.rglob('*'))
  for convert_stage, source, target in (
    (import_stage, path, ours),
    (conversion.export_stage, ours, back),
  ):
    with pytest.raises(InputError, match='exists'):
      convert_stage(source, target)
  assert sorted(tmp_path.rglob('*')) == before


def hostile_file(path, tensors, kind, victim):
  """A file that no network may come from."""
  if kind == 'hostile':
    command = f'touch {victim}'

    class Call:
      def __reduce__(self):
        return os.system, (command,)

    with zipfile.ZipFile(path, 'w') as archive:
      data = pickle.dumps({'state_dict': Call()}, protocol=2)
      archive.writestr('archive/data.pkl', data)
      archive.writestr('archive/version', '3\n')
    return
  write(path, tensors())
  if kind == 'truncated':
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  elif kind == 'foreign':
    path.write_bytes(b'<html><body>Not found</body></html>')
  elif kind == 'empty':
    path.write_bytes(b'')


@pytest.mark.parametrize(
  ('kind', 'words'),
  [
    ('hostile', 'system'),
    ('truncated', 'truncated'),
    ('foreign', 'a web page'),
    ('empty', 'an empty file'),
    ('classes', 'reshaped 2'),
  ],
)
def test_bad_files_end_in_one_line(tmp_path, tensors, kind, words):
  path, victim = tmp_path / 'a.pth', tmp_path / 'victim'
  hostile_file(path, tensors, kind, victim)
  more = ['--num_classes=19'] if kind == 'classes' else []
  done = tiny_run.run_verb(
    'convert', f'--source={path}', f'--target={tmp_path}/b', *more
  )
  assert done.returncode == 2 and done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and 'a.pth' in line and words in line
  # Nothing was executed, nothing was written.
  assert [path.name for path in tmp_path.iterdir()] == ['a.pth']


def tiny_network(config, role, backbone='resnet18'):
  network = config[role]
  network.update({'backbone': backbone} | TINY)
  return networks.make_network(network, 9)


@pytest.mark.slow
def test_a_run_with_files_of_pytorch(tmp_path, tensors, capfd, monkeypatch):
  config = tiny_run.tiny_config()
  # The names of a ResNet, and a fraction of the compilation.
  small = functools.partial(ResNet, (1, 1, 1, 1), False)
  monkeypatch.setitem(deeplab.BACKBONES, 'resnet10', small)
  config.stages = ('distill',)
  config.data.train_scenes = config.batch_size = 2
  config.mesh.data = 1
  config.optim.name, config.optim.lr = 'sgd', 0.01
  config.distill.attnfd.teacher_attention = 'checkpoint'
  config.eval.num_pictures = 0
  for role in ('teacher', 'student'):
    tiny_network(config, role, 'resnet10')
  found = tensors('resnet10', num_classes=9)
  saved = write(tmp_path / 'teacher.pth.tar', prefixed('module.', found))
  config.teacher.checkpoint = str(saved)
  config.student.pretrained = str(write(tmp_path / 'trunk.pth', trunk(found)))
  states = []
  init_state = Stage.init_state

  def spy(self, **options):
    state = init_state(self, **options)
    states.append(jax.tree.map(np.array, state))  # It is donated.
    return state

  config.teacher.min_miou = 0.99
  with pytest.raises(InputError, match=r'below config\.teacher\.min_miou'):
    experiment.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()  # Before anything is begun.
  config.teacher.min_miou = 0.0
  with monkeypatch.context() as patch:
    patch.setattr(Stage, 'init_state', spy)
    result = experiment.train(config, tmp_path / 'run')['distill']
  out, _ = capfd.readouterr()
  assert 'starts from the backbone of' in out and 'teacher val mIoU' in out
  assert "unwrapped 'state_dict'; removed 'module.' from names" in out
  options = result['method']['options']['attnfd']
  assert options['teacher_attention'] == 'checkpoint'
  assert 0 <= result['teacher']['miou'] < 0.99
  assert result['teacher']['source'].endswith('teacher.pth.tar')
  (state,) = states
  gates = state.collections['distiller']['teacher']['methods_attnfd']
  student = {
    'params': state.params['student'],
    **state.collections['student'],
  }
  back = torch_models.export_torch(student, gates, backbone='resnet10')
  same = {name for name, x in back.items() if np.array_equal(x, found[name])}
  assert same >= {name for name in back if 'backbone.' in name}
  assert same >= {name for name in back if '.cbam.' in name}
  assert 'decoder.last_conv.8.weight' not in same
  # A student with its own gates can go back, gates included.
  conversion.export_stage(
    tmp_path / 'run' / 'distill', tmp_path / 'student.pth'
  )
  exported = torch_files.read_state_dict(tmp_path / 'student.pth')
  assert exported.keys() == found.keys()


def test_score_of_a_teacher_survives_a_restart(tmp_path):
  log = logs.StageLog(tmp_path)
  log.metrics('teacher', 0, {'miou': 0.5})
  log.metrics('train', 7, {'loss': 1.0})
  log = logs.StageLog(tmp_path)
  log.truncate_after(3)
  assert log.last('teacher', 'miou') == 0.5
  assert log.last('eval', 'miou', default=0.25) == 0.25


def test_files_that_do_not_fit_stop_a_run_before_it_begins(tmp_path, tensors):
  config = tiny_run.tiny_config()
  tiny_network(config, 'student')
  path = write(tmp_path / 'a.pth', trunk(tensors('mobilenet_v2')))
  config.student.pretrained = str(path)
  with pytest.raises(InputError, match='does not fill the backbone resnet18'):
    experiment.train(config, tmp_path / 'run')
  config.student.pretrained = ''
  config.stages = ('student', 'distill')
  config.teacher.checkpoint = str(path)
  with pytest.raises(InputError, match='not a complete resnet'):
    experiment.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_the_distiller_of_the_authors():
  backbones = {'s_net': 'resnet18', 't_net': 'mobilenet_v2'}
  found, channels = {}, []
  for number, (prefix, backbone) in enumerate(backbones.items(), 1):
    network, variables, gates = shapes(backbone, 7, width_multiplier=1.0)
    filled = jax.tree.map(
      lambda x, n=number: np.full(x.shape, n, np.float32), (variables, gates)
    )
    tensors = torch_models.export_torch(*filled, backbone=backbone)
    found |= {f'{prefix}.{name}': value for name, value in tensors.items()}
    maps = networks.abstract_outputs(network, (64, 64))['features']
    channels.append({tap: x.shape[-1] for tap, x in maps.items()})
  student, teacher = channels
  kernels = {}
  for number, tap in ((3, 'backbone'), (4, 'aspp'), (5, 'decoder')):
    size = (teacher[tap], student[tap], 1, 1)
    kernel = np.random.default_rng(number).normal(size=size)
    kernels[tap] = found[f'Connectors.{number}.0.weight'] = kernel
    for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
      found[f'Connectors.{number}.1.{leaf}'] = np.full(teacher[tap], 3.0)
  options = {
    'student_backbone': 'resnet18',
    'teacher_backbone': 'mobilenet_v2',
    'num_classes': 7,
  }
  pair = attnfd_jax.load_torch_distiller(found, **options)
  for variables, value in (
    (pair.student_variables, 1),
    (pair.teacher_variables, 2),
    (pair.distiller_variables['teacher'], 2),
  ):
    assert {x.flat[0] for x in jax.tree.leaves(variables)} == {value}
  params = pair.distiller_variables['params']
  for tap, kernel in kernels.items():
    (found_kernel,) = [
      x for x in jax.tree.leaves(params[f'connectors_{tap}']) if x.ndim == 4
    ]
    np.testing.assert_allclose(found_kernel, kernel.transpose(2, 3, 1, 0))
    gates = jax.tree.leaves(params[f'student_gates_{tap}'])
    assert {x.flat[0] for x in gates} == {1}
  del found['Connectors.4.0.weight']
  with pytest.raises(InputError, match=r'missing 1.*Connectors\.4\.0\.weight'):
    attnfd_jax.load_torch_distiller(found, **options)
