# SPDX-License-Identifier: Apache-2.0
"""Traces PyTorch modules by torchax, with fixes for what it does not support.

torch is an optional dependency: it is not imported until a module is given, and
its values are typed as Any.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import importlib.metadata
import sys
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from attnfd_jax.errors import first_line, InputError

# Versions that fit together on Python 3.11 and newer.
INSTALL = (
  "pip install 'torch>=2.13' 'torchax>=0.0.14.dev20261026' (the extra "
  "attnfd_jax[torch]), or 'torch==2.12.1' 'torchax==0.0.13'"
)


def is_module(value: object) -> bool:
  """Whether `value` is a torch.nn.Module; torch need not be installed."""
  torch = sys.modules.get('torch')
  return torch is not None and isinstance(value, torch.nn.Module)


def version(package: str) -> str:
  """Name and version of a package, or 'no <package>'."""
  try:
    return f'{package} {importlib.metadata.version(package)}'
  except importlib.metadata.PackageNotFoundError:
    return f'no {package}'


def import_torchax() -> tuple[Any, Any]:
  """Returns the modules torch and torchax; InputError if they do not work."""
  try:
    import torch  # pyright: ignore[reportMissingImports]  # Optional.
    import torchax  # pyright: ignore[reportMissingImports]
  except Exception as error:  # Versions that do not fit raise many kinds.
    installed = f'{version("torch")} and {version("torchax")}'
    raise InputError(
      f'A PyTorch teacher needs torch and torchax; installed are {installed} '
      f'({first_line(error)}): {INSTALL}.'
    ) from error
  return torch, torchax


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Allows what torchax does: promote dtypes, and ask for 64-bit types."""
  with (
    warnings.catch_warnings(),
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    warnings.filterwarnings('ignore', '.*requested dtype (int|float)64')
    warnings.filterwarnings('ignore', category=DeprecationWarning)
    warnings.filterwarnings('ignore', category=FutureWarning)
    yield


# Weights by distance in pixels: linear, and Keys' cubic with a = -0.5.
_KERNELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  'bilinear': lambda x: np.maximum(1 - x, 0),
  'bicubic': lambda x: np.select(
    [x < 1, x < 2],
    [(1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2],
    0,
  ),
}


def _resize_weights(
  mode: str, old: int, new: int, *, align_corners: Any, scale: float | None
) -> Float[np.ndarray, '{new} {old}']:
  """Weights of an antialiased resize as PyTorch computes it."""
  step = 1 / scale if scale else old / new
  if align_corners:
    step = (old - 1) / (new - 1) if new > 1 else 0.0
  centers = step * (np.arange(new) + 0.5) - 0.5
  distances = np.abs(np.arange(old)[None] - centers[:, None])
  weights = _KERNELS[mode](distances / max(step, 1.0))
  return np.asarray(weights / np.sum(weights, 1, keepdims=True), np.float32)


@functools.cache
def _fix_resizing() -> None:
  """Replaces antialiased resizes, which torchax calls with wrong arguments."""
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
    axes = 'bchw,yh,xw->bcyx'
    return jnp.einsum(axes, x, rows, columns, precision='highest')

  for mode in _KERNELS:
    operation = getattr(torch.ops.aten, f'_upsample_{mode}2d_aa')
    function = view(functools.partial(resized, mode))
    for key in (operation, operation.default):
      env.override_op_definition(key, function)


def with_taps(module: Any, taps: Mapping[str, str]) -> Any:
  """Wraps a module to return {'logits': ..., 'tap <tap>': ...}, see WithTaps.

  Args:
    module: a torch.nn.Module on the CPU.
    taps: {tap: name of a submodule}.
  """
  torch, _ = import_torchax()
  return _with_taps(torch.nn.Module)(module, taps)


def extract(module: Any) -> tuple[dict[str, jax.Array], Callable[..., Any]]:
  """Converts a torch.nn.Module to JAX.

  Returns:
    Its parameters and buffers by name, and a pure function of these and of the
    tuple of the module's arguments.
  """
  _, torchax = import_torchax()
  _fix_resizing()
  with quiet():
    return torchax.extract_jax(module)


def _first_tensor(value: Any) -> Any:
  """The tensor that a submodule returns, alone or first in a tuple, or None."""
  while isinstance(value, (tuple, list)) and value:
    value = value[0]
  return value if hasattr(value, 'shape') else None


def _find_logits(value: Any) -> Any:
  """The logits in the output of a module, or None."""
  for key in ('logits', 'out'):
    if isinstance(value, Mapping) and key in value:
      return _find_logits(value[key])
    if hasattr(value, key) and hasattr(getattr(value, key), 'shape'):
      return _find_logits(getattr(value, key))
  x = None if isinstance(value, Mapping) else _first_tensor(value)
  return x if x is not None and len(x.shape) == 4 else None


@functools.cache
def _on_jax() -> Any:
  """A torch function mode that moves tensors on the CPU to JAX.

  They are those that a module creates, or holds outside its buffers, which
  torchax does not convert. Floating-point ones get the dtype of the image.
  """
  torch, torchax = import_torchax()
  from torch.utils import (  # pyright: ignore[reportMissingImports]
    _pytree as pytree,
  )

  jax_tensors = (torchax.tensor.Tensor, torchax.tensor.View)
  on_cpu = (None, 'cpu', torch.device('cpu'))
  # Constructors whose default dtype is a floating-point one.
  floats = (torch.ones, torch.zeros, torch.empty, torch.linspace, torch.eye)

  class OnJax(torch.overrides.TorchFunctionMode):
    def __init__(self, dtype):
      super().__init__()
      self._dtype = dtype

    def _move(self, x):
      if isinstance(x, jax_tensors):
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
      elif any(
        isinstance(x, jax_tensors) for x in pytree.tree_leaves((args, kwargs))
      ):
        both = args, kwargs
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._move, both)
      return function(*args, **kwargs)

  return OnJax


@functools.cache
def _with_taps(base: Any) -> Any:
  """Defines a subclass of torch.nn.Module once torch is imported."""

  class WithTaps(base):
    """Returns a dict of tensors: 'logits', if there are any, and the taps."""

    def __init__(self, module, taps):
      super().__init__()
      self.module, self.taps = module, taps

    def forward(self, image):
      tapped, hooks = {}, []

      def keep(tap):
        def hook(module, args, output):
          tapped[tap] = output

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
      outputs = {}
      for tap, name in self.taps.items():
        x = _first_tensor(tapped.get(tap))
        if x is None or len(x.shape) not in (3, 4):
          problem = 'returned no map' if tap in tapped else 'was not called'
          raise InputError(
            f'taps: {tap}={name!r} {problem}; name a submodule that returns '
            '[b, c, h, w] or [b, n, c].'
          )
        outputs[f'tap {tap}'] = x
      logits = _find_logits(output)
      if logits is not None:
        outputs['logits'] = logits
      elif not outputs:
        raise InputError(
          f'{type(self.module).__name__} returns {type(output).__name__} '
          "without logits [b, k, h, w], as 'logits', as 'out', first in a "
          'tuple or alone; wrap it in a module that does.'
        )
      return outputs

  return WithTaps
