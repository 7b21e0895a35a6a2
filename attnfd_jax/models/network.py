# SPDX-License-Identifier: Apache-2.0
"""The contract of a network, and networks by name.

A network is a Linen module, ours or the user's, that is built with
`num_classes`, `dtype` (None computes in float32) and options of its own, and
that maps normalized images to `Outputs`. To add one by name: a row in NETWORKS.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any, NotRequired, Protocol, TypedDict

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from attnfd_jax import user_code
from attnfd_jax.errors import explained, first_line, InputError, one_of
from attnfd_jax.models import resizing
from attnfd_jax.models.deeplab import DeepLabV3Plus


class Outputs(TypedDict):
  """What a network, or a teacher, makes of images [b, H, W, 3].

  Attributes:
    logits: float [b, H, W, k], at the size of the image.
    features: {tap: [b, h, w, c]}, the maps that methods compare; {} is allowed.
    coarse_logits: [b, h', w', k], whose align-corners resize `logits` is. Leave
      it out where that is not so.
    norms: {tap: {'scale', 'bias'}}, each [c], of the batch normalization that a
      map comes from, where a method asks for it.
  """

  logits: jax.Array
  features: Mapping[str, jax.Array]
  coarse_logits: NotRequired[jax.Array]
  norms: NotRequired[Mapping[str, Mapping[str, jax.Array]]]


class Network(Protocol):
  """A Linen module, or anything with these two pure functions."""

  def init(self, rngs, image, *, train) -> Any:
    """Variables: 'params' and, if it has any, other collections."""

  def apply(self, variables, image, *, train, rngs=None, mutable=False) -> Any:
    """Outputs of normalized images; with `mutable` also those collections.

    `train` uses the statistics of the batch, and drops at random by the rng
    'dropout'.
    """


NETWORKS = {'deeplabv3plus': DeepLabV3Plus}


def compute_dtype(name):
  """The `dtype` of modules: None leaves float32 images in float32."""
  one_of('config.optim.dtype', name, ('float32', 'bfloat16'))
  return None if name == 'float32' else jnp.dtype(name)


def make_network(
  config, num_classes, *, dtype='float32', source=None, **changes
):
  """The network of a group `student` or `teacher` of a config.

  Its 'network' is one of NETWORKS, whose fields are keys of the group; or a
  class of the user's, whose fields are 'options'; `source`: see load_object.
  `changes` are fields that differ; those that the network lacks are left out.
  """
  name = config['network']
  if user_code.is_code(name):
    network_class = user_code.load_object(name, option='network', source=source)
    options = dict(config['options'])
  else:
    one_of('network', name, (*NETWORKS, "or 'file.py:Class' of your own"))
    if config['options']:
      raise InputError(
        f'options={dict(config["options"])} are of a class of your own; those '
        f'of {name} are keys of the group, such as width_multiplier.'
      )
    network_class = NETWORKS[name]
    keys = network_class.__dataclass_fields__.keys() & set(config)
    options = {key: config[key] for key in keys}
  fields = getattr(network_class, '__dataclass_fields__', {})
  options |= {key: x for key, x in changes.items() if key in fields}
  with explained(f'network={name!r}'):
    return network_class(
      num_classes=num_classes, dtype=compute_dtype(dtype), **options
    )


def with_taps(network, taps):
  """`network` that returns these maps, too, if it has a field `extra_taps`.

  Other networks are what they are: a method that misses a map says so.
  """
  if not taps or not hasattr(network, 'extra_taps'):
    return network
  return network.clone(extra_taps=tuple(taps))


def is_ours(network):
  """Whether ONNX and PyTorch files can be written of a network."""
  return isinstance(network, tuple(NETWORKS.values()))


def describe(config):
  """'resnet18 x0.25', or the name of a class of the user's, for tables."""
  if user_code.is_code(config['network']):
    return config['network'].rpartition(':')[2]
  width = config['width_multiplier']
  return config['backbone'] + ('' if width == 1 else f' x{width:g}')


def abstract_variables(network):
  """Shapes and types of the variables, without computing or compiling."""
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  init = functools.partial(network.init, jax.random.key(0), train=False)
  return jax.eval_shape(init, image)


def abstract_outputs(network, image_size, *, variables=None, **options):
  """Shapes and types of its Outputs for two images of `image_size`."""
  image = jax.ShapeDtypeStruct((2, *image_size, 3), jnp.float32)
  if variables is None:
    variables = abstract_variables(network)
  forward = functools.partial(network.apply, **(options or {'train': False}))
  return jax.eval_shape(forward, variables, image)


def check_network(network, num_classes, image_size):
  """Holds a user's network to the contract; InputError names what differs."""
  out = checked_outputs(network, num_classes, image_size)
  if 'coarse_logits' not in out:
    return

  # The loss of large batches, and evaluation, resize coarse_logits.
  @jax.jit
  def both(image):
    variables = network.init(jax.random.key(0), image, train=False)
    out = network.apply(variables, image, train=False)
    coarse = out['coarse_logits'].astype(jnp.float32)
    return out['logits'], resizing.resize(coarse, *image.shape[1:3])

  image = np.random.default_rng(0).normal(size=(1, 64, 64, 3))
  logits, resized = both(image.astype(np.float32))
  allowed = 0.02 * (np.max(np.abs(logits)) or 1)
  if logits.shape != resized.shape or np.max(abs(logits - resized)) > allowed:
    raise InputError(
      f'{type(network).__name__}: logits are not the align-corners resize of '
      "coarse_logits; leave 'coarse_logits' out of what it returns."
    )


def checked_outputs(network, num_classes, image_size, **options):
  """`abstract_outputs`, held to the contract; of a Teacher, too."""
  name = getattr(network, 'name', None) or type(network).__name__
  try:
    out = abstract_outputs(network, image_size, **options)
  except InputError:
    raise
  except Exception as error:
    what = f'{name} fails on images {tuple(image_size)}'
    raise InputError(f'{what}: {first_line(error)}') from error
  found = out if isinstance(out, Mapping) else {}
  whole = isinstance(found.get('features'), Mapping)
  if not whole or not hasattr(found.get('logits'), 'shape'):
    raise InputError(f"{name} must return a dict with 'logits' and 'features'.")
  expected = (2, *image_size, num_classes)
  *size, count = out['logits'].shape
  if tuple(size) == expected[:-1] and count != num_classes:
    raise InputError(
      f'{name} has {count} classes, expected {num_classes}; for a teacher '
      "config.teacher.class_map names its index of each of the data set's."
    )
  if out['logits'].shape != expected:
    raise InputError(
      f'{name}: logits are {out["logits"].shape}, expected {expected}: scores '
      'at the size of the image; resize them where they are made.'
    )
  for tap, x in out['features'].items():
    shape = getattr(x, 'shape', x)
    if not isinstance(shape, tuple) or len(shape) != 4:
      raise InputError(f'{name}: map {tap!r} is {shape}, not [b, h, w, c].')
  return out


def count_gflops(network, height, width):
  """1e9 operations of the convolutions of one image's forward pass."""
  image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  forward = functools.partial(network.apply, train=False)
  return count_flops(forward, abstract_variables(network), image) / 1e9


def count_flops(function, *args):
  """Operations of the convolutions in the trace of one call, the same on every
  platform; multiply and add are two.
  """
  return _convolution_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _convolution_flops(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    inner = [x for x in params.values() if isinstance(x, core.ClosedJaxpr)]
    if name == 'conv_general_dilated':
      kernel = equation.invars[1].aval.shape
      features = kernel[params['dimension_numbers'].rhs_spec[0]]
      total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // features
    elif name == 'cond':
      # lax.platform_dependent: forms of one convolution, last the plain one.
      inner = params['branches'][-1:]
    total += sum(_convolution_flops(x.jaxpr) for x in inner)
  return total
