# SPDX-License-Identifier: Apache-2.0
"""Converts PyTorch files to folders of stages, and stages to PyTorch files."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import tempfile
from typing import Any

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
from attnfd_jax.types import PyTree, StrPath, Variables

ENDINGS = ('.pth', '.pth.tar', '.safetensors')
# Data sets that are recognized by the number or the names of their classes.
_DATASETS = {
  'pascal_voc': classes.VOC,
  'cityscapes': classes.CITYSCAPES,
  'camvid': classes.CAMVID,
}


def convert(
  source: StrPath | None,
  target: StrPath | None,
  *,
  config: Mapping[str, Any],
  allow_code: bool = False,
  **options: Any,
) -> list[str]:
  """Converts a PyTorch file to the folder of a stage, or the reverse.

  Args:
    source: file or folder to convert.
    target: folder or file to write.
    config: see `import_stage`.
    allow_code: see `export_stage`.
    **options: of `import_stage`.

  Returns:
    Lines to print.
  """
  if not (source and target):
    raise InputError(
      '--source and --target must be given, one a file and one a folder.'
    )
  source = paths.as_path(source)
  if not source.exists():
    raise InputError(f'--source={source}: no such file or folder.')
  if source.is_dir() != str(target).endswith(ENDINGS):
    raise InputError(
      f'--target={target}: it must end in {", ".join(ENDINGS)} if --source is '
      'a folder, and must be a folder if --source is a file.'
    )
  if source.is_file():
    return import_stage(source, target, config=config, **options)
  if given := [name for name, value in options.items() if value]:
    raise InputError(f'--{given[0]} needs a PyTorch file as --source.')
  return export_stage(source, target, allow_code=allow_code)


def _new(target: StrPath) -> pathlib.Path:
  if os.path.lexists(target):
    raise InputError(f'--target={target}: exists; choose another name.')
  return pathlib.Path(target)


def _missing(tree: PyTree) -> list[str]:
  """Paths of the leaves that are None."""
  return [path for path, x in torch_names.flatten(tree).items() if x is None]


def _fill(variables: PyTree, missing: list[str], network: Any) -> Variables:
  """Initializes the missing variables at random, as for training."""

  @jax.jit
  def init(rng):
    fresh = network.init(rng, jnp.zeros((1, 64, 64, 3)), train=False)
    fresh = torch_names.flatten(fresh)
    # The compiler drops the others.
    return {path: fresh[path] for path in missing}

  filled = jax.device_get(init(jax.random.key(0)))
  filled = torch_names.flatten(variables) | filled
  return traverse_util.unflatten_dict(filled, sep='/')


def _metadata(path: pathlib.Path) -> dict[str, Any]:
  """Metadata that `export_stage` wrote to a .safetensors file, or {}."""
  if path.suffix != '.safetensors':
    return {}
  metadata = files.read_torch(path)['metadata']
  keys = {'class_names', 'palette', 'in_path_attention'} & metadata.keys()
  try:
    return {key: json.loads(metadata[key]) for key in keys}
  except ValueError:
    return {}  # Written by another program.


def _describe_classes(
  num_classes: int, class_names: Sequence[str], metadata: Mapping[str, Any]
) -> tuple[str, list[str], list]:
  """Name of the data set, names of its classes, palette as a list."""
  names, count = list(class_names), len({*class_names})
  if names and not len(names) == count == num_classes:
    text = f'--class_names has {len(names)} names ({count} distinct)'
    raise InputError(f'{text}; the network has {num_classes} classes.')
  names = names or metadata.get('class_names')
  if not isinstance(names, list) or len(names) != num_classes:
    guesses = [list(x) for x in _DATASETS.values() if len(x) == num_classes]
    names = [*guesses, [f'class_{i}' for i in range(num_classes)]][0]
  for dataset, table in _DATASETS.items():
    if names == [*table]:
      return dataset, names, [*map(list, table.values())]
  palette = metadata.get('palette', ())
  if np.shape(palette) != (num_classes, 3):
    palette = classes.voc_palette(num_classes).tolist()
  return 'folder', [str(name) for name in names], palette


def import_stage(
  source: StrPath,
  target: StrPath,
  *,
  config: Mapping[str, Any],
  class_names: Sequence[str] = (),
  allow_missing: bool = False,
  **options: Any,
) -> list[str]:
  """Writes the folder of a stage from a PyTorch file.

  CBAMs are in the forward path only if a .safetensors file from `export_stage`
  says so; in the authors' code they are not.

  Args:
    source: PyTorch file.
    target: new folder.
    config: plain values of a resolved config, for what the file does not show.
    class_names: names of the classes; by default those in the file, else those
      of a data set with as many classes, else class_0, class_1 and so on.
    allow_missing: whether to initialize missing tensors at random.
    **options: fields of DeepLabV3Plus; None is as in the file.

  Returns:
    Lines to print.

  Raises:
    InputError: if the file does not fit; nothing is written.
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
  summary = f'{source.name} as {name}: {report}'
  if not report.loaded:
    raise InputError(f'{summary}; no tensor matches.')
  if not report.complete and not allow_missing:
    raise InputError(
      f'{summary}; --allow_missing initializes the others at random.'
    )
  dataset, class_names, palette = _describe_classes(
    num_classes, class_names, metadata
  )
  data: dict[str, Any] = {'name': dataset}
  if dataset == 'folder':
    data['class_names'] = class_names
  lines = [summary]
  if report.backbone_only:
    lines.append('the file contains only a backbone')
  if missing := _missing(variables):
    variables = _fill(variables, missing, network)
    lines.append(
      f'{len(missing)} tensors are random: missing in the file, or of another '
      'shape'
    )
  if _missing(attention or {}):
    attention = None
    lines.append('its attention is incomplete and was dropped')
  info = {
    **config,
    'stage': 'converted',
    'student': student,
    'data': config['data'] | data,
    'source': source.name,
    'class_names': class_names,
    'palette': palette,
  }
  _write_folder(target, info, variables, attention)
  gates = 'without' if attention is None else 'with'
  return [*lines, f'{target}: {name} ({dataset}), {gates} attention']


def _write_folder(
  target: pathlib.Path,
  info: Mapping[str, Any],
  variables: Variables,
  attention: Variables | None,
) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  hidden = f'.{target.name}.'
  with tempfile.TemporaryDirectory('', hidden, target.parent) as temporary:
    stage = pathlib.Path(temporary, 'stage')
    stage.mkdir()
    logs.write_json(stage / 'config.json', info)
    logs.write_json(stage / 'environment.json', logs.environment())
    if attention is not None:
      loading.write_attention(stage, attention)
    # The part of a TrainState that loading.load_network reads.
    collections = jax.tree.map(jnp.asarray, variables)
    state = {
      'params': {'student': collections.pop('params')},
      'collections': {'student': collections},
    }
    with checkpoints.managed(stage / 'checkpoints') as manager:
      checkpoints.save(manager, 0, state, {'source': info['source']}, miou=0.0)
    stage.rename(target)


def check_format(network: Any, kind: str) -> None:
  """Raises InputError if a network cannot be written as 'onnx' or 'pth'."""
  if kind in ('onnx', 'pth') and not networks.is_ours(network):
    raise InputError(
      f'{kind} is written for DeepLabV3Plus only; use --format=stablehlo or '
      'safetensors of export.'
    )


def describe_data(info: Mapping[str, Any]) -> dict[str, Any]:
  """Facts on images and classes for an exported file.

  Args:
    info: the stage's config.json from `load_network`.
  """
  return {
    'class_names': info['class_names'],
    'palette': info['palette'].tolist(),
    'mean': layers.IMAGE_MEAN,
    'std': layers.IMAGE_STD,
    'dataset': info['data']['name'],
    'protocol': info['eval']['protocol'],
  }


def without_places(value: Any) -> Any:
  """Replaces absolute paths in a part of a config by ''.

  Exported files are shared, and such paths exist on one machine only.
  """
  if isinstance(value, dict):
    return {key: without_places(x) for key, x in value.items()}
  is_path = isinstance(value, str) and os.path.isabs(os.path.expanduser(value))
  return '' if is_path else value


def describe_stage(info: Mapping[str, Any]) -> dict[str, Any]:
  """The part of a stage's config.json that scoring an exported file needs."""
  keys = ('protocol', 'short_side', 'size_multiple')
  settings = {k: info['eval'][k] for k in keys if k in info['eval']}
  network = networks.describe(info[loading.role_of(info)])
  return {
    'stage': info['stage'],
    'step': info['checkpoint_step'],
    'network': network,
    'data': without_places(info['data']),
    'eval': settings,
  }


def write_weights(
  path: pathlib.Path,
  directory: StrPath | None,
  network: Any,
  variables: Variables,
  info: Mapping[str, Any],
) -> tuple[int, list[str]]:
  """Writes the network of a stage to a PyTorch file.

  DeepLabV3Plus gets the authors' names of tensors, other networks
  '<collection>/<path>'.

  Args:
    path: file to write; its ending decides the format.
    directory: folder of the stage, whose gates are written as well; None
      writes no gates.
    network: from `load_network`, as the next two.
    variables: of the network.
    info: the stage's config.json.

  Returns:
    The number of tensors, and lines to print.

  Raises:
    InputError: if the format does not support the network.
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
        "its attention is in the forward path; the authors' DeepLab loads it, "
        'but does not apply it there'
      )
    elif attention is None:
      remarks.append("it has no attention, so the authors' strict load fails")
  else:
    tensors = torch_names.flatten(jax.device_get(variables))
    group = info[loading.role_of(info)]
    # Without the folder, which exists on this machine only.
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


def export_stage(
  source: StrPath, target: StrPath, *, allow_code: bool = False
) -> list[str]:
  """Writes a PyTorch file from the best checkpoint of a stage.

  Args:
    source: folder of the stage.
    target: new file; its ending decides the format.
    allow_code: whether to run a Python file of the folder, if it defines the
      network.

  Returns:
    Lines to print.

  Raises:
    InputError: if the stage cannot be written; there is no file then.
  """
  target = _new(target)
  network, variables, info = loading.load_network(source, allow_code=allow_code)
  count, remarks = write_weights(target, source, network, variables, info)
  name = networks.describe(info[loading.role_of(info)])
  return [f'{target}: {name}, {count} tensors', *remarks]
