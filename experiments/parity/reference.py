# SPDX-License-Identifier: Apache-2.0
"""The authors' networks, built from a clone of their repository.

Their code is imported and run where it lies; none of it is copied. It wants
ImageNet weights from the network and an unused torchvision: both are replaced
by nothing here, weights and statistics are drawn at random instead.
"""

import contextlib
import pathlib
import subprocess
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


def commit(path):
  """The commit of a clone, or None of a folder without history."""
  command = ['git', '-C', str(path), 'rev-parse', 'HEAD']
  done = subprocess.run(command, capture_output=True, text=True)
  return done.stdout.strip() or None


def build_network(reference, backbone, *, num_classes):
  """Their DeepLab with random weights."""
  DeepLab = reference[0]
  return DeepLab(BACKBONES[backbone], num_classes=num_classes, sync_bn=False)


def build_distiller(reference, student, teacher, *, num_classes, seed=0):
  """Their Distiller with random weights and no dropout."""
  Distiller = reference[1]
  torch.manual_seed(seed)
  networks = [
    build_network(reference, name, num_classes=num_classes)
    for name in (teacher, student)
  ]
  distiller = Distiller(*networks, types.SimpleNamespace(attn_lambda=2.0))
  randomise(distiller, seed)
  without_dropout(distiller)
  return distiller


def nudge(module, seed=0):
  """Changes every weight by about one unit in its last place."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for weight in module.parameters():
      noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
      weight.mul_(1 + torch.finfo(weight.dtype).eps * noise)


class Training:
  """Their training, one step at a time (train_kd.py:56-66 and 100-125)."""

  def __init__(self, reference, distiller, *, lr, epochs, epoch_steps):
    _, _, LR_Scheduler, SegmentationLosses = reference
    student = distiller.s_net
    options = dict(momentum=0.9, weight_decay=5e-4, nesterov=True)
    main = [
      {'params': student.get_1x_lr_params(), 'lr': lr},
      {'params': student.get_10x_lr_params(), 'lr': lr * 10},
    ]
    first = [{'params': distiller.Connectors.parameters(), 'lr': lr * 10}]
    self._main = torch.optim.SGD(main, **options)
    self._first = torch.optim.SGD(first, **options)
    self._scheduler = LR_Scheduler('poly', lr, epochs, epoch_steps)
    self._criterion = SegmentationLosses(cuda=False).build_loss(mode='ce')
    self._epoch_steps = epoch_steps
    self.distiller = distiller

  def step(self, index, image, label):
    """The loss of step `index`, after which the weights have moved."""
    epoch, i = divmod(index, self._epoch_steps)
    optimizer = self._main if epoch else self._first
    with contextlib.redirect_stdout(None):  # The scheduler prints.
      self._scheduler(optimizer, i, epoch, 0.0)
    optimizer.zero_grad()
    self.distiller.train()
    logits, attention = self.distiller(image)
    loss = self._criterion(logits, label) + attention
    loss.backward()
    optimizer.step()
    return loss.item()

  def tensors(self):
    """{name: array} of everything that is in their state."""
    state = self.distiller.state_dict()
    return {name: tensor.numpy().copy() for name, tensor in state.items()}
