# SPDX-License-Identifier: Apache-2.0
"""Makes networks/: what torch computes of our networks and of their loss.

Run once, with torch: `python tests/golden/make_networks.py`. The networks of
METHOD section 2 are written down here a second time, for torch, under the
names of the authors' checkpoints; tests/test_golden.py compares without torch.
All is computed in float64 and stored in float32.
"""

import json
import pathlib

import drawn
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

FOLDER = pathlib.Path(__file__).parent / 'networks'
TAPS = ('backbone', 'aspp', 'decoder')
IMAGE, CLASSES = (3, 3, 33, 37), 5
# Channels of its 17 blocks at width 1/4: multiples of 8, our choice.
MOBILENET = (8, *[8] * 2, *[8] * 3, *[16] * 4, *[24] * 3, *[40] * 3, 80)


class Layers:
  """torch.nn layers by name, made and filled when they are first used."""

  def __init__(self, seed):
    self.seed, self.train = seed, False
    self._layers = {}

  def _layer(self, name, make):
    if name not in self._layers:
      layer = make().double()
      for key, tensor in layer.state_dict().items():
        if key != 'num_batches_tracked':
          value = drawn.weight(f'{self.seed} {name}.{key}', tensor.shape)
          tensor.copy_(torch.from_numpy(value))
      self._layers[name] = layer
    return self._layers[name].train(self.train)

  def conv(self, name, x, features, size=1, stride=1, dilation=1, **options):
    options = {'padding': dilation * (size // 2), 'bias': False} | options
    return self._layer(
      name,
      lambda: nn.Conv2d(
        x.shape[1], features, size, stride, dilation=dilation, **options
      ),
    )(x)

  def norm(self, name, x, momentum=0.1):
    return self._layer(
      name, lambda: nn.BatchNorm2d(x.shape[1], momentum=momentum)
    )(x)

  def linear(self, name, x, features):
    return self._layer(name, lambda: nn.Linear(x.shape[1], features))(x)

  def state(self):
    return {
      f'{name}.{key}': tensor.detach().numpy()
      for name, layer in self._layers.items()
      for key, tensor in layer.state_dict().items()
    }

  def shapes(self):
    return {name: list(value.shape) for name, value in self.state().items()}

  def statistics(self):
    return {k: v for k, v in self.state().items() if '.running_' in k}

  def gradients(self):
    """Of every trained tensor: the authors' optimizer sees no Linear."""
    return {
      f'{name}.{key}': parameter.grad.numpy()
      for name, layer in self._layers.items()
      for key, parameter in layer.named_parameters()
      if not isinstance(layer, nn.Linear)
    }


def resize(x, size):
  return F.interpolate(x, size, mode='bilinear', align_corners=True)


def basic_block(net, name, x, width, stride=1, dilation=1):
  x = F.relu(x)
  y = net.conv(f'{name}.conv1', x, width, 3, stride, dilation)
  y = F.relu(net.norm(f'{name}.bn1', y))
  y = net.conv(f'{name}.conv2', y, width, 3, 1, dilation)
  return net.norm(f'{name}.bn2', y) + shortcut(net, name, x, width, stride)


def bottleneck(net, name, x, width, stride=1, dilation=1):
  x = F.relu(x)
  y = F.relu(net.norm(f'{name}.bn1', net.conv(f'{name}.conv1', x, width)))
  y = net.conv(f'{name}.conv2', y, width, 3, stride, dilation)
  y = F.relu(net.norm(f'{name}.bn2', y))
  y = net.norm(f'{name}.bn3', net.conv(f'{name}.conv3', y, 4 * width))
  return y + shortcut(net, name, x, 4 * width, stride)


def shortcut(net, name, x, features, stride):
  if stride == 1 and x.shape[1] == features:
    return x
  x = net.conv(f'{name}.downsample.0', x, features, 1, stride)
  return net.norm(f'{name}.downsample.1', x)


def resnet(net, x, blocks, block):
  """Low level, tap and main output at output stride 16."""
  x = F.relu(net.norm('backbone.bn1', net.conv('backbone.conv1', x, 8, 7, 2)))
  x = F.max_pool2d(x, 3, 2, 1)
  for stage in (1, 2, 3, 4):
    for i in range(blocks[stage - 1]):
      stride = 2 if stage in (2, 3) and i == 0 else 1
      dilation = 2 if stage == 4 else 1
      if stage == 4 and block is bottleneck:
        dilation = (2, 4, 8)[i]
      name, width = f'backbone.layer{stage}.{i}', 8 * 2 ** (stage - 1)
      x = block(net, name, x, width, stride, dilation)
    if stage == 1:
      low_level = F.relu(x)
  return low_level, x, F.relu(x)


def inverted_residual(
  net, name, x, features, expansion=6, stride=1, dilation=1, twice=False
):
  """With `twice` the expansion's norm sees the unpadded map afterwards."""
  hidden, number = expansion * x.shape[1], 0
  y = F.pad(x, (dilation,) * 4)
  if expansion != 1:
    y = net.norm(f'{name}.conv.1', net.conv(f'{name}.conv.0', y, hidden))
    y, number = F.relu6(y), 3
    if twice:
      net.norm(f'{name}.conv.1', net.conv(f'{name}.conv.0', x, hidden))
  y = net.conv(
    f'{name}.conv.{number}',
    y,
    hidden,
    3,
    stride,
    dilation,
    padding=0,
    groups=hidden,
  )
  y = F.relu6(net.norm(f'{name}.conv.{number + 1}', y))
  y = net.conv(f'{name}.conv.{number + 3}', y, features)
  y = net.norm(f'{name}.conv.{number + 4}', y)
  return x + y if stride == 1 and x.shape[1] == features else y


def mobilenet_v2(net, x):
  """Low level, tap and main output at output stride 16, while distilling."""
  x = net.conv('backbone.features.0.0', x, 8, 3, 2)
  x = F.relu6(net.norm('backbone.features.0.1', x))
  for i, features in enumerate(MOBILENET, 1):
    x = inverted_residual(
      net,
      f'backbone.features.{i}',
      x,
      features,
      expansion=1 if i == 1 else 6,
      stride=2 if i in (2, 4, 7) else 1,
      dilation=2 if i == 17 else 1,
      twice=net.train and i in (4, 7, 14),
    )
    if i == 3:
      low_level = x
  return low_level, x, x


def aspp(net, x, features):
  branches = []
  for i, rate in enumerate((1, 6, 12, 18), 1):
    name, size = f'aspp.aspp{i}', 1 if i == 1 else 3
    y = net.conv(f'{name}.atrous_conv', x, features, size, 1, rate)
    branches.append(F.relu(net.norm(f'{name}.bn', y)))
  y = net.conv('aspp.global_avg_pool.1', x.mean((2, 3), True), features)
  y = F.relu(net.norm('aspp.global_avg_pool.2', y))
  branches.append(resize(y, x.shape[2:]))
  y = net.conv('aspp.conv1', torch.cat(branches, 1), features)
  return F.relu(net.norm('aspp.bn1', y))


def decoder(net, low_level, context, features, low_level_features):
  y = net.conv('decoder.conv1', low_level, low_level_features)
  y = F.relu(net.norm('decoder.bn1', y))
  y = torch.cat([resize(context, y.shape[2:]), y], 1)
  for i in (0, 4):
    y = net.conv(f'decoder.last_conv.{i}', y, features, 3)
    y = F.relu(net.norm(f'decoder.last_conv.{i + 1}', y))
  return y


def cbam(net, tap, x):
  def mlp(x):
    x = net.linear(f'{name}.ChannelGate.mlp.1', x, features // 16)
    return net.linear(f'{name}.ChannelGate.mlp.3', F.relu(x), features)

  name, features = f'{tap}.cbam', x.shape[1]
  gate = mlp(x.mean((2, 3))) + mlp(x.amax((2, 3)))
  x = x * torch.sigmoid(gate)[:, :, None, None]
  pooled = torch.cat([x.amax(1, True), x.mean(1, True)], 1)
  gate = net.conv(f'{name}.SpatialGate.spatial.conv', pooled, 1, 7)
  gate = net.norm(f'{name}.SpatialGate.spatial.bn', gate, momentum=0.01)
  return x * torch.sigmoid(gate)


def cbam_free(x):
  x = x * torch.sigmoid(x.mean((2, 3), True) + x.amax((2, 3), True))
  return x * torch.sigmoid(x.amax(1, True) + x.mean(1, True))


def connector(net, number, x, features):
  x = net.conv(f'Connectors.{number}.0', x, features)
  return net.norm(f'Connectors.{number}.1', x)


def deeplab(net, image, backbone, channels):
  """Logits and taps; `channels` of ASPP, decoder and low level."""
  outputs = {}
  low_level, outputs['backbone'], x = backbone(net, image)
  outputs['aspp'] = x = aspp(net, x, channels[0])
  outputs['decoder'] = x = decoder(net, low_level, x, *channels[1:])
  x = net.conv('decoder.last_conv.8', x, CLASSES, bias=True)
  return outputs | {'logits': resize(x, image.shape[2:])}


def resnet18(net, x):
  return resnet(net, x, (2, 2, 2, 2), basic_block)


def resnet50(net, x):
  return resnet(net, x, (3, 4, 6, 3), bottleneck)


# Name: (function of layers and maps, shapes of the maps).
CASES = {
  'conv_norm': (
    lambda net, x: net.norm(
      'backbone.bn1', net.conv('backbone.conv1', x, 8, 3, 2, 2)
    ),
    [(3, 5, 9, 10)],
  ),
  'depthwise': (
    lambda net, x: net.norm(
      'backbone.features.5.conv.4',
      net.conv('backbone.features.5.conv.3', x, 6, 3, 2, 2, groups=6),
    ),
    [(3, 6, 9, 10)],
  ),
  'larger': (lambda net, x: resize(x, (9, 13)), [(2, 3, 5, 4)]),
  'smaller': (lambda net, x: resize(x, (4, 6)), [(2, 3, 9, 13)]),
  'from_point': (lambda net, x: resize(x, (4, 5)), [(2, 3, 1, 1)]),
  'to_point': (lambda net, x: resize(x, (1, 1)), [(2, 3, 4, 5)]),
  'max_pool': (lambda net, x: F.max_pool2d(x, 3, 2, 1), [(2, 3, 8, 9)]),
  'basic_block': (
    lambda net, x: basic_block(net, 'backbone.layer3.0', x, 8, 2, 2),
    [(3, 6, 9, 10)],
  ),
  'bottleneck': (
    lambda net, x: bottleneck(net, 'backbone.layer4.1', x, 4, 1, 4),
    [(3, 16, 9, 10)],
  ),
  'inverted_residual': (
    lambda net, x: inverted_residual(
      net, 'backbone.features.4', x, 4, dilation=2
    ),
    [(3, 4, 7, 8)],
  ),
  'updated_twice': (
    lambda net, x: inverted_residual(
      net, 'backbone.features.4', x, 6, stride=2, twice=net.train
    ),
    [(3, 4, 7, 8)],
  ),
  # Larger than the largest of the rates.
  'aspp': (lambda net, x: aspp(net, x, 4), [(3, 3, 19, 20)]),
  'decoder': (
    lambda net, x, y: decoder(net, x, y, 6, 3),
    [(3, 5, 9, 10), (3, 4, 3, 4)],
  ),
  'cbam': (lambda net, x: cbam(net, 'aspp', x), [(3, 32, 4, 5)]),
  'cbam_free': (lambda net, x: cbam_free(x), [(3, 6, 4, 5)]),
  'connector': (lambda net, x: connector(net, 3, x, 7), [(3, 5, 4, 5)]),
}


def run_case(name):
  function, shapes = CASES[name]
  net = Layers(name)
  maps = [
    torch.from_numpy(drawn.image(f'{name} {i}', shape)).requires_grad_()
    for i, shape in enumerate(shapes)
  ]
  found = {}
  with torch.no_grad():
    y = function(net, *maps)
  shapes = net.shapes()
  if shapes:  # Else there is but one mode.
    found['eval'] = y
  net.train = True
  found['train'] = y = function(net, *maps)
  weights = torch.from_numpy(drawn.uniform(f'{name} weights', y.shape))
  (y * weights).sum().backward()
  found |= {f'gradient/{i}': x.grad for i, x in enumerate(maps)}
  found = {key: to_float32(value) for key, value in found.items()}
  found['state'] = drawn.to_bytes(shapes)
  if shapes:
    found |= packed('statistics', net.statistics())
    found |= packed('gradients', net.gradients())
  return {f'{name}/{key}': value for key, value in found.items()}


def to_float32(x):
  return x.detach().numpy().astype(np.float32)


def packed(key, tensors):
  return {f'{key}/{k}': v for k, v in drawn.pack(tensors).items()}


def outputs_of(mode, outputs):
  """The logits thinned out: the loss and its gradient have seen them all."""
  outputs = outputs | {'logits': outputs['logits'][:, :, 1::3, ::4]}
  return {f'{mode}/{key}': to_float32(x) for key, x in outputs.items()}


def run_teacher(image):
  """What is stored, and the refined maps in train mode."""
  net = Layers('teacher')

  def forward():
    outputs = deeplab(net, image, resnet50, (48, 32, 8))
    return outputs, {tap: cbam(net, tap, outputs[tap]) for tap in TAPS}

  with torch.no_grad():
    outputs, _ = forward()
    found = {'state': drawn.to_bytes(net.shapes())}
    found |= outputs_of('eval', outputs)
    net.train = True
    outputs, refined = forward()
  found |= outputs_of('train', outputs)
  found |= packed('statistics', net.statistics())
  return found, refined


def run_student(name, backbone, image, label, targets):
  """One training step of recipe `reference` without its update."""
  net = Layers(name)

  def forward():
    outputs = deeplab(net, image, backbone, (32, 16, 8))
    maps = {
      tap: connector(
        net, number, cbam(net, tap, outputs[tap]), targets[tap].shape[1]
      )
      for number, tap in enumerate(TAPS, 3)
    }
    return outputs, maps

  with torch.no_grad():
    outputs, _ = forward()
  found = {'state': drawn.to_bytes(net.shapes())}
  found |= outputs_of('eval', outputs)
  net.train = True
  outputs, maps = forward()
  found |= outputs_of('train', outputs)
  batch = len(image)
  ce = F.cross_entropy(
    outputs['logits'], label.long(), ignore_index=drawn.IGNORE_LABEL
  )
  terms = {
    tap: (maps[tap] / maps[tap].norm() - targets[tap] / targets[tap].norm())
    .square()
    .sum()
    / batch
    for tap in TAPS
  }
  attention = sum(terms.values())
  loss = ce / batch + 2 * attention
  loss.backward()
  losses = {f'attnfd_{tap}': value for tap, value in terms.items()}
  losses |= {'ce': ce, 'attnfd': attention, 'loss': loss}
  found |= {f'loss/{key}': to_float32(x) for key, x in losses.items()}
  found |= packed('statistics', net.statistics())
  found |= packed('gradients', net.gradients())
  return found


def main():
  FOLDER.mkdir(exist_ok=True)
  cases = {}
  for name in CASES:
    cases |= run_case(name)
  image = torch.from_numpy(drawn.image('image', IMAGE))
  label = drawn.labels('label', (IMAGE[0], *IMAGE[2:]), CLASSES)
  teacher, targets = run_teacher(image)
  files = {'cases': cases, 'resnet50': teacher}
  for backbone in (resnet18, mobilenet_v2):
    name = backbone.__name__
    files[name] = run_student(
      name, backbone, image, torch.from_numpy(label), targets
    )
  for name, arrays in files.items():
    np.savez_compressed(FOLDER / f'{name}.npz', **arrays)
  versions = {
    'torch': torch.__version__,
    'numpy': np.__version__,
    'drawn': drawn.checksum(),
  }
  text = json.dumps(versions, indent=2) + '\n'
  (FOLDER / 'versions.json').write_text(text)


if __name__ == '__main__':
  main()
