# SPDX-License-Identifier: Apache-2.0
"""What tests tell XLA, as they compile more than they compute."""

import importlib.metadata

from packaging.version import Version


def quick(devices=1):
  """XLA_FLAGS for that many CPU devices and half the time of a compilation."""
  flags = [
    f'--xla_force_host_platform_device_count={devices}',
    '--xla_backend_optimization_level=0',  # Of LLVM.
  ]
  # XLA refuses flags that it does not know.
  if Version(importlib.metadata.version('jax')) < Version('0.11'):
    flags.append('--xla_cpu_use_fusion_emitters=false')  # Kernels without MLIR.
  return ' '.join(flags)
