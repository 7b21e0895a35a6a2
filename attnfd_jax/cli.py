# SPDX-License-Identifier: Apache-2.0
"""Shared by all commands: flags, and bad input as one line and exit code 2."""

import ast
from collections.abc import Callable, Iterator, Sequence
import contextlib
import io
import logging as standard_logging
import os
import pathlib
import re
import sys
import traceback
from typing import Any
import warnings

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from attnfd_jax import named_configs, user_cache
from attnfd_jax.data import masks
from attnfd_jax.devices import diagnosis, processes
from attnfd_jax.errors import InputError
from attnfd_jax.progress import write
from attnfd_jax.training.stopping import Stopped

DEBUG = flags.DEFINE_bool('debug', False, 'Show tracebacks of bad input.')
# Flags defined below belong to the command that calls the function.
flags.disclaim_key_flags()
# Else its import warns where the font cache cannot be written.
standard_logging.getLogger('matplotlib').setLevel(standard_logging.ERROR)
# While the command line is parsed, ml_collections reports a wrong key by an
# AttributeError or KeyError with the closest one, a wrong value by a TypeError
# or ValueError, a wrong path by an OSError.
_PARSING = (AttributeError, KeyError, TypeError, ValueError, OSError)
_PARSING += (ImportError, SyntaxError, flags.Error)
# What a flag accepts, by absl's name for its type.
_EXPECTED = {
  'bool': 'True or False',
  'int': 'a whole number, such as 8',
  'float': 'a number, such as 0.01',
  'tuple': 'values between commas, such as "(64, 64)" or '
  """"('road', 'sky')\"""",
  # Any text is a valid string, so the flag must be a group of a config.
  'string': 'a dict, or a key of the group, as in {}.KEY=VALUE',
}

# Other messages of ml_collections about --config and its file, reworded.
_REWORDED = (
  (
    r"^Could not override field '(\w+)' \(reference\)\. (.*) is of original "
    r"type <class '(\w+)'> and cannot be casted to type <class '(\w+)'>$",
    r'\1=\2 in the file of --config is \3; it must be \4.',
  ),
  (
    r'^Key "(\w+)" does not exist .*?(Did you mean.*)?$',
    r'No key \1 in this group of --config. \2',
  ),
  (
    r'^Found (\S+) in argv before .*',
    r'--config=FILE must come before \1.',
  ),
  (
    r'^Flag (\S+) is provided after (\S+) .*',
    r'\1 would replace \2; leave one of them out.',
  ),
  (
    r"^The flag 'config\..* is defined twice.*",
    '--config is given twice; leave one of them out.',
  ),
  (
    '.*Path to config file is an empty.*',
    '--config= is empty; name a config, as in --config=quickstart, or a file.',
  ),
)


class _Bool(flags.BooleanParser):
  """absl's Boolean, which also accepts the words of YAML."""

  def parse(self, argument):
    words = {'yes': True, 'on': True, 'no': False, 'off': False}
    return super().parse(words.get(str(argument).lower(), argument))


class _Tuple(flags.ArgumentParser):
  """A Python tuple or list, or a single value; single words need no quotes."""

  def parse(self, argument):
    value = argument
    if isinstance(argument, str):  # Otherwise the default.
      try:
        value = ast.literal_eval(argument.strip() or '()')
      except (ValueError, SyntaxError) as error:
        if re.search(r'[\s()\[\]{}#"\']', argument):
          raise ValueError(error) from error
    if isinstance(value, (set, dict)):
      raise ValueError(argument)
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)

  def flag_type(self):
    return 'tuple'


class _OrNone(flags.ArgumentParser):
  """Accepts what `parser` accepts, and None, the default of some keys."""

  def __init__(self, parser):
    self._parser = parser

  def parse(self, argument):
    none = str(argument).lower() == 'none'
    return None if none else self._parser.parse(argument)

  def flag_type(self):
    return self._parser.flag_type()


def define_config() -> None:
  """Defines --config and its overrides; the last one of a key wins."""
  parsers = flags.FloatParser(), flags.IntegerParser(), _Bool(), _Tuple()
  for kind, parser in zip((float, int, bool, tuple), parsers, strict=True):
    config_flags.register_flag_parser_for_type(kind, _OrNone(parser))
  text, values = 'NAME[:VARIANT] or FILE.py[:VARIANT]', flags.FLAGS
  config_flags.DEFINE_config_file('config', None, text, flag_values=values)


def define_processes() -> None:
  """Defines the flags of `join_processes`, for commands that train."""
  text = 'Bitwise reproducible on GPUs, but slower.'
  flags.DEFINE_bool('deterministic', False, text)
  text = 'HOST:PORT of process 0 of a multi-process job.'
  flags.DEFINE_string('coordinator', None, text)
  text = 'Number of processes of the job; 1 ignores the cluster.'
  flags.DEFINE_integer('num_processes', None, text)
  flags.DEFINE_integer('process_id', None, 'Index of this process, from 0.')


def join_processes() -> None:
  """Joins a multi-process job, in which only process 0 prints."""
  if flags.FLAGS.deterministic:  # XLA reads this when JAX is first used.
    xla_flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{xla_flags} --xla_gpu_deterministic_ops=true'
  names = ('coordinator', 'num_processes', 'process_id')
  values: dict[str, Any] = {name: flags.FLAGS[name].value for name in names}
  processes.initialize(**values)
  if not processes.is_first():
    sys.stdout = open(os.devnull, 'w')


def own_flags() -> dict[str, Any]:
  """Values of the command's own flags by name, without --config."""
  own = flags.FLAGS.get_flags_for_module('__main__')
  names = (flag.name for flag in own if not flag.name.startswith('config'))
  return {name: flags.FLAGS[name].value for name in names}


def output_file(flag: str, ending: str = '') -> pathlib.Path | None:
  """The path given by a flag, or None. Fails early if it is not writable."""
  value: str | None = flags.FLAGS[flag].value
  if not value:
    return None
  path = pathlib.Path(value)
  if path.is_dir() or not path.name.lower().endswith(ending):
    raise InputError(f'--{flag}={path}: name a file, such as result{ending}.')
  diagnosis.require_writable(path.parent, f'--{flag}')
  path.parent.mkdir(parents=True, exist_ok=True)
  return path


def enable_compilation_cache() -> None:
  """Keeps compiled programs between runs, in JAX's folder or our own."""
  if not jax.config.values['jax_compilation_cache_dir']:
    path = str(user_cache.folder('xla'))
    jax.config.update('jax_compilation_cache_dir', path)
  show, shown = warnings.showwarning, []

  def show_once(message, *rest, **options):
    text = str(message)
    if 'persistent compilation cache' not in text:
      show(message, *rest, **options)
    elif not shown:  # JAX repeats the warning in each compiling thread.
      shown.append(text)
      path = jax.config.values['jax_compilation_cache_dir']
      is_default = path == str(user_cache.folder('xla'))
      variable = 'XDG_CACHE_HOME' if is_default else 'JAX_COMPILATION_CACHE_DIR'
      reason = text.partition("': ")[2] or text
      what = f'The compilation cache {path} cannot be used ({reason})'
      remedy = f'set {variable} to a writable folder'
      write(f'{what}: every start compiles again; {remedy}.')
      jax.config.update('jax_enable_compilation_cache', False)

  warnings.showwarning = show_once


def _with_home(match: re.Match[str]) -> str:
  return match[1] + os.path.expanduser(match[2])


def _with_config_file(argv: Sequence[str]) -> Iterator[str]:
  """Replaces the bare name of a config in `argv` by its file."""
  spellings = '-config', '--config'
  for i, argument in enumerate(argv):
    flag, equals, value = argument.partition('=')
    if equals and flag in spellings:
      argument = f'{flag}={named_configs.resolve(value)}'
    elif i and argv[i - 1] in spellings:
      argument = named_configs.resolve(argument)
    yield argument


def _one_line(error: BaseException) -> str:
  text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
  text = text.replace('\\n', '\n').strip()
  if text.startswith(('"', "'")):  # A name or a text in quotes.
    text = text.strip('\'"')
  if 'Traceback' in text:
    # The config file raised; its own message is the last line.
    text = re.sub(r'^\w+: ', '', text.splitlines()[-1])
  if 'Failed loading config file' in text:
    # ml_collections lists the places it searched first.
    text = f'{text.splitlines()[-1].strip()} (--config)'
    if 'No such file' in text:
      remedy = 'configs of attnfd_jax go by name, as in --config=camvid'
      text = f'{text}; {remedy}'
  text = re.sub(r'^\W*(\w+)\W*\nDid you mean', r'No key \1. Did you mean', text)
  for pattern, replacement in _REWORDED:
    text = re.sub(pattern, replacement, text, flags=re.S)
  if re.fullmatch(r'\w+', text):  # No key is close enough.
    text = f'No key {text} in this group of --config.'
  return re.sub(r'\s*\n\s*', ' ', text).strip() or type(error).__name__


@contextlib.contextmanager
def _readable(*errors: type[BaseException]) -> Iterator[None]:
  """Turns errors of these types into one line and exit code 2."""
  try:
    yield
  except KeyboardInterrupt:
    print('\nInterrupted.', file=sys.stderr)
    sys.exit(130)
  except Stopped as stopped:
    if stopped.message:
      print(f'\n{stopped.message}', file=sys.stderr)
    raise
  except Exception as error:
    expected = isinstance(error, errors)
    cause, problem = error.__cause__ if expected else error, None
    # JAX fails with these if its devices cannot be used.
    if isinstance(cause, (RuntimeError, AssertionError)):
      problem = diagnosis.check_start()
    if not (expected or problem):
      raise
    if DEBUG.value if flags.FLAGS.is_parsed() else '--debug' in sys.argv:
      traceback.print_exc()
    text = '; '.join(problem) if problem else _one_line(error)
    print(f'error: {text}', file=sys.stderr)
    sys.exit(2)


def _illegal_value(error: flags.Error) -> InputError | None:
  """A plain error for a flag's value that absl rejected, or None."""
  given = str(error).removesuffix(f': {error.__context__}')
  given = given.removeprefix('flag ')
  flag = given.partition('=')[0]
  parser = flags.FLAGS[flag.lstrip('-')].parser
  expected = _EXPECTED.get(parser.flag_type(), '').format(flag)
  if (least := getattr(parser, 'lower_bound', None)) is not None:
    expected = expected.replace(',', f' of {least} or more,')
  return InputError(f'{given}: expected {expected}.') if expected else None


def _parse(argv: Sequence[str]) -> list[str]:
  # Shells do not expand the ~ of --flag=~/path.
  argv = [re.sub('^(-[^=]*=|)(~.*)', _with_home, x, flags=re.S) for x in argv]
  for flag in map(flags.FLAGS.__getitem__, flags.FLAGS):
    if isinstance(flag.parser, flags.BooleanParser):
      flag.parser = _Bool()
  with _readable(*_PARSING):
    try:
      argv = list(_with_config_file(argv))
      return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
      raise (_illegal_value(error) or error) from None
    except _PARSING:
      raise
    except Exception as error:
      text = f'its file raised {type(error).__name__}: {error}'
      raise InputError(f'--config: {text}; --debug shows where.') from error


def _unraisable_hook(unraisable: Any) -> None:
  """Python's hook, but silent about Orbax's threads after a failed save."""
  if 'Event loop is closed' not in str(unraisable.exc_value):
    sys.__unraisablehook__(unraisable)


def prepare_process() -> None:
  """Changes settings of the whole process, which only a command may do."""
  masks.tune_process()
  enable_compilation_cache()
  # Orbax logs every step, and errors that it also raises.
  logging.set_verbosity(logging.INFO if DEBUG.value else logging.FATAL)
  if not DEBUG.value:
    sys.unraisablehook = _unraisable_hook
  # File names are bytes that may not decode.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')


def run(
  main: Callable[..., None],
  *,
  required: Sequence[str] = (),
  positional: bool = False,
) -> None:
  """Parses the flags and calls `main`; bad input becomes one line.

  Args:
    main: the command.
    required: flags that must be given; one is enough of 'checkpoint|config'.
    positional: whether `main` takes the arguments that are not flags.
  """

  def guarded(argv):
    with _readable(InputError, OSError):
      prepare_process()
      if len(argv) > 1 and not positional:
        raise InputError(f'Unknown argument {argv[1]!r}; flags start with --.')
      for choices in required:
        given = [flags.FLAGS[name] for name in choices.split('|')]
        if not any(flag.value for flag in given):
          raise InputError(f'--{given[0].name} is missing: {given[0].help}')
      main(*argv[1:])

  app.run(guarded, flags_parser=_parse)
