# SPDX-License-Identifier: Apache-2.0
"""Every command of README and docs, run as it is written, on tiny data.

A command runs in a folder of its own that has what the reader has: `PATH`,
`IMAGES`, `data/camvid`, `runs/camvid/distill` and so on are there under these
very names. `adapted` is all that is changed in a command: its size. A command
that needs something else fails here until it has it.
"""

import contextlib
import functools
import json
import pathlib
import re
import runpy
import shlex
import sys
import warnings

from absl import flags
from absl.testing import flagsaver
from data import fixtures
import jax
import numpy as np
from PIL import Image
import pytest
import small_run

from attnfd_jax import cli
from attnfd_jax.benchmarks import train
from attnfd_jax.config import default_config, resolve
from attnfd_jax.exporting import agreement, fresh_process
from attnfd_jax.models import deeplab
from attnfd_jax.models import network as networks
from attnfd_jax.models.resnet import ResNet
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.runs import conversion

pytestmark = [pytest.mark.commands, pytest.mark.slow]
ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
# First words of commands that are not run here, and why.
NOT_RUN = {
  'pip install': 'needs a network; .ci/run and CI install the package',
  'git clone': 'needs a network',
  'pytest': 'this is pytest',
  'srun': 'needs Slurm',
  'gcloud': 'needs a TPU slice',
  'attnfd ': 'tests/test_named_configs.py and tests/test_wheel.py',
  'python -m webbrowser ': 'opens a window',
  'python experiments/': 'minutes to hours, PyTorch or a clone of theirs',
}
AND = re.compile(r' && (?=(?:[^"]*"[^"]*")*[^"]*$)')  # Not in quotes.
# Parts of ours that run in other tests, as they take long.
ELSEWHERE_RUN = {
  'configs/quickstart.py': '.ci/run and the job smoke of CI, as it stands',
  # Networks from files of PyTorch must be real ones, and these compile slowly.
  '--config.student.pretrained=': 'tests/test_convert.py',
  '.py:imagenet': 'tests/test_config.py and tests/test_weights.py',
  '--weights=int8': 'tests/test_export.py',
  # Needs the scores of a finished stage.
  '--format=folder': 'tests/test_hand_over.py',
  # A random network loses more in int8 than is allowed.
  '--quantize=int8': 'tests/test_quantized.py',
  # Needs PyTorch, and a file that the page has.
  '--config.teacher.factory=teacher.py:make': 'tests/teachers/'
  'test_any_teacher_docs.py',
  # Two processes that meet.
  '--coordinator=': 'tests/training/test_processes.py',
}
# Flags whose value is a name.
NAMED = ('checkpoint', 'config.data.root', 'input', 'output', 'workdir')
OURS = 'python -m attnfd_jax.'
# Overrides of `main` that make it small.
TINY = (
  '--config.batch_size=4',
  '--config.mesh.data=1',
  '--config.num_epochs=1',
  '--config.teacher.num_epochs=1',
  '--config.data.base_size=32',
  '--config.data.crop_size=(32, 32)',
  '--config.eval.every_epochs=9',
  '--config.eval.num_pictures=0',
  '--config.eval.protocol=native',
  '--config.eval.short_side=0',
  '--config.optim.name=sgd',
  '--config.optim.lr=0.01',
  '--config.optim.weight_decay=0',
  '--config.distill.attnfd.weight=0.3',
  '--config.student.width_multiplier=1',
  '--config.teacher.width_multiplier=1',
  '--config.optim.warmup_epochs=0',
  '--config.teacher.min_miou=0',  # Teachers are random.
)
# Of a DeepLabV3+ that compiles fast, as in teacher.pth.tar.
NARROW = {
  'width_multiplier': 0.125,
  'aspp_channels': 16,
  'decoder_channels': 16,
  'low_level_channels': 8,
}
# Of the file that `evaluate` and `predict` take as --model.
STUDENT = ('--output=student.onnx', '--uint8', '--argmax')
# Other arguments that make a verb small.
SMALL = {
  'benchmark': (
    *('--rounds=1', '--seconds=0.01', '--steps=1'),
    *('--batch=4', '--height=32', '--width=32'),
  ),
}


def lines_of_shell(text):
  """(number, line) of the fences of a page, continued lines joined."""
  fence, start, joined = None, 0, ''
  for number, line in enumerate(text.splitlines(), 1):
    if line.startswith('```'):
      fence = line if fence is None else None
    elif fence in ('```', '```sh'):
      start = start if joined else number
      joined += line
      if joined.endswith('\\'):
        joined = joined[:-1]
        continue
      for part in AND.split(joined):
        yield start, ' '.join(part.split())
      joined = ''


def find_commands():
  """{command: 'page:line'} of those that have to be run.

  One whose arguments are all in another one, but for what folders and files
  are called, is run with that one.
  """
  found = {}
  for page in PAGES:
    for number, line in lines_of_shell(page.read_text()):
      if line.startswith(OURS) and not any(x in line for x in ELSEWHERE_RUN):
        parts = re.sub(rf' --({"|".join(NAMED)})=\S+', r' --\1', line).split()
        found.setdefault(frozenset(parts), (line, f'{page.name}:{number}'))
  return dict(
    x for parts, x in found.items() if not any(parts < y for y in found)
  )


COMMANDS = find_commands()


def test_all_lines_are_known():
  # A line of shell that is neither run nor in NOT_RUN would go unseen.
  words = 'python|pip|git|curl|wget|srun|gcloud|pytest|mkdocs|attnfd'
  words = re.compile(rf'({words})\b')
  for page in PAGES:
    for number, line in lines_of_shell(page.read_text()):
      known = line.startswith((OURS, *NOT_RUN))
      assert known or not words.match(line), f'{page.name}:{number}: {line}'
  # And there is something to run at all.
  verbs = {command.removeprefix(OURS).split()[0] for command in COMMANDS}
  assert verbs >= {'main', 'evaluate', 'predict', 'export', 'check_data'}
  text = ''.join(page.read_text() for page in PAGES)
  assert all(part in text for part in (*NOT_RUN, *ELSEWHERE_RUN))


def adapted(command):
  """Arguments of `command`, the verb first, in a size for tests."""
  verb, *arguments = shlex.split(command.removeprefix(OURS))
  given = {argument.split('=')[0] for argument in arguments}
  small = list(SMALL.get(verb, ()))
  if verb in ('main', 'compare'):
    small += TINY
    small += [f'{flag}=2' for flag in given if flag.endswith('.labeled_limit')]
    config = next(x for x in arguments if x.startswith('--config='))
    if verb == 'compare':
      small += ['--methods=kd', '--seeds=0']
      small.append('--config.teacher.checkpoint=runs/a/teacher')
    elif '--config.stages' not in given:
      # Of classes that the teacher in `reader` knows; else one stage will do.
      stage = 'distill' if 'camvid' in config else 'student'
      small.append(f'--config.stages=({stage!r},)')
      if '--config.teacher.checkpoint' not in given:
        small.append('--config.teacher.checkpoint=runs/a/teacher')
  return [verb, *arguments, *small]  # The last of two counts.


@contextlib.contextmanager
def flags_of_one_verb():
  """`main` may have been imported; other verbs have flags of these names."""
  found = flags.FLAGS.flags_by_module_dict().get('attnfd_jax.main', [])
  # One that was defined again is in the list again.
  others = {flag.name: flag for flag in found}.values()
  for flag in others:
    delattr(flags.FLAGS, flag.name)
  try:
    with flagsaver.flagsaver():
      yield
  finally:
    for flag in others:
      flags.DEFINE_flag(flag, module_name='attnfd_jax.main')


def run(arguments):
  """`python -m attnfd_jax.VERB ...` in this process, without its guard."""
  verb, *arguments = arguments
  path = str(ROOT / 'attnfd_jax' / f'{verb}.py')

  def start(main, *, required=(), positional=False):
    with warnings.catch_warnings():
      # ml_collections loads configs by a deprecated way.
      warnings.filterwarnings('ignore', 'the load_module', DeprecationWarning)
      argv = flags.FLAGS(sys.argv)
    for choices in required:
      assert any(flags.FLAGS[name].value for name in choices.split('|'))
    assert positional or len(argv) == 1, f'not a flag: {argv[1:]}'
    main(*argv[1:])

  with pytest.MonkeyPatch.context() as patch, flags_of_one_verb():
    patch.setattr(cli, 'run', start)
    patch.setattr(sys, 'argv', [path, *arguments])
    runpy.run_path(path, run_name='__main__')


def random_files(folder):
  """teacher.pth.tar, resnet18.pth, and the stage that `convert` makes."""
  network = deeplab.DeepLabV3Plus('resnet18', 11, **NARROW)
  network = network.clone(in_path_attention=True)
  shapes = networks.abstract_variables(network)
  variables = train.random_variables(shapes, 0)
  tensors = torch_models.export_torch(variables, backbone='resnet18')
  torch_files.write_torch(folder / 'teacher.pth.tar', {'state_dict': tensors})
  trunk = {
    name.removeprefix('backbone.'): value
    for name, value in tensors.items()
    if name.startswith('backbone.') and 'cbam' not in name
  }
  torch_files.write_torch(folder / 'resnet18.pth', trunk)
  config = json.loads(resolve(default_config()).to_json_best_effort())
  conversion.import_stage(
    folder / 'teacher.pth.tar', folder / 'converted', config=config
  )


def two_classes(root):
  """The folder of images that the pages call `PATH`, of two classes."""
  fixtures.make_folder(root, 'index')
  for path in (root / 'masks').rglob('*.png'):
    ids = np.array(Image.open(path))
    Image.fromarray(np.where(ids == 2, 1, ids).astype(np.uint8)).save(path)


def run_here(kind, path, images, options=None):
  """What `export` has a fresh process do."""
  run = fresh_process.LOADERS[kind](path, **options or {})
  return fresh_process.measure(run, images)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """Networks and measurements that compile and run fast."""
  with (
    small_run.kept_programs(tmp_path_factory.mktemp('programs')),
    pytest.MonkeyPatch.context() as patch,
  ):
    # As many blocks as make a ResNet-18 recognized.
    blocks = functools.partial(ResNet, (1, 1, 2, 1), False)
    patch.setitem(deeplab.BACKBONES, 'resnet18', blocks)
    patch.setitem(train.PEAK_SIZE, 'cpu', 64)
    # A fresh process: tests/test_export.py.
    patch.setattr(agreement, 'run_fresh', run_here)
    # Programs that run once are not worth optimizing.
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def reader(small, tmp_path_factory):
  """A folder with what a reader of the pages has."""
  folder = tmp_path_factory.mktemp('reader')
  (folder / 'configs').symlink_to(ROOT / 'configs')
  (folder / 'PATH').mkdir()
  fixtures.make_camvid(folder / 'PATH')
  two_classes(folder / 'PATH')
  (folder / 'data').mkdir()
  (folder / 'data' / 'camvid').symlink_to(folder / 'PATH')
  fixtures.make_cityscapes(folder / 'data' / 'cityscapes')
  (folder / 'IMAGES').mkdir()
  image, _ = fixtures.draw(0, 3)
  fixtures.write(folder / 'IMAGES' / 'a.png', image)
  (folder / 'IMAGE_OR_FOLDER').symlink_to(folder / 'IMAGES')
  random_files(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    text = (ROOT / 'docs' / 'own_data.md').read_text()
    drawing = re.search(r'^```python\n(.*?)^```$', text, re.S | re.M)[1]
    exec(compile(drawing, 'own_data.md', 'exec'), {})
    stages = "--config.stages=('teacher', 'distill')"
    run(adapted(f'{OURS}main --config=configs/camvid.py {shlex.quote(stages)}'))
    run(adapted(f'{OURS}main --config=configs/cityscapes.py'))
    runs = folder / 'runs' / 'cityscapes'
    (runs / 'distill').symlink_to(runs / 'student')
    for name in ('a', 'b', 'camvid_cpu', 'camvid_cpu_1', 'my_images'):
      (folder / 'runs' / name).symlink_to(folder / 'runs' / 'camvid')
    (folder / 'runs' / 'teacher').symlink_to(folder / 'converted')
    run(['prepare_data', '--config=configs/cityscapes.py', '--target=DIR'])
    run(['export', '--checkpoint=converted', '--format=onnx', *STUDENT])
  return folder


def prepare(reader, folder, arguments):
  """Links what is in `reader` into `folder`, but for what will be written."""
  verb, *arguments = arguments
  (folder / 'runs').mkdir()
  for path in (*reader.iterdir(), *(reader / 'runs').iterdir()):
    target = folder / path.relative_to(reader)
    if not target.exists():
      target.symlink_to(path)
  written = {'--target', '--workdir', '--output', '--submission'}
  paths = [x.split('=')[1] for x in arguments if x.split('=')[0] in written]
  if verb == 'main' and not any('--workdir' in x for x in arguments):
    config = next(x for x in arguments if x.startswith('--config='))
    name = config.removesuffix('.py').replace('.py:', '_')
    paths.append(f'runs/{name.split("/")[-1]}')
  for path in paths:
    (folder / path).unlink(missing_ok=True)


@pytest.mark.parametrize('command', COMMANDS, ids=COMMANDS.values())
def test_command(reader, tmp_path, monkeypatch, command):
  arguments = adapted(command)
  prepare(reader, tmp_path, arguments)
  monkeypatch.chdir(tmp_path)
  if 'runs/teacher' in command or arguments[0] in ('convert', 'export'):
    for path in (tmp_path / 'runs').iterdir():
      if path.name != 'teacher':
        path.unlink()
        path.mkdir()
        (path / 'distill').symlink_to(reader / 'converted')
  before = {*tmp_path.rglob('*')}
  run(arguments)
  if arguments[0] not in ('doctor', 'benchmark', 'check_data', 'evaluate'):
    assert {*tmp_path.rglob('*')} - before
