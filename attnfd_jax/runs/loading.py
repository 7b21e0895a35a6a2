# SPDX-License-Identifier: Apache-2.0
"""Loads the networks of stored stages."""

from collections.abc import Mapping
import json
from typing import Any, TypeAlias

from etils import epath
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
from attnfd_jax.types import AnyPath, StrPath, Variables

# Gates at the taps of a network, outside its forward path: those of an imported
# file, or the ones a student was distilled with; '<collection>/<tap>/<leaf>'.
ATTENTION_FILE = 'attention.safetensors'
# In a folder that export wrote, instead of checkpoints.
WEIGHTS_FILE = 'model.safetensors'
# Keys that the config.json of any stage has.
_STAGE_KEYS = ('class_names', 'palette', 'data', 'distill', 'eval', 'optim')

# Network, its variables, and config.json of the stage.
Loaded: TypeAlias = tuple[Any, Variables, dict[str, Any]]


def role_of(info: Mapping[str, Any]) -> str:
  """The group of a stage's config.json that describes its network."""
  return 'teacher' if info['stage'] == 'teacher' else 'student'


def _read_info(directory: epath.Path) -> dict[str, Any]:
  """Reads config.json; raises InputError if the folder is not of a stage."""
  path = directory / 'config.json'
  if not path.is_file():
    raise InputError(
      f'{directory}: no config.json; name the folder of a stage, such as '
      'runs/quickstart/distill.'
    )
  try:
    info = dict(json.loads(path.read_text()))
    if 'stage' in info and not {role_of(info), *_STAGE_KEYS} <= info.keys():
      raise ValueError('Some groups of the config are missing.')
  except (TypeError, ValueError) as error:
    raise InputError(
      f'{path}: damaged, or not of a stage; restore a copy.'
    ) from error
  if 'stage' not in info:
    raise InputError(
      f'{directory}: is a run; name one of its stages, such as distill.'
    )
  return info


def load_network(
  directory: StrPath,
  *,
  sharding: jax.sharding.Sharding | None = None,
  step: int | None = None,
  network: Any = None,
  allow_code: bool = False,
) -> Loaded:
  """Loads the network of a finished or running stage.

  Args:
    directory: folder of a stage, such as runs/camvid/distill, or one written by
      `export --format=folder`.
    sharding: of the variables; the first device by default.
    step: which checkpoint; the best by default.
    network: the module, if the caller has built it.
    allow_code: whether to run a Python file of the folder, if it defines the
      network.

  Returns:
    The module, with the compute dtype of the stage; its variables; and the
    stage's config.json with 'checkpoint_step' added.

  Raises:
    InputError: if the folder is not of a stage, has no such checkpoint, or
      needs code that is not allowed.
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
        f'{directory}: has the weights of step {info["checkpoint_step"]} only.'
      )
    return network, jax.device_put(_read_weights(path, network), sharding), info
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    dict(networks.abstract_variables(network)),
  )
  # The layout of a TrainState; evaluation used the moving averages, if any.
  weights = 'ema' if info['optim']['ema_decay'] > 0 else 'params'
  state_shapes = {
    weights: {'student': shapes.pop('params')},
    'collections': {'student': shapes},
  }
  state, info['checkpoint_step'] = checkpoints.restore(
    directory / 'checkpoints', state_shapes, step=step
  )
  collections = state['collections']['student']
  return network, {'params': state[weights]['student'], **collections}, info


def _read_weights(path: epath.Path, network: Any) -> Variables:
  """Variables from a file of conversion.write_weights.

  Raises:
    InputError: if some are missing.
  """
  if not networks.is_ours(network):
    tensors = files.read_torch(path)['state_dict']
    return traverse_util.unflatten_dict(tensors, sep='/')
  variables, _, report = torch_networks.import_network(path, network)
  if not report.complete:
    raise InputError(f'{path}: {report}; restore a copy of the file.')
  return variables


def load_attention(
  directory: epath.Path, network: Any
) -> dict[str, Any] | None:
  """Loads the CBAMs at the taps of a network, outside its forward path.

  Args:
    directory: folder of a stage.
    network: its module.

  Returns:
    {'params', 'batch_stats'} with the taps as keys, or None if the folder has
    none, or they are in the forward path.
  """
  path = directory / ATTENTION_FILE
  if getattr(network, 'in_path_attention', False) or not path.is_file():
    return None
  tensors = safetensors.numpy.load(path.read_bytes())
  return traverse_util.unflatten_dict(tensors, sep='/')


def write_attention(directory: AnyPath, gates: Variables) -> None:
  """Writes gates for `load_attention`."""
  tensors = names.flatten(jax.device_get(gates))
  files.write_safetensors(directory / ATTENTION_FILE, tensors)
