# SPDX-License-Identifier: Apache-2.0
"""Measures the time from an image on the host to its class ids."""

import time
from typing import Any

import jax
import numpy as np

from attnfd_jax.benchmarks import train
from attnfd_jax.errors import InputError
from attnfd_jax.inference import predictor
from attnfd_jax.models import network as networks


def run(options: Any) -> dict[str, Any]:
  """Times single images, including the copies to the device and back.

  Args:
    options: flags of the command.

  Returns:
    The object that `--json` prints.

  Raises:
    InputError: if a flag is wrong.
  """
  if options.batch > 1:
    raise InputError(
      f'--batch={options.batch}: predict measures one image at a time; omit '
      '--batch.'
    )
  config = train.configure(options)
  student = networks.describe(config.student)
  num_classes, dtype = options.num_classes, config.optim.dtype
  network = networks.make_network(config.student, num_classes, dtype=dtype)
  shapes = networks.abstract_variables(network)
  variables = jax.device_put(train.random_variables(shapes, config.seed))
  height, width = size = tuple(config.data.crop_size)
  generator = np.random.default_rng(config.seed)
  image = generator.integers(0, 256, (1, *size, 3), np.uint8)
  times = []
  for _ in range(2 + options.steps):
    start = time.perf_counter()
    jax.device_get(predictor.classify(network, variables, image, size=size))
    times.append(time.perf_counter() - start)
  speed = train.speed(times, images=1)
  print(
    f'{student}, {height} x {width}: {speed["step_seconds"]:.4g} s per image, '
    f'{speed["images_per_second"]:.4g} images/s'
  )
  return {
    'student': student,
    'image_size': [height, width],
    'num_classes': num_classes,
    'dtype': dtype,
    'compile_seconds': times[0],
  } | speed
