# SPDX-License-Identifier: Apache-2.0
"""The authors' networks, built from a clone of their repository.

Their code is imported and run where it lies; none of it is copied. It wants
ImageNet weights from the network and an unused torchvision: both are replaced
by nothing here, weights and statistics are drawn at random instead.
"""

import pathlib
import sys
import types

import torch

BACKBONES = {
  'resnet18': 'resnet18',
  'resnet101': 'resnet101',
  'mobilenet_v2': 'mobilenet',
}


def import_reference(path):
  """(DeepLab, Distiller, LR_Scheduler, SegmentationLosses) of the clone."""
  path = pathlib.Path(path).resolve()
  if not (path / 'distiller.py').is_file():
    sys.exit(f'{path}: no distiller.py; clone AmirMansurian/AttnFD there.')
  sys.path.insert(0, str(path))
  unused = ('torchvision', 'torchvision.models', 'torchvision.models.resnet')
  for name in unused:
    sys.modules.setdefault(name, types.ModuleType(name))
  import torch.utils.model_zoo as model_zoo

  model_zoo.load_url = lambda *args, **kwargs: {}
  from distiller import Distiller
  from modeling.deeplab import DeepLab
  from utils.loss import SegmentationLosses
  from utils.lr_scheduler import LR_Scheduler

  return DeepLab, Distiller, LR_Scheduler, SegmentationLosses


def randomise(module, seed):
  """Draws statistics and norms at random; convolutions keep their start."""
  generator = torch.Generator().manual_seed(seed)
  for layer in module.modules():
    if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
      for tensor, low, high in (
        (layer.weight.data, 0.5, 1.5),
        (layer.bias.data, -0.2, 0.2),
        (layer.running_mean, -0.2, 0.2),
        (layer.running_var, 0.5, 1.5),
      ):
        random = torch.rand(tensor.shape, generator=generator)
        tensor.copy_(low + (high - low) * random)


def without_dropout(module):
  """Sets every dropout rate to 0, so that both sides compute the same."""
  for layer in module.modules():
    if isinstance(layer, torch.nn.Dropout):
      layer.p = 0.0


def build_distiller(reference, student, *, num_classes, seed=0):
  """Their Distiller with a ResNet-101 teacher, random weights, no dropout."""
  DeepLab, Distiller, _, _ = reference
  torch.manual_seed(seed)
  networks = [
    DeepLab(BACKBONES[name], num_classes=num_classes, sync_bn=False)
    for name in ('resnet101', student)
  ]
  distiller = Distiller(*networks, types.SimpleNamespace(attn_lambda=2.0))
  randomise(distiller, seed)
  without_dropout(distiller)
  return distiller
