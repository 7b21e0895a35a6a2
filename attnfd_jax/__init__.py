# SPDX-License-Identifier: Apache-2.0
"""Attention-guided feature distillation for semantic segmentation, in JAX."""

import importlib

from attnfd_jax.distill import make_method, METHODS
from attnfd_jax.distill.attnfd import AttnFD, attnfd_loss
from attnfd_jax.metrics import confusion_matrix, mean_iou
from attnfd_jax.models.deeplab import DeepLabV3Plus, normalise
from attnfd_jax.pytorch.networks import load_torch, load_torch_distiller

# What the loss does not need is imported when it is asked for.
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
  'load_torch',
  'load_torch_distiller',
  'make_method',
  'mean_iou',
  'normalise',
  *_LAZY,
]
__version__ = '0.2.0'


def __getattr__(name):
  if name not in _LAZY:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, attribute = _LAZY[name]
  return getattr(importlib.import_module(module), attribute)
