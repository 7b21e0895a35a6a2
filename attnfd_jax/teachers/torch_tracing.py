# SPDX-License-Identifier: Apache-2.0
"""PyTorch modules under torchax: their import, their trace, and repairs.

Nothing here imports torch before a module is given.
"""

from collections.abc import Mapping
import contextlib
import functools
import importlib.metadata
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.errors import first_line, InputError

# Pairs that work together on Python 3.11 and newer.
INSTALL = (
  "pip install 'torch>=2.13' 'torchax>=0.0.14.dev20261026' (the extra "
  "attnfd_jax[torch]), or 'torch==2.12.1' 'torchax==0.0.13'"
)


def is_module(value):
  """Whether `value` is a torch.nn.Module; torch need not be installed."""
  torch = sys.modules.get('torch')
  return torch is not None and isinstance(value, torch.nn.Module)


def version(package):
  try:
    return f'{package} {importlib.metadata.version(package)}'
  except importlib.metadata.PackageNotFoundError:
    return f'no {package}'


def import_torchax():
  try:
    import torch
    import torchax
  except Exception as error:  # Whatever two versions that do not fit raise.
    found = f'{version("torch")} and {version("torchax")}'
    raise InputError(
      f'A PyTorch teacher needs torch and torchax; here are {found} '
      f'({first_line(error)}): {INSTALL}.'
    ) from error
  return torch, torchax


@contextlib.contextmanager
def quiet():
  """torchax promotes types, and asks for 64 bits that JAX does not have."""
  with (
    warnings.catch_warnings(),
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    warnings.filterwarnings('ignore', '.*requested dtype (int|float)64')
    warnings.filterwarnings('ignore', category=DeprecationWarning)
    warnings.filterwarnings('ignore', category=FutureWarning)
    yield


# Of the distance of pixels, for 'linear' and Keys' cubic with a = -0.5.
_KERNELS = {
  'bilinear': lambda x: np.maximum(1 - x, 0),
  'bicubic': lambda x: np.select(
    [x < 1, x < 2],
    [(1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2],
    0,
  ),
}


def _resize_weights(mode, old, new, *, align_corners, scale):
  """Weights [new, old] of an antialiased resize as PyTorch computes it."""
  step = 1 / scale if scale else old / new
  if align_corners:
    step = (old - 1) / (new - 1) if new > 1 else 0.0
  centers = step * (np.arange(new) + 0.5) - 0.5
  distances = np.abs(np.arange(old)[None] - centers[:, None])
  weights = _KERNELS[mode](distances / max(step, 1.0))
  return np.float32(weights / np.sum(weights, 1, keepdims=True))


@functools.cache
def _mend_resizing():
  """torchax calls its antialiased resizes with arguments that do not fit."""
  torch, torchax = import_torchax()
  env, view = torchax.default_env(), torchax.interop.torch_view

  def resized(mode, x, size, align_corners, *scales):
    scales = scales if len(scales) == 2 else (None, None)
    rows, columns = (
      jnp.asarray(
        _resize_weights(
          mode, old, new, align_corners=align_corners, scale=scale
        ),
        x.dtype,
      )
      for old, new, scale in zip(x.shape[2:], size, scales, strict=True)
    )
    form = 'bchw,yh,xw->bcyx'
    return jnp.einsum(form, x, rows, columns, precision='highest')

  for mode in _KERNELS:
    operation = getattr(torch.ops.aten, f'_upsample_{mode}2d_aa')
    function = view(functools.partial(resized, mode))
    for key in (operation, operation.default):
      env.override_op_definition(key, function)


def with_taps(module, taps):
  """A module that returns {'logits', 'tap <name>': ...} of a module on the CPU,
  see WithTaps.
  """
  torch, _ = import_torchax()
  return _with_taps(torch.nn.Module)(module, taps)


def extract(module):
  """{name: array} of parameters and buffers, and a pure function of these and
  of the module's arguments.
  """
  _, torchax = import_torchax()
  _mend_resizing()
  with quiet():
    return torchax.extract_jax(module)


def _first_tensor(value):
  """The tensor that a submodule returns, or that is first in a tuple of it."""
  while isinstance(value, (tuple, list)) and value:
    value = value[0]
  return value if hasattr(value, 'shape') else None


def _find_logits(value):
  """Logits in what a module returns, or None."""
  for key in ('logits', 'out'):
    if isinstance(value, Mapping) and key in value:
      return _find_logits(value[key])
    if hasattr(value, key) and hasattr(getattr(value, key), 'shape'):
      return _find_logits(getattr(value, key))
  found = None if isinstance(value, Mapping) else _first_tensor(value)
  return found if found is not None and len(found.shape) == 4 else None


@functools.cache
def _on_jax():
  """A mode of torch in which tensors that a module makes, or holds outside its
  buffers, are JAX's and of the type that the image has; torchax takes them for
  PyTorch's.
  """
  torch, torchax = import_torchax()
  from torch.utils import _pytree as pytree

  ours = (torchax.tensor.Tensor, torchax.tensor.View)
  on_cpu = (None, 'cpu', torch.device('cpu'))
  # What they make is of the default type, unless they are told another.
  floats = (torch.ones, torch.zeros, torch.empty, torch.linspace, torch.eye)

  class OnJax(torch.overrides.TorchFunctionMode):
    def __init__(self, dtype):
      super().__init__()
      self._dtype = dtype

    def _move(self, x):
      if isinstance(x, ours):
        return x
      x = x.to(self._dtype) if x.is_floating_point() else x
      return torchax.default_env().to_xla(x)

    def __torch_function__(self, function, types, args=(), kwargs=None):
      kwargs = dict(kwargs or {})
      if function in torchax.tensor.TENSOR_CONSTRUCTORS:
        device = kwargs.get('device')
        kwargs['device'] = 'jax' if device in on_cpu else device
        if function in floats:
          kwargs.setdefault('dtype', self._dtype)
      elif any(isinstance(x, ours) for x in pytree.tree_leaves((args, kwargs))):
        both = args, kwargs
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._move, both)
      return function(*args, **kwargs)

  return OnJax


@functools.cache
def _with_taps(base):
  """A class, for torch is not there when this file is read."""

  class WithTaps(base):
    """Returns a dict of tensors: 'logits' if there are any, and the taps."""

    def __init__(self, module, taps):
      super().__init__()
      self.module, self.taps = module, taps

    def forward(self, image):
      seen, hooks = {}, []

      def keep(tap):
        def hook(module, args, output):
          seen[tap] = output

        return hook

      for tap, name in self.taps.items():
        submodule = self.module.get_submodule(name)
        hooks.append(submodule.register_forward_hook(keep(tap)))
      traced = type(image).__module__.startswith('torchax')
      try:
        with _on_jax()(image.dtype) if traced else contextlib.nullcontext():
          output = self.module(image)
      finally:
        for hook in hooks:
          hook.remove()
      found = {}
      for tap, name in self.taps.items():
        x = _first_tensor(seen.get(tap))
        if x is None or len(x.shape) not in (3, 4):
          what = 'was not called' if tap not in seen else 'returned no map'
          raise InputError(
            f'taps: {tap}={name!r} {what}; name a submodule that returns '
            '[b, c, h, w] or [b, n, c].'
          )
        found[f'tap {tap}'] = x
      logits = _find_logits(output)
      if logits is not None:
        found['logits'] = logits
      elif not found:
        raise InputError(
          f'{type(self.module).__name__} returns {type(output).__name__} '
          "without logits [b, k, h, w], as 'logits', as 'out', first in a "
          'tuple or alone; wrap it in a module that does.'
        )
      return found

  return WithTaps
