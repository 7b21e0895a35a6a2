# SPDX-License-Identifier: Apache-2.0
"""Objects of the user's own: 'file.py:Object' or 'package.module:Object'.

A config names a network, a method or a teacher so. That Python runs then is the
user's choice. Files are kept in <stage>/code/<hash>/<name>.py, so that a stage
can be loaded where the original is gone or has changed; what a run's folder
names runs only with --allow_code.
"""

import contextlib
import functools
import hashlib
import importlib
import sys
import types

from etils import epath

from attnfd_jax import paths
from attnfd_jax.errors import InputError


def is_code(spec):
  """Whether `spec` names an object of Python, rather than one of ours."""
  return ':' in spec


def _path_of(spec):
  return epath.Path(spec.rpartition(':')[0])


def _is_file(spec):
  return _path_of(spec).suffix == '.py'


@contextlib.contextmanager
def explained(what):
  """Makes an InputError of whatever the user's code raises."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    text = f'{type(error).__name__}: {error}; see where with --debug.'
    raise InputError(f'{what}: it raised {text}') from error


def load_object(spec, *, option, source=None):
  """The object that `spec` names, the value of `option` in messages.

  `source` are the bytes of its file, where they have been checked: what is read
  again may be another file. The same bytes give the same object, so that
  compiled programs are shared. InputError if there is none, or its code raises.
  """
  given = f'{option}={spec!r}'
  where, _, name = spec.rpartition(':')
  if not where or not name.isidentifier():
    raise InputError(f"{given} must be 'file.py:Object' or 'module:Object'.")
  with explained(given):
    if not _is_file(spec):
      module = importlib.import_module(where)
    elif source is None and not _path_of(spec).is_file():
      raise InputError(f'{given}: there is no file {where}.')
    else:
      source = _path_of(spec).read_bytes() if source is None else source
      module = _run(source, where)
  if not hasattr(module, name):
    raise InputError(f'{given}: {where} has no {name}.')
  return getattr(module, name)


@functools.cache
def _run(source, path):
  """The module of a file's bytes; no bytecode beside it takes their place."""
  # One name for each content: dataclasses and pickle look modules up by name.
  name = f'{epath.Path(path).stem}_{_digest(source)[:8]}'
  module = sys.modules[name] = types.ModuleType(name)
  module.__file__ = path
  exec(compile(source, path, 'exec'), module.__dict__)
  return module


def _digest(source):
  return hashlib.sha256(source).hexdigest()


def specs(config):
  """Each 'file.py:Object' or 'package.module:Object' of a config."""
  groups = [config[name] for name in ('student', 'teacher', 'distill')]
  keys = ('network', 'factory', 'method')
  named = [group.get(key, '') for group in groups for key in keys]
  return [spec for spec in named if is_code(spec)]


def store(directory, config, stored):
  """{spec: sha256} of the files of `config`, copied into a stage's folder.

  InputError if one differs from `stored`, what the run's stages have recorded.
  """
  digests = {}
  for spec in filter(_is_file, specs(config)):
    path = _path_of(spec)
    source = path.read_bytes()
    digest = digests[spec] = _digest(source)
    if stored.get(spec, digest) != digest:
      remedy = 'put the old file back, or use another --workdir.'
      raise InputError(f'{path} has changed since the run was begun; {remedy}')
    copy = _copy_of(spec, directory, digest)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with paths.replacing(copy) as file:
      file.write(source)
  return digests


def _copy_of(spec, directory, digest):
  return directory / 'code' / digest[:12] / _path_of(spec).name


def kept(directory, info, spec, *, allow_code):
  """For `load_object`: the copy that a stage keeps of `spec`, and its bytes.

  `info` is the stage's config.json. InputError if the code may not be run, or
  is not what `store` recorded.
  """
  if not allow_code:
    remedy = 'read what is below code/, and add --allow_code to run it.'
    raise InputError(f'{directory}: its config names code, {spec}: {remedy}')
  if not _is_file(spec):
    return spec, None
  digest = info.get('code', {}).get(spec, '')
  copy = _copy_of(spec, directory, digest)
  source = copy.read_bytes() if copy.is_file() else b''
  if _digest(source) != digest:
    text = 'absent, or not the file that was recorded; put a copy back.'
    raise InputError(f'{copy}: {text}')
  return f'{copy}:{spec.rpartition(":")[2]}', source
