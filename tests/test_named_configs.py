# SPDX-License-Identifier: Apache-2.0
"""Configs by name, and `attnfd`, the commands in one."""

import pathlib
import sys

import pytest

from attnfd_jax import __main__ as attnfd
from attnfd_jax import named_configs
from attnfd_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
  """Runs `attnfd` in an empty folder; returns exit code, stdout, stderr."""
  monkeypatch.chdir(tmp_path)

  def run(*arguments):
    monkeypatch.setattr(sys, 'argv', ['attnfd', *arguments])
    code = 0
    try:
      attnfd.main()
    except SystemExit as error:
      code = error.code
    return code, *capsys.readouterr()

  return run


def test_there_is_one_copy():
  ours = {path.stem: path for path in (ROOT / 'configs').glob('*.py')}
  assert named_configs.names() == sorted(ours)
  for name, path in ours.items():
    assert named_configs.path_of(name).samefile(path)


@pytest.mark.parametrize('variant', ['', ':cpu', ':a:b'])
def test_a_name_is_a_file(variant, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = f'{named_configs.FOLDER}/camvid.py{variant}'
  assert named_configs.resolve(f'camvid{variant}') == path


@pytest.mark.parametrize(
  'value', ['', 'camvid.py', './camvid', 'a/camvid.py:cpu', '/camvid', ':cpu']
)
def test_a_path_stays(value):
  assert named_configs.resolve(value) == value


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / 'camvid'
  path.mkdir()  # Of the data, say.
  assert named_configs.resolve('camvid').endswith('configs/camvid.py')
  path.rmdir()
  path.touch()
  assert named_configs.resolve('camvid') == 'camvid'


def test_an_unknown_name_is_refused():
  with pytest.raises(InputError, match="'camvd'. Did you mean 'camvid'?"):
    named_configs.resolve('camvd:cpu')


def test_configs_are_listed(run):
  code, out, _ = run('configs')
  assert code == 0
  lines = out.splitlines()
  assert [line.split()[0] for line in lines] == named_configs.names()
  assert all(len(line.split()) > 3 for line in lines)


def test_a_copy_is_never_written_over(run, tmp_path):
  assert run('copy-config', 'camvid', 'mine.py')[0] == 0
  text = (tmp_path / 'mine.py').read_text()
  assert text == (ROOT / 'configs' / 'camvid.py').read_text()
  (tmp_path / 'mine.py').write_text('edited')
  code, _, error = run('copy-config', 'coco', 'mine.py')
  assert code == 2
  assert error == 'error: mine.py already exists; choose another name.\n'
  assert (tmp_path / 'mine.py').read_text() == 'edited'
  assert run('copy-config', 'coco', '.')[0] == 0
  assert (tmp_path / 'coco.py').exists()


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (['trian'], "Unknown command 'trian'. Did you mean 'train'?"),
    (['copy-config', 'camvid'], 'attnfd copy-config NAME FILE.py'),
    (['copy-config', 'camvd', 'a.py'], "Did you mean 'camvid'?"),
    (['copy-config', 'camvid', 'a.yaml'], 'a.yaml: a config is a Python file'),
    (['copy-config', 'camvid', 'gone/a.py'], 'No such file or directory'),
    (['configs', 'all'], 'Usage: attnfd configs'),
  ],
)
def test_a_wrong_command_is_one_line(run, tmp_path, arguments, words):
  code, out, error = run(*arguments)
  assert (code, out) == (2, '')
  (line,) = error.splitlines()
  assert line.startswith('error: ') and words in line
  assert not list(tmp_path.iterdir())


def test_help_lists_every_command(run):
  code, out, _ = run()
  assert code == 0
  modules = {path.stem for path in (ROOT / 'attnfd_jax').glob('*.py')}
  commands = [line.split()[0] for line in out.splitlines()[2:]]
  named = {attnfd._MODULES.get(name) for name in commands} - {None}
  uses_flags = {
    name
    for name in modules
    if '\n  cli.run(' in (ROOT / 'attnfd_jax' / f'{name}.py').read_text()
  }
  assert named == uses_flags
