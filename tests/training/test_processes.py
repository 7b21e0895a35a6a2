# SPDX-License-Identifier: Apache-2.0
"""Two processes of two devices are one process of four; flags and clusters."""

import json
import pathlib

import jax
import job
import numpy as np
import process_run
import pytest

from attnfd_jax.devices import processes
from attnfd_jax.errors import InputError
from attnfd_jax.models import network as networks
from attnfd_jax.runs import checkpoints, logs
from attnfd_jax.training import experiment

SCRIPT = pathlib.Path(process_run.__file__)
TIMES = ('step_seconds', 'images_per_second', 'data_wait', 'train_seconds')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """(of two processes, of one, what each of the two printed)."""
  base = tmp_path_factory.mktemp('processes')
  workers = job.start(SCRIPT, f'--workdir={base / "two"}')
  experiment.train(process_run.get_config(), base / 'one')
  printed = job.output_of(workers)
  return base / 'two', base / 'one', printed


def read_lines(path):
  records = [json.loads(line) for line in path.read_text().splitlines()]
  return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


@pytest.mark.slow
def test_two_processes_train_as_one(folders):
  two, one, _ = folders
  for stage in ('teacher', 'distill'):
    ours, theirs = (read_lines(d / stage / 'metrics.jsonl') for d in (two, one))
    assert [(r['kind'], r['step']) for r in ours] == [
      (r['kind'], r['step']) for r in theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
      names = set(b) & {'loss', 'ce', 'attnfd', 'grad_norm', 'miou'}
      assert 'loss' in names or b['kind'] != 'train'
      # Float32 sums over the batch in two orders.
      np.testing.assert_allclose(
        [a[name] for name in names], [b[name] for name in names], rtol=1e-5
      )


@pytest.mark.slow
def test_their_checkpoint_is_one_checkpoint(folders):
  """Read here, by one process with one device, whole."""
  states = []
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for folder in folders[:2]:
    directory = folder / 'distill' / 'checkpoints'
    step = checkpoints.steps(directory)[-1]
    wanted = {
      'params': {
        'student': networks.abstract_variables(
          process_run.Small('resnet18', 9)
        )['params']
      }
    }
    wanted = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), wanted
    )
    found, _ = checkpoints.restore(directory, wanted, step=step)
    assert step == 4
    states.append(jax.device_get(found))
  for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
    scale = np.abs(theirs).max()
    # Four steps of rounding, relative to the largest weight of a tensor.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale)


@pytest.mark.slow
def test_images_count_once(folders):
  """The counts are global: those of 3 images, one of them padded with none."""
  two, one, _ = folders
  ours, theirs = (
    json.loads((d / 'distill' / 'result.json').read_text()) for d in (two, one)
  )
  for name in ('miou', 'pixel_accuracy', 'fw_iou'):
    # A tie may round to either side: 3 x 32 x 48 pixels.
    np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-3)


@pytest.mark.slow
def test_one_of_them_writes(folders):
  two, one, (first, second) = folders
  names = [
    {str(path.relative_to(d)) for path in d.glob('*')} for d in (two, one)
  ]
  assert names[0] == names[1] and 'report.html' in names[0]
  stage = [
    {path.name for path in (d / 'distill').glob('*')} for d in (two, one)
  ]
  assert stage[0] == stage[1]
  for line in ('compiling the training step', 'finished: val mIoU'):
    assert (two / 'distill' / 'log.txt').read_text().count(line) == 1
  assert 'finished: val mIoU' in first and 'mIoU' not in second
  facts = json.loads((two / 'distill' / 'environment.json').read_text())
  assert facts['processes'] == 2 and facts['device'].startswith('4 x')


@pytest.fixture
def joined(monkeypatch):
  """What jax.distributed.initialize was called with; it joins nothing."""
  calls = []

  def initialize(*args, **options):
    calls.append((args, options))

  for name in ('SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'JOB_COMPLETION_INDEX'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  return calls


@pytest.mark.parametrize(
  'options, words',
  [
    ({'process_id': 0}, '--coordinator, --num_processes missing'),
    ({'coordinator': 'a:1', 'num_processes': 2}, '--process_id missing'),
    (
      {'coordinator': 'a', 'num_processes': 2, 'process_id': 0},
      '--coordinator=a must be HOST:PORT',
    ),
    (
      {'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2},
      '--process_id=2 must be from 0 to 1',
    ),
  ],
  ids=['id', 'no_id', 'port', 'range'],
)
def test_flags_that_do_not_fit(joined, options, words):
  with pytest.raises(InputError, match=words):
    processes.initialize(**options)
  assert not joined


def test_flags_leave_out_detection(joined, monkeypatch):
  monkeypatch.setenv('SLURM_STEP_NODELIST', 'node[1-2]')
  processes.initialize(coordinator='a:1', num_processes=2, process_id=1)
  assert joined == [(('a:1', 2, 1), {'cluster_detection_method': 'deactivate'})]
  processes.initialize(num_processes=1)
  assert len(joined) == 1


@pytest.mark.parametrize('tasks', ['1', '4'])
def test_a_single_task_keeps_its_devices(joined, monkeypatch, tasks):
  monkeypatch.setenv('SLURM_STEP_NODELIST', 'node1')
  monkeypatch.setenv('SLURM_NTASKS', tasks)
  processes.initialize()
  assert len(joined) == int(tasks != '1')


@pytest.mark.parametrize('launched', [False, True], ids=['alone', 'launched'])
def test_who_cannot_meet(monkeypatch, joined, launched):
  def refuse(*args, **options):
    raise RuntimeError('No pod there.\nMore.')

  monkeypatch.setattr(jax.distributed, 'initialize', refuse)
  if not launched:
    processes.initialize()  # A laptop, or a notebook: no cluster.
    return
  monkeypatch.setenv('JOB_COMPLETION_INDEX', '0')
  with pytest.raises(
    InputError, match=r'cannot connect: RuntimeError No pod there\. Give'
  ):
    processes.initialize()


def test_the_others_write_nothing(monkeypatch, tmp_path):
  monkeypatch.setattr(processes, 'is_first', lambda: False)
  log = logs.StageLog(tmp_path)
  log.line('text')
  log.metrics('train', 1, {'loss': 1.0})
  logs.write_json(tmp_path / 'a.json', {})
  assert not list(tmp_path.iterdir())
