# SPDX-License-Identifier: Apache-2.0
"""Finds problems of a machine and their remedies, which `doctor` prints."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax import paths
from attnfd_jax.errors import first_line, InputError
from attnfd_jax.types import StrPath

_LEAST_FREE = 2e9  # Bytes; three checkpoints of the largest network are 2 GB.
_PAGES = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
# Packages that provide a backend: (pattern, extra of jax, device).
_PLUGINS = (('jax.cuda', 'cuda', 'NVIDIA GPU'), ('libtpu', 'tpu', 'TPU'))


class Finding(NamedTuple):
  """One line of the report; a problem if it has a remedy."""

  text: str
  remedy: str = ''


def _numbers(version: str) -> tuple[int, ...]:
  """Numbers in a version: (0, 12, 4, 1) for '0.12.4.dev1'."""
  return tuple(map(int, re.findall(r'\d+', version)))


def check_versions(
  requirements: Iterable[str], find_version: Callable[[str], str]
) -> Iterator[Finding]:
  """Checks the versions of installed packages.

  Args:
    requirements: such as 'orbax-checkpoint>=0.12,<1'.
    find_version: importlib.metadata.version, or a function like it.
  """
  for line in sorted(requirements):
    if ';' in line:
      continue  # Belongs to an extra.
    name = re.split(r'[^\w.-]', line)[0]
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
    if name == 'jax':  # Else pip would not update the plugin of the device.
      remedy += (
        ', with jax[cuda13] or jax[tpu] in place of jax for a GPU or TPU'
      )
    yield Finding(text, remedy if broken else '')


def _requirements() -> list[str]:
  """Requirements of the installed package, else those of pyproject.toml."""
  try:
    return importlib.metadata.requires('attnfd_jax') or []
  except importlib.metadata.PackageNotFoundError:
    path = pathlib.Path(__file__).parents[2] / 'pyproject.toml'
    text = path.read_text() if path.is_file() else '[project]'
    return tomllib.loads(text)['project'].get('dependencies', [])


def _has_nvidia_gpu() -> bool:
  """Whether the driver lists a GPU; does not use JAX."""
  command = ['nvidia-smi', '-L']
  try:
    done = subprocess.run(command, capture_output=True, timeout=20, check=True)
  except (OSError, subprocess.SubprocessError):
    return False
  return b'GPU' in done.stdout


def check_backend(
  backend: str, *, platforms: str, installed: Collection[str], has_gpu: bool
) -> Finding:
  """Checks whether JAX uses the accelerator of the machine.

  Args:
    backend: the backend that JAX chose.
    platforms: value of JAX_PLATFORMS.
    installed: names of all installed packages.
    has_gpu: whether the machine has an NVIDIA GPU.
  """
  if backend != 'cpu':
    return Finding(f'backend {backend}')
  if platforms:
    return Finding(f'backend cpu, as set by JAX_PLATFORMS={platforms}')
  for pattern, extra, kind in _PLUGINS:
    if any(re.match(pattern, name, re.IGNORECASE) for name in installed):
      return Finding(
        f'backend cpu, although support for {kind} is installed',
        'jax and its plugin must have the same version: pip install -U '
        f"'jax[{extra}]'; if that does not help, python -c 'import jax; "
        "jax.devices()' shows the reason",
      )
  if not has_gpu:
    return Finding('backend cpu: no GPU or TPU and no plugin for one')
  text = 'backend cpu, although there is an NVIDIA GPU'
  return Finding(text, "pip install -U 'jax[cuda13]'")


def check_pages(mode: str, tunables: str, *, libc: tuple[str, str]) -> Finding:
  """Checks whether memory is in huge pages, which are faster on a CPU.

  Args:
    mode: content of Linux's transparent_hugepage/enabled.
    tunables: value of GLIBC_TUNABLES.
    libc: name and version of the C library.
  """
  library, version = libc
  tunable = library == 'glibc' and _numbers(version) >= (2, 35)
  tunable = tunable and '[madvise]' in mode
  tuned = tunable and re.search(r'glibc\.malloc\.hugetlb=[1-9]', tunables)
  if '[always]' in mode or tuned:
    return Finding('memory in huge pages')
  hint = 'glibc.malloc.hugetlb=1 makes steps on a CPU a tenth faster'
  hint = f'; GLIBC_TUNABLES={hint} (docs/speed.md)' if tunable else ''
  return Finding(f'memory in small pages{hint}')


def check_memory(backend: str, environment: Mapping[str, str]) -> Finding:
  """Reports how much GPU memory JAX allocates in advance."""
  if backend != 'gpu':
    return Finding(f'memory preallocation: none on {backend}')
  variable = 'XLA_PYTHON_CLIENT_PREALLOCATE'
  if environment.get(variable, '').lower() == 'false':
    return Finding('memory preallocation off: grows as needed')
  share = float(environment.get('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.75'))
  text = f'memory preallocation: {share:.0%} of each GPU, not a leak'
  return Finding(f'{text}; {variable}=false turns it off')


def check_folder(
  folder: StrPath, what: str, option: str, *, least_free: float = _LEAST_FREE
) -> Finding:
  """Checks whether a folder is writable and has space.

  Args:
    folder: may not exist yet.
    what: what the folder is, for the message.
    option: the flag or variable that names it.
    least_free: number of bytes that must be free.
  """
  folder = pathlib.Path(folder).absolute()
  existing = next(x for x in (folder, *folder.parents) if x.exists())
  other = f'or name another by {option}'
  try:
    paths.check_writable(existing)
  except OSError as error:
    text = f'{what} {folder} cannot be written ({error.strerror})'
    return Finding(text, f'make it writable, {other}')
  free = shutil.disk_usage(existing).free
  text = f'{what} {folder}: writable, {free / 1e9:.1f} GB free'
  return Finding(text, f'make room, {other}' if free < least_free else '')


def require_writable(folder: StrPath, option: str) -> None:
  """Raises InputError unless `folder`, which may not exist yet, is writable."""
  finding = check_folder(folder, 'folder', option, least_free=0)
  if finding.remedy:
    raise InputError(f'{"; ".join(finding)}.')


@jax.jit
@functools.partial(jax.value_and_grad, argnums=1)
def convolve(image: jax.Array, kernel: jax.Array) -> jax.Array:
  """Mean square of a dilated convolution, and its gradient by the kernel."""
  layout = ('NHWC', 'HWIO', 'NHWC')
  out = jax.lax.conv_general_dilated(
    image, kernel, (1, 1), 'SAME', None, (2, 2), layout
  )
  return jnp.mean(jnp.square(out))


def check_device(
  device: Any, convolve: Callable[..., Any] = convolve
) -> Finding:
  """Checks and times a convolution on a jax.Device, forward and backward."""
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
    remedy = 'check the driver, and that jax, jaxlib and the plugin have the'
    remedy += ' same version and that no other program fills the device'
    return Finding(text, remedy)
  # All inputs are 1. In each direction a pixel sees 3 taps of the kernel; the 2
  # pixels next to either border see 2.
  taps = np.concatenate([np.full(28, 3.0), np.full(4, 2.0)])
  expected = np.mean(np.square(16 * taps)) * np.mean(np.square(taps))
  # The value is quadratic in the kernel, so its gradient sums to twice as much.
  if not np.allclose([value, np.sum(gradient) / 2], expected, rtol=0.02):
    return Finding(
      f'{name}: a convolution gives {float(value):.6g}, not {expected:.6g}',
      'update the driver, jaxlib and the plugin; do not train on this device',
    )
  return Finding(f'{name}: convolution and gradient in {1e3 * seconds:.2f} ms')


def check_start() -> Finding | None:
  """Checks whether JAX starts; None if it does."""
  platforms = os.environ.get('JAX_PLATFORMS', '')
  try:
    jax.local_devices()
  except Exception as error:  # RuntimeError, or an AssertionError in JAX.
    use = 'unset JAX_PLATFORMS to use what there is'
    return Finding(
      f'no backend starts with JAX_PLATFORMS={platforms!r} '
      f'({first_line(error)})',
      f'{use if platforms else "set JAX_PLATFORMS=cpu to use the CPU"}, or '
      "install the plugin of the device: pip install -U 'jax[cuda13]' or "
      "'jax[tpu]'",
    )
  return None


def find_all(workdir: StrPath) -> Iterator[Finding]:
  """Yields all findings; stops early if JAX does not start."""
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
  cache = jax.config.values['jax_compilation_cache_dir']
  yield check_folder(cache, 'compiled programs', 'JAX_COMPILATION_CACHE_DIR')
