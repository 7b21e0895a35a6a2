# SPDX-License-Identifier: Apache-2.0
"""The network that train_smp.py trained, for config.teacher.factory."""

import os

import segmentation_models_pytorch as smp
import torch

CLASS_NAMES = (
  *('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign_symbol'),
  *('fence', 'car', 'pedestrian', 'bicyclist'),
)


def make_module(encoder='mobilenet_v2'):
  """DeepLabV3+ of segmentation_models.pytorch with random weights."""
  return smp.DeepLabV3Plus(encoder, encoder_weights=None, classes=11)


def make():
  """The module and what a run should know about it."""
  path = os.environ.get('SMP_TEACHER', 'runs/any_teacher/smp.pt')
  saved = torch.load(path, weights_only=True)
  module = make_module(saved['encoder'])
  module.load_state_dict(saved['state_dict'])
  # The encoder wants multiples of 16.
  return module, {'class_names': CLASS_NAMES, 'size_multiple': 16}
