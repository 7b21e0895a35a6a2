# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, and nobody reaches into another file's privates."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / 'attnfd_jax'
# Each room may import from itself and from the levels above its own.
LEVELS = (
  {'errors', 'named_configs', 'paths', 'progress', 'types'}
  | {'user_cache', 'user_code'},
  {'devices', 'losses', 'metrics', 'models'},
  {'data', 'distill', 'pytorch'},
  {'config'},
  {'runs'},
  {'inference', 'teachers', 'reporting'},
  {'exporting'},
  {'training'},
  {'benchmarks'},
  {'comparison'},
)
COMMANDS = {
  *('main', 'evaluate', 'predict', 'report', 'convert', 'export'),
  *('check_data', 'prepare_data', 'benchmark', 'doctor', 'compare'),
}
# Where a config may be read; functions below take plain arguments.
EDGES = {'benchmarks', 'comparison', 'training', *COMMANDS}


def name_of(path):
  parts = path.relative_to(ROOT.parent).with_suffix('').parts
  return '.'.join(part for part in parts if part != '__init__')


FILES = {name_of(path): path for path in sorted(ROOT.rglob('*.py'))}


def imports_of(path):
  """Pairs of an imported module of the package and a name in it, or ''."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        whole = f'{node.module}.{alias.name}'
        if whole in FILES:
          yield whole, ''
        elif node.module in FILES:
          yield node.module, alias.name
    elif isinstance(node, ast.Import):
      for alias in node.names:
        if alias.name in FILES:
          yield alias.name, ''


def room_of(module):
  return module.split('.')[1] if '.' in module else ''


IMPORTS = {name: list(imports_of(path)) for name, path in FILES.items()}


def test_files_are_read():
  assert len(FILES) > 60
  assert ('attnfd_jax.losses', 'Mean') in IMPORTS['attnfd_jax.distill.kd']


def test_rooms_import_from_below():
  level = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
  wrong = [
    f'{name} imports {other}'
    for name, found in IMPORTS.items()
    for other, _ in found
    if room_of(name) in level and room_of(name) != room_of(other)
    if level.get(room_of(other), len(LEVELS)) > level[room_of(name)]
  ]
  assert not wrong
  known = {*level, *COMMANDS, 'cli', '__main__', ''}
  unknown = {room_of(name) for name in FILES} - known
  assert not unknown, 'give the new room its level'


def test_nobody_imports_a_command():
  wrong = [
    f'{name} imports {other}'
    for name, found in IMPORTS.items()
    for other, _ in found
    if room_of(other) in COMMANDS
  ]
  assert not wrong


def test_there_is_no_cycle_of_files():
  graph = {
    name: {other for other, _ in found if other != name}
    for name, found in IMPORTS.items()
  }
  graphlib.TopologicalSorter(graph).prepare()


def test_no_private_name_crosses_files():
  wrong = [
    f'{name} imports {other}.{imported}'
    for name, found in IMPORTS.items()
    for other, imported in found
    if imported.startswith('_') and imported != '__version__'
  ]
  for name, path in FILES.items():
    tree = ast.parse(path.read_text())
    modules = {
      alias.asname or alias.name
      for node in ast.walk(tree)
      if isinstance(node, ast.ImportFrom)
      and (node.module or '').startswith('attnfd_jax')
      for alias in node.names
    }
    wrong += [
      f'{name} uses {node.value.id}.{node.attr}'
      for node in ast.walk(tree)
      if isinstance(node, ast.Attribute)
      and isinstance(node.value, ast.Name)
      and node.value.id in modules
      and node.attr.startswith('_')
      and not node.attr.startswith('__')
    ]
  assert not wrong


def test_config_is_read_at_the_edges():
  wrong = [
    name
    for name, found in IMPORTS.items()
    for other, _ in found
    if other == 'attnfd_jax.config' and room_of(name) not in EDGES
  ]
  assert not wrong


@pytest.mark.parametrize('word', ['attnfd', 'kd'])
def test_no_method_has_its_name_outside_its_room(word):
  """As a word of its own in a string: in distill/, and in the recipes."""
  wrong = []
  for name, path in FILES.items():
    if room_of(name) in ('distill', 'config', ''):
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and node.value == word:
        wrong.append(f'{name}:{node.lineno}')
  assert not wrong
