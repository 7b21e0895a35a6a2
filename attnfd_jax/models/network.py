# SPDX-License-Identifier: Apache-2.0
"""Networks built from a config's group, and what is known without weights."""

import functools

import jax
import jax.numpy as jnp

from attnfd_jax.errors import InputError
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.models.flops import count_flops

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
