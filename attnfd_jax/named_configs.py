# SPDX-License-Identifier: Apache-2.0
"""The configs that come with the package, by name: `camvid`, `camvid:cpu`."""

import ast
import pathlib
import re

from attnfd_jax.errors import InputError, known

# The folder configs/ of the repository, by a link; a wheel has the files. A
# checkout without links has a text file there.
FOLDER = pathlib.Path(__file__).parent / 'configs'
if not FOLDER.is_dir():
  FOLDER = pathlib.Path(__file__).parents[1] / 'configs'


def names():
  return sorted(path.stem for path in FOLDER.glob('*.py'))


def path_of(name):
  """The file of a config; InputError with the nearest name if there is none."""
  known(
    'config', name, names(), others='; or the path of a file, as in mine.py'
  )
  return FOLDER / f'{name}.py'


def summaries():
  """{name: first line of its docstring} of all configs."""
  return {
    name: ast.get_docstring(ast.parse(path_of(name).read_text())).split('\n')[0]
    for name in names()
  }


def resolve(value):
  """A value of --config with the file in place of a bare name.

  'camvid' and 'camvid:cpu' are such names; paths stay as they are.
  """
  name, colon, variant = value.partition(':')
  if not re.fullmatch(r'\w+', name) or pathlib.Path(name).is_file():
    return value
  return f'{path_of(name)}{colon}{variant}'


def copy(name, target):
  """Copies a config to a new file, to be edited; returns its path."""
  source, target = path_of(name), pathlib.Path(target)
  if target.is_dir():
    target /= source.name
  if target.suffix != '.py':
    raise InputError(f'{target}: a config is a file of Python, as in mine.py.')
  try:
    with target.open('x') as file:
      file.write(source.read_text())
  except FileExistsError:
    raise InputError(f'{target} exists; it is left as it is.') from None
  return target
