# SPDX-License-Identifier: Apache-2.0
"""The configs of the package, by name: `camvid`, `camvid:cpu`."""

import ast
import pathlib
import re

from attnfd_jax.errors import check_name, InputError
from attnfd_jax.types import StrPath

# A symbolic link to the configs/ of the repository; in a wheel, the files.
# Where git cannot create links, a text file is in its place.
FOLDER = pathlib.Path(__file__).parent / 'configs'
if not FOLDER.is_dir():
  FOLDER = pathlib.Path(__file__).parents[1] / 'configs'


def names() -> list[str]:
  """Names of all configs, sorted."""
  return sorted(path.stem for path in FOLDER.glob('*.py'))


def path_of(name: str) -> pathlib.Path:
  """The file of a config; InputError with the closest name if none matches."""
  check_name(
    'config', name, names(), others='; or the path of a file, as in mine.py'
  )
  return FOLDER / f'{name}.py'


def summaries() -> dict[str, str]:
  """The first line of the docstring of each config, by name."""
  texts = {name: path_of(name).read_text() for name in names()}
  docstrings = {x: ast.get_docstring(ast.parse(y)) for x, y in texts.items()}
  return {x: (y or '').partition('\n')[0] for x, y in docstrings.items()}


def resolve(value: str) -> str:
  """Replaces a bare name in a value of --config by the config's file.

  'camvid' and 'camvid:cpu' are bare names; paths are returned unchanged.
  """
  name, colon, variant = value.partition(':')
  if not re.fullmatch(r'\w+', name) or pathlib.Path(name).is_file():
    return value
  return f'{path_of(name)}{colon}{variant}'


def copy(name: str, target: StrPath) -> pathlib.Path:
  """Copies a config to a new file for editing and returns its path."""
  source, target = path_of(name), pathlib.Path(target)
  if target.is_dir():
    target /= source.name
  if target.suffix != '.py':
    raise InputError(f'{target}: a config is a Python file, as in mine.py.')
  try:
    with target.open('x') as file:
      file.write(source.read_text())
  except FileExistsError:
    raise InputError(f'{target} already exists; choose another name.') from None
  return target
