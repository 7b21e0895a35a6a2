# SPDX-License-Identifier: Apache-2.0
"""Runs a command: attnfd COMMAND [FLAGS], or python -m attnfd_jax.

attnfd train --config=camvid --config.data.root=PATH
attnfd configs
attnfd copy-config camvid mine.py
"""

import ast
import pathlib
import runpy
import sys

from attnfd_jax import named_configs
from attnfd_jax.errors import check_name, InputError

_NAMES = ('train', 'check-data', 'prepare-data', 'evaluate', 'predict')
_NAMES += ('compare', 'export', 'convert', 'report', 'benchmark', 'doctor')
_MODULES = {name: name.replace('-', '_') for name in _NAMES}
_MODULES['train'] = 'main'
_OWN = {
  'configs': 'Lists the configs that --config takes by name.',
  'copy-config': 'Copies a config for editing: copy-config NAME FILE.py.',
}


def _summary(module: str) -> str:
  path = pathlib.Path(__file__).with_name(f'{module}.py')
  docstring = ast.get_docstring(ast.parse(path.read_text())) or ''
  return docstring.partition('\n')[0]


def _print_table(texts: dict[str, str]) -> None:
  width = max(map(len, texts)) + 2
  for name, text in texts.items():
    print(f'{name:{width}}{text}')


def _help() -> None:
  print('attnfd COMMAND [FLAGS]; attnfd COMMAND --help lists its flags.\n')
  texts = {name: _summary(module) for name, module in _MODULES.items()}
  _print_table(texts | _OWN)


def _run_own(command: str, arguments: list[str]) -> None:
  if command == 'configs' and not arguments:
    _print_table(named_configs.summaries())
  elif command == 'copy-config' and len(arguments) == 2:
    print(f'written: {named_configs.copy(*arguments)}')
  else:
    usage = {'configs': '', 'copy-config': ' NAME FILE.py'}[command]
    raise InputError(f'Usage: attnfd {command}{usage}')


def main() -> None:
  """Runs the command named by the first argument."""
  given, *arguments = sys.argv[1:] or ['help']
  if given in ('help', '-h', '--help'):
    return _help()
  command = 'train' if given == 'main' else given.replace('_', '-')
  try:
    check_name('command', command, (*_MODULES, *_OWN))
    if command in _OWN:
      return _run_own(command, arguments)
  except (InputError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  sys.argv = [f'attnfd {command}', *arguments]
  # As the main module: --help shows its docstring.
  module = f'attnfd_jax.{_MODULES[command]}'
  runpy.run_module(module, run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
