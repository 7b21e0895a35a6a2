# SPDX-License-Identifier: Apache-2.0
"""Objects of the user's own: 'file.py:Object' or 'package.module:Object'.

A config names a network, a method or a teacher so. That Python runs then is the
user's choice; what a run's folder names runs only with --allow_code.
"""

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
  return is_code(spec) and spec.rpartition(':')[0].endswith('.py')


def path_of(spec):
  """The file of 'file.py:Object'."""
  return epath.Path(spec.rpartition(':')[0])


def sha256(path):
  """Hex digest of a file's bytes."""
  return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()


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
  where, _, name = spec.rpartition(':')
  if not where or not name.isidentifier():
    raise InputError(
      f"{option}={spec!r} must be 'file.py:Object' or 'package.module:Object'."
    )
  if is_file(spec) and not path_of(spec).is_file():
    raise InputError(f'{option}={spec!r}: there is no file {where}.')
  try:
    if is_file(spec):
      module = _run(path_of(spec).read_bytes(), where)
    else:
      module = importlib.import_module(where)
  except InputError:
    raise
  except Exception as error:  # Whatever the user's code raises.
    raise InputError(
      f'{option}={spec!r}: it raised {type(error).__name__}: {error}; see '
      'where with --debug.'
    ) from error
  if not hasattr(module, name):
    raise InputError(f'{option}={spec!r}: {where} has no {name}.')
  return getattr(module, name)


@functools.cache
def _run(source, path):
  """The module of a file's bytes, which are what was hashed: no cached bytecode
  beside the file can take their place.
  """
  # One name for each content: dataclasses and pickle look modules up by name.
  digest = hashlib.sha256(source).hexdigest()
  module = types.ModuleType(f'{pathlib.PurePath(path).stem}_{digest[:8]}')
  module.__file__ = path
  sys.modules[module.__name__] = module
  try:
    exec(compile(source, path, 'exec'), module.__dict__)
  except BaseException:
    del sys.modules[module.__name__]
    raise
  return module
