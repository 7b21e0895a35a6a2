# SPDX-License-Identifier: Apache-2.0
"""Makes a teacher of any torch.nn.Module, traced by torchax.

Needs the extra `torch`. torch is not imported until a module is given.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import difflib
import hashlib
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from attnfd_jax.data import transforms
from attnfd_jax.data.records import Size
from attnfd_jax.errors import check_choice, check_range, first_line, InputError
from attnfd_jax.models import layers
from attnfd_jax.models.layers import IMAGE_MEAN, IMAGE_STD
from attnfd_jax.teachers import torch_tracing
from attnfd_jax.types import AnyArray, PyTree

# Largest allowed difference between PyTorch and JAX, relative to the largest
# absolute value of a feature map.
TOLERANCE = 1e-4
# Image sizes of vision transformers and encoders are multiples of these.
_MULTIPLES = (8, 14, 16, 32, 64)
# Numbers of tokens before those of the patches: a class token, that and one for
# distillation, or that and four registers.
_PREFIX_TOKENS = (1, 2, 5)


def from_torch(
  module: Any,
  taps: Mapping[str, str] | None = None,
  *,
  name: str = '',
  class_names: Sequence[str] = (),
  mean: Sequence[float] = IMAGE_MEAN,
  std: Sequence[float] = IMAGE_STD,
  size_multiple: int = 1,
  dtype: str = 'float32',
) -> 'TorchTeacher':
  """Makes a Teacher of a torch.nn.Module, which it sets to evaluation mode.

  `jax.jit(teacher.apply)(teacher.variables, image)` computes what the module
  does, from normalized images [b, H, W, 3] to Outputs, on any device mesh.

  Args:
    module: maps float images [b, 3, H, W] to logits [b, k, h, w], to a dict or
      an object that has them as 'logits' or 'out', or to a tuple in which they
      are first. Without logits it can only provide feature maps.
    taps: {tap: name of a submodule}, with names as in module.named_modules().
      The output of the submodule is the feature map: [b, c, h, w], or tokens
      [b, n, c], which are reshaped to a map without class and register tokens.
    name: for logs and tables; default: the name of the class.
    class_names: in the order of the logits, if known.
    mean: of the normalization that the module was trained with, for images from
      0 to 1. `apply` takes images normalized with ImageNet's and converts them.
    std: see mean.
    size_multiple: images are first resized bilinearly to the next multiple of
      this, for networks that need it.
    dtype: compute dtype, 'float32' or 'bfloat16'; logits are float32.

  Raises:
    InputError: if torch or torchax is missing or they do not fit together, a
      tap does not exist, or weights hold NaN; from `apply`, if the module
      cannot be traced.
  """
  torch_tracing.import_torchax()
  if not torch_tracing.is_module(module):
    kind = type(module).__name__
    raise InputError(f'from_torch needs a torch.nn.Module, not {kind}.')
  taps = dict(taps or {})
  _check_taps(module, taps)
  check_range('size_multiple', size_multiple, 1, 4096)
  check_choice('dtype', dtype, ('float32', 'bfloat16'))
  for key, values in (('mean', mean), ('std', std)):
    numbers = np.shape(values) == (3,) and np.isfinite(values).all()
    if not numbers or (key == 'std' and min(values) <= 0):
      positive = ' above 0' * (key == 'std')
      raise InputError(f'{key}={values} must be three numbers{positive}.')
  module = module.cpu().eval()
  wrapped = torch_tracing.with_taps(module, taps)
  variables, function = torch_tracing.extract(wrapped)
  parameters = {f'module.{key}' for key, _ in module.named_parameters()}
  bad = [
    key.removeprefix('module.')
    for key in sorted(parameters & variables.keys())
    if not bool(jnp.isfinite(variables[key]).all())
  ]
  if bad:
    first = ', '.join(bad[:3])
    raise InputError(
      f'{type(module).__name__}: {len(bad)} of its {len(parameters)} '
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


def _check_taps(module: Any, taps: Mapping[str, str]) -> None:
  names = [name for name, _ in module.named_modules() if name]
  for tap, name in taps.items():
    if name not in names:
      near = difflib.get_close_matches(str(name), names, 3, cutoff=0.4)
      near = near or [x for x in names if '.' not in x][:8]
      raise InputError(
        f'taps: {tap}={name!r} is not a submodule of {type(module).__name__}; '
        f'choose from {", ".join(near) or "none"}.'
      )


def _digest(variables: Mapping[str, AnyArray]) -> str:
  """SHA-256 of names, dtypes, shapes and values, the same on every machine."""
  digest = hashlib.sha256()
  for name in sorted(variables):
    value = np.asarray(variables[name])
    digest.update(repr((name, str(value.dtype), value.shape)).encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()


def _cast(variables: PyTree, dtype: str) -> PyTree:
  """Casts all floating-point arrays to `dtype`."""

  def cast(x):
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

  return jax.tree.map(cast, variables)


def _as_map(
  tokens: Float[Array, 'b n c'], size: Sequence[int]
) -> Float[Array, 'b h w c']:
  """Reshapes tokens of the patches of an image of `size` to a feature map.

  Either patches divide the image evenly, and a few other tokens may come before
  theirs, or there are no other tokens.
  """
  count, grids = tokens.shape[1], set()
  for patch in range(1, min(size) + 1):
    even = all(n % patch == 0 for n in size)
    for h, w in ([n // patch for n in size], [-(-n // patch) for n in size]):
      extra = count - h * w
      if extra == 0 or (even and extra in _PREFIX_TOKENS):
        grids.add((not even, extra, h, w))
  exact = [x for x in grids if x[:2] == (False, 0)]
  if len(exact or grids) != 1:
    shown = ' or '.join(f'{h}x{w} after {e}' for _, e, h, w in sorted(grids))
    raise InputError(
      f'taps: {count} tokens of an image {tuple(size)} could be '
      f'{shown or "no grid of patches"}; name a submodule that returns '
      '[b, c, h, w].'
    )
  ((_, extra, h, w),) = exact or grids
  return tokens[:, extra:].reshape(tokens.shape[0], h, w, -1)


@dataclasses.dataclass(frozen=True, eq=False)
class TorchTeacher:
  """A torch.nn.Module as a teacher, see from_torch.

  Attributes:
    module: the PyTorch module with its taps, on the CPU, for `compare`.
    function: (variables, (image [b, 3, H, W],)) -> outputs of the module.
    variables: its parameters and buffers by name, in `dtype`.
    name: see from_torch.
    class_names: see from_torch.
    taps: see from_torch.
    mean: see from_torch.
    std: see from_torch.
    size_multiple: see from_torch.
    dtype: see from_torch.
    fingerprint: SHA-256 of the variables before they were cast.
    source: where it comes from.
    remarks: lines for the log.
  """

  module: Any
  function: Callable[..., Any]
  variables: PyTree
  name: str
  class_names: tuple[str, ...] = ()
  taps: Mapping[str, str] = dataclasses.field(default_factory=dict)
  mean: tuple[float, ...] = IMAGE_MEAN
  std: tuple[float, ...] = IMAGE_STD
  size_multiple: int = 1
  dtype: str = 'float32'
  fingerprint: str = ''
  source: str = 'PyTorch'
  remarks: tuple[str, ...] = ()

  def apply(
    self,
    variables: PyTree,
    image: Float[AnyArray, 'b H W 3'],
    *,
    rng: jax.Array | None = None,
  ) -> Any:
    """Returns Outputs, without 'logits' if the module has none.

    Always in evaluation mode: `rng` is ignored. See Teacher.
    """
    del rng
    _, h, w, _ = image.shape
    x = self._enter(image).astype(self.dtype)
    try:
      with torch_tracing.quiet():
        outputs = self.function(variables, (x,))
    except Exception as error:
      raise self._explained(error, (h, w)) from error
    return self._leave(outputs, (h, w))

  def _enter(
    self, image: Float[AnyArray, 'b H W 3']
  ) -> Float[Array, 'b 3 h w']:
    """Converts our normalized images to the float32 input of the module."""
    x: Any = image.astype(jnp.float32)
    constants = (IMAGE_MEAN, IMAGE_STD), (self.mean, self.std)
    if constants[0] != constants[1]:
      (mean, std), (module_mean, module_std) = (
        [layers.per_channel(np.array(y, np.float32), x) for y in pair]
        for pair in constants
      )
      x = (x * std + mean - module_mean) / module_std
    _, h, w, _ = image.shape
    x = _resize(x, self._input_size((h, w)))
    return jnp.transpose(x, (0, 3, 1, 2))

  def _input_size(self, size: Size) -> Size:
    """(height, width) of the module's input for an image of `size`."""
    return transforms.next_multiple(size, self.size_multiple)

  def _leave(
    self, module_outputs: Mapping[str, jax.Array], size: Size
  ) -> dict[str, Any]:
    """Outputs for an image of `size` from those of the module."""
    features = {}
    for key, x in module_outputs.items():
      if key != 'logits':
        x = (
          _as_map(x, self._input_size(size))
          if x.ndim == 3
          else jnp.moveaxis(x, 1, -1)
        )
        features[key.removeprefix('tap ')] = x
    outputs: dict[str, Any] = {'features': features}
    if 'logits' in module_outputs:
      logits = jnp.moveaxis(module_outputs['logits'], 1, -1)
      outputs['logits'] = _resize(logits.astype(jnp.float32), size)
    return outputs

  def _explained(self, error: Exception, size: Size) -> InputError:
    """An InputError; it suggests a size_multiple if the module needs one."""
    if isinstance(error, InputError):
      return error
    text = f'{self.name} fails on images {size}: {first_line(error)}'
    if type(error).__name__ == 'OperatorNotFound':  # Of torchax.
      versions = ', '.join(map(torch_tracing.version, ('torch', 'torchax')))
      return InputError(
        f'{text}; torchax has no such operation here ({versions}): '
        f'{torch_tracing.INSTALL}'
      )
    for multiple in _MULTIPLES:
      larger = transforms.next_multiple(size, multiple)
      if larger != size and self.accepts(larger):
        return InputError(
          f'{text}; it takes {larger}: size_multiple={multiple} resizes images '
          'to that first, see docs/any_teacher.md.'
        )
    return InputError(text)

  def accepts(self, size: Size) -> bool:
    """Whether the module can be traced for an image of (height, width)."""
    x = jax.ShapeDtypeStruct((1, 3, *size), self.dtype)
    try:
      with torch_tracing.quiet():
        jax.eval_shape(lambda v, x: self.function(v, (x,)), self.variables, x)
    except Exception:
      return False
    return True

  def compare(self, image: Float[AnyArray, 'b H W 3']) -> dict[str, float]:
    """Compares the outputs of JAX and PyTorch, both in float32.

    Args:
      image: normalized, as by attnfd_jax.normalize.

    Returns:
      For 'logits' and each tap, the largest absolute difference divided by the
      largest absolute value of PyTorch.

    Raises:
      InputError: if one is above TOLERANCE or not finite.
    """
    torch, _ = torch_tracing.import_torchax()
    variables, _ = torch_tracing.extract(self.module)
    exact = dataclasses.replace(
      self, variables=_cast(variables, 'float32'), dtype='float32'
    )
    _, h, w, _ = image.shape
    with jax.default_matmul_precision('highest'):
      actual = _maps(jax.jit(exact.apply)(exact.variables, image))
    x = torch.from_numpy(np.array(exact._enter(image)))
    with torch.no_grad(), warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Of the user's module.
      outputs = self.module.float()(x)
    outputs = {key: jnp.asarray(y.numpy()) for key, y in outputs.items()}
    expected, differences = _maps(exact._leave(outputs, (h, w))), {}
    for key, y in expected.items():
      if not np.isfinite(y).all():
        raise InputError(
          f'{self.name}: {key} has NaN or infinite values for images of the '
          'data set; check its weights, mean and std.'
        )
      largest = np.max(np.abs(actual[key] - y))
      differences[key] = float(largest / max(np.max(np.abs(y)), 1e-30))
    for key, difference in differences.items():
      if not difference <= TOLERANCE:
        raise InputError(
          f'{self.name}: {key} differs by {difference:.1e} between PyTorch and '
          f'JAX, more than {TOLERANCE:g} of its largest value; look for random '
          'or in-place operations in its forward pass.'
        )
    return differences


def _maps(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
  logits = {'logits': outputs['logits']} if 'logits' in outputs else {}
  maps = logits | outputs['features']
  return {key: np.asarray(x, np.float32) for key, x in maps.items()}


def _resize(
  x: Float[AnyArray, 'b h w c'], size: Size
) -> Float[AnyArray, 'b height width c']:
  """Resizes with half-pixel centers, as PyTorch's bilinear interpolate."""
  if x.shape[1:3] == tuple(size):
    return x
  shape = (x.shape[0], *size, x.shape[-1])
  return jax.image.resize(x, shape, 'linear', antialias=False)
