# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix, and checks of single values."""

from collections.abc import Collection, Iterator
import contextlib
import difflib
import math


class InputError(ValueError):
  """Bad input: its message is one line, what is wrong and what to do."""


class DataError(InputError):
  """A file, folder or list of a data set is wrong.

  Attributes:
    kind: 'partner' (an image without mask or a mask without image),
      'unreadable' (truncated, empty, not an image), 'size' (image and mask
      differ), 'mode' (colors where ids are expected), 'depth' (not 8 bits),
      'values' (ids or colors that are not a class), 'lossy' (a JPEG mask),
      'exif' (rotated by its orientation tag), 'split' (missing or empty),
      'annotation' (JSON and tables of classes), 'classes' (a split with
      fewer than two) or 'leak' (an unlabeled image that is in val or test).
    file: the file at fault, 'path' or 'archive!member'.
    values: for kind 'values', {id or 'r,g,b': number of pixels}.
  """

  # With defaults, because worker processes pickle errors by their message.
  def __init__(
    self,
    message: str,
    kind: str = '',
    file: object = '',
    values: dict | None = None,
  ):
    super().__init__(message)
    self.kind, self.file, self.values = kind, str(file), values


def check_range(
  name: str, value: object, least: float, most: float = math.inf
) -> None:
  """Raises InputError unless least <= value <= most; NaN is never within."""
  if not isinstance(value, (int, float)) or not least <= value <= most:
    limits = f'from {least:g} to {most:g}'
    if most == math.inf:
      limits = f'{least:g} or more'
    raise InputError(f'{name}={value} must be {limits}.')


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
  """Raises InputError unless `value` is one of the choices."""
  if value not in choices:
    raise InputError(f'{name}={value!r} must be one of {", ".join(choices)}.')


def check_name(
  what: str, name: str, names: Collection[str], *, others: str = ''
) -> None:
  """Raises InputError with the closest of `names` unless `name` is one."""
  if name not in names:
    close = difflib.get_close_matches(name, names, 1)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    choices = ', '.join(names) + others
    raise InputError(f'Unknown {what} {name!r}.{hint} Have: {choices}.')


def first_line(error: BaseException) -> str:
  """The first line of a message, after the type unless it is a ValueError."""
  kind = '' if isinstance(error, ValueError) else f'{type(error).__name__} '
  # Errors of zipfile may quote the whole archive.
  return (kind + next(iter(str(error).splitlines()), '')[:1000]).strip()


@contextlib.contextmanager
def named(group: str) -> Iterator[None]:
  """Prefixes the message of an InputError with '<group>.'."""
  try:
    yield
  except InputError as error:
    raise InputError(f'{group}.{error}') from error


@contextlib.contextmanager
def convert_errors(what: str) -> Iterator[None]:
  """Turns any error into InputError('<what>: <its first line>')."""
  try:
    yield
  except Exception as error:
    raise InputError(f'{what}: {first_line(error)}') from error
