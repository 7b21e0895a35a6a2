# SPDX-License-Identifier: Apache-2.0
"""examples/: trained, resumed, evaluated, predicted, exported, refused."""

import json
import pathlib
import shutil

from etils import epath
import numpy as np
from PIL import Image
import pytest
import small_run
import tiny_run

import attnfd_jax
from attnfd_jax.errors import InputError
from attnfd_jax.inference import evaluation
from attnfd_jax.training import experiment

EXAMPLES = pathlib.Path(__file__).parents[1] / 'examples'


def make_config(tmp_path):
  """The small run, with examples copied so that a test may change them."""
  config = small_run.make_config()
  config.teacher.in_path_attention = False
  config.optim.ema_decay = 0.0
  for path in EXAMPLES.glob('*.py'):
    shutil.copy(path, tmp_path)
  return config


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A distilled U-Net under the teacher of a function, by our own method."""
  folder = tmp_path_factory.mktemp('examples')
  config = make_config(folder)
  config.stages = ('student', 'distill')
  config.student.network = f'{folder}/unet.py:UNet'
  config.student.options = {'width': 4}
  config.teacher.factory = f'{folder}/teacher.py:make'
  config.distill.method = 'kd'
  experiment.train(config, folder / 'run')
  return config, folder / 'run'


def test_three_examples_together(trained):
  _, run = trained
  result = json.loads((run / 'distill' / 'result.json').read_text())
  assert result['network'] == 'UNet'
  assert result['teacher']['name'] == 'by color'
  assert result['teacher']['source'].endswith('teacher.py:make')
  assert result['teacher']['miou'] > 0.1
  records = small_run.read_lines(run / 'distill')
  assert records[0]['kind'] == 'teacher'
  assert all('kd' in x for x in records if x['kind'] == 'train')
  info = json.loads((run / 'distill' / 'config.json').read_text())
  kept = sorted(x.name for x in (run / 'distill' / 'code').glob('*/*.py'))
  assert kept == ['teacher.py', 'unet.py'] and len(info['code']) == 2


def test_it_resumes_bit_for_bit(trained, tmp_path, monkeypatch):
  config, run = trained
  evaluate, calls = evaluation.evaluate, []

  def interrupt(*arguments, **options):
    calls.append(arguments)
    if len(calls) == 6:  # The second one of `distill`, after its teacher's.
      raise KeyboardInterrupt
    return evaluate(*arguments, **options)

  with monkeypatch.context() as patch:
    patch.setattr(evaluation, 'evaluate', interrupt)
    with pytest.raises(KeyboardInterrupt):
      experiment.train(config, tmp_path / 'run')
  experiment.train(config, tmp_path / 'run')
  log = (tmp_path / 'run' / 'distill' / 'log.txt').read_text()
  assert 'resumed from step 2' in log
  small_run.assert_same_run(tmp_path / 'run' / 'distill', run / 'distill')


def test_a_file_that_has_changed_is_not_resumed_with(trained, tmp_path):
  config, run = trained
  shutil.copytree(run, tmp_path / 'run')
  (tmp_path / 'run' / 'distill' / 'result.json').unlink()
  path = pathlib.Path(config.student.network.rpartition(':')[0])
  before = path.read_text()
  try:
    path.write_text(before + '# Another.\n')
    with pytest.raises(InputError, match='unet.py has changed since'):
      experiment.train(config, tmp_path / 'run')
  finally:
    path.write_text(before)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp('images')
  generator = np.random.default_rng(0)
  for i in range(2):
    pixels = generator.integers(0, 256, (40, 56, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{i}.png')
  return folder


def test_a_folder_runs_no_code_unless_allowed(trained, images, tmp_path):
  _, run = trained
  stage = run / 'distill'
  # Looked at by somebody else: the original files are not there.
  for verb, *options in (
    ('evaluate',),
    ('predict', f'--input={images}', f'--output={tmp_path / "out"}'),
    ('export', f'--output={tmp_path / "a.stablehlo"}'),
  ):
    done = tiny_run.run_verb(verb, f'--checkpoint={stage}', *options)
    assert done.returncode == 2, verb
    assert done.stderr.count('\n') == 1 and '--allow_code' in done.stderr
    done = tiny_run.run_verb(
      verb, f'--checkpoint={stage}', *options, '--allow_code'
    )
    assert done.returncode == 0, done.stderr
  assert len(list((tmp_path / 'out').glob('*.png'))) == 4
  network, variables, _ = attnfd_jax.load(stage, allow_code=True)
  image = np.zeros((1, 32, 32, 3), np.float32)
  out = network.apply(variables, image, train=False)
  assert out['logits'].shape == (1, 32, 32, 9)


def test_a_copy_that_was_changed_is_not_run(trained, tmp_path, monkeypatch):
  _, run = trained
  shutil.copytree(run / 'student', tmp_path / 'student')
  (path,) = (tmp_path / 'student' / 'code').glob('*/unet.py')
  local = type(epath.Path(path))
  read = local.read_bytes

  def read_and_change(file):
    source = read(file)
    if file.name == path.name:
      path.write_text('raise SystemExit')
    return source

  # What runs is what was checked, whatever the file is by then.
  monkeypatch.setattr(local, 'read_bytes', read_and_change)
  attnfd_jax.load(tmp_path / 'student', allow_code=True)
  assert path.read_text() == 'raise SystemExit'
  with pytest.raises(InputError, match='not the file that was recorded'):
    attnfd_jax.load(tmp_path / 'student', allow_code=True)


@pytest.mark.parametrize('kind', ['onnx', 'pth', 'safetensors'])
def test_formats_of_other_networks(trained, tmp_path, kind):
  _, run = trained
  output = tmp_path / f'student.{kind}'
  done = tiny_run.run_verb(
    'export',
    f'--checkpoint={run / "distill"}',
    f'--format={kind}',
    f'--output={output}',
    '--allow_code',
  )
  if kind == 'safetensors':
    assert done.returncode == 0, done.stderr
    assert output.is_file()
  else:
    assert done.returncode == 2
    assert 'DeepLabV3Plus' in done.stderr and 'stablehlo' in done.stderr
    assert done.stderr.count('\n') == 1 and not output.exists()


def test_the_method_with_a_memory(tmp_path):
  config = make_config(tmp_path)
  config.stages = ('teacher', 'distill')
  config.distill.method = f'{tmp_path}/masked_memory.py:MaskedMemory'
  config.distill.options = {'hidden': 0.25, 'size': 8}
  experiment.train(config, tmp_path / 'run')
  last = small_run.read_lines(tmp_path / 'run' / 'distill')[-2]
  assert last['maskedmemory_masked'] > 0 and last['maskedmemory_memory'] > 0
  states = small_run.stored_states(tmp_path / 'run' / 'distill')
  memory = states[4]['collections']['distiller']['memory']
  bank = memory['methods_maskedmemory']['bank']
  # Four images in each of four steps, the newest first; eight are kept.
  assert bank.shape[0] == 8
  np.testing.assert_allclose(np.linalg.norm(bank, axis=-1), 1, rtol=1e-3)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'hiden': 0.5}, "unexpected keyword argument 'hiden'"),
    ({'tap': 'aspp'}, "KeyError|'aspp'"),
  ],
)
def test_wrong_options_of_a_method_are_refused(tmp_path, options, message):
  config = make_config(tmp_path)
  config.distill.method = f'{tmp_path}/masked_memory.py:MaskedMemory'
  config.distill.options = options
  with pytest.raises(InputError, match=message):
    experiment.train(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
