# SPDX-License-Identifier: Apache-2.0
"""Loads objects of the user: 'file.py:Object' or 'package.module:Object'.

A config can name a network, a method or a teacher this way, and naming it
allows it to run. The file is copied to <stage>/code/<hash>/<name>.py, so that a
stage can be loaded after the original has changed or is gone. Code named by the
config in a run's folder runs only with --allow_code.
"""

from collections.abc import Iterator, Mapping
import contextlib
import functools
import hashlib
import importlib
import sys
import types
from typing import Any

from etils import epath

from attnfd_jax import paths
from attnfd_jax.errors import InputError
from attnfd_jax.types import Config


def is_code(spec: str) -> bool:
  """Whether `spec` names an object of the user, not a built-in one."""
  return ':' in spec


def _path_of(spec: str) -> epath.Path:
  return epath.Path(spec.rpartition(':')[0])


def _is_file(spec: str) -> bool:
  return _path_of(spec).suffix == '.py'


@contextlib.contextmanager
def convert_user_errors(what: str) -> Iterator[None]:
  """Turns any error of the user's code into an InputError."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    text = f'{type(error).__name__}: {error}; see where with --debug.'
    raise InputError(f'{what}: it raised {text}') from error


def load_object(spec: str, *, option: str, source: bytes | None = None) -> Any:
  """Imports the object that `spec` names.

  The same file content gives the same object, so that compiled programs are
  shared.

  Args:
    spec: 'file.py:Object' or 'package.module:Object'.
    option: name of the option, for messages.
    source: content of the file, where it was verified: the file itself may have
      changed since.

  Raises:
    InputError: if the object does not exist or its module raises.
  """
  given = f'{option}={spec!r}'
  where, _, name = spec.rpartition(':')
  if not where or not name.isidentifier():
    raise InputError(f"{given} must be 'file.py:Object' or 'module:Object'.")
  with convert_user_errors(given):
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
def _run(source: bytes, path: str) -> types.ModuleType:
  """Runs a module from its source, never from cached bytecode."""
  # A name for each content: dataclasses and pickle look modules up by name.
  name = f'{epath.Path(path).stem}_{_digest(source)[:8]}'
  module = sys.modules[name] = types.ModuleType(name)
  module.__file__ = path
  exec(compile(source, path, 'exec'), module.__dict__)
  return module


def _digest(source: bytes) -> str:
  return hashlib.sha256(source).hexdigest()


def specs(config: Config) -> list[str]:
  """All 'file.py:Object' and 'package.module:Object' values of a config."""
  groups = [config[name] for name in ('student', 'teacher', 'distill')]
  keys = ('network', 'factory', 'method')
  values = [group.get(key, '') for group in groups for key in keys]
  return [value for value in values if is_code(value)]


def store(
  directory: epath.Path,
  config: Config,
  stored: Mapping[str, str],
) -> dict[str, str]:
  """Copies the code files of a config into a stage's folder.

  Args:
    directory: folder of the stage.
    config: a config or its JSON.
    stored: {spec: sha256} of the files that earlier stages of the run used.

  Returns:
    {spec: sha256} of the files of this config.

  Raises:
    InputError: if a file differs from the stored one.
  """
  digests = {}
  for spec in filter(_is_file, specs(config)):
    path = _path_of(spec)
    source = path.read_bytes()
    digest = digests[spec] = _digest(source)
    if stored.get(spec, digest) != digest:
      remedy = 'restore the file, or use another --workdir.'
      raise InputError(f'{path} has changed since the run started; {remedy}')
    copy = _copy_of(spec, directory, digest)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with paths.replacing(copy) as file:
      file.write(source)
  return digests


def _copy_of(spec: str, directory: epath.Path, digest: str) -> epath.Path:
  return directory / 'code' / digest[:12] / _path_of(spec).name


def kept(
  directory: epath.Path,
  info: Mapping[str, Any],
  spec: str,
  *,
  allow_code: bool,
) -> tuple[str, bytes | None]:
  """The copy of a code file in a stage's folder, for `load_object`.

  Args:
    directory: folder of the stage.
    info: content of its config.json.
    spec: the original value of the config.
    allow_code: whether the user has allowed to run it.

  Returns:
    The spec of the copy and its verified content, None for installed modules.

  Raises:
    InputError: if code is not allowed, or the copy is not the recorded one.
  """
  if not allow_code:
    remedy = 'read the files in code/, and add --allow_code to run them.'
    raise InputError(f'{directory}: its config names code, {spec}: {remedy}')
  if not _is_file(spec):
    return spec, None
  digest = info.get('code', {}).get(spec, '')
  copy = _copy_of(spec, directory, digest)
  source = copy.read_bytes() if copy.is_file() else b''
  if _digest(source) != digest:
    text = 'missing, or not the file that was recorded; restore it.'
    raise InputError(f'{copy}: {text}')
  return f'{copy}:{spec.rpartition(":")[2]}', source
