# SPDX-License-Identifier: Apache-2.0
"""Attention-guided feature distillation for semantic segmentation, in JAX."""

import importlib

from attnfd_jax.distill.attnfd import AttnFD
from attnfd_jax.distill.attnfd import attnfd_loss
from attnfd_jax.metrics import confusion_matrix
from attnfd_jax.metrics import mean_iou
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.pytorch.distillers import load_torch_distiller
from attnfd_jax.pytorch.networks import load_torch

__all__ = [
  'AttnFD',
  'DeepLabV3Plus',
  'attnfd_loss',
  'confusion_matrix',
  'load_torch',
  'load_torch_distiller',
  'mean_iou',
  'normalise',
  'predict',
]
__version__ = '0.1.0'


def __getattr__(name):
  # What the loss does not need is imported when it is asked for.
  if name == 'predict':
    return importlib.import_module('attnfd_jax.predict')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
