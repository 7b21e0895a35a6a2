# SPDX-License-Identifier: Apache-2.0
r"""Trains a DeepLabV3+ of segmentation_models.pytorch on CamVid, in PyTorch.

  python experiments/any_teacher/train_smp.py --root=CAMVID \
    --output=runs/any_teacher/smp.pt [--encoder=mobilenet_v2] \
    [--encoder_weights=FILE] [--epochs=15]

A teacher that this package has no part in: data, training and score are
PyTorch's. The score is of the protocol of configs/camvid.py:cpu (images at a
short side of 120, labels untouched), so that `evaluate` can be held to it.
FILE has torchvision's names, in .pth or .safetensors. Prints one JSON object.
"""

import argparse
import json
import pathlib
import time

import numpy as np
from PIL import Image
import segmentation_models_pytorch as smp
from teacher import make_module
import torch
from torch.nn import functional

SHORT_SIDE, MULTIPLE, VOID = 120, 16, 11
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read(root, split):
  """Images uint8 [n, 120, 160, 3], and labels uint8 [n, 360, 480]."""
  images, labels = [], []
  for path in sorted((root / split).iterdir()):
    image = Image.open(path).convert('RGB')
    w, h = image.size
    size = (w * SHORT_SIDE // h, SHORT_SIDE)
    images.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR)))
    labels.append(
      np.asarray(Image.open(root / f'{split}annot' / f'{path.stem}.png'))
    )
  return np.stack(images), np.stack(labels)


def normalized(images):
  x = torch.from_numpy(images).float().permute(0, 3, 1, 2) / 255
  mean, std = (torch.tensor(y).reshape(1, 3, 1, 1) for y in (MEAN, STD))
  return (x - mean) / std


def forward(module, x):
  """Logits at the size of x, which is resized to what the encoder takes."""
  size = x.shape[2:]
  seen = [-(-n // MULTIPLE) * MULTIPLE for n in size]
  x = functional.interpolate(x, seen, mode='bilinear')
  return functional.interpolate(module(x), size, mode='bilinear')


@torch.no_grad()
def mean_iou(module, images, labels):
  """Over the untouched labels, classes that do not occur left out."""
  module.eval()
  counts = np.zeros((11, 12), np.int64)
  for i in range(0, len(images), 8):
    logits = forward(module, normalized(images[i : i + 8]))
    label = labels[i : i + 8]
    logits = functional.interpolate(
      logits, label.shape[1:], mode='bilinear', align_corners=True
    )
    found, valid = logits.argmax(1).numpy(), label != VOID
    pairs = label[valid].astype(np.int64) * 12 + found[valid]
    counts += np.bincount(pairs, minlength=11 * 12).reshape(11, 12)
  counts = counts[:, :11]
  both = np.diag(counts)
  union = counts.sum(0) + counts.sum(1) - both
  return float(np.mean((both / np.maximum(union, 1))[union > 0]))


def augmented(images, labels, generator):
  """A mirrored, brighter or darker batch at a random scale, cropped back."""
  scale = generator.uniform(1.0, 1.6)
  h, w = images.shape[1:3]
  size = [round(h * scale), round(w * scale)]
  x = normalized(images) + generator.uniform(-0.4, 0.4)
  y = torch.from_numpy(labels.copy()).float()[:, None]
  x = functional.interpolate(x, size, mode='bilinear')
  y = functional.interpolate(y, size, mode='nearest')
  top = generator.integers(0, size[0] - h + 1)
  left = generator.integers(0, size[1] - w + 1)
  x, y = (z[:, :, top : top + h, left : left + w] for z in (x, y))
  if generator.random() < 0.5:
    x, y = x.flip(3), y.flip(3)
  return x, y[:, 0].long()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--root', type=pathlib.Path, required=True)
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--encoder', default='mobilenet_v2')
  parser.add_argument('--encoder_weights', type=pathlib.Path)
  parser.add_argument('--epochs', type=int, default=15)
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  torch.manual_seed(options.seed)
  generator = np.random.default_rng(options.seed)
  module = make_module(options.encoder)
  if path := options.encoder_weights:
    if path.suffix == '.safetensors':
      from safetensors.torch import load_file

      tensors = load_file(path)
    else:
      tensors = torch.load(path, weights_only=True)
    own = module.encoder.state_dict()
    kept = {k: x for k, x in tensors.items() if k in own}
    rest = {k for k in own if not k.endswith('num_batches_tracked')} - {*kept}
    print(f'encoder: {len(kept)} tensors loaded, missing {sorted(rest)[:6]}')
    module.encoder.load_state_dict(kept, strict=False)
  images, labels = read(options.root, 'train')
  heads = [*module.decoder.parameters(), *module.segmentation_head.parameters()]
  groups = [
    {'params': module.encoder.parameters(), 'lr': 5e-4},
    {'params': heads, 'lr': 2e-3},
  ]
  tx = torch.optim.AdamW(groups, weight_decay=0.01)
  steps = options.epochs * (len(images) // 16)
  schedule = torch.optim.lr_scheduler.PolynomialLR(tx, steps, power=0.9)
  start, step = time.time(), 0
  for epoch in range(options.epochs):
    order = generator.permutation(len(images))
    module.train()
    for i in range(0, len(order) - 15, 16):
      chosen = order[i : i + 16]
      # Labels at the size of the images, nearest pixels.
      small = labels[chosen][:, ::3, ::3]
      x, y = augmented(images[chosen], small, generator)
      loss = functional.cross_entropy(forward(module, x), y, ignore_index=VOID)
      tx.zero_grad()
      loss.backward()
      tx.step()
      schedule.step()
      step += 1
    seconds = time.time() - start
    print(f'epoch {epoch + 1}: loss {loss:.3f}, {seconds:.0f} s', flush=True)
  scores = {
    x: mean_iou(module, *read(options.root, x)) for x in ('val', 'test')
  }
  options.output.parent.mkdir(parents=True, exist_ok=True)
  saved = {'encoder': options.encoder, 'state_dict': module.state_dict()}
  torch.save(saved, options.output)
  weights = options.encoder_weights
  print(
    json.dumps(
      {
        'network': f'smp.DeepLabV3Plus({options.encoder!r})',
        'encoder_weights': weights and weights.name,
        'miou': scores,
        'epochs': options.epochs,
        'steps': step,
        'seed': options.seed,
        'seconds': round(time.time() - start, 1),
        'device': f'CPU, {torch.get_num_threads()} threads',
        'versions': {'torch': torch.__version__, 'smp': smp.__version__},
      }
    )
  )


if __name__ == '__main__':
  main()
