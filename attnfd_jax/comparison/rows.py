# SPDX-License-Identifier: Apache-2.0
"""Rows of a comparison: a method and its changes to the config."""

import ast
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import itertools
import re
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from attnfd_jax import distill, user_code
from attnfd_jax.config import leaves, resolve
from attnfd_jax.errors import InputError
from attnfd_jax.types import Config

BASELINE = ''  # The method of the baseline: no distillation.
# Keys of the group distill that are not settings of one method.
_OF_ALL_ROWS = ('distill.method', 'distill.ce_batch_division')

# Values to try for each key of the config.
Settings: TypeAlias = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Row:
  """A method with settings, pairs of a config key and its value."""

  method: str
  settings: tuple[tuple[str, Any], ...] = ()

  @property
  def name(self) -> str:
    """Unique name, such as 'attnfd,weight=0.3'; 'student' for the baseline."""
    return ','.join([self.method or 'student', *self._shortened()])

  @property
  def title(self) -> str:
    """Name in tables and charts, such as 'AttnFD (weight=0.3)'."""
    if not self.method:
      return 'Baseline'
    settings = ', '.join(self._shortened())
    title = distill.title(self.method)
    return f'{title} ({settings})' if settings else title

  def _shortened(self) -> Iterator[str]:
    """The settings as 'weight=0.3', or 'attnfd.weight=0.3' in a sum."""
    parts = 2 if '+' in self.method else 1
    for key, value in self.settings:
      yield f'{".".join(key.split(".")[1:][-parts:])}={value}'

  @property
  def folder(self) -> str:
    """The name as a valid file name."""
    safe = re.sub(r'[^\w.,=+-]', '_', self.name)[:80]
    if safe == self.name:
      return safe
    return f'{safe}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}'

  @property
  def stage(self) -> str:
    """The stage of a run that trains this row's student."""
    return 'distill' if self.method else 'student'

  @property
  def _changes(self) -> dict[str, Any]:
    """Values of config keys."""
    method = {'distill.method': self.method} if self.method else {}
    return method | dict(self.settings)

  def configured(
    self,
    config: Config,
    *,
    teacher: str = '',
    changes: Mapping[str, Any] | None = None,
  ) -> Config:
    """Returns a resolved copy of `config` for this row's stage only.

    Args:
      config: config of the comparison.
      teacher: folder of a teacher stage, if the config gives no teacher.
      changes: further keys and their values.
    """
    config = config.copy_and_resolve_references()
    if not user_code.is_code(self.method):
      # The options belong to the class of another row.
      config.distill.options = ConfigDict()
    own = {'stages': (self.stage,), **self._changes}
    if self.method and teacher:
      own['teacher.checkpoint'] = teacher
      # This comparison trained the teacher, with the code its config names.
      if user_code.is_code(config.teacher.network):
        own['teacher.allow_code'] = True
    for key, value in (own | dict(changes or {})).items():
      _set(config, key, value)
    return resolve(config)

  def flags(self, changes: Mapping[str, Any]) -> list[str]:
    """Flags that repeat the row with `main`, next to those of the config."""
    values = {'stages': self.stage, **changes, **self._changes}
    return [f'--config.{key}={value}' for key, value in values.items()]


def _set(config: Config, key: str, value: Any) -> Any:
  """Sets a key; returns the value, converted to the key's type."""
  try:
    config.update_from_flattened_dict({key: value})
  except (TypeError, ValueError, KeyError, AttributeError) as error:
    text = str(error).splitlines()[0]
    raise InputError(f'config.{key}={value!r}: {text}') from error
  return leaves(config)[key]


def parse_settings(
  flag: str, texts: Sequence[str], config: Config
) -> dict[str, list[Any]]:
  """Parses the values of a flag, such as 'distill.attnfd.weight:0.3,1,3'.

  Args:
    flag: name of the flag, for messages.
    texts: its values.
    config: gives the keys and the types of their values.

  Returns:
    Values of each key.

  Raises:
    InputError: if a text cannot be parsed, or does not fit the config.
  """
  settings, config_values = {}, leaves(config)
  for text in texts:
    key, colon, values = text.partition(':')
    if not colon or not values or not key.startswith('distill.'):
      raise InputError(
        f'--{flag}={text}: expected distill.KEY:VALUE,VALUE, such as '
        'distill.attnfd.weight:0.3,1,3.'
      )
    if key in settings:
      raise InputError(f'--{flag}: {key} is given twice; join its values.')
    if key not in config_values:
      raise InputError(f'--{flag}: the config has no key {key}.')
    if key in _OF_ALL_ROWS:
      raise InputError(
        f'--{flag}: {key} is not a setting of one method; set it in the config.'
      )
    try:
      parsed = ast.literal_eval(f'[{values}]')
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      parsed = values.split(',')
    parsed = [tuple(x) if isinstance(x, list) else x for x in parsed]
    copy = config.copy_and_resolve_references()
    # 1 and 1.0 become the same value.
    settings[key] = [_set(copy, key, x) for x in parsed]
    if len({*map(repr, settings[key])}) < len(settings[key]):
      raise InputError(f'--{flag}={text}: a value is given twice.')
  return settings


def _concerns(key: str, method: str) -> bool:
  """Whether a key affects the method, or one method of a sum."""
  group = key.split('.')[1]
  if group == 'options':
    return user_code.is_code(method)
  return group not in distill.METHODS or group in method.split('+')


def make_rows(method: str, settings: Settings) -> list[Row]:
  """Returns a Row for each combination of the settings of this method."""
  own = {k: values for k, values in settings.items() if _concerns(k, method)}
  combinations = itertools.product(*own.values())
  return [Row(method, tuple(zip(own, x, strict=True))) for x in combinations]


def check(
  config: Config,
  methods: Sequence[str],
  settings: Mapping[str, Settings],
) -> None:
  """Checks methods and settings before anything runs.

  Args:
    config: config of the comparison.
    methods: values of --methods.
    settings: those of the flags 'tune' and 'vary'.

  Raises:
    InputError: if a method is unknown or given twice, a setting belongs to none
      of them, or a value is wrong.
  """
  repeated = {x for x in methods if methods.count(x) > 1}
  if repeated or not methods:
    fault = f'names {min(repeated)} twice' if repeated else 'is empty'
    raise InputError(f'--methods {fault}; give names such as attnfd,kd.')
  for flag, of_flag in settings.items():
    for key in of_flag:
      if not any(_concerns(key, method) for method in methods):
        raise InputError(
          f'--{flag}: {key} is a setting of none of --methods; add its method '
          'or remove it.'
        )
  if both := set(settings['tune']) & set(settings['vary']):
    raise InputError(f'{min(both)} is in --tune and in --vary; choose one.')
  every = {k: v for of_flag in settings.values() for k, v in of_flag.items()}
  for method in methods:
    for row in make_rows(method, every):
      options = row.configured(config).distill
      distill.make_distiller(method, options, options=options.options)
