# SPDX-License-Identifier: Apache-2.0
"""Networks from configs, from seeds and from stored stages."""

import functools
import json
import pathlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.errors import InputError
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.models.deeplab import TAPS
from attnfd_jax.models.flops import count_flops
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.runs import checkpoints

# Of a stage made from a PyTorch file: '<collection>/<tap>/<leaf>'.
ATTENTION_FILE = 'attention.safetensors'
# What a stage's config.json has for sure.
_DESCRIBED = ('class_names', 'palette', 'data', 'distill', 'eval', 'optim')
_FIELDS = (
  'backbone',
  'output_stride',
  'width_multiplier',
  'aspp_channels',
  'decoder_channels',
  'low_level_channels',
  'in_path_attention',
  'aspp_dropout',
  'decoder_dropout',
  'head_dropout',
)


def compute_dtype(name):
  """The `dtype` of modules: None leaves float32 images in float32."""
  return None if name == 'float32' else jnp.dtype(name)


def make_network(config, num_classes, *, dtype='float32', **changes):
  """DeepLabV3Plus of a group `student` or `teacher` of a config.

  Raises:
    InputError: for a backbone or stride that does not exist.
  """
  options = {key: config[key] for key in _FIELDS if key in config} | changes
  try:
    return DeepLabV3Plus(
      num_classes=num_classes, dtype=compute_dtype(dtype), **options
    )
  except ValueError as error:
    raise InputError(str(error)) from error


def describe(config):
  """'resnet18' or 'resnet18 x0.25', for tables."""
  width = config['width_multiplier']
  suffix = '' if width == 1 else f' x{width:g}'
  return f'{config["backbone"]}{suffix}'


def init_key(seed, index):
  """Keys for random starts. rbg compiles several times as fast as threefry
  for hundreds of parameters; its numbers differ, so it is named here.
  """
  return jax.random.fold_in(jax.random.key(seed, impl='rbg'), index)


def abstract_variables(network):
  """Shapes and types of the variables, without computing or compiling."""
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  return jax.eval_shape(
    lambda x: network.init(jax.random.key(0), x, train=False), image
  )


def count_params(variables):
  """Number of trained values of a network."""
  return sum(x.size for x in jax.tree.leaves(variables['params']))


def count_gflops(network, height, width):
  """1e9 operations of the convolutions of one image's forward pass."""
  image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  forward = functools.partial(network.apply, train=False)
  return count_flops(forward, abstract_variables(network), image) / 1e9


def load_pretrained(path, network):
  """Variables of a network from the backbone, or all, of a PyTorch file.

  Args:
    path: of the file; a head for other classes is left out.
    network: DeepLabV3Plus.

  Returns:
    The variables with None where the file has nothing that fits, and a line
    that says so.

  Raises:
    InputError: if it cannot be read, or does not fill the whole backbone.
  """
  try:
    tensors = torch_models.reference_names(torch_files.read_state_dict(path))
  except OSError as error:
    raise InputError(
      f'{path}: cannot be read ({error.strerror}); is pretrained of '
      'config.teacher or config.student right?'
    ) from error
  variables, _, report = torch_models.import_network(tensors, network)
  backbone = jax.tree.leaves(
    [tree.get('backbone') for tree in variables.values()],
    is_leaf=lambda x: x is None,
  )
  if any(leaf is None for leaf in backbone):
    raise InputError(
      f'{path}: does not fill the backbone {network.backbone}: {report}.'
    )
  what = 'whole network'
  if not report.complete:
    what = 'backbone and what else fits'
  if torch_models.backbone_only(report):
    what = 'backbone'
  return variables, f'starts from the {what} of {path}: {report}'


def role_of(info):
  """The group of a stage's config.json that describes its network."""
  return 'teacher' if info['stage'] == 'teacher' else 'student'


def _with_sharding(shapes, sharding):
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
  )


def _damaged(path):
  return InputError(f'{path}: damaged, or of no stage; put a copy back.')


def load_network(directory, *, sharding=None, step=None):
  """Network, variables and description of a finished or running stage.

  Args:
    directory: of a stage, e.g. runs/camvid/distill.
    sharding: of the variables; the first device by default.
    step: which checkpoint; the best by default.

  Returns:
    module, {'params', 'batch_stats'}, and a dict: the stage's config.json with
    'checkpoint_step'.

  Raises:
    InputError: if the folder is no stage, or has no such checkpoint.
  """
  directory = pathlib.Path(directory)
  path = directory / 'config.json'
  if not path.is_file():
    raise InputError(
      f'{directory}: no config.json; name the folder of a stage, such as '
      'runs/quickstart/distill.'
    )
  try:
    info = dict(json.loads(path.read_text()))
  except (TypeError, ValueError) as error:
    raise _damaged(path) from error
  if 'stage' not in info:
    raise InputError(
      f'{directory}: is a run; name one of its stages, e.g. '
      f'{directory / "distill"}.'
    )
  if not {role_of(info), *_DESCRIBED} <= info.keys():
    raise _damaged(path)
  network = make_network(info[role_of(info)], len(info['class_names']))
  variables, step = checkpoints.restore_student(
    directory / 'checkpoints',
    _with_sharding(abstract_variables(network), sharding),
    averaged=info['optim']['ema_decay'] > 0,
    step=step,
  )
  info['checkpoint_step'] = step
  info['palette'] = np.array(info['palette'], np.uint8)
  return network, variables, info


def load_attention(directory, network, info):
  """The CBAMs at the taps of a stored network, outside its forward path.

  They are those of an imported file, or the ones that a student was distilled
  with.

  Args:
    directory: of a stage.
    network, info: as of `load_network`.

  Returns:
    {'params', 'batch_stats'} with the taps as keys, NumPy arrays, or None.
  """
  directory = pathlib.Path(directory)
  path = directory / ATTENTION_FILE
  if path.is_file():
    tensors, _ = torch_files.read_safetensors(path)
    return traverse_util.unflatten_dict(tensors, sep='/')
  if info['stage'] != 'distill' or network.in_path_attention:
    return None
  distill = info['distill']
  trained = distill['student_attention'] in ('learnable', 'mlp_frozen')
  if 'attnfd' not in distill['method'].split('+') or not trained:
    return None
  gates = _with_sharding(torch_models.abstract_gates(network), None)

  def wanted(part):
    named = {f'student_gates_{tap}': x for tap, x in gates[part].items()}
    return {'methods_attnfd': named}

  found, _ = checkpoints.restore_parts(
    directory / 'checkpoints',
    {
      'params': {'distiller': wanted('params')},
      'collections': {'distiller': {'batch_stats': wanted('batch_stats')}},
    },
    step=info['checkpoint_step'],
  )
  found = jax.device_get(found)
  parts = {
    'params': found['params']['distiller'],
    'batch_stats': found['collections']['distiller']['batch_stats'],
  }
  return {
    part: {tap: tree['methods_attnfd'][f'student_gates_{tap}'] for tap in TAPS}
    for part, tree in parts.items()
  }
