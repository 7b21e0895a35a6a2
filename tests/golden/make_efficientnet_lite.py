# SPDX-License-Identifier: Apache-2.0
"""Makes efficientnet_lite/: what torch computes of the three variants.

Run once, with torch and `pip install efficientnet-lite-pytorch`:
`python tests/golden/make_efficientnet_lite.py`. Its networks, with drawn
weights in float64; tests/models/test_efficientnet_lite.py compares without
them. Maps are at the strides that they were published with, up to 32.
"""

import importlib.metadata
import json
import pathlib

from dilated import take_strides
import drawn
from efficientnet_lite_pytorch import EfficientNet
import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent / 'efficientnet_lite'
PEER = 'efficientnet_lite_pytorch'
SIZES = ((64, 64), (49, 78))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_network(variant):
  """The peer's network with the weights that its names draw; counters are 0."""
  # Padding by the size of each map; momentum and depth are as in training here.
  options = {'image_size': None, 'batch_norm_momentum': 0.9}
  network = EfficientNet.from_name(
    f'efficientnet-{variant}', drop_connect_rate=0, num_classes=5, **options
  ).double()
  for name, tensor in network.state_dict().items():
    if tensor.ndim:
      value = drawn.weight(f'{variant} {name}', tensor.shape)
      tensor.copy_(torch.from_numpy(value))
  return network


def draw_image(size):
  """[b, 3, h, w] by ImageNet's mean and deviation, and as the peer wants it."""
  image = drawn.image(f'image {size}', (2, 3, *size))
  mean, std = (np.reshape(x, (3, 1, 1)) for x in (MEAN, STD))
  return image, torch.from_numpy(((image * std + mean) * 255 - 127) / 128)


def run_blocks(network, image):
  """[b, h, w, c] of every block."""
  maps = []
  hooks = [
    block.register_forward_hook(lambda _, args, x: maps.append(x))
    for block in network._blocks
  ]
  network.extract_features(image)
  for hook in hooks:
    hook.remove()
  return [x.permute(0, 2, 3, 1) for x in maps]


def packed(name, tensors):
  found = drawn.pack({k: x.detach().numpy() for k, x in tensors.items()})
  return {f'{name}/{key}': x for key, x in found.items()}


def run_training(variant, size, output_stride):
  """Last map, gradients of its sum with a drawn map, and new statistics."""
  network = take_strides(make_network(variant), output_stride).train()
  last = run_blocks(network, draw_image(size)[1])[-1]
  torch.sum(
    last * torch.from_numpy(drawn.uniform('sum', last.shape))
  ).backward()
  trunk = ('_conv_stem.', '_bn0.', '_blocks.')
  gradients = {
    name: x.grad
    for name, x in network.named_parameters()
    if name.startswith(trunk)
  }
  statistics = {
    name: x
    for name, x in network.named_buffers()
    if name.startswith(trunk) and x.ndim
  }
  return (
    packed('last', {'last': last})
    | packed('gradients', gradients)
    | packed('statistics', statistics)
  )


def main():
  FOLDER.mkdir(exist_ok=True)
  for variant in ('lite0', 'lite1', 'lite2'):
    network = make_network(variant).eval()
    shapes = {k: [*x.shape] for k, x in network.state_dict().items()}
    found = {'shapes': drawn.to_bytes(shapes)}
    with torch.no_grad():
      for size in SIZES:
        maps = run_blocks(network, draw_image(size)[1])
        maps = {f'block{i:02}': x for i, x in enumerate(maps)}
        found |= packed('{}x{}'.format(*size), maps)
    np.savez_compressed(FOLDER / f'{variant}.npz', **found)
  found = run_training('lite0', SIZES[1], 16)
  np.savez_compressed(FOLDER / 'training.npz', **found)
  versions = {
    PEER: importlib.metadata.version(PEER),
    'torch': torch.__version__,
    'numpy': np.__version__,
    'drawn': drawn.checksum(),
  }
  text = json.dumps(versions, indent=2) + '\n'
  (FOLDER / 'versions.json').write_text(text)


if __name__ == '__main__':
  main()
