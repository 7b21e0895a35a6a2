# SPDX-License-Identifier: Apache-2.0
"""Any torch.nn.Module as a teacher: a pure function of JAX, traced by torchax.

Needs the extra `torch`. Nothing here imports torch before a module is given.
"""

from collections.abc import Mapping
import dataclasses
import difflib
import hashlib
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.data import transforms
from attnfd_jax.errors import first_line, InputError, one_of, within
from attnfd_jax.models import layers
from attnfd_jax.models.layers import IMAGE_MEAN, IMAGE_STD
from attnfd_jax.teachers import torch_tracing

# Largest difference of PyTorch and JAX, relative to the largest value of a map.
TOLERANCE = 1e-4
# Of sizes that vision transformers and encoders ask for.
_MULTIPLES = (8, 14, 16, 32, 64)
# Before those of patches: a class, one for distillation, or four registers.
_PREFIX_TOKENS = (1, 2, 5)


def from_torch(
  module,
  taps=None,
  *,
  name='',
  class_names=(),
  mean=IMAGE_MEAN,
  std=IMAGE_STD,
  size_multiple=1,
  dtype='float32',
):
  """A Teacher of a torch.nn.Module, which is set to evaluation mode.

  `jax.jit(teacher.apply)(teacher.variables, image)` computes what the module
  does, from normalized images [b, H, W, 3] to Outputs; any mesh will do.

  Args:
    module: maps float images [b, 3, H, W] to logits [b, k, h, w], or to a dict
      or an object that has them as 'logits' or 'out', or to a tuple whose first
      item they are. Without logits it is of use for its taps only.
    taps: {tap: name of a submodule}, as of module.named_modules(). What that
      one returns is the map: [b, c, h, w], or tokens [b, n, c], which become a
      map without those before the patches.
    name: for logs and tables; by default that of the class.
    class_names: in the order of its logits, if known.
    mean, std: the normalization that the module was trained with, of images
      from 0 to 1. `apply` takes images with ImageNet's, and changes them.
    size_multiple: images are resized, bilinearly, to the next multiples of it
      first, where a network needs that.
    dtype: 'float32' or 'bfloat16', in which it computes; logits are float32.

  Raises:
    InputError: if torch or torchax is missing or does not fit, a tap does not
      exist, weights hold NaN, or, when it is traced, the module fails.
  """
  torch_tracing.import_torchax()
  if not torch_tracing.is_module(module):
    kind = type(module).__name__
    raise InputError(f'from_torch needs a torch.nn.Module, not {kind}.')
  taps = dict(taps or {})
  _check_taps(module, taps)
  within('size_multiple', size_multiple, 1, 4096)
  one_of('dtype', dtype, ('float32', 'bfloat16'))
  for key, values in (('mean', mean), ('std', std)):
    numbers = np.shape(values) == (3,) and np.isfinite(values).all()
    if not numbers or (key == 'std' and min(values) <= 0):
      positive = ' above 0' * (key == 'std')
      raise InputError(f'{key}={values} must be three numbers{positive}.')
  module = module.cpu().eval()
  wrapped = torch_tracing.with_taps(module, taps)
  variables, function = torch_tracing.extract(wrapped)
  parameters = {f'module.{key}' for key, _ in module.named_parameters()}
  broken = [
    key.removeprefix('module.')
    for key in sorted(parameters & variables.keys())
    if not bool(jnp.isfinite(variables[key]).all())
  ]
  if broken:
    first = ', '.join(broken[:3])
    raise InputError(
      f'{type(module).__name__}: {len(broken)} of its {len(parameters)} '
      f'parameters hold NaN or infinity: {first}; take another checkpoint.'
    )
  return TorchTeacher(
    module=wrapped,
    function=function,
    variables=_cast(variables, dtype),
    name=name or type(module).__name__,
    class_names=tuple(class_names),
    taps=taps,
    mean=tuple(map(float, mean)),
    std=tuple(map(float, std)),
    size_multiple=size_multiple,
    dtype=dtype,
    fingerprint=_digest(variables),
  )


def _check_taps(module, taps):
  names = [name for name, _ in module.named_modules() if name]
  for tap, name in taps.items():
    if name not in names:
      near = difflib.get_close_matches(str(name), names, 3, cutoff=0.4)
      near = near or [x for x in names if '.' not in x][:8]
      raise InputError(
        f'taps: {tap}={name!r} is no submodule of {type(module).__name__}; '
        f'nearest are {", ".join(near) or "none"}.'
      )


def _digest(variables):
  """Hex digest of names, types and values, the same on every machine."""
  digest = hashlib.sha256()
  for name in sorted(variables):
    value = np.asarray(variables[name])
    digest.update(repr((name, str(value.dtype), value.shape)).encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()


def _cast(variables, dtype):
  """Floating point ones in `dtype`; half precision and doubles, too."""

  def cast(x):
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(cast, variables)


def _as_map(tokens, size):
  """[b, n, c] of patches of an image of `size` as [b, h, w, c].

  Patches divide the image, after a few other tokens, or there are no others.
  """
  count, grids = tokens.shape[1], set()
  for patch in range(1, min(size) + 1):
    whole = all(n % patch == 0 for n in size)
    for h, w in ([n // patch for n in size], [-(-n // patch) for n in size]):
      extra = count - h * w
      if extra == 0 or (whole and extra in _PREFIX_TOKENS):
        grids.add((not whole, extra, h, w))
  exact = [x for x in grids if x[:2] == (False, 0)]
  if len(exact or grids) != 1:
    found = ' or '.join(f'{h}x{w} after {e}' for _, e, h, w in sorted(grids))
    raise InputError(
      f'taps: {count} tokens of an image {tuple(size)} could be '
      f'{found or "no grid of patches"}; name a submodule that returns '
      '[b, c, h, w].'
    )
  ((_, extra, h, w),) = exact or grids
  return tokens[:, extra:].reshape(tokens.shape[0], h, w, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class TorchTeacher:
  """What `from_torch` makes, see there.

  Attributes:
    module: the PyTorch module with its taps, on the CPU, for `compare`.
    function: (variables, (image [b, 3, H, W],)) -> what the module returns.
    variables: {name: array} of its parameters and buffers, in `dtype`.
    fingerprint: SHA-256 of these before they were cast.
    remarks: for the log.
  """

  module: Any
  function: Any
  variables: Any
  name: str
  class_names: tuple = ()
  taps: Mapping[str, str] = dataclasses.field(default_factory=dict)
  mean: tuple = IMAGE_MEAN
  std: tuple = IMAGE_STD
  size_multiple: int = 1
  dtype: str = 'float32'
  fingerprint: str = ''
  source: str = 'PyTorch'
  remarks: tuple = ()

  def apply(self, variables, image, *, rng=None):
    """Outputs, see Teacher; without random numbers, as it is evaluated."""
    del rng
    size = tuple(image.shape[1:3])
    x = self._enter(image).astype(self.dtype)
    try:
      with torch_tracing.quiet():
        found = self.function(variables, (x,))
    except Exception as error:
      raise self._explained(error, size) from error
    return self._leave(found, size)

  def _enter(self, image):
    """[b, H, W, 3] as we normalize it to float32 [b, 3, H', W'] as it does."""
    x = image.astype(jnp.float32)
    numbers = (IMAGE_MEAN, IMAGE_STD), (self.mean, self.std)
    if numbers[0] != numbers[1]:
      (mean, std), (their_mean, their_std) = (
        [layers.per_channel(np.float32(y), x) for y in pair] for pair in numbers
      )
      x = (x * std + mean - their_mean) / their_std
    x = _resize(x, self._seen(image.shape[1:3]))
    return jnp.transpose(x, (0, 3, 1, 2))

  def _seen(self, size):
    """(height, width) of what the module is given for an image of `size`."""
    return transforms.next_multiple(size, self.size_multiple)

  def _leave(self, found, size):
    """Outputs of what the module returned for an image of `size`."""
    features = {}
    for key, x in found.items():
      if key != 'logits':
        x = (
          _as_map(x, self._seen(size))
          if x.ndim == 3
          else jnp.moveaxis(x, 1, -1)
        )
        features[key.removeprefix('tap ')] = x
    outputs = {'features': features}
    if 'logits' in found:
      logits = jnp.moveaxis(found['logits'], 1, -1).astype(jnp.float32)
      outputs['logits'] = _resize(logits, size)
    return outputs

  def _explained(self, error, size):
    """An InputError, with a size that fits if there is one near."""
    if isinstance(error, InputError):
      return error
    text = f'{self.name} fails on images {size}: {first_line(error)}'
    if type(error).__name__ == 'OperatorNotFound':  # Of torchax.
      versions = ', '.join(map(torch_tracing.version, ('torch', 'torchax')))
      what = f'torchax has no such operation here ({versions})'
      return InputError(f'{text}; {what}: {torch_tracing.INSTALL}')
    for multiple in _MULTIPLES:
      near = transforms.next_multiple(size, multiple)
      if near != size and self.accepts(near):
        return InputError(
          f'{text}; it takes {near}: size_multiple={multiple} resizes images '
          'to that before, see docs/any_teacher.md.'
        )
    return InputError(text)

  def accepts(self, size):
    """Whether the module can be traced for an image of (height, width)."""
    x = jax.ShapeDtypeStruct((1, 3, *size), self.dtype)
    try:
      with torch_tracing.quiet():
        jax.eval_shape(lambda v, x: self.function(v, (x,)), self.variables, x)
    except Exception:
      return False
    return True

  def compare(self, image):
    """{'logits' or tap: largest difference of JAX and PyTorch} in float32,
    relative to the largest value of PyTorch.

    Args:
      image: float32 [b, H, W, 3], normalized as by attnfd_jax.normalise.

    Raises:
      InputError: if one is above TOLERANCE, or is not finite.
    """
    torch, _ = torch_tracing.import_torchax()
    variables, _ = torch_tracing.extract(self.module)
    exact = dataclasses.replace(
      self, variables=_cast(variables, 'float32'), dtype='float32'
    )
    size = tuple(image.shape[1:3])
    with jax.default_matmul_precision('highest'):
      ours = jax.jit(exact.apply)(exact.variables, image)
    x = torch.from_numpy(np.array(exact._enter(image)))
    with torch.no_grad(), warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Of the user's module.
      found = self.module.float()(x)
    found = {key: jnp.asarray(value.numpy()) for key, value in found.items()}
    theirs, differences = exact._leave(found, size), {}
    for key, y in _maps(theirs).items():
      if not np.isfinite(y).all():
        raise InputError(
          f'{self.name}: {key} has NaN or infinite values for images of the '
          'data set; are its weights, and mean and std, right?'
        )
      worst = np.max(np.abs(_maps(ours)[key] - y))
      differences[key] = float(worst / max(np.max(np.abs(y)), 1e-30))
    for key, difference in differences.items():
      if not difference <= TOLERANCE:
        raise InputError(
          f'{self.name}: {key} differs by {difference:.1e} between PyTorch and '
          f'JAX, more than {TOLERANCE:g} of its largest value; is something '
          'random, or in place, in its forward pass?'
        )
    return differences


def _maps(outputs):
  logits = {'logits': outputs['logits']} if 'logits' in outputs else {}
  found = logits | outputs['features']
  return {key: np.asarray(x, np.float32) for key, x in found.items()}


def _resize(x, size):
  """[b, h, w, c] to (height, width) with half-pixel centers, as PyTorch's
  interpolate(mode='bilinear') does.
  """
  if x.shape[1:3] == tuple(size):
    return x
  shape = (x.shape[0], *size, x.shape[-1])
  return jax.image.resize(x, shape, 'linear', antialias=False)
