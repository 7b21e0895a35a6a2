# SPDX-License-Identifier: Apache-2.0
"""The errors that a user can fix, and checks of single values."""

import contextlib
import difflib
import math


class InputError(ValueError):
  """Bad input: one line that says what is wrong and what to do."""


class DataError(InputError):
  """One file, folder or list of a data set is wrong.

  Attributes:
    kind: 'partner' (an image without mask or a mask without image),
      'unreadable' (truncated, empty, no image), 'size' (of image and mask
      differ), 'mode' (colours where ids are expected), 'depth' (not 8 bits),
      'values' (ids or colours that are no class), 'lossy' (a JPEG mask),
      'exif' (rotated by its orientation tag), 'split' (absent or empty),
      'annotation' (JSON and tables of classes) or 'classes' (a split with
      fewer than two).
    file: what is wrong, 'path' or 'archive!member'.
    values: {id or 'r,g,b': pixels} of kind 'values', else None.
  """

  # With defaults: worker processes pickle errors by their message alone.
  def __init__(self, message, kind='', file='', values=None):
    super().__init__(message)
    self.kind, self.file, self.values = kind, str(file), values


def within(name, value, least, most=math.inf):
  """Raises InputError unless least <= value <= most; NaN is in no range."""
  if not isinstance(value, (int, float)) or not least <= value <= most:
    limits = f'from {least:g} to {most:g}'
    if most == math.inf:
      limits = f'{least:g} or more'
    raise InputError(f'{name}={value} must be {limits}.')


def one_of(name, value, choices):
  """Raises InputError unless `value` is one of the choices."""
  if value not in choices:
    raise InputError(f'{name}={value!r} must be one of {", ".join(choices)}.')


def known(what, name, names, *, others=''):
  """Raises InputError with the nearest of `names` unless `name` is one."""
  if name not in names:
    near = difflib.get_close_matches(name, names, 1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    have = ', '.join(names) + others
    raise InputError(f'Unknown {what} {name!r}.{hint} Have: {have}.')


def first_line(error):
  """First line (JAX adds more), after the type unless it is a ValueError."""
  kind = '' if isinstance(error, ValueError) else f'{type(error).__name__} '
  # zipfile's may hold the whole archive.
  return (kind + next(iter(str(error).splitlines()), '')[:1000]).strip()


@contextlib.contextmanager
def named(group):
  """Adds '<group>.' to what an InputError says."""
  try:
    yield
  except InputError as error:
    raise InputError(f'{group}.{error}') from error


@contextlib.contextmanager
def explained(what):
  """Whatever the user's code raises becomes InputError('<what>: <line>')."""
  try:
    yield
  except Exception as error:
    raise InputError(f'{what}: {first_line(error)}') from error
