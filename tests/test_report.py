# SPDX-License-Identifier: Apache-2.0
"""The report: numbers, words and files, from run folders made up here."""

import json
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest

from attnfd_jax import report
from attnfd_jax.errors import InputError

NAMES = (
  *('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign <b>&'),
  *('fence', 'car', 'pedestrian', 'bicyclist'),
)
PALETTE = np.array(
  [
    *([128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128]),
    *([0, 0, 192], [128, 128, 0], [192, 128, 128], [64, 64, 128]),
    *([64, 0, 128], [64, 64, 0], [0, 128, 192]),
  ],
  np.uint8,
)
MIOU = {'teacher': 0.47, 'student': 0.412, 'distill': 0.4355}


def _scenes(rng, n, height, width):
  """Labels with a sky, houses, a road, cars and an ignored rim; images."""
  y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
  labels, images = [], []
  for _ in range(n):
    horizon = 0.4 + 0.1 * rng.random()
    label = np.where(y < horizon, 0, 3)
    for _ in range(6):
      kind, left, size = rng.choice([1, 5, 1, 2]), rng.random(), rng.random()
      tall = (x > left) & (x < left + 0.25 * size + 0.02)
      label[tall & (y < horizon + 0.08) & (y > 0.45 - 0.4 * size)] = kind
    label[(y > horizon) & (abs(x - 0.5) > 0.25 + 0.4 * (y - horizon))] = 4
    for _ in range(4):
      kind, cx = rng.choice([8, 9, 6, 10]), rng.random()
      cy, r = 0.5 + 0.3 * rng.random(), 0.05 + 0.08 * rng.random()
      label[(x - cx) ** 2 + (y - cy) ** 2 < r**2] = kind
    image = PALETTE[label] * (0.65 + 0.35 * y[..., None])
    image = image + 25 * np.sin(18 * x + 9 * y)[..., None]
    label[:, : width // 30] = 255
    labels.append(label)
    images.append(np.clip(image + rng.normal(0, 6, image.shape), 0, 255))
  return np.uint8(images), np.uint8(labels)


def _blobs(rng, shape, low, high):
  """Smooth noise in [low, high]."""
  n, h, w = shape
  y, x = np.mgrid[:h, :w] / [[[h]], [[w]]]
  noise = sum(
    np.sin(2 * np.pi * (a * x + b * y) + c)
    for a, b, c in rng.uniform(-3, 3, (8, 3))
  )
  noise = np.stack([np.roll(noise, 3 * i, 1) for i in range(n)])
  noise = (noise - noise.min()) / (noise.max() - noise.min())
  return low + (high - low) * noise


def _write_json(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


def make_run(folder, *, seed=0, miou=None, stages=report.STAGES, size=(96, 128)):
  """A finished run folder with seeded numbers and smooth pictures."""
  rng = np.random.default_rng(seed)
  miou = MIOU if miou is None else miou
  config = {
    'seed': seed,
    'batch_size': 8,
    'num_steps': 400,
    'recipe': 'clean',
    'stages': list(report.STAGES),
    'data': {'name': 'camvid', 'root': '<root>'},
    'student': {'backbone': 'resnet18'},
    'teacher': {'backbone': 'resnet101', 'checkpoint': ''},
    'distill': {'method': 'attnfd', 'attn_lambda': 2.0},
    'optim': {'learning_rate': 0.01},
  }
  _write_json(folder / 'config.json', config)
  image, label = _scenes(rng, 3, *size)
  base = rng.uniform(0.25, 0.7, len(NAMES))
  results = {}
  for stage in stages:
    ious = np.clip(base + rng.normal(miou[stage] - 0.45, 0.05, 11), 0, 1)
    table = dict(zip(NAMES, ious.round(4).tolist(), strict=True))
    table['fence'] = None
    results[stage] = {
      'stage': stage,
      'dataset': 'camvid',
      'split': 'val',
      'protocol': 'native',
      'miou': miou[stage],
      'pixel_accuracy': 0.8 + miou[stage] / 10,
      'class_accuracy': miou[stage] + 0.1,
      'fw_iou': 0.7,
      'iou_per_class': table,
      'step': 400,
      'seed': seed,
      'params': 59_339_000 if stage == 'teacher' else 16_610_000,
      'gflops': 88.1 if stage == 'teacher' else 21.4,
      'train_seconds': 3725.0 if stage == 'teacher' else 830.0,
      'device': 'cpu x2',
      'versions': {'jax': '0.10.2', 'flax': '0.12.8'},
      'method': 'attnfd',
      'image_size': list(size),
      'test': {'miou': miou[stage] - 0.02, 'split': 'test'},
    }
    lines = []
    for step in range(0, 401, 5):
      decay = np.exp(-step / 120)
      terms = {'ce': 0.4 + 2 * decay + 0.1 * rng.random()}
      if stage == 'distill':
        terms['attnfd'] = 0.02 + 0.1 * decay + 0.005 * rng.random()
      lines.append({'kind': 'train', 'step': step, **terms})
      lines[-1] |= {'loss': sum(terms.values()), 'grad_norm': 1e6}
      if step and step % 40 == 0:
        value = miou[stage] * (1 - np.exp(-step / 90)) + 0.01 * rng.random()
        lines.append({'kind': 'eval', 'step': step, 'miou': value})
    text = '\n'.join(map(json.dumps, lines)) + '\n{"kind": "tra'
    _write_json(folder / stage / 'result.json', results[stage])
    (folder / stage / 'metrics.jsonl').write_text(text)
    noise = _blobs(rng, label.shape, 0, 1) > miou[stage] + 0.35
    prediction = np.where(noise, np.roll(label, 9, 2), label)
    prediction[prediction == 255] = 3
    arrays = {'image': image, 'label': label, 'prediction': prediction}
    arrays['palette'] = PALETTE
    if stage == 'distill':
      for tap, (h, w) in (
        *(('backbone', (6, 8)), ('aspp', (6, 8))),
        ('decoder', (24, 32)),
      ):
        teacher = _blobs(rng, (3, h, w), 0.2, 0.9)
        arrays[f'teacher_attention_{tap}'] = teacher
        noise = _blobs(rng, (3, h, w), 0, 0.3)
        arrays[f'student_attention_{tap}'] = (teacher + noise)[:, ::1]
    np.savez_compressed(folder / stage / 'pictures.npz', **arrays)
  _write_json(folder / 'results.json', results)
  return folder


def _page(folders, output):
  report.write_report(folders, output)
  return output.read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  return _page([make_run(folder / 'a')], folder / 'report.html')
