# SPDX-License-Identifier: Apache-2.0
"""Python files of the user's, kept in the run that used them.

They lie in <stage>/code/<hash>/<name>.py, so that a stage can be loaded where
the original is gone or has changed; they run only when that is allowed.
"""

import hashlib

from attnfd_jax import paths, user_code
from attnfd_jax.errors import InputError

_KEYS = (
  ('student', 'network'),
  ('teacher', 'network'),
  ('teacher', 'factory'),
  ('distill', 'method'),
)


def specs(config):
  """Each 'file.py:Object' or 'package.module:Object' of a config."""
  named = [config[group][key] for group, key in _KEYS if key in config[group]]
  return [spec for spec in named if user_code.is_code(spec)]


def store(directory, config, stored):
  """Copies the files that `config` names into a stage's folder.

  `stored` is what the stages of the run have recorded so far, and what comes
  back, for this one's config.json: {spec: sha256}.

  Raises:
    InputError: if a file has changed since the run was begun.
  """
  digests = {}
  for spec in filter(user_code.is_file, specs(config)):
    path = user_code.path_of(spec)
    source = path.read_bytes()
    digest = digests[spec] = _digest(source)
    if stored.get(spec, digest) != digest:
      raise InputError(
        f'{path} has changed since the run was begun; put the old file '
        'back, or use another --workdir.'
      )
    target = _place(directory, spec, digest)
    target.parent.mkdir(parents=True, exist_ok=True)
    with paths.replacing(target) as file:
      file.write(source)
  return digests


def _digest(source):
  return hashlib.sha256(source).hexdigest()


def _place(directory, spec, digest):
  return directory / 'code' / digest[:12] / user_code.path_of(spec).name


def stored_spec(directory, spec, recorded, *, allow_code):
  """The spec of the copy that a stage keeps of `spec`, an object of its config.

  Raises:
    InputError: if it may not be run, or is not what `store` returned.
  """
  if not allow_code:
    raise InputError(
      f'{directory}: its config names Python code, {spec}, and a folder runs '
      'none unless you allow it: read the files below code/, then add '
      '--allow_code.'
    )
  if not user_code.is_file(spec):
    return spec
  digest = recorded.get(spec, '')
  path = _place(directory, spec, digest)
  if not path.is_file() or _digest(path.read_bytes()) != digest:
    raise InputError(
      f'{path}: absent, or not the file that was recorded; put a copy back.'
    )
  return f'{path}:{spec.rpartition(":")[2]}'
