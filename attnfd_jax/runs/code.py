# SPDX-License-Identifier: Apache-2.0
"""Python files of the user's, kept in the run that used them.

They lie in <stage>/code/<hash>/<name>.py, so that a stage can be loaded where
the original is gone or has changed; they run only when that is allowed.
"""

from attnfd_jax import paths, user_code
from attnfd_jax.errors import InputError

_KEYS = (
  'student.network',
  'teacher.network',
  'teacher.factory',
  'distill.method',
)


def specs(config):
  """{key: 'file.py:Object' or 'package.module:Object'} of a config, or dict."""
  pairs = [key.split('.') for key in _KEYS]
  found = {f'{g}.{k}': config[g][k] for g, k in pairs if k in config[g]}
  return {key: x for key, x in found.items() if user_code.is_code(x)}


def store(directory, config, stored):
  """Copies the files that `config` names into a stage; returns what to record.

  Args:
    directory: of the stage.
    config: of the run.
    stored: what an earlier start recorded, or {}.

  Returns:
    {spec: sha256}, for the stage's config.json.

  Raises:
    InputError: if a file has changed since the stage was begun.
  """
  digests = {}
  for spec in specs(config).values():
    if not user_code.is_file(spec):
      continue
    path = user_code.path_of(spec)
    digest = digests[spec] = user_code.sha256(path)
    if stored.get(spec, digest) != digest:
      raise InputError(
        f'{path} has changed since the run was begun; put the old file '
        'back, or use another --workdir.'
      )
    target = _place(directory, spec, digest)
    target.parent.mkdir(parents=True, exist_ok=True)
    with paths.replacing(target) as file:
      file.write(path.read_bytes())
  return digests


def _place(directory, spec, digest):
  return directory / 'code' / digest[:12] / user_code.path_of(spec).name


def stored_spec(directory, spec, recorded, *, allow_code):
  """The spec of the copy that a stage keeps of the object `spec`.

  Args:
    directory: of the stage.
    spec: of its config.
    recorded: as of `store`.
    allow_code: it may be run.

  Raises:
    InputError: if it may not, or the copy is not what was recorded.
  """
  if not allow_code:
    raise InputError(
      f'{directory}: its config names Python code, {spec}, and a folder runs '
      'none unless you allow it: read the files below code/, then add '
      '--allow_code.'
    )
  if not user_code.is_file(spec):
    return spec
  path = _place(directory, spec, recorded.get(spec, ''))
  if not path.is_file() or user_code.sha256(path) != recorded.get(spec):
    raise InputError(
      f'{path}: absent, or not the file that was recorded; put a copy back.'
    )
  return f'{path}:{spec.rpartition(":")[2]}'
