# SPDX-License-Identifier: Apache-2.0
"""Networks of stored stages."""

import json
import pathlib

from flax import traverse_util
import jax
import numpy as np

from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import TAPS
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.runs import checkpoints

# Of a stage made from a PyTorch file: '<collection>/<tap>/<leaf>'.
ATTENTION_FILE = 'attention.safetensors'
# Short side of image and label in protocol `reference`; train_kd.py:281.
REFERENCE_SHORT_SIDE = 513
# What a stage's config.json has for sure.
_DESCRIBED = ('class_names', 'palette', 'data', 'distill', 'eval', 'optim')


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


def load_network(directory, *, sharding=None, step=None, allow_code=False):
  """Network, variables and description of a finished or running stage.

  Args:
    directory: of a stage, e.g. runs/camvid/distill.
    sharding: of the variables; the first device by default.
    step: which checkpoint; the best by default.
    allow_code: run Python files of the folder, where its network is one.

  Returns:
    module, which computes in the type of the stage, its variables, and a dict:
    the stage's config.json with 'checkpoint_step'.

  Raises:
    InputError: if the folder is no stage, or has no such checkpoint.
  """
  del allow_code  # No network is made of code yet.
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
  network = networks.make_network(
    info[role_of(info)],
    len(info['class_names']),
    dtype=info['optim']['dtype'],
  )
  variables, step = checkpoints.restore_student(
    directory / 'checkpoints',
    _with_sharding(networks.abstract_variables(network), sharding),
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
    tensors = torch_files.read_torch(path)['state_dict']
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


def describe(checkpoint, info):
  """'runs/quickstart/distill, step 320: resnet18 x0.125'."""
  name = networks.describe(info[role_of(info)])
  return f'{checkpoint}, step {info["checkpoint_step"]}: {name}'


def seen_short_side(info, protocol):
  """Short side of the images that the network sees; 0 leaves their size."""
  if protocol == 'reference':
    return REFERENCE_SHORT_SIDE
  return info['eval'].get('short_side', 0)
