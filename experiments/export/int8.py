# SPDX-License-Identifier: Apache-2.0
r"""Students in float32, with int8 weights, and in full int8, side by side.

  python experiments/export/int8.py runs/a/student runs/b/student \
    [--output=F.json]

Exports each stage to a float32 and an int8 ONNX file (all defaults, calibrated
on train) and to a StableHLO file with int8 weights. Reports the mIoU on val,
also for the other calibrations, the fraction of pixels of the calibration
images with the class of float32, and the size. Then, on a machine that should
have nothing else to do: the time per image, and the memory that loading and
running a file adds to a process. The files take turns, each in a fresh process;
networks of full width with random weights are measured as well.
make_table.py writes the results into docs/deployment.md.

The stages of results/int8.json, each with --config=configs/camvid.py:cpu,
--config.stages="('student',)" and --config.optim.warmup_epochs=1:

  ResNet-18 x0.5: --config.student.width_multiplier=0.5
  EfficientNet-Lite0: --config.student.backbone=efficientnet_lite0
    --config.student.width_multiplier=1 --config.student.pretrained=imagenet
    --config.student.lr=0.001 --config.student.head_lr_scale=4
    --config.num_epochs=25
  MobileNetV2: the same with --config.student.backbone=mobilenet_v2
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import onnx

from attnfd_jax import metrics
from attnfd_jax.benchmarks.data import peak_memory
from attnfd_jax.devices import sharding
from attnfd_jax.exporting import (
  agreement,
  fresh_process,
  onnx_graph,
  quantized,
  stablehlo,
  student,
)
from attnfd_jax.inference import evaluation, onnx_model
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.runs import loading, logs

FOLDER = pathlib.Path(__file__).parent
# Row -> (format, further options of export).
FILES = {
  'float32': ('onnx', {}),
  'int8 weights': ('stablehlo', {'weights': 'int8'}),
  'int8': ('onnx', {'quantize': 'int8'}),
}
SIZES = [(120, 160), (360, 480)]
FULL_WIDTH = ('resnet18', 'mobilenet_v2', 'efficientnet_lite0')
ROUNDS = 3


def measure_file(path, height, width):
  """Prints the cost of running a file on one image, as JSON."""
  import jax.export
  import onnxruntime

  del onnxruntime  # Imported before the memory is read.
  image = np.random.default_rng(0).integers(
    0, 256, (1, height, width, 3), dtype=np.uint8
  )
  jax.devices()
  before = peak_memory()
  run = fresh_process.LOADERS[path.suffix[1:]](str(path))
  np.asarray(run(image))
  seconds = []
  for _ in range(11):
    start = time.perf_counter()
    np.asarray(run(image))
    seconds.append(time.perf_counter() - start)
  cost = {'ms': 1e3 * np.median(seconds)}
  print(json.dumps(cost | {'memory_mb': (peak_memory() - before) / 1e6}))


def find_costs(files, sizes=SIZES):
  """The cost of each file, {row: {'HxW': cost}}; the files take turns."""
  costs = {name: {} for name in files}
  for h, w in sizes:
    found = {name: [] for name in files}
    for _ in range(ROUNDS):
      for name, path in files.items():
        command = [sys.executable, __file__, '--measure', str(path), f'{h}x{w}']
        env = os.environ | {'JAX_PLATFORMS': 'cpu'}
        result = subprocess.run(
          command, env=env, check=True, capture_output=True, text=True
        )
        found[name].append(json.loads(result.stdout))
    for name, rounds in found.items():
      costs[name][f'{h}x{w}'] = {
        key: round(sorted(x[key] for x in rounds)[ROUNDS // 2], 2)
        for key in rounds[0]
      }
  return costs


def export_stage(checkpoint, folder):
  """Files of a stage by row, and what `export` said of each."""
  files, lines = {}, {}
  for name, (kind, options) in FILES.items():
    files[name] = folder / f'{name.replace(" ", "_")}.{kind}'
    lines[name] = student.export_student(
      checkpoint, files[name], kind=kind, uint8=True, argmax=True, **options
    )
    print('\n'.join(lines[name]), flush=True)
    # Places of this machine say nothing.
    lines[name] = [x.replace(f'{folder}/', '') for x in lines[name]]
    lines[name] = [x.replace(checkpoint, 'STAGE') for x in lines[name]]
  return files, lines


def calibrated_scores(path, images, source, info, folder):
  """Val mIoU of int8 files by calibrations that are not the default."""
  scores = {}
  for method in quantized.METHODS[1:]:
    ranges = quantized.find_ranges(path, images, method=method, folder=folder)
    int8 = folder / f'{method}.onnx'
    onnx.save(quantized.make_int8(onnx.load(path), ranges), int8)
    network = onnx_model.OnnxNetwork(int8)
    counts = quantized.count_pixels(network, source, info, text=method)
    scores[method] = metrics.mean_iou(counts)
  return scores


def score_stage(checkpoint, folder):
  """A stage's files by row, and all about it but their costs."""
  files, lines = export_stage(checkpoint, folder)
  network, variables, info = loading.load_network(checkpoint)
  network, variables = network.clone(dtype=None), jax.device_get(variables)
  source, short_side = agreement.split_source(info), info['eval']['short_side']
  small = jax.device_get(stablehlo.grow(stablehlo.shrink(variables, 'int8')))
  options = {'mesh': sharding.make_mesh(), 'short_side': short_side}
  options['num_classes'] = len(info['class_names'])
  counts = {
    'int8 weights': evaluation.evaluate(network, small, source, **options)
  }
  loaded = {x: onnx_model.OnnxNetwork(files[x]) for x in ('float32', 'int8')}
  for name, model in loaded.items():
    counts[name] = quantized.count_pixels(model, source, info, text=name)
  images, _ = quantized.calibration_images(None, info, short_side=short_side)
  forward = stablehlo.make_forward(network, uint8=True, argmax=True)
  exact, rounded = (
    [np.asarray(forward(x, image)) for image in images]
    for x in (variables, small)
  )
  same = {
    'float32': 1.0,
    'int8 weights': agreement.compare(exact, rounded)[2],
    'int8': quantized.pixel_agreement(*loaded.values(), images),
  }
  return files, {
    'network': info['student']['backbone'],
    'width_multiplier': info['student']['width_multiplier'],
    'from_imagenet': bool(info['student']['pretrained']),
    'num_epochs': info['num_epochs'],
    'val_miou_by_calibration': {
      quantized.METHODS[0]: metrics.mean_iou(counts['int8']),
      **calibrated_scores(files['float32'], images, source, info, folder),
    },
    'rows': {
      name: {
        'file': files[name].suffix[1:],
        'val_miou': metrics.mean_iou(counts[name]),
        'same_class': same[name],
        'val_iou_per_class': metrics.iou_per_class(counts[name]).tolist(),
        'mb': files[name].stat().st_size / 1e6,
        'lines': lines[name],
      }
      for name in FILES
    },
  }


def full_width_files(backbone, folder):
  """A float32 and an int8 file of a network with random weights."""
  network = DeepLabV3Plus(backbone=backbone, num_classes=11)
  image = np.zeros((1, *SIZES[0], 3), np.float32)
  variables = jax.jit(network.init, static_argnames='train')(
    jax.random.key(0), image, train=False
  )
  files = {x: folder / f'{x}.onnx' for x in ('float32', 'int8')}
  model = onnx_graph.make_model(
    network, jax.device_get(variables), uint8=True, argmax=True, metadata={}
  )
  onnx.save(model, files['float32'])
  images = np.random.default_rng(0).integers(
    0, 256, (2, 1, *SIZES[0], 3), dtype=np.uint8
  )
  ranges = quantized.find_ranges(
    files['float32'], images, method='minmax', folder=folder
  )
  onnx.save(quantized.make_int8(model, ranges), files['int8'])
  return files


def main():
  jax.config.update('jax_platforms', 'cpu')  # As the command.
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('checkpoints', nargs='+')
  output = FOLDER / 'results' / 'int8.json'
  parser.add_argument('--output', type=pathlib.Path, default=output)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:

    def folder(name):
      path = pathlib.Path(temporary, name)
      path.mkdir()
      return path

    stages = [
      score_stage(checkpoint, folder(f'{i}'))
      for i, checkpoint in enumerate(options.checkpoints)
    ]
    full_width = {x: full_width_files(x, folder(x)) for x in FULL_WIDTH}
    print('measuring costs', flush=True)
    for files, found in stages:
      for name, cost in find_costs(files).items():
        found['rows'][name]['costs'] = cost
    full_width = {
      name: {
        'mb': {x: path.stat().st_size / 1e6 for x, path in files.items()},
        'costs': find_costs(files, SIZES[1:]),
      }
      for name, files in full_width.items()
    }
  found = {
    'command': [pathlib.Path(arg).name for arg in sys.argv],
    'device': logs.device_name(),
    'cpu': quantized.dot_products(),
    'versions': logs.versions(),
    'stages': [found for _, found in stages],
    'full_width': full_width,
  }
  options.output.parent.mkdir(parents=True, exist_ok=True)
  options.output.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  if sys.argv[1:2] == ['--measure']:
    measure_file(pathlib.Path(sys.argv[2]), *map(int, sys.argv[3].split('x')))
  else:
    main()
