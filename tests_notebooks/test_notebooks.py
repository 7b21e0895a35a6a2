# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, at reduced size, on a CPU.

  pytest -o addopts= tests_notebooks

Not in tests/: plain pytest needs neither the minutes nor Jupyter, and what
conftest.py does to jax there no reader of a notebook has. CONTRIBUTING.md says
how to run them with the packages of Colab's image.
"""

import json
import os
import pathlib
import shutil
import time

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 600  # Seconds a notebook, on two cores.
CLASSES = 'sky building road marking pavement tree pole car person'.split()
SHORT = (
  '--config.num_epochs=1',
  '--config.teacher.num_epochs=1',
  '--config.eval.every_epochs=1',
  *(
    f'--config.{role}.{key}=16'
    for role in ('teacher', 'student')
    for key in ('aspp_channels', 'decoder_channels', 'low_level_channels')
  ),
)
SMALL = (
  *SHORT,
  '--config.student.width_multiplier=0.125',
  '--config.teacher.width_multiplier=0.25',
)


@pytest.fixture
def execute(tmp_path):
  """(name, checks, **parameters) -> (outputs of its cells, seconds)."""

  def execute(name, checks='', **parameters):
    notebook = nbformat.read(ROOT / 'experiments' / name, as_version=4)
    (given,) = [
      i
      for i, cell in enumerate(notebook.cells)
      if 'parameters' in cell.metadata.get('tags', ())
    ]
    for key in parameters:
      assert f'{key} =' in notebook.cells[given].source
    values = '\n'.join(f'{k} = {v!r}' for k, v in parameters.items())
    notebook.cells.insert(given + 1, nbformat.v4.new_code_cell(values))
    notebook.cells.append(nbformat.v4.new_code_cell(checks))
    environment = {
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'programs'),
      'TMPDIR': str(tmp_path),
      # Most of the time goes into compiling.
      'XLA_FLAGS': '--xla_backend_optimization_level=0',
    }
    start = time.monotonic()
    nbclient.NotebookClient(
      notebook,
      timeout=LIMIT,
      resources={'metadata': {'path': str(tmp_path)}},
    ).execute(env=os.environ | environment)
    seconds = time.monotonic() - start
    print(f'{name}: {seconds:.0f} s')
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    return {cell.id: cell.outputs for cell in cells}, seconds

  return execute


def text_of(outputs):
  return ''.join(
    output.get('text', '') for cell in outputs.values() for output in cell
  )


def kinds_of(cell):
  """Media types that a cell displays."""
  return {kind for output in cell for kind in output.get('data', ())}


NO_JAX = "assert 'jax' not in sys.modules  # It would hold the TPU."


def test_colab_tpu(execute, tmp_path):
  results = tmp_path / 'results'
  options = {
    'REPOSITORY': str(ROOT),
    'RESULTS': str(results),
    'ACCELERATOR': 'cpu',
    'QUICKSTART': [*SMALL, '--config.data.train_scenes=64'],
    'MAX_DROP': 1.0,  # Barely trained.
    'DRAWN': [
      *SHORT,
      '--config.data.base_size=96',
      '--config.data.crop_size=(96, 96)',
      '--config.data.limit=32',
      '--config.batch_size=16',
      '--config.teacher.backbone=efficientnet_lite0',
      '--config.optim.warmup_epochs=0',
    ],
  }
  outputs, seconds = execute('colab_tpu.ipynb', NO_JAX, **options)
  assert seconds < LIMIT
  for name in ('report', 'train'):
    (page,) = [x for x in outputs[name] if 'data' in x]
    assert 'data:image/' in page['data']['text/html']
  for name in ('check', 'use'):
    assert 'image/png' in kinds_of(outputs[name])
  for run in ('quickstart', 'drawn'):
    table = json.loads((results / run / 'results.json').read_text())
    assert set(table) == {'teacher', 'student', 'distill'}
  assert table['distill']['dataset'] == 'folder'
  sizes = [
    (results / 'drawn' / name).stat().st_size
    for name in ('student.onnx', 'student_int8.onnx')
  ]
  assert 1e5 < sizes[1] < 0.3 * sizes[0]
  text = text_of(outputs)
  assert text.count('loaded ') >= 2  # Teacher and student from ImageNet.
  assert 'with int8' in text

  # The runtime is lost just before its last result; now with a zip.
  data = tmp_path / 'attnfd_jax_files' / 'data'
  archive = shutil.make_archive(tmp_path / 'mine', 'zip', data.parent, 'data')
  shutil.rmtree(data.parent)
  (results / 'drawn').rename(results / 'own')
  (results / 'own' / 'distill' / 'result.json').unlink()
  options |= {'DATA': archive, 'CLASS_NAMES': tuple(CLASSES)}
  options['TRAINING'] = options['DRAWN']
  outputs, _ = execute('colab_tpu.ipynb', **options)
  text = text_of(outputs)
  assert text.count('already finished, skipped') == 5
  assert '[distill] resumed from step 2' in text
  again = json.loads((results / 'own' / 'results.json').read_text())
  assert again['distill']['miou'] == table['distill']['miou']


CHECKS = """
for name, (_, _, curves) in runs.items():
  assert np.mean(curves['ce'][-10:]) < 0.8 * curves['ce'][0], name
# The start is the same, and only one of them follows the teacher.
first, second = (curves for _, _, curves in runs.values())
assert abs(first['ce'][0] - second['ce'][0]) < 1e-5
for tap in ('early', 'late'):
  assert np.mean(second[tap][-10:]) < 0.8 * np.mean(first[tap][-10:])
"""


def test_functional_api(execute):
  outputs, seconds = execute(
    'functional_api.ipynb', CHECKS, REPOSITORY=str(ROOT), STEPS=100
  )
  assert seconds < LIMIT
  for name in ('data', 'results', 'attention'):
    assert 'image/png' in kinds_of(outputs[name])
