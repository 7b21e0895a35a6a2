# SPDX-License-Identifier: Apache-2.0
"""PyTorch files as stages of ours, and stages as PyTorch files."""

import json
import os
import pathlib
import tempfile

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax import paths
from attnfd_jax.data import classes
from attnfd_jax.errors import InputError
from attnfd_jax.models import layers
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import files
from attnfd_jax.pytorch import names as torch_names
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.runs import checkpoints, loading, logs

ENDINGS = ('.pth', '.pth.tar', '.safetensors')
# Data sets that a number of classes, or their names, show.
_DATASETS = {
  'pascal_voc': classes.VOC,
  'cityscapes': classes.CITYSCAPES,
  'camvid': classes.CAMVID,
}


def convert(source, target, *, config, allow_code=False, **options):
  """`import_stage` of a file, with options, or `export_stage` of a folder."""
  if not (source and target):
    raise InputError('--source and --target must name a file and a folder.')
  source = paths.as_path(source)
  if not source.exists():
    raise InputError(f'--source={source}: no such file or folder.')
  if source.is_dir() != str(target).endswith(ENDINGS):
    raise InputError(
      f'--target={target}: a folder becomes a file that ends in '
      f'{", ".join(ENDINGS)}, and a file becomes a folder.'
    )
  if source.is_file():
    return import_stage(source, target, config=config, **options)
  if given := [name for name, value in options.items() if value]:
    raise InputError(f'--{given[0]} is for PyTorch files as --source.')
  return export_stage(source, target, allow_code=allow_code)


def _new(target):
  if os.path.lexists(target):
    raise InputError(f'--target={target}: exists; name another one.')
  return pathlib.Path(target)


def _holes(tree):
  """Paths of the leaves that are None."""
  return [path for path, x in torch_names.flatten(tree).items() if x is None]


def _fill(variables, holes, network):
  """The variables with random values, as networks start, in place of None."""

  @jax.jit
  def init(rng):
    fresh = network.init(rng, jnp.zeros((1, 64, 64, 3)), train=False)
    fresh = torch_names.flatten(fresh)
    # Only what is returned is compiled.
    return {path: fresh[path] for path in holes}

  filled = jax.device_get(init(jax.random.key(0)))
  filled = torch_names.flatten(variables) | filled
  return traverse_util.unflatten_dict(filled, sep='/')


def _metadata(path):
  """What `export_stage` left in a .safetensors file, or {}."""
  if path.suffix != '.safetensors':
    return {}
  metadata = files.read_torch(path)['metadata']
  keys = {'class_names', 'palette', 'in_path_attention'} & metadata.keys()
  try:
    return {key: json.loads(metadata[key]) for key in keys}
  except ValueError:
    return {}  # Keys of somebody else.


def _describe_classes(num_classes, class_names, metadata):
  """Name of the data set, names of its classes, palette as a list."""
  names, count = list(class_names), len({*class_names})
  if names and not len(names) == count == num_classes:
    text = f'--class_names has {len(names)} names, {count} of them different'
    raise InputError(f'{text}; the network has {num_classes} classes.')
  names = names or metadata.get('class_names')
  if not isinstance(names, list) or len(names) != num_classes:
    alike = [list(x) for x in _DATASETS.values() if len(x) == num_classes]
    names = [*alike, [f'class_{i}' for i in range(num_classes)]][0]
  for dataset, table in _DATASETS.items():
    if names == [*table]:
      return dataset, names, [*map(list, table.values())]
  palette = metadata.get('palette', ())
  if np.shape(palette) != (num_classes, 3):
    palette = classes.voc_palette(num_classes).tolist()
  return 'folder', [str(name) for name in names], palette


def import_stage(
  source, target, *, config, class_names=(), allow_missing=False, **options
):
  """Writes the folder `target` from a PyTorch file; returns lines to print.

  `config` is a resolved one as plain values, for what the file does not show;
  `options` are of DeepLabV3Plus, None as in the file. The CBAMs are in the
  forward path if our own .safetensors says so; in the authors' code they are
  not. `allow_missing` fills what does not fit at random. Nothing is written on
  InputError.
  """
  source, target = pathlib.Path(source), _new(target)
  read = torch_networks.read_network(source)
  torch_networks.check_is_ours(read)
  metadata = _metadata(source)
  options = {
    'in_path_attention': metadata.get('in_path_attention') is True,
    **torch_networks.infer_options(read.tensors),
    **{key: value for key, value in options.items() if value is not None},
  }
  for key in ('backbone', 'num_classes'):
    if key not in options:
      raise InputError(f'{source.name}: does not show its {key}; give --{key}.')
  num_classes = options.pop('num_classes')
  student = config['student'] | options
  network = networks.make_network(student, num_classes)
  variables, attention, report = torch_networks.import_network(read, network)
  name = f'{networks.describe(student)}, {num_classes} classes'
  found = f'{source.name} as {name}: {report}'
  if not report.loaded:
    raise InputError(f'{found}; nothing in it fits.')
  if not report.complete and not allow_missing:
    raise InputError(f'{found}; --allow_missing fills the rest at random.')
  described = _describe_classes(num_classes, class_names, metadata)
  dataset, class_names, palette = described
  data = {'name': dataset}
  if dataset == 'folder':
    data['class_names'] = class_names
  lines = [found]
  if report.backbone_only:
    lines.append('the file holds a backbone and nothing else')
  if holes := _holes(variables):
    variables = _fill(variables, holes, network)
    lines.append(f'{len(holes)} tensors are random: not in the file, or unfit')
  if _holes(attention or {}):
    attention = None
    lines.append('its attention is incomplete and was left out')
  info = config | {
    'stage': 'converted',
    'student': student,
    'data': config['data'] | data,
    'source': source.name,
    'class_names': class_names,
    'palette': palette,
  }
  _write_folder(target, info, variables, attention)
  gates = 'no attention' if attention is None else 'attention kept'
  return [*lines, f'{target}: {name} ({dataset}), {gates}']


def _write_folder(target, info, variables, attention):
  target.parent.mkdir(parents=True, exist_ok=True)
  hidden = f'.{target.name}.'
  with tempfile.TemporaryDirectory('', hidden, target.parent) as temporary:
    stage = pathlib.Path(temporary, 'stage')
    stage.mkdir()
    logs.write_json(stage / 'config.json', info)
    logs.write_json(stage / 'environment.json', logs.environment())
    if attention is not None:
      loading.write_attention(stage, attention)
    # What loading.load_network reads of a state in training.
    collections = jax.tree.map(jnp.asarray, variables)
    state = {
      'params': {'student': collections.pop('params')},
      'collections': {'student': collections},
    }
    with checkpoints.managed(stage / 'checkpoints') as manager:
      checkpoints.save(manager, 0, state, {'source': info['source']}, miou=0.0)
    stage.rename(target)


def check_format(network, kind):
  """InputError for 'onnx' and 'pth', which name the layers of DeepLabV3Plus."""
  if kind in ('onnx', 'pth') and not networks.is_ours(network):
    raise InputError(
      f'{kind} is written for DeepLabV3Plus only; use --format=stablehlo or '
      'safetensors of export.'
    )


def describe_data(info):
  """What a file says about images and classes, of a stage's config.json."""
  return {
    'class_names': info['class_names'],
    'palette': info['palette'].tolist(),
    'mean': layers.IMAGE_MEAN,
    'std': layers.IMAGE_STD,
    'dataset': info['data']['name'],
    'protocol': info['eval']['protocol'],
  }


def without_places(value):
  """A part of a config with '' for absolute paths: they say where things are on
  one machine, and files are given away.
  """
  if isinstance(value, dict):
    return {key: without_places(x) for key, x in value.items()}
  is_place = isinstance(value, str) and os.path.isabs(os.path.expanduser(value))
  return '' if is_place else value


def describe_stage(info):
  """What is left to know to score a file: a part of a stage's config.json."""
  seen = ('protocol', 'short_side', 'size_multiple')
  settings = {k: info['eval'][k] for k in seen if k in info['eval']}
  network = networks.describe(info[loading.role_of(info)])
  return {
    'stage': info['stage'],
    'step': info['checkpoint_step'],
    'network': network,
    'data': without_places(info['data']),
    'eval': settings,
  }


def write_weights(path, directory, network, variables, info):
  """Writes what `load_network` returned for the stage in `directory`, with the
  gates of that folder unless it is None.

  DeepLabV3Plus gets the authors' names, another network '<collection>/<path>'.
  The ending of `path` decides the format. Returns number of tensors and lines
  to print; InputError if the network cannot be written so.
  """
  is_safetensors, remarks = path.suffix == '.safetensors', []
  check_format(network, 'safetensors' if is_safetensors else 'pth')
  if networks.is_ours(network):
    attention = None
    if directory is not None:
      attention = loading.load_attention(paths.as_path(directory), network)
    tensors = torch_networks.export_torch(
      variables, attention, backbone=network.backbone
    )
    spec = {x: getattr(network, x) for x in ('backbone', 'in_path_attention')}
    if network.in_path_attention:
      remarks.append(
        "its attention is in the forward path; the authors' DeepLab loads it "
        'and computes something else'
      )
    elif attention is None:
      remarks.append(
        "no attention, as in plain DeepLabV3+; the authors' strict load fails"
      )
  else:
    tensors = torch_names.flatten(jax.device_get(variables))
    group = info[loading.role_of(info)]
    # Where its file lay on this machine says nothing elsewhere.
    name = pathlib.Path(group['network']).name
    spec = {'network': name, 'options': group['options']}
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_safetensors:
    metadata = (describe_data(info) | spec).items()
    metadata = {key: json.dumps(value) for key, value in metadata}
    files.write_safetensors(path, tensors, metadata)
  else:  # What the authors' train_kd.py reads.
    checkpoint = {'epoch': 0, 'state_dict': tensors, 'best_pred': 0.0}
    files.write_torch(path, checkpoint)
  return len(tensors), remarks


def export_stage(source, target, *, allow_code=False):
  """Writes a PyTorch file from a stage's best checkpoint; lines to print.

  The ending of `target` decides the format. Nothing is written on InputError.
  """
  target = _new(target)
  *network, info = loading.load_network(source, allow_code=allow_code)
  count, remarks = write_weights(target, source, *network, info)
  name = networks.describe(info[loading.role_of(info)])
  return [f'{target}: {name}, {count} entries', *remarks]
