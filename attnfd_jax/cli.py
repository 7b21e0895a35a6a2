# SPDX-License-Identifier: Apache-2.0
"""What all verbs share: bad input ends in one line and exit code 2."""

import contextlib
import pathlib
import re
import sys
import traceback

from absl import app, flags, logging
import jax
from ml_collections import config_flags

from attnfd_jax import user_cache
from attnfd_jax.data import masks
from attnfd_jax.errors import InputError
from attnfd_jax.training.stopping import Stopped

DEBUG = flags.DEFINE_bool('debug', False, 'Show tracebacks of bad input.')
flags.disclaim_key_flags()  # The flags below are of the command that asks.
# ml_collections reports a wrong key by AttributeError or KeyError with the
# nearest one, a wrong value by TypeError or ValueError, a wrong path by
# OSError; all of them come from the command line while it is parsed.
_PARSING = (AttributeError, KeyError, TypeError, ValueError, OSError)
_PARSING += (ImportError, SyntaxError, flags.Error)


def define_config():
  """Defines --config and its overrides."""
  config_flags.DEFINE_config_file('config', None, 'configs/NAME.py[:VARIANT]')


def own_flags():
  """{name: value} of the flags that the command itself defines."""
  own = flags.FLAGS.get_flags_for_module('__main__')
  return {flag.name: flags.FLAGS[flag.name].value for flag in own}


def output_file(flag, ending=''):
  """The path of a flag or None, known to be writable before the long part."""
  if not flags.FLAGS[flag].value:
    return None
  path = pathlib.Path(flags.FLAGS[flag].value)
  if path.is_dir() or not path.name.lower().endswith(ending):
    raise InputError(f'--{flag}={path}: name a file, such as found{ending}.')
  path.parent.mkdir(parents=True, exist_ok=True)
  return path


def enable_compilation_cache():
  """Compiled programs are kept between runs, unless JAX was told where."""
  if not jax.config.jax_compilation_cache_dir:
    path = str(user_cache.folder('xla'))
    jax.config.update('jax_compilation_cache_dir', path)


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
  text = re.sub(r'^\W*(\w+)\W*\nDid you mean', r'No key \1. Did you mean', text)
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
  except errors as error:
    if DEBUG.value if flags.FLAGS.is_parsed() else '--debug' in sys.argv:
      traceback.print_exc()
    print(f'error: {_one_line(error)}', file=sys.stderr)
    sys.exit(2)


def _parse(argv):
  with _readable(*_PARSING):
    try:
      return flags.FLAGS(argv)
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

  Its bad input, and `required` flags without a value, become one line.
  """

  def guarded(argv):
    with _readable(InputError, OSError):
      prepare_process()
      if len(argv) > 1 and not positional:
        raise InputError(f'Unknown argument {argv[1]!r}; flags start with --.')
      for flag in map(flags.FLAGS.__getitem__, required):
        if not flag.value:
          raise InputError(f'--{flag.name} is missing: {flag.help}')
      main(*argv[1:])

  app.run(guarded, flags_parser=_parse)
