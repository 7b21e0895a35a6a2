# SPDX-License-Identifier: Apache-2.0
"""Seconds from the bytes of an image to its class ids, as `predict` does it."""

import statistics
import time

import jax
import numpy as np

from attnfd_jax.benchmarks import train
from attnfd_jax.errors import InputError
from attnfd_jax.inference import predictor
from attnfd_jax.models import network as networks
from attnfd_jax.runs import logs


def run(options):
  """Prints what it measures; returns what `--json` prints.

  One image at a time, from the host and back, by a student of random weights.

  Args:
    options: flags config, student, height, width, num_classes, dtype, recipe
      and steps, and those of `train` that are not used here.

  Raises:
    InputError: whenever the user can mend it.
  """
  if options.batch > 1:
    raise InputError(f'--batch={options.batch}: predict takes one image.')
  config = train.configure(options)
  network = networks.make_network(
    config.student, options.num_classes, dtype=config.optim.dtype
  )
  variables = jax.device_put(train.random_variables(network, config.seed))
  height, width = config.data.crop_size
  image = np.random.default_rng(config.seed).integers(
    0, 256, (1, height, width, 3), np.uint8
  )
  times = []
  for _ in range(2 + options.steps):
    begun = time.perf_counter()
    found = predictor.classify(network, variables, image, size=(height, width))
    jax.device_get(found)
    times.append(time.perf_counter() - begun)
  seconds = statistics.median(times[2:])
  print(
    f'{networks.describe(config.student)}, {height} x {width}: {seconds:.4g} s '
    f'an image, {1 / seconds:.4g} images/s'
  )
  return {
    'student': networks.describe(config.student),
    'image_size': [height, width],
    'num_classes': options.num_classes,
    'dtype': config.optim.dtype,
    'step_seconds': seconds,
    'step_seconds_all': times[2:],
    'images_per_second': 1 / seconds,
    'compile_seconds': times[0],
    'device': logs.device_name(),
    'versions': logs.versions(),
  }
