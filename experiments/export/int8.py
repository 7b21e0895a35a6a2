# SPDX-License-Identifier: Apache-2.0
r"""Students in float32, with int8 weights, and in full int8, side by side.

  python experiments/export/int8.py runs/a/student runs/b/student \
    [--output=F.json]

Exports each stage to a float32 and an int8 ONNX file (all defaults, calibrated
on train) and to a StableHLO file with int8 weights. Reports the mIoU on val,
the fraction of pixels of the calibration images with the class of float32, the
size, and, in fresh processes that take turns, the time per image and the memory
that loading and running the file adds to a process. make_table.py writes it
into docs/deployment.md.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

FOLDER = pathlib.Path(__file__).parent
# Row -> (format, further options of export).
FILES = {
  'float32': ('onnx', {}),
  'int8 weights': ('stablehlo', {'weights': 'int8'}),
  'int8': ('onnx', {'quantize': 'int8'}),
}
SIZES = [(120, 160), (360, 480)]
ROUNDS = 3


def measure_file(kind, path, height, width):
  """Prints the cost of running a file on one image, as JSON."""
  import jax.export
  import numpy as np
  import onnxruntime

  from attnfd_jax.exporting import fresh_process

  del jax, onnxruntime  # Imported before the memory is read.
  image = np.random.default_rng(0).integers(
    0, 256, (1, height, width, 3), dtype=np.uint8
  )
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  run = fresh_process.LOADERS[kind](path)
  np.asarray(run(image))
  seconds = []
  for _ in range(11):
    start = time.perf_counter()
    np.asarray(run(image))
    seconds.append(time.perf_counter() - start)
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  cost = {'ms': 1e3 * np.median(seconds), 'memory_mb': (after - before) / 1e3}
  print(json.dumps(cost))


def find_costs(files):
  """The cost of each file, {row: {'HxW': cost}}; the files take turns."""
  costs = {name: {} for name in files}
  for h, w in SIZES:
    found = {name: [] for name in files}
    for _ in range(ROUNDS):
      for name, path in files.items():
        command = [sys.executable, __file__, '--measure', FILES[name][0]]
        command += [str(path), str(h), str(w)]
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


def compare_stage(checkpoint, folder):
  """The rows of one stage."""
  import jax
  import numpy as np

  from attnfd_jax import metrics
  from attnfd_jax.devices import sharding
  from attnfd_jax.exporting import agreement, quantized, stablehlo, student
  from attnfd_jax.inference import evaluation, onnx_model
  from attnfd_jax.runs import loading

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
  costs = find_costs(files)
  return {
    'network': info['student']['backbone'],
    'width_multiplier': info['student']['width_multiplier'],
    'from_imagenet': bool(info['student']['pretrained']),
    'num_epochs': info['num_epochs'],
    'rows': {
      name: {
        'file': files[name].suffix[1:],
        'val_miou': metrics.mean_iou(counts[name]),
        'same_class': same[name],
        'val_iou_per_class': metrics.iou_per_class(counts[name]).tolist(),
        'mb': files[name].stat().st_size / 1e6,
        'costs': costs[name],
        'lines': lines[name],
      }
      for name in FILES
    },
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('checkpoints', nargs='+')
  output = FOLDER / 'results' / 'int8.json'
  parser.add_argument('--output', type=pathlib.Path, default=output)
  options = parser.parse_args()

  import jax

  from attnfd_jax.exporting import quantized
  from attnfd_jax.runs import logs

  jax.config.update('jax_platforms', 'cpu')  # As the command.
  rows = []
  for checkpoint in options.checkpoints:
    with tempfile.TemporaryDirectory() as folder:
      rows.append(compare_stage(checkpoint, pathlib.Path(folder)))
  found = {
    'command': [pathlib.Path(arg).name for arg in sys.argv],
    'device': logs.device_name(),
    'cpu': quantized.dot_products(),
    'versions': logs.versions(),
    'stages': rows,
  }
  options.output.parent.mkdir(parents=True, exist_ok=True)
  options.output.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  if sys.argv[1:2] == ['--measure']:
    kind, path, height, width = sys.argv[2:]
    measure_file(kind, path, int(height), int(width))
  else:
    main()
