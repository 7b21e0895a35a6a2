# SPDX-License-Identifier: Apache-2.0
"""Objects of the user's own: 'file.py:Object' or 'package.module:Object'.

A config names a network, a method or a teacher so. That Python runs then is the
user's choice; what a run's folder names runs only with --allow_code.
"""

import contextlib
import functools
import hashlib
import importlib
import pathlib
import sys
import types

from etils import epath

from attnfd_jax.errors import InputError


def is_code(spec):
  """Whether `spec` names an object of Python, rather than one of ours."""
  return ':' in spec


def is_file(spec):
  """Whether `spec` names an object in a file, rather than in a package."""
  return is_code(spec) and path_of(spec).suffix == '.py'


def path_of(spec):
  """The file of 'file.py:Object'."""
  return epath.Path(spec.rpartition(':')[0])


@contextlib.contextmanager
def explained(what):
  """Makes an InputError of whatever the user's code raises."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    raise InputError(
      f'{what}: it raised {type(error).__name__}: {error}; see where with '
      '--debug.'
    ) from error


def load_object(spec, *, option):
  """The object that `spec` names.

  Two calls with the same file give the same object, so that compiled programs
  are shared.

  Args:
    spec: 'file.py:Object' or 'package.module:Object'.
    option: what the user set to it, for messages.

  Raises:
    InputError: if there is no such file or object, or its code raises.
  """
  given = f'{option}={spec!r}'
  where, _, name = spec.rpartition(':')
  if not where or not name.isidentifier():
    raise InputError(
      f"{given} must be 'file.py:Object' or 'package.module:Object'."
    )
  if is_file(spec) and not path_of(spec).is_file():
    raise InputError(f'{given}: there is no file {where}.')
  with explained(given):
    if is_file(spec):
      module = _run(path_of(spec).read_bytes(), where)
    else:
      module = importlib.import_module(where)
  if not hasattr(module, name):
    raise InputError(f'{given}: {where} has no {name}.')
  return getattr(module, name)


@functools.cache
def _run(source, path):
  """The module of a file's bytes, which are what was hashed: no cached bytecode
  beside the file can take their place.
  """
  # One name for each content: dataclasses and pickle look modules up by name.
  digest = hashlib.sha256(source).hexdigest()
  name = f'{pathlib.PurePath(path).stem}_{digest[:8]}'
  module = sys.modules[name] = types.ModuleType(name)
  module.__file__ = path
  try:
    exec(compile(source, path, 'exec'), module.__dict__)
  except BaseException:
    del sys.modules[name]
    raise
  return module
