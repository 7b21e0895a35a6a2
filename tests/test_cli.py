# SPDX-License-Identifier: Apache-2.0
"""Commands as users have them: bad input is one line and exit code 2."""

import concurrent.futures
import os
import subprocess
import sys
import warnings

from absl import flags
import jax
import pytest
import tiny_run

from attnfd_jax import cli
from attnfd_jax.config import leaves, resolve
from attnfd_jax.errors import InputError

CONFIG = f'--config={tiny_run.ROOT}/configs/camvid.py'
CHECKS = """
import sys
import attnfd_jax
found = {'cv2', 'grain', 'orbax', 'matplotlib', 'absl.app'} & {*sys.modules}
assert not found, found
import attnfd_jax.main
from attnfd_jax.inference import image_files, scoring
from attnfd_jax.config import default_config, resolve
from attnfd_jax.data.sources import load_dataset
config = resolve(default_config())
load_dataset(config.data).splits['val'][0]
found = {'tensorflow', 'torch', 'pandas'} & {*sys.modules}
assert not found, found
import jax
assert not jax._src.xla_bridge._backends, 'importing started a backend'
"""
MAIN = ('-m', 'attnfd_jax.main')
# Arguments, and words of the one line.
BAD = {
  'key': (
    (CONFIG, '--config.optim.head_lr=1'),
    ('No key head_lr in this group of --config.',),
  ),
  'path': (
    ('--config=configs/camvid.py',),
    ('camvid.py', '(--config)', 'by name, as in --config=camvid'),
  ),
  'name': (
    ('--config', 'camvidd:cpu'),
    ("Unknown config 'camvidd'. Did you mean 'camvid'? Have: camvid, city",),
  ),
  'variant': (
    (f'{CONFIG}:degub',),
    ("Unknown variant 'degub'; use debug, imagenet, cpu_imagenet, cpu or ",),
  ),
  'value': ((CONFIG, '--config.optim.lr=fast'), ('optim.lr', 'fast')),
  'flag': ((CONFIG, '--workdr=x'), ("'workdr'", 'Did you mean: workdir')),
  'missing': (
    (),
    ('--config is missing: NAME[:VARIANT] or FILE.py[:VARIANT]',),
  ),
  'type': (
    (CONFIG, '--config.batch_size=8.0'),
    ('--config.batch_size=8.0: expected a whole number, such as 8.',),
  ),
  'own type': (
    (CONFIG, '--num_processes=all'),
    ('--num_processes=all: expected a whole number, such as 8.',),
  ),
  'order': (
    ('--config.optim.lr=1', CONFIG),
    ('--config=FILE must come before --config.optim.lr=1.',),
  ),
  'twice': (
    (CONFIG, CONFIG, '--config.optim.lr=1'),
    ('--config is given twice; leave one of them out.',),
  ),
  'group': (
    (CONFIG, '--config.data.root=x', '--config.data=x'),
    ('--config.data would replace --config.data.root; leave one',),
  ),
  'empty': (
    ('--config=',),
    ('--config= is empty; name a config, as in --config=quickstart',),
  ),
  'home': (('--config=~/gone.py',), ('/gone.py', '(--config)')),
  'word': ((CONFIG, 'train'), ("Unknown argument 'train'; flags start",)),
}
GOOD = {
  'debug': (*MAIN, CONFIG, '--debug', '--config.data.root=gone'),
  'by name': (*MAIN, '--config', 'camvid:cpu', '--config.data.root=gone'),
  'help': (*MAIN, '--help'),
  'imports': ('-c', CHECKS),
}
COMMANDS = GOOD | {name: (*MAIN, *case[0]) for name, case in BAD.items()}


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """Name -> finished process; two at a time, for imports take seconds."""
  folder = tmp_path_factory.mktemp('cli')
  environment = os.environ | {
    'PYTHONPATH': str(tiny_run.ROOT),
    # ml_collections loads configs by a deprecated way.
    'PYTHONWARNINGS': 'error,ignore:the load_module():DeprecationWarning',
    'XDG_CACHE_HOME': str(tmp_path_factory.mktemp('cache')),
  }

  def run(arguments):
    return subprocess.run(
      [sys.executable, *arguments],
      capture_output=True,
      text=True,
      cwd=folder,
      env=environment,
      check=False,
    )

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    processes = list(pool.map(run, COMMANDS.values()))
  # Nothing of this leaves a trace.
  assert not list(folder.iterdir())
  return dict(zip(COMMANDS, processes, strict=True))


@pytest.mark.parametrize(
  ('error', 'line'),
  [
    # As ml_collections 1 and absl raise them.
    (
      AttributeError(KeyError('\'lrr\'\nDid you mean "lr" instead of "lrr"?')),
      'No key lrr. Did you mean "lr" instead of "lrr"?',
    ),
    (
      KeyError('\'optimm\'\nDid you mean "optim" instead of "optimm"?'),
      'No key optimm. Did you mean "optim" instead of "optimm"?',
    ),
    (
      AttributeError(KeyError("'zzz'")),
      'No key zzz in this group of --config.',
    ),
    (
      ValueError("Unknown command line flag 'config.x.lr'"),
      "Unknown command line flag 'config.x.lr'",
    ),
    (ValueError('two\n  lines'), 'two lines'),
    (
      TypeError(
        "Could not override field 'num_epochs' (reference). 5 is of original "
        "type <class 'str'> and cannot be casted to type <class 'float'>"
      ),
      'num_epochs=5 in the file of --config is str; it must be float.',
    ),
    (
      KeyError(
        'Key "lrr" does not exist and cannot be added since the config is '
        'locked. Other fields present: "{}"\nDid you mean "lr" instead of '
        '"lrr"?'
      ),
      'No key lrr in this group of --config. Did you mean "lr" instead of '
      '"lrr"?',
    ),
    (ValueError(), 'ValueError'),
  ],
  ids=[
    *('near', 'group', 'far', 'flag', 'lines', 'file type', 'file key', 'empty')
  ],
)
def test_one_line(error, line):
  assert cli._one_line(error) == line


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line(done, name):
  process = done[name]
  assert process.returncode == 2, process.stderr
  assert process.stdout == ''
  (line,) = process.stderr.splitlines()
  assert line.startswith('error: ')
  for word in BAD[name][1]:
    assert word in line


def test_debug_shows_where(done):
  process = done['debug']
  assert process.returncode == 2
  lines = process.stderr.splitlines()
  assert 'Traceback (most recent call last):' in lines
  assert lines[-1].startswith('error: gone: no such folder')
  assert '--config.data.root=PATH' in lines[-1]


def test_a_config_goes_by_name(done):
  process = done['by name']
  assert process.returncode == 2
  assert process.stderr.startswith('error: gone: no such folder')


def test_help_names_the_flags(done):
  process = done['help']
  assert process.returncode in (0, 1)  # absl exits with 1.
  assert '--config' in process.stdout and '--workdir' in process.stdout
  assert process.stderr == ''


def test_imports_are_light(done):
  assert done['imports'].returncode == 0, done['imports'].stderr


@pytest.fixture
def parse(monkeypatch):
  """A command's parsing of its arguments, in this process; returns flags."""
  values = flags.FlagValues()
  monkeypatch.setattr(flags, 'FLAGS', values)
  cli.define_config()
  flags.DEFINE_integer('threads', None, '', 1, flag_values=values)
  flags.DEFINE_float('fps', None, '', flag_values=values)
  flags.DEFINE_bool('flip', False, '', flag_values=values)
  flags.DEFINE_string('workdir', None, '', flag_values=values)

  def parse(*arguments):
    monkeypatch.setattr(sys, 'argv', ['main.py', CONFIG, *arguments])
    with warnings.catch_warnings(action='ignore'):  # Of loading a config.
      rest = cli._parse(sys.argv)
    return rest[1:], values

  return parse


def parsed(parse, *arguments):
  """The value of the key that the last of the arguments sets."""
  _, values = parse(*arguments)
  key = arguments[-1].partition('=')[0].replace('--no', '--')
  name = key.removeprefix('--config.')
  if name == key:
    return values[key[2:]].value
  return leaves(resolve(values.config))[name]


@pytest.mark.parametrize(
  ('arguments', 'value'),
  [
    ('--config.data.cache', True),
    ('--config.data.cache=true', True),
    ('--config.data.cache=1', True),
    ('--config.data.cache=yes', True),
    ('--config.data.cache=ON', True),
    ('--config.data.cache=no', False),
    ('--config.data.cache=off', False),
    ('--noconfig.data.cache', False),
    ('--flip=no', False),
    ('--flip=on', True),
    ('--config.distill.teacher_dropout=None', False),
    ('--config.optim.lr=1e-3', 0.001),
    ('--config.optim.lr=1', 1.0),
    ('--config.num_epochs=1e2', 100.0),
    ('--config.student.lr=None', 0.05),
    ('--config.optim.clip_norm=None', None),
    ('--config.optim.clip_norm=none', None),
    ('--config.seed=0x10', 16),
    ('--config.data.crop_size=(64,64)', (64, 64)),
    ('--config.data.crop_size=[64, 64]', (64, 64)),
    ('--config.data.crop_size=64,64', (64, 64)),
    ('--config.data.crop_size= 64,64 ', (64, 64)),
    ("--config.data.class_names=['a','b']", ('a', 'b')),
    ('--config.data.class_names=', ()),
    ('--config.stages=student', ('student',)),
    ('--config.data.palette=((0,0,0),(255,0,0))', ((0, 0, 0), (255, 0, 0))),
    ('--config.data.root=', ''),
    ('--config.num_epochs=3 --config.num_epochs=4', 4.0),
    ('--config.data.cache=no --config.data.cache=yes', True),
    ('--config.data.crop_size=64,64 --config.data.crop_size=32,48', (32, 48)),
    ("--config.stages=('student',) --config.stages=distill", ('distill',)),
    ('--config.data.class_names=a --config.data.class_names=', ()),
    ('--config.data.palette=((1,2,3),) --config.data.palette=()', ()),
    ('--config.data.root=a --config.data.root=b', 'b'),
  ],
  ids=str,
)
def test_values_as_people_type_them(parse, arguments, value):
  arguments = arguments.replace(' --', '\n--').split('\n')
  assert parsed(parse, *arguments) == value


@pytest.mark.parametrize(
  ('argument', 'expected'),
  [
    ('--config.data.cache=maybe', 'True or False'),
    ('--config.data.cache=2', 'True or False'),
    ('--config.data.flip=yes', 'a number, such as 0.01'),
    ('--config.data.flip=', 'a number, such as 0.01'),
    ('--config.optim.lr=1/100', 'a number, such as 0.01'),
    ('--config.optim.lr=0,01', 'a number, such as 0.01'),
    ('--config.optim.lr=auto', 'a number, such as 0.01'),
    ('--config.batch_size=', 'a whole number, such as 8'),
    ('--config.batch_size=1e2', 'a whole number, such as 8'),
    ('--config.data.threads=auto', 'a whole number, such as 8'),
    ('--threads=no', 'a whole number of 1 or more, such as 8'),
    ('--threads=0', 'a whole number of 1 or more, such as 8'),
    ('--fps=fast: 3', 'a number, such as 0.01'),
    ('--flip=maybe', 'True or False'),
    ('--config.data.palette=#ff0000,#00ff00', 'values between commas, such'),
    ('--config.data.crop_size=64 64', 'values between commas, such as'),
    ('--config.data.crop_size={64,65}', 'values between commas, such as'),
    ('--config.data.class_names=(a, b)', 'values between commas, such as'),
    ("--config.data.class_names=('a' 'b", 'values between commas, such as'),
    ('--config.student=resnet18', 'a dict, or a key of the group, as in --con'),
    ('--config.student.options=width', 'a dict, or a key of the group'),
  ],
  ids=str,
)
def test_values_of_another_type_get_our_words(
  parse, capsys, argument, expected
):
  with pytest.raises(SystemExit) as stopped:
    parse(argument)
  assert stopped.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'error: {argument}: expected {expected}')


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--config.num_epochs=None', 'config.num_epochs=None; leave it out for'),
    ('--config.data.cache=None', 'config.data.cache=None; leave it out for'),
    ('--config.data.class_names=None', 'config.data.class_names=None; leave'),
    ('--config.loggers=None', 'config.loggers=None; leave it out for its def'),
    ('--config.optim.lr=0', 'config.optim.lr=0.0 must be 1e-30 or more.'),
    ('--config.student.lr=0', 'config.student.lr=0.0 must be 1e-30 or more.'),
    ('--config.data.crop_size=64', 'config.data.crop_size=(64,) must be (hei'),
    ('--config.data.crop_size=64x64', "config.data.crop_size=('64x64',) must"),
    ('--config.stages=a,b', "config.stages=('a,b',) must be chosen from"),
    ('--config.student.backbone=None', "Unknown backbone 'None'. Have: resn"),
    ('--config.teacher.network=None', "config.teacher.network='None' must be"),
    ('--config.student={}', 'config.student.aspp_channels is missing; set sin'),
    (
      "--config.data={'root': 'x'}",
      'config.data.balanced is missing; set sing',
    ),
  ],
  ids=str,
)
def test_what_a_type_allows_and_its_key_does_not(parse, argument, message):
  with pytest.raises(InputError) as refused:
    resolve(parse(argument)[1].config)
  assert message in str(refused.value)


@pytest.mark.parametrize(
  ('arguments', 'value'),
  [
    (('--workdir=~/a b/c',), 'HOME/a b/c'),
    (('--workdir', '~/a'), 'HOME/a'),
    (('--workdir=~',), 'HOME'),
    (('--workdir=a~b',), 'a~b'),
    (('--workdir=./~/a',), './~/a'),
    (('--config.data.root=~/d',), 'HOME/d'),
    (('--config.teacher.checkpoint=~/a.pth',), 'HOME/a.pth'),
    (('--config.student.pretrained=~/r.pth',), 'HOME/r.pth'),
    (('--config.student.network=~/n.py:Net',), 'HOME/n.py:Net'),
    (('--config.data.decoded_cache=~/c',), 'HOME/c'),
  ],
  ids=str,
)
def test_home_in_flags(parse, monkeypatch, arguments, value):
  monkeypatch.setenv('HOME', '/home/me')
  _, values = parse(*arguments)
  key = arguments[0].partition('=')[0]
  found = values[key[2:]].value
  assert found == value.replace('HOME', '/home/me')


def test_home_in_other_arguments(parse, monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  rest, _ = parse('~/runs/a', 'b~c')
  assert rest == ['/home/me/runs/a', 'b~c']


@pytest.mark.parametrize('own', [False, True], ids=['XDG', 'JAX'])
def test_a_cache_that_cannot_be_written_is_one_line(
  tmp_path, monkeypatch, capsys, own
):
  names = ('jax_compilation_cache_dir', 'jax_enable_compilation_cache')
  before = {name: getattr(jax.config, name) for name in names}
  monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  try:
    given = str(tmp_path / 'file' / 'mine') if own else None
    jax.config.update('jax_compilation_cache_dir', given)
    text = "Error writing persistent compilation cache entry for 'jit_f': "
    with pytest.warns(UserWarning, match='something else') as others:
      cli.enable_compilation_cache()
      for _ in range(3):
        warnings.warn(f'{text}NotADirectoryError: no folder', stacklevel=1)
      warnings.warn('something else', stacklevel=1)
    assert not jax.config.jax_enable_compilation_cache
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
  found = capsys.readouterr().err
  assert found.count('(NotADirectoryError: no folder)') == 1
  variable = 'JAX_COMPILATION_CACHE_DIR' if own else 'XDG_CACHE_HOME'
  assert f'set {variable} to a writable folder.' in found
  assert len(others) == 1
