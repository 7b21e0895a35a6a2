# SPDX-License-Identifier: Apache-2.0
"""Attention-guided feature distillation for semantic segmentation, in JAX."""

import importlib
from typing import Any, TYPE_CHECKING

from attnfd_jax.distill import make_method, METHODS
from attnfd_jax.distill.attnfd import AttnFD, attnfd_loss
from attnfd_jax.metrics import confusion_matrix, mean_iou
from attnfd_jax.models.deeplab import DeepLabV3Plus, normalize
from attnfd_jax.pytorch.networks import load_torch, load_torch_distiller

if TYPE_CHECKING:
  from attnfd_jax.inference.predictor import predict
  from attnfd_jax.runs.loading import load_network as load
  from attnfd_jax.teachers.torch_module import from_torch
  from attnfd_jax.training.experiment import train

# Imported on first use, to keep `import attnfd_jax` fast.
_LAZY = {
  'from_torch': ('attnfd_jax.teachers.torch_module', 'from_torch'),
  'load': ('attnfd_jax.runs.loading', 'load_network'),
  'predict': ('attnfd_jax.inference.predictor', 'predict'),
  'train': ('attnfd_jax.training.experiment', 'train'),
}
__all__ = [
  'METHODS',
  'AttnFD',
  'DeepLabV3Plus',
  'attnfd_loss',
  'confusion_matrix',
  'from_torch',
  'load',
  'load_torch',
  'load_torch_distiller',
  'make_method',
  'mean_iou',
  'normalize',
  'predict',
  'train',
]
__version__ = '0.2.0'


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, attribute = _LAZY[name]
  return getattr(importlib.import_module(module), attribute)
