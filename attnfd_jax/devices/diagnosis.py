# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a machine, and the remedy: what `doctor` prints."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import subprocess
import time
import tomllib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax import paths
from attnfd_jax.errors import first_line, InputError

_LEAST_FREE = 2e9  # Bytes; three checkpoints of the largest network are 2 GB.
_PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
# Packages that bring a backend: (pattern, extra of jax, device).
_PLUGINS = (('jax.cuda', 'cuda', 'NVIDIA GPU'), ('libtpu', 'tpu', 'TPU'))


class Finding(NamedTuple):
  """One line; with a remedy it is a problem."""

  text: str
  remedy: str = ''


def _numbers(version):
  """(0, 12, 4, 1) of '0.12.4.dev1'."""
  return tuple(map(int, re.findall(r'\d+', version)))


def check_versions(requirements, find_version):
  """Findings about packages, by bounds such as 'orbax-checkpoint>=0.12,<1'."""
  for line in sorted(requirements):
    if ';' in line:
      continue  # Of an extra.
    name = re.match(r'[\w.-]+', line)[0]
    try:
      version = find_version(name)
      broken = ','.join(
        f'{sign}{bound}'
        for sign, bound in re.findall(r'(>=|<)\s*([\w.]+)', line)
        if (_numbers(version) >= _numbers(bound)) != (sign == '>=')
      )
      text = f'{name} {version}'
      if broken:
        text += f', but {broken} is needed'
    except importlib.metadata.PackageNotFoundError:
      text = broken = f'{name} is not installed'
    remedy = f"pip install -U '{line}'"
    if name == 'jax':  # Without it pip leaves jax and its plugin apart.
      remedy += ', with jax[cuda13] or jax[tpu] for jax on such a device'
    yield Finding(text, remedy if broken else '')


def _requirements():
  """Of the installed package, or of pyproject.toml beside it."""
  try:
    return importlib.metadata.requires('attnfd_jax') or []
  except importlib.metadata.PackageNotFoundError:
    path = pathlib.Path(__file__).parents[2] / 'pyproject.toml'
    text = path.read_text() if path.is_file() else '[project]'
    return tomllib.loads(text)['project'].get('dependencies', [])


def _has_nvidia_gpu():
  """What the driver lists, without jax."""
  command = ['nvidia-smi', '-L']
  try:
    done = subprocess.run(command, capture_output=True, timeout=20, check=True)
  except (OSError, subprocess.SubprocessError):
    return False
  return b'GPU' in done.stdout


def check_backend(backend, *, platforms, installed, has_gpu):
  """A Finding about what jax chose; `platforms` is JAX_PLATFORMS."""
  if backend != 'cpu':
    return Finding(f'backend {backend}')
  if platforms:
    return Finding(f'backend cpu, as JAX_PLATFORMS={platforms} asks for')
  for pattern, extra, kind in _PLUGINS:
    if any(re.match(pattern, name, re.IGNORECASE) for name in installed):
      return Finding(
        f'backend cpu, although support for {kind} is installed',
        'versions of jax and its plugin must be the same: pip install -U '
        f"'jax[{extra}]', then python -c 'import jax; jax.devices()' says more",
      )
  if not has_gpu:
    return Finding('backend cpu: no GPU or TPU and no plugin for one')
  text = 'backend cpu, although there is an NVIDIA GPU'
  return Finding(text, "pip install -U 'jax[cuda13]'")


def check_pages(mode, tunables, *, libc):
  """A Finding about the pages of a CPU's memory; `mode` is Linux' text."""
  library, version = libc
  tunable = library == 'glibc' and _numbers(version) >= (2, 35)
  tunable = tunable and '[madvise]' in mode
  tuned = tunable and re.search(r'glibc\.malloc\.hugetlb=[1-9]', tunables)
  if '[always]' in mode or tuned:
    return Finding('memory in huge pages')
  hint = 'glibc.malloc.hugetlb=1 makes steps on a CPU a tenth faster'
  hint = f'; GLIBC_TUNABLES={hint} (docs/speed.md)' if tunable else ''
  return Finding(f'memory in small pages{hint}')


def check_memory(backend, environment):
  """A Finding about what jax takes of a device's memory."""
  if backend != 'gpu':
    return Finding(f'memory preallocation: none on {backend}')
  variable = 'XLA_PYTHON_CLIENT_PREALLOCATE'
  if environment.get(variable, '').lower() == 'false':
    return Finding('memory preallocation off: grows as needed')
  share = float(environment.get('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.75'))
  text = f'memory preallocation: {share:.0%} of each GPU, which is no leak'
  return Finding(f'{text}; {variable}=false turns it off')


def check_folder(folder, what, option, *, least_free=_LEAST_FREE):
  """A Finding: whether `folder` can be written and has so many bytes free."""
  folder = pathlib.Path(folder).absolute()
  there = next(x for x in (folder, *folder.parents) if x.exists())
  other = f'or name another by {option}'
  try:
    paths.check_writable(there)
  except OSError as error:
    text = f'{what} {folder} cannot be written ({error.strerror})'
    return Finding(text, f'make it writable, {other}')
  free = shutil.disk_usage(there).free
  text = f'{what} {folder}: writable, {free / 1e9:.1f} GB free'
  return Finding(text, f'make room, {other}' if free < least_free else '')


def require_writable(folder, option):
  """Raises InputError unless `folder`, which need not be there, is writable."""
  finding = check_folder(folder, 'folder', option, least_free=0)
  if finding.remedy:
    raise InputError(f'{"; ".join(finding)}.')


@jax.jit
@functools.partial(jax.value_and_grad, argnums=1)
def convolve(image, kernel):
  """Mean square of a dilated convolution, and its gradient by the kernel."""
  layout = ('NHWC', 'HWIO', 'NHWC')
  out = jax.lax.conv_general_dilated(
    image, kernel, (1, 1), 'SAME', None, (2, 2), layout
  )
  return jnp.mean(jnp.square(out))


def check_device(device, convolve=convolve):
  """A Finding: one convolution of ones, forward and backward, with its time."""
  name = f'{device.platform}:{device.id} {device.device_kind}'
  try:
    with jax.default_device(device):
      ones = jnp.ones((2, 32, 32, 16)), jnp.ones((3, 3, 16, 16))
      jax.block_until_ready(convolve(*ones))
      start = time.perf_counter()
      value, gradient = jax.device_get(convolve(*ones))
      seconds = time.perf_counter() - start
  except Exception as error:  # Whatever a driver may raise.
    text = f'{name}: a convolution fails ({first_line(error)})'
    remedy = 'check the driver, that jax, jaxlib and plugin are of one version'
    return Finding(text, f'{remedy}, and what else is on the device')
  # Rows see 3 taps, the 2 at either border only 2; columns alike.
  taps = np.concatenate([np.full(28, 3.0), np.full(4, 2.0)])
  expected = np.mean(np.square(16 * taps)) * np.mean(np.square(taps))
  # The gradient sums to twice the value: it is quadratic in a kernel of ones.
  if not np.allclose([value, np.sum(gradient) / 2], expected, rtol=0.02):
    return Finding(
      f'{name}: a convolution gives {float(value):.6g}, not {expected:.6g}',
      'update the driver, jaxlib and the plugin; do not train on this device',
    )
  return Finding(f'{name}: convolution and gradient in {1e3 * seconds:.2f} ms')


def check_start():
  """A Finding with a remedy if JAX starts on no device, else None."""
  platforms = os.environ.get('JAX_PLATFORMS', '')
  try:
    jax.local_devices()
  except Exception as error:  # RuntimeError, or jax's own AssertionError.
    use = 'unset JAX_PLATFORMS to use what there is'
    return Finding(
      f'no backend starts with JAX_PLATFORMS={platforms!r} '
      f'({first_line(error)})',
      f'{use if platforms else "set JAX_PLATFORMS=cpu to use the CPU"}, or '
      "install the plugin of the device: pip install -U 'jax[cuda13]' or "
      "'jax[tpu]'",
    )
  return None


def find_all(workdir):
  """All findings, in the order in which they are worth reading."""
  yield Finding(f'python {platform.python_version()}, {platform.platform()}')
  yield from check_versions(_requirements(), importlib.metadata.version)
  if problem := check_start():
    yield problem
    return
  platforms = os.environ.get('JAX_PLATFORMS', '')
  backend = jax.default_backend()
  names = [x.metadata['Name'] or '' for x in importlib.metadata.distributions()]
  has_gpu = backend == 'cpu' and _has_nvidia_gpu()
  yield check_backend(
    backend, platforms=platforms, installed=names, has_gpu=has_gpu
  )
  yield check_memory(backend, os.environ)
  if backend == 'cpu':
    mode = _PAGES.read_text() if _PAGES.is_file() else ''
    tunables = os.environ.get('GLIBC_TUNABLES', '')
    yield check_pages(mode, tunables, libc=platform.libc_ver())
  for device in jax.local_devices():
    yield check_device(device)
  yield check_folder(workdir, 'workdir', '--workdir')
  cache = jax.config.jax_compilation_cache_dir
  yield check_folder(cache, 'compiled programs', 'JAX_COMPILATION_CACHE_DIR')
