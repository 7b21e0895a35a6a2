# SPDX-License-Identifier: Apache-2.0
"""Networks of stored stages."""

import json

from flax import traverse_util
import jax
import numpy as np
import safetensors.numpy

from attnfd_jax import paths, user_code
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import files, names
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.runs import checkpoints

# Gates at the taps of a network, outside its forward path: those of an imported
# file, or the ones a student was distilled with; '<collection>/<tap>/<leaf>'.
ATTENTION_FILE = 'attention.safetensors'
# Of a folder that export wrote, in place of checkpoints.
WEIGHTS_FILE = 'model.safetensors'
# What a stage's config.json has for sure.
_DESCRIBED = ('class_names', 'palette', 'data', 'distill', 'eval', 'optim')


def role_of(info):
  """The group of a stage's config.json that describes its network."""
  return 'teacher' if info['stage'] == 'teacher' else 'student'


def _read_info(directory):
  """The config.json of a stage; InputError if the folder is none."""
  path = directory / 'config.json'
  if not path.is_file():
    raise InputError(
      f'{directory}: no config.json; name the folder of a stage, such as '
      'runs/quickstart/distill.'
    )
  try:
    info = dict(json.loads(path.read_text()))
    if 'stage' in info and not {role_of(info), *_DESCRIBED} <= info.keys():
      raise ValueError('Some groups of the config are absent.')
  except (TypeError, ValueError) as error:
    raise InputError(
      f'{path}: damaged, or of no stage; put a copy back.'
    ) from error
  if 'stage' not in info:
    raise InputError(
      f'{directory}: is a run; name one of its stages, such as distill.'
    )
  return info


def load_network(
  directory, *, sharding=None, step=None, network=None, allow_code=False
):
  """Network, variables and description of a finished or running stage.

  Args:
    directory: of a stage, e.g. runs/camvid/distill, or of `export
      --format=folder`.
    sharding: of the variables; the first device by default.
    step: which checkpoint; the best by default.
    network: of the stage, where the caller has it.
    allow_code: run a Python file of the folder, where its network is one.

  Returns:
    module, which computes in the type of the stage, its variables, and a dict:
    the stage's config.json with 'checkpoint_step'.

  Raises:
    InputError: if the folder is no stage, has no such checkpoint, or names code
      that is not allowed.
  """
  directory = paths.as_path(directory)
  info = _read_info(directory)
  if network is None:
    options, source = dict(info[role_of(info)]), None
    if user_code.is_code(options['network']):
      options['network'], source = user_code.kept(
        directory, info, options['network'], allow_code=allow_code
      )
    count, dtype = len(info['class_names']), info['optim']['dtype']
    network = networks.make_network(options, count, dtype=dtype, source=source)
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  info['palette'] = np.array(info['palette'], np.uint8)
  path = directory / WEIGHTS_FILE
  if path.is_file() and not (directory / 'checkpoints').is_dir():
    if step not in (None, info.setdefault('checkpoint_step', 0)):
      raise InputError(
        f'{directory}: has the weights of step {info["checkpoint_step"]} alone.'
      )
    return network, jax.device_put(_read_weights(path, network), sharding), info
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    dict(networks.abstract_variables(network)),
  )
  # As a TrainState has them; an average of the weights is what was evaluated.
  weights = 'ema' if info['optim']['ema_decay'] > 0 else 'params'
  wanted = {
    weights: {'student': shapes.pop('params')},
    'collections': {'student': shapes},
  }
  found, info['checkpoint_step'] = checkpoints.restore(
    directory / 'checkpoints', wanted, step=step
  )
  rest = found['collections']['student']
  return network, {'params': found[weights]['student'], **rest}, info


def _read_weights(path, network):
  """Variables of a file of conversion.write_weights; InputError if some are
  missing.
  """
  if not networks.is_ours(network):
    tensors = files.read_torch(path)['state_dict']
    return traverse_util.unflatten_dict(tensors, sep='/')
  variables, _, report = torch_networks.import_network(path, network)
  if not report.complete:
    raise InputError(f'{path}: {report}; put a copy of the file back.')
  return variables


def load_attention(directory, network):
  """The CBAMs at the taps of a stored network, outside its forward path:
  {'params', 'batch_stats'} with the taps as keys, or None.
  """
  path = directory / ATTENTION_FILE
  if getattr(network, 'in_path_attention', False) or not path.is_file():
    return None
  tensors = safetensors.numpy.load(path.read_bytes())
  return traverse_util.unflatten_dict(tensors, sep='/')


def write_attention(directory, gates):
  """Stores what `load_attention` reads."""
  tensors = names.flatten(jax.device_get(gates))
  files.write_safetensors(directory / ATTENTION_FILE, tensors)
