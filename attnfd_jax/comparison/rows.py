# SPDX-License-Identifier: Apache-2.0
"""The rows of a comparison: a method, and what differs from the config."""

import ast
import dataclasses
import hashlib
import itertools
import re

from ml_collections import ConfigDict

from attnfd_jax import distill, user_code
from attnfd_jax.config import leaves, resolve
from attnfd_jax.errors import InputError

BASELINE = ''  # As a method: labels alone.
# Keys of the group distill that the baseline would need, too.
_OF_ALL_ROWS = ('distill.method', 'distill.ce_batch_division')


@dataclasses.dataclass(frozen=True)
class Row:
  """A method with settings, ((key of the config, value), ...)."""

  method: str
  settings: tuple = ()

  @property
  def name(self):
    """'attnfd,weight=0.3'; 'student' without a method."""
    return ','.join([self.method or 'student', *self._shortened()])

  @property
  def title(self):
    """'AttnFD (weight=0.3)', as people read it."""
    if not self.method:
      return 'Baseline'
    settings = ', '.join(self._shortened())
    title = distill.title(self.method)
    return f'{title} ({settings})' if settings else title

  def _shortened(self):
    """'weight=0.3' of 'distill.attnfd.weight', whose method is known; of a sum
    'attnfd.weight=0.3'.
    """
    parts = 2 if '+' in self.method else 1
    for key, value in self.settings:
      yield f'{".".join(key.split(".")[1:][-parts:])}={value}'

  @property
  def folder(self):
    """Its name, as a file system can hold it."""
    safe = re.sub(r'[^\w.,=+-]', '_', self.name)[:80]
    if safe == self.name:
      return safe
    return f'{safe}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}'

  @property
  def stage(self):
    """Of a run, the stage that trains this row's student."""
    return 'distill' if self.method else 'student'

  @property
  def _changes(self):
    """{key of the config: value}."""
    method = {'distill.method': self.method} if self.method else {}
    return method | dict(self.settings)

  def configured(self, config, *, teacher='', changes=None):
    """A resolved copy of `config` for this row's stage alone.

    `teacher` is the folder of a stage, if the config gives none; `changes` are
    further keys.
    """
    config = config.copy_and_resolve_references()
    if not user_code.is_code(self.method):
      config.distill.options = ConfigDict()  # Those of another row's class.
    own = {'stages': (self.stage,), **self._changes}
    if self.method and teacher:
      own['teacher.checkpoint'] = teacher
      # What this comparison trained is the code of its config.
      if user_code.is_code(config.teacher.network):
        own['teacher.allow_code'] = True
    for key, value in (own | (changes or {})).items():
      _set(config, key, value)
    return resolve(config)

  def flags(self, changes):
    """Of `main`, to repeat the row beside the flags of the config."""
    values = {'stages': self.stage, **changes, **self._changes}
    return [f'--config.{key}={value}' for key, value in values.items()]


def _set(config, key, value):
  """Sets a key, and returns the value as the config's type has it."""
  try:
    config.update_from_flattened_dict({key: value})
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    text = str(error).splitlines()[0]
    raise InputError(f'config.{key}={value!r}: {text}') from error
  return leaves(config)[key]


def parse_settings(flag, texts, config):
  """{key: values} of 'distill.attnfd.weight:0.3,1,3' and others of a flag."""
  found, known = {}, leaves(config)
  for text in texts:
    key, colon, values = text.partition(':')
    if not colon or not values or not key.startswith('distill.'):
      raise InputError(
        f'--{flag}={text}: expected distill.KEY:VALUE,VALUE, such as '
        'distill.attnfd.weight:0.3,1,3.'
      )
    if key in found:
      raise InputError(f'--{flag}: {key} is given twice; join its values.')
    if key not in known:
      raise InputError(f'--{flag}: the config has no key {key}.')
    if key in _OF_ALL_ROWS:
      raise InputError(
        f'--{flag}: {key} is not a setting of a method; set it for all rows.'
      )
    try:
      parsed = ast.literal_eval(f'[{values}]')
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      parsed = values.split(',')
    parsed = [tuple(x) if isinstance(x, list) else x for x in parsed]
    copy = config.copy_and_resolve_references()
    # 1 and 1.0 are one value, in whatever way they are written.
    found[key] = [_set(copy, key, x) for x in parsed]
    if len({*map(repr, found[key])}) < len(found[key]):
      raise InputError(f'--{flag}={text}: one of the values is there twice.')
  return found


def _concerns(key, method):
  """Whether a key is of one of the methods, or of all of them."""
  group = key.split('.')[1]
  if group == 'options':
    return user_code.is_code(method)
  return group not in distill.METHODS or group in method.split('+')


def make_rows(method, settings):
  """A Row for each combination of those `settings` that concern the method."""
  own = {k: values for k, values in settings.items() if _concerns(k, method)}
  combinations = itertools.product(*own.values())
  return [Row(method, tuple(zip(own, x, strict=True))) for x in combinations]


def check(config, methods, settings):
  """InputError for unknown methods, settings of none of them, wrong values."""
  repeated = {x for x in methods if methods.count(x) > 1}
  if repeated or not methods:
    what = f'{min(repeated)} twice' if repeated else 'nothing'
    raise InputError(f'--methods names {what}; give names such as attnfd,kd.')
  for flag, found in settings.items():
    for key in found:
      if not any(_concerns(key, method) for method in methods):
        raise InputError(f'--{flag}: {key} is of none of --methods.')
  if both := set(settings['tune']) & set(settings['vary']):
    raise InputError(f'{min(both)} is in --tune and in --vary; choose one.')
  every = {k: v for found in settings.values() for k, v in found.items()}
  for method in methods:
    for row in make_rows(method, every):
      options = row.configured(config).distill
      distill.make_distiller(method, options, options=options.options)
