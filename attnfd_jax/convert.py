# SPDX-License-Identifier: Apache-2.0
r"""PyTorch files into folders of ours, and back; torch is not needed.

  python -m attnfd_jax.convert --source=teacher.pth.tar --target=runs/teacher \
    [--backbone=resnet101 --num_classes=21] [--class_names=road,car,...]
  python -m attnfd_jax.convert --source=runs/camvid/distill --target=a.pth

The folder can be evaluated and predicted with, and be a teacher. --target ends
in .pth, .pth.tar or .safetensors when --source is a folder.
"""

import json
import os
import pathlib
import shutil
import tempfile

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnfd_jax import cli
from attnfd_jax.config import default_config
from attnfd_jax.config import resolve
from attnfd_jax.data import classes
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import IMAGE_MEAN
from attnfd_jax.models.deeplab import IMAGE_STD
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import names as torch_names
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.runs import checkpoints
from attnfd_jax.runs import loading
from attnfd_jax.runs import logs
from attnfd_jax.training.state import make_state

TORCH_ENDINGS = ('.pth', '.pth.tar', '.safetensors')
# Number of classes -> the data set of the paper, or ours, that has so many.
_DATASETS = {
  len(classes.VOC): ('pascal_voc', classes.VOC),
  len(classes.CITYSCAPES): ('cityscapes', classes.CITYSCAPES),
  len(classes.CAMVID): ('camvid', classes.CAMVID),
}


def _new(target):
  if os.path.lexists(target):
    raise InputError(f'--target={target}: exists; name another one.')
  return pathlib.Path(target)


def _metadata(path):
  """What `export_stage` left in a .safetensors file, or {}."""
  if path.suffix != '.safetensors':
    return {}
  _, metadata = torch_files.read_safetensors(path)
  try:
    return {
      key: json.loads(metadata[key])
      for key in ('class_names', 'palette', 'in_path_attention')
      if key in metadata
    }
  except ValueError:
    return {}  # Keys of somebody else.


def _describe_classes(num_classes, class_names, metadata):
  """Name of the data set, names of its classes, palette as a list."""
  names, palette = metadata.get('class_names'), metadata.get('palette')
  shape = np.shape(palette) if palette is not None else ()
  if class_names:
    if len(class_names) != num_classes or len({*class_names}) != num_classes:
      raise InputError(
        f'--class_names has {len(class_names)} names, {len({*class_names})} of '
        f'them different; the network has {num_classes} classes.'
      )
    names = list(class_names)
  elif not isinstance(names, list) or len(names) != num_classes:
    names = None
  if names is None and num_classes in _DATASETS:
    dataset, table = _DATASETS[num_classes]
    return dataset, list(table), [list(colour) for colour in table.values()]
  if shape != (num_classes, 3):
    palette = classes.voc_palette(num_classes).tolist()
  for dataset, table in _DATASETS.values():
    if names == list(table):
      return dataset, names, [list(colour) for colour in table.values()]
  names = names or [f'class_{i}' for i in range(num_classes)]
  return 'folder', [str(name) for name in names], palette


def fill_holes(variables, network):
  """Random values, as networks start, in place of None."""

  leaves, structure = jax.tree.flatten(variables, is_leaf=lambda x: x is None)

  @jax.jit
  def init(rng):
    # Only what is returned is compiled.
    fresh = network.init(rng, jnp.zeros((1, 64, 64, 3)), train=False)
    pairs = zip(leaves, structure.flatten_up_to(fresh), strict=True)
    return [new for old, new in pairs if old is None]

  fresh = iter(jax.device_get(init(networks.init_key(0, 1))))
  leaves = [next(fresh) if leaf is None else leaf for leaf in leaves]
  return structure.unflatten(leaves)


def import_stage(
  source,
  target,
  *,
  backbone=None,
  num_classes=None,
  class_names=(),
  in_path_attention=None,
  allow_missing=False,
):
  """Writes the folder `target` from a PyTorch file; returns lines to print.

  Args:
    source: .pth, .pth.tar or .safetensors file.
    target: folder that does not exist.
    backbone: key of BACKBONES; by default what the names show.
    num_classes: by default that of the classifier in the file.
    class_names: in the order of ids.
    in_path_attention: the CBAMs belong into the forward path of the network;
      by default what our own .safetensors says, else False, as in the authors'
      code.
    allow_missing: fill what does not fit at random.

  Raises:
    InputError: whenever the user can mend it; nothing is written then.
  """
  source, target = pathlib.Path(source), _new(target)
  tensors = torch_models.reference_names(torch_files.read_state_dict(source))
  metadata = _metadata(source)
  options = torch_models.infer_options(tensors)
  given = {'backbone': backbone, 'num_classes': num_classes}
  options |= {key: value for key, value in given.items() if value is not None}
  for key in given:
    if key not in options:
      raise InputError(f'{source.name}: does not show its {key}; give --{key}.')
  config = default_config()
  num_classes = options.pop('num_classes')
  if in_path_attention is None:
    in_path_attention = metadata.get('in_path_attention') is True
  config.student.update(options)
  with config.student.unlocked():
    config.student.in_path_attention = in_path_attention
  network = networks.make_network(config.student, num_classes)
  variables, attention, report = torch_models.import_network(tensors, network)
  name = networks.describe(config.student)
  found = f'{source.name} as {name} with {num_classes} classes: {report}'
  if not report.loaded:
    raise InputError(f'{found}; nothing in it fits.')
  if not report.complete and not allow_missing:
    raise InputError(f'{found}; --allow_missing fills the rest at random.')
  dataset, names, palette = _describe_classes(
    num_classes, class_names, metadata
  )
  config.data.name = dataset
  if dataset == 'folder':
    config.data.class_names = tuple(names)
  lines = [found]
  if torch_models.backbone_only(report):
    lines.append('the file holds a backbone and nothing else')
  holes = _count_holes(variables)
  if holes:
    variables = fill_holes(variables, network)
    lines.append(f'{holes} tensors are random: not in the file, or unfit')
  if attention is not None and _count_holes(attention):
    attention = None
    lines.append('its attention is incomplete and was left out')
  info = json.loads(resolve(config).to_json_best_effort()) | {
    'stage': 'converted',
    'source': source.name,
    'class_names': names,
    'palette': palette,
  }
  _write_folder(target, info, variables, attention)
  gates = 'no attention' if attention is None else 'attention kept'
  lines.append(f'{target}: {name}, {num_classes} classes ({dataset}), {gates}')
  return lines


def _count_holes(tree):
  leaves = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
  return sum(leaf is None for leaf in leaves)


def _write_folder(target, info, variables, attention):
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(
    tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent)
  )
  try:
    temporary.chmod(0o755)
    logs.write_json(temporary / 'config.json', info)
    logs.write_json(temporary / 'environment.json', logs.environment())
    if attention is not None:
      torch_files.write_safetensors(
        temporary / loading.ATTENTION_FILE, torch_names.flatten(attention)
      )
    state = jax.tree.map(jnp.asarray, {'student': variables})
    state = make_state(state, optax.identity(), ema=False)
    with checkpoints.make_manager(temporary / 'checkpoints') as manager:
      checkpoints.save(manager, 0, state, {'source': info['source']}, miou=0.0)
      manager.wait_until_finished()
    temporary.rename(target)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def export_stage(source, target):
  """Writes a PyTorch file from a stage's folder; returns lines to print.

  Args:
    source: folder of a stage; its best checkpoint is taken.
    target: file that does not exist; its ending decides the format.

  Raises:
    InputError: whenever the user can mend it; nothing is written then.
  """
  target = _new(target)
  network, variables, info = loading.load_network(source)
  attention = loading.load_attention(source, network, info)
  tensors = torch_models.export_torch(
    variables, attention, backbone=network.backbone
  )
  target.parent.mkdir(parents=True, exist_ok=True)
  if target.suffix == '.safetensors':
    metadata = {
      'backbone': network.backbone,
      'class_names': info['class_names'],
      'palette': info['palette'].tolist(),
      'mean': IMAGE_MEAN,
      'std': IMAGE_STD,
      'in_path_attention': network.in_path_attention,
    }
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    torch_files.write_safetensors(target, tensors, metadata)
  else:
    # What the authors' train_kd.py reads.
    torch_files.write_torch(
      target, {'epoch': 0, 'state_dict': tensors, 'best_pred': 0.0}
    )
  name = networks.describe(info[loading.role_of(info)])
  lines = [f'{target}: {name}, {len(tensors)} entries']
  if network.in_path_attention:
    lines.append(
      "its attention is in the forward path, which the authors' DeepLab has "
      'not: it loads the file, and computes something else'
    )
  elif attention is None:
    lines.append(
      'without attention, as in plain DeepLabV3+; the strict load of the '
      'authors wants some'
    )
  return lines


def main(argv):
  del argv
  options = flags.FLAGS
  for name in ('source', 'target'):
    if not options[name].value:
      raise InputError(f'--{name} is missing; name a file or a folder.')
  source, target = pathlib.Path(options.source), pathlib.Path(options.target)
  if not source.exists():
    raise InputError(f'--source={source}: no such file or folder.')
  to_torch = target.name.endswith(TORCH_ENDINGS)
  if source.is_dir() != to_torch:
    raise InputError(
      f'--target={target}: a folder becomes a file that ends in '
      f'{", ".join(TORCH_ENDINGS)}, and a file becomes a folder.'
    )
  if to_torch:
    given = ('backbone', 'num_classes', 'class_names', 'in_path_attention')
    given = [name for name in given if options[name].present]
    if given or options.allow_missing:
      raise InputError(
        f'--{(given or ["allow_missing"])[0]} is for PyTorch files as --source.'
      )
    lines = export_stage(source, target)
  else:
    lines = import_stage(
      source,
      target,
      backbone=options.backbone,
      num_classes=options.num_classes,
      class_names=options.class_names,
      in_path_attention=options.in_path_attention,
      allow_missing=options.allow_missing,
    )
  print('\n'.join(lines))


if __name__ == '__main__':
  flags.DEFINE_string('source', None, 'PyTorch file, or folder of a stage.')
  flags.DEFINE_string('target', None, 'Folder, or file; must not exist.')
  flags.DEFINE_string('backbone', None, 'As in the file by default.')
  flags.DEFINE_integer('num_classes', None, 'As in the file by default.')
  flags.DEFINE_list('class_names', [], 'Names in the order of ids.')
  flags.DEFINE_bool(
    'in_path_attention', None, 'The CBAMs belong into the forward path.'
  )
  flags.DEFINE_bool('allow_missing', False, 'Fill what is missing at random.')
  cli.run(main)
