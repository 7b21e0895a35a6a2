# SPDX-License-Identifier: Apache-2.0
"""What all verbs share: bad input ends in one line and exit code 2."""

import ast
import contextlib
import logging as standard_logging
import os
import pathlib
import re
import sys
import traceback
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
flags.disclaim_key_flags()  # The flags below are of the command that asks.
# It would say when imported that its list of fonts has no place to be kept.
standard_logging.getLogger('matplotlib').setLevel(standard_logging.ERROR)
# ml_collections reports a wrong key by AttributeError or KeyError with the
# nearest one, a wrong value by TypeError or ValueError, a wrong path by
# OSError; all of them come from the command line while it is parsed.
_PARSING = (AttributeError, KeyError, TypeError, ValueError, OSError)
_PARSING += (ImportError, SyntaxError, flags.Error)
# What a flag takes, by the name that absl has for its type.
_EXPECTED = {
  'bool': 'True or False',
  'int': 'a whole number, such as 8',
  'float': 'a number, such as 0.01',
  'tuple': 'values between commas, such as "(64, 64)" or '
  """"('road', 'sky')\"""",
  # Any text is a string: what was wrong is a group of a config.
  'string': 'a dict, or a key of the group, as in {}.KEY=VALUE',
}

# What else ml_collections says about --config and its file.
_IN_OUR_WORDS = (
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
  """As absl's, and the words of YAML."""

  def parse(self, argument):
    words = {'yes': True, 'on': True, 'no': False, 'off': False}
    return super().parse(words.get(str(argument).lower(), argument))


class _Tuple(flags.ArgumentParser):
  """A tuple or list of Python, or a single value; a word needs no quotes."""

  def parse(self, argument):
    value = argument
    if isinstance(argument, str):  # Else it is the default.
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
  """What `parser` takes, or None, the default of some keys."""

  def __init__(self, parser):
    self._parser = parser

  def parse(self, argument):
    none = str(argument).lower() == 'none'
    return None if none else self._parser.parse(argument)

  def flag_type(self):
    return self._parser.flag_type()


def define_config():
  """Defines --config and its overrides; of one given twice the last counts."""
  parsers = flags.FloatParser(), flags.IntegerParser(), _Bool(), _Tuple()
  for kind, parser in zip((float, int, bool, tuple), parsers, strict=True):
    config_flags.register_flag_parser_for_type(kind, _OrNone(parser))
  text, values = 'NAME[:VARIANT] or FILE.py[:VARIANT]', flags.FLAGS
  config_flags.DEFINE_config_file('config', None, text, flag_values=values)


def define_processes():
  """Defines the flags of `join_processes`, of commands that train."""
  text = 'GPUs repeat their bits; slower.'
  flags.DEFINE_bool('deterministic', False, text)
  text = 'HOST:PORT of process 0 of several.'
  flags.DEFINE_string('coordinator', None, text)
  flags.DEFINE_integer('num_processes', None, 'Of the job; 1 is always alone.')
  flags.DEFINE_integer('process_id', None, 'Of this process, from 0.')


def join_processes():
  """Makes this process a part of its job; only the first one prints."""
  if flags.FLAGS.deterministic:  # XLA reads it when JAX is first used.
    given = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{given} --xla_gpu_deterministic_ops=true'
  place = ('coordinator', 'num_processes', 'process_id')
  processes.initialise(**{name: flags.FLAGS[name].value for name in place})
  if not processes.is_first():
    sys.stdout = open(os.devnull, 'w')


def own_flags():
  """{name: value} of the command's own flags, but --config."""
  own = flags.FLAGS.get_flags_for_module('__main__')
  names = (flag.name for flag in own if not flag.name.startswith('config'))
  return {name: flags.FLAGS[name].value for name in names}


def output_file(flag, ending=''):
  """The path of a flag or None, known to be writable before the long part."""
  if not flags.FLAGS[flag].value:
    return None
  path = pathlib.Path(flags.FLAGS[flag].value)
  if path.is_dir() or not path.name.lower().endswith(ending):
    raise InputError(f'--{flag}={path}: name a file, such as found{ending}.')
  diagnosis.require_writable(path.parent, f'--{flag}')
  path.parent.mkdir(parents=True, exist_ok=True)
  return path


def enable_compilation_cache():
  """Compiled programs are kept between runs, unless JAX was told where."""
  if not jax.config.jax_compilation_cache_dir:
    path = str(user_cache.folder('xla'))
    jax.config.update('jax_compilation_cache_dir', path)
  show, shown = warnings.showwarning, []

  def show_once(message, *rest, **options):
    text = str(message)
    if 'persistent compilation cache' not in text:
      show(message, *rest, **options)
    elif not shown:  # JAX warns again where threads compile.
      shown.append(text)
      path = jax.config.jax_compilation_cache_dir
      ours = path == str(user_cache.folder('xla'))
      variable = 'XDG_CACHE_HOME' if ours else 'JAX_COMPILATION_CACHE_DIR'
      reason = text.partition("': ")[2] or text
      what = f'The cache of programs {path} cannot be used ({reason})'
      remedy = f'set {variable} to a folder that can be written'
      write(f'{what}: each start compiles them again; {remedy}.')
      jax.config.update('jax_enable_compilation_cache', False)

  warnings.showwarning = show_once


def _at_home(match):
  return match[1] + os.path.expanduser(match[2])


def _with_config_file(argv):
  """`argv` with the file in place of a config's bare name."""
  given = '-config', '--config'
  for i, argument in enumerate(argv):
    flag, equals, value = argument.partition('=')
    if equals and flag in given:
      argument = f'{flag}={named_configs.resolve(value)}'
    elif i and argv[i - 1] in given:
      argument = named_configs.resolve(argument)
    yield argument


def _one_line(error):
  text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
  text = text.replace('\\n', '\n').strip()
  if text.startswith(('"', "'")):  # A name in quotes, or a text that is.
    text = text.strip('\'"')
  if 'Traceback' in text:
    # A config file that raised; its own message is the last line.
    text = re.sub(r'^\w+: ', '', text.splitlines()[-1])
  if 'Failed loading config file' in text:
    # ml_collections tells all places it looked at first.
    text = f'{text.splitlines()[-1].strip()} (--config)'
    if 'No such file' in text:
      remedy = 'those of attnfd_jax go by name, as in --config=camvid'
      text = f'{text}; {remedy}'
  text = re.sub(r'^\W*(\w+)\W*\nDid you mean', r'No key \1. Did you mean', text)
  for pattern, ours in _IN_OUR_WORDS:
    text = re.sub(pattern, ours, text, flags=re.S)
  if re.fullmatch(r'\w+', text):  # No key is near enough.
    text = f'No key {text} in this group of --config.'
  return re.sub(r'\s*\n\s*', ' ', text).strip() or type(error).__name__


@contextlib.contextmanager
def _readable(*errors):
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
    if isinstance(cause, (RuntimeError, AssertionError)):  # JAX's, perhaps.
      problem = diagnosis.check_start()
    if not (expected or problem):
      raise
    if DEBUG.value if flags.FLAGS.is_parsed() else '--debug' in sys.argv:
      traceback.print_exc()
    text = '; '.join(problem) if problem else _one_line(error)
    print(f'error: {text}', file=sys.stderr)
    sys.exit(2)


def _refused(error):
  """An InputError in our words about the value that absl refused, or None."""
  given = str(error).removesuffix(f': {error.__context__}')
  given = given.removeprefix('flag ')
  flag = given.partition('=')[0]
  parser = flags.FLAGS[flag.lstrip('-')].parser
  expected = _EXPECTED.get(parser.flag_type(), '').format(flag)
  if (least := getattr(parser, 'lower_bound', None)) is not None:
    expected = expected.replace(',', f' of {least} or more,')
  return expected and InputError(f'{given}: expected {expected}.')


def _parse(argv):
  # Shells leave the ~ of --flag=~/path alone.
  argv = [re.sub('^(-[^=]*=|)(~.*)', _at_home, x, flags=re.S) for x in argv]
  for flag in map(flags.FLAGS.__getitem__, flags.FLAGS):
    if isinstance(flag.parser, flags.BooleanParser):
      flag.parser = _Bool()
  with _readable(*_PARSING):
    try:
      argv = list(_with_config_file(argv))
      return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
      raise (_refused(error) or error) from None
    except _PARSING:
      raise
    except Exception as error:
      text = f'its file raised {type(error).__name__}: {error}'
      raise InputError(f'--config: {text}; see where by --debug.') from error


def _without_afterthoughts(unraisable):
  """As the hook of Python, but for Orbax's threads after a failed save."""
  if 'Event loop is closed' not in str(unraisable.exc_value):
    sys.__unraisablehook__(unraisable)


def prepare_process():
  """Settings of the whole process, which only a command may change."""
  masks.tune_process()
  enable_compilation_cache()
  # Orbax tells every step it takes, and an error that is raised, too.
  logging.set_verbosity(logging.INFO if DEBUG.value else logging.FATAL)
  if not DEBUG.value:
    sys.unraisablehook = _without_afterthoughts
  # Names of files are bytes, and not always text.
  sys.stdout.reconfigure(errors='backslashreplace')


def run(main, *, required=(), positional=False):
  """Parses flags, calls main, with other arguments if they are `positional`.

  Its bad input, and `required` flags without a value, become one line; of
  'checkpoint|config' one is enough.
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
