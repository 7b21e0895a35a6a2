# SPDX-License-Identifier: Apache-2.0
"""Defines what a network is, and builds networks by name.

A network is a Linen module, built-in or the user's. It is constructed with
`num_classes`, `dtype` (None computes in float32) and options of its own, and
maps normalized images to `Outputs`. To add one by name, add it to NETWORKS.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import (
  Any,
  NotRequired,
  Protocol,
  runtime_checkable,
  TypeAlias,
  TypedDict,
)

import jax
from jax.extend import core
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from attnfd_jax import user_code
from attnfd_jax.errors import (
  check_choice,
  convert_errors,
  first_line,
  InputError,
)
from attnfd_jax.models import resizing
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.types import AnyArray, Config, PyTree, Variables

_Rngs: TypeAlias = jax.Array | dict[str, jax.Array]


# Feature maps by tap; heights, widths and channels may differ between taps.
FeatureMaps: TypeAlias = Mapping[str, Float[AnyArray, 'b _h _w _c']]


class Outputs(TypedDict):
  """What a network or a teacher returns for images [b, H, W, 3].

  Attributes:
    logits: at the resolution of the images.
    features: feature maps by tap, of any sizes; distillation methods compare
      them. May be empty.
    coarse_logits: logits at a lower resolution, present only if `logits` is
      their bilinear resize with aligned corners.
    norms: 'scale' and 'bias' by tap, of the batch normalization that produces
      the feature map; present only if a method asks for them.
  """

  logits: Float[Array, 'b H W k']
  features: FeatureMaps
  coarse_logits: NotRequired[Float[Array, 'b _h _w k']]
  norms: NotRequired[Mapping[str, Mapping[str, Float[Array, ' _c']]]]


@runtime_checkable
class Network(Protocol):
  """A Linen module, or any object with these two pure functions."""

  def init(
    self, rngs: _Rngs, image: Float[Array, 'b H W 3'], *, train: bool
  ) -> Variables:
    """Returns the variables: 'params' and other collections, if any."""
    ...

  def apply(
    self,
    variables: Variables,
    image: Float[Array, 'b H W 3'],
    *,
    train: bool,
    rngs: _Rngs | None = None,
    mutable: bool | Sequence[str] = False,
  ) -> Any:
    """Returns the Outputs for normalized images.

    Args:
      variables: as `init` returns them.
      image: normalized images.
      train: whether to normalize by batch statistics and to apply dropout,
        which uses the rng 'dropout'.
      rngs: random keys by name.
      mutable: names of the collections to update; if given, the result is
        (Outputs, updated collections).
    """
    ...


NETWORKS: dict[str, Any] = {'deeplabv3plus': DeepLabV3Plus}


def compute_dtype(name: str) -> jnp.dtype | None:
  """Returns the `dtype` field of modules; None is float32, that of images."""
  check_choice('config.optim.dtype', name, ('float32', 'bfloat16'))
  return None if name == 'float32' else jnp.dtype(name)


def make_network(
  config: Config,
  num_classes: int,
  *,
  dtype: str = 'float32',
  source: bytes | None = None,
  **changes: Any,
) -> Any:
  """Builds the network of a `student` or `teacher` config group.

  Args:
    config: the group, a ConfigDict or a dict. Its 'network' is a key of
      NETWORKS, whose fields are further keys of the group, or names a class of
      the user, whose fields are in 'options'.
    num_classes: number of classes.
    dtype: name of the compute dtype.
    source: content of the user's file, see user_code.load_object.
    **changes: fields that differ from the config; those that the network does
      not have are ignored.

  Raises:
    InputError: if the network does not exist or cannot be built.
  """
  name = config['network']
  if user_code.is_code(name):
    network_class = user_code.load_object(name, option='network', source=source)
    options = dict(config['options'])
  else:
    check_choice('network', name, (*NETWORKS, "or 'file.py:Class' of your own"))
    if config['options']:
      raise InputError(
        f'options={dict(config["options"])} are for a class of your own; set '
        f'those of {name} as keys of the group, such as width_multiplier.'
      )
    network_class = NETWORKS[name]
    keys = network_class.__dataclass_fields__.keys() & set(config)
    options = {key: config[key] for key in keys}
  fields = getattr(network_class, '__dataclass_fields__', {})
  options |= {key: x for key, x in changes.items() if key in fields}
  with convert_errors(f'network={name!r}'):
    return network_class(
      num_classes=num_classes, dtype=compute_dtype(dtype), **options
    )


def with_taps(network: Any, taps: Sequence[str]) -> Any:
  """Makes a network return these feature maps, too, if it has `extra_taps`.

  Other networks are returned as they are; a method that needs a map that is
  missing raises an error.
  """
  if not taps or not hasattr(network, 'extra_taps'):
    return network
  return network.clone(extra_taps=tuple(taps))


def is_ours(network: object) -> bool:
  """Whether a network is built-in, which exports to ONNX and PyTorch need."""
  return isinstance(network, tuple(NETWORKS.values()))


def describe(config: Config) -> str:
  """Names a network in tables: 'resnet18 x0.25', or the user's class."""
  if user_code.is_code(config['network']):
    return config['network'].rpartition(':')[2]
  width = config['width_multiplier']
  return config['backbone'] + ('' if width == 1 else f' x{width:g}')


def abstract_variables(network: Network) -> Variables:
  """Shapes and dtypes of the variables, without computing or compiling."""
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  init = functools.partial(network.init, jax.random.key(0), train=False)
  return jax.eval_shape(init, image)


def abstract_outputs(
  network: Any,
  image_size: Sequence[int],
  *,
  variables: PyTree | None = None,
  **options: Any,
) -> Any:
  """Shapes and dtypes of the Outputs for two images.

  Args:
    network: a Network, or a Teacher with its `variables` and `options`.
    image_size: height and width.
    variables: arrays or their shapes; default: those of the network.
    **options: keyword arguments of `apply`; default: train=False.
  """
  image = jax.ShapeDtypeStruct((2, *image_size, 3), jnp.float32)
  if variables is None:
    variables = abstract_variables(network)
  forward = functools.partial(network.apply, **(options or {'train': False}))
  return jax.eval_shape(forward, variables, image)


def check_network(
  network: Network, num_classes: int, image_size: Sequence[int]
) -> None:
  """Raises InputError unless a user's network returns valid Outputs."""
  out = checked_outputs(network, num_classes, image_size)
  if 'coarse_logits' not in out:
    return

  # Evaluation and the loss of large batches resize coarse_logits.
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
      "coarse_logits; leave 'coarse_logits' out of the returned dict."
    )


def _has_logits_and_features(out: Any) -> bool:
  return (
    isinstance(out, Mapping)
    and isinstance(out.get('features'), Mapping)
    and hasattr(out.get('logits'), 'shape')
  )


def checked_outputs(
  network: Any, num_classes: int, image_size: Sequence[int], **options: Any
) -> Outputs:
  """Returns `abstract_outputs` if they are valid.

  Args:
    network: a Network or a Teacher.
    num_classes: expected number of classes.
    image_size: height and width.
    **options: of `abstract_outputs`.

  Raises:
    InputError: says which part of Outputs is missing or has a wrong shape.
  """
  name = getattr(network, 'name', None) or type(network).__name__
  try:
    out = abstract_outputs(network, image_size, **options)
  except InputError:
    raise
  except Exception as error:
    failure = f'{name} fails on images {tuple(image_size)}'
    raise InputError(f'{failure}: {first_line(error)}') from error
  if not _has_logits_and_features(out):
    raise InputError(f"{name} must return a dict with 'logits' and 'features'.")
  expected = (2, *image_size, num_classes)
  *size, count = out['logits'].shape
  if tuple(size) == expected[:-1] and count != num_classes:
    raise InputError(
      f'{name} has {count} classes, expected {num_classes}; for a teacher, set '
      'config.teacher.class_map to its index of each class of the data set.'
    )
  if out['logits'].shape != expected:
    raise InputError(
      f'{name}: logits are {out["logits"].shape}, expected {expected}; resize '
      'them to the size of the image.'
    )
  for tap, x in out['features'].items():
    shape = getattr(x, 'shape', x)
    if not isinstance(shape, tuple) or len(shape) != 4:
      raise InputError(f'{name}: map {tap!r} is {shape}, not [b, h, w, c].')
  return out


def count_gflops(network: Network, height: int, width: int) -> float:
  """GFLOPs of the convolutions in a forward pass on one image."""
  image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  forward = functools.partial(network.apply, train=False)
  return count_flops(forward, abstract_variables(network), image) / 1e9


def count_flops(function: Callable[..., Any], *args: PyTree) -> int:
  """FLOPs of the convolutions that `function(*args)` traces.

  A multiply-add counts as two. The result does not depend on the platform.
  """
  return _convolution_flops(jax.make_jaxpr(function)(*args).jaxpr)


# Any: for pyright, the values of a Jaxpr have no shapes.
def _convolution_flops(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    inner = [x for x in params.values() if isinstance(x, core.ClosedJaxpr)]
    if name == 'conv_general_dilated':
      kernel = equation.invars[1].aval.shape
      features = kernel[params['dimension_numbers'].rhs_spec[0]]
      total += 2 * equation.outvars[0].aval.size * math.prod(kernel) // features
    elif name == 'cond':
      # From lax.platform_dependent: implementations of one convolution, of
      # which the last is the plain one.
      inner = params['branches'][-1:]
    total += sum(_convolution_flops(x.jaxpr) for x in inner)
  return total
