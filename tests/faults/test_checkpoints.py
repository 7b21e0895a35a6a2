# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are damaged, gone, timed, or cannot be written."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from attnfd_jax.errors import InputError
from attnfd_jax.runs import checkpoints

RUN = {'seed': 0, 'batch_size': 4, 'records': 8}


def make_state(step):
  # Large enough that numbers lie in files of their own.
  values = np.random.default_rng(step).normal(size=(40, 50))
  return {
    'step': jnp.int32(step),
    'params': {'student': jnp.asarray(values, jnp.float32)},
  }


@pytest.fixture
def folder(tmp_path):
  """Checkpoints 1 (the best), 4 and 5 of six steps."""
  folder = tmp_path / 'student' / 'checkpoints'
  with checkpoints.managed(folder) as manager:
    for step, miou in enumerate((0.9, 0.2, 0.3, None, 0.1), 1):
      checkpoints.save(manager, step, make_state(step), RUN, miou=miou)
  return folder


def restore(folder, log=print):
  state, step = checkpoints.restore_latest(folder, make_state(0), RUN, log=log)
  jax.tree.map(np.testing.assert_array_equal, state, make_state(step))
  return step


def largest(folder):
  files = (path for path in folder.rglob('*') if path.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def truncate(folder):
  path = largest(folder / 'state')
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])


def flip(folder):
  path = largest(folder / 'state')
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def zero(folder):
  path = largest(folder / 'state')
  path.write_bytes(bytes(path.stat().st_size))


def bend(folder):
  """One digit of the numbers that say what belongs to the run."""
  path = folder / 'run' / 'metadata'
  path.write_text(path.read_text().replace('checksums', 'checksumz'))


DAMAGE = {
  'truncated': truncate,
  'flipped': flip,
  'zeroed': zero,
  'removed': lambda folder: largest(folder / 'state').unlink(),
  'manifest': lambda folder: (folder / 'state/manifest.ocdbt').unlink(),
  'run': lambda folder: (folder / 'run/metadata').unlink(),
  'facts': bend,
}


def test_best_and_last_two_survive_restarts(folder):
  assert checkpoints.steps(folder) == [1, 4, 5]
  with checkpoints.managed(folder) as manager:
    assert manager.best_step() == 1
    for step in (6, 7):  # Timed ones, which have no score.
      checkpoints.save(manager, step, make_state(step), RUN)
    assert manager.best_step() == 1
  assert checkpoints.steps(folder) == [1, 6, 7]
  assert restore(folder) == 7


def test_a_score_can_be_added_later(folder):
  with checkpoints.managed(folder) as manager:
    checkpoints.save(manager, 6, make_state(6), RUN)
    assert manager.metrics(6) is None
    checkpoints.save(manager, 6, make_state(6), RUN, miou=0.95)
    checkpoints.wait(manager)
    assert (manager.best_step(), manager.metrics(6)) == (6, {'miou': 0.95})
  assert restore(folder) == 6


@pytest.mark.parametrize('name', DAMAGE)
def test_a_damaged_one_is_skipped(folder, name):
  DAMAGE[name](folder / '5')
  lines = []
  assert restore(folder, lines.append) == 4
  (line,) = lines
  assert line.startswith('checkpoint 5 cannot be read (')
  assert line.endswith('moved to damaged_5; resuming from step 4')
  # Moved, not deleted; its step can be saved again.
  assert checkpoints.steps(folder) == [1, 4]
  assert (folder.parent / 'damaged_5').is_dir()
  with checkpoints.managed(folder) as manager:
    checkpoints.save(manager, 5, make_state(5), RUN, miou=0.1)
  assert restore(folder) == 5


def test_if_none_can_be_read_nothing_is_touched(folder):
  for step in (1, 4, 5):
    truncate(folder / str(step))
  before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
  message = (
    r'none of the checkpoints 5, 4, 1 can be read \(5: .*Nothing was del'
  )
  with pytest.raises(InputError, match=message) as error:
    restore(folder)
  assert '\n' not in str(error.value)
  assert before == {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  assert [path.name for path in folder.parent.iterdir()] == ['checkpoints']


def test_a_damaged_best_one_is_not_replaced_silently(folder):
  truncate(folder / '1')
  for part in (make_state(0), {'params': make_state(0)['params']}):
    with pytest.raises(InputError, match='checkpoint 1 cannot be read'):
      checkpoints.restore(folder, part)
  (folder / '1' / 'metrics' / 'metrics').write_text('{"mi')
  with pytest.raises(InputError, match='move the folder 1 away'):
    checkpoints.managed(folder).__enter__()


def test_another_run_is_no_damage(folder):
  with pytest.raises(InputError, match='use another --workdir'):
    checkpoints.restore_latest(folder, make_state(0), RUN | {'seed': 1})
  assert checkpoints.steps(folder) == [1, 4, 5]


def test_what_a_killed_save_left_is_removed(folder):
  torn = folder / '6.orbax-checkpoint-tmp'
  shutil.copytree(folder / '5', torn)
  assert restore(folder) == 5
  with checkpoints.managed(folder) as manager:
    checkpoints.save(manager, 6, make_state(6), RUN)
  assert not torn.exists() and restore(folder) == 6


def test_a_full_disk_loses_nothing(folder, monkeypatch):
  def full(*arguments, **options):
    del arguments, options
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'save', full)
    with pytest.raises(
      InputError, match=r'cannot save \(.*No space.*make room'
    ):
      with checkpoints.managed(folder) as manager:
        checkpoints.save(manager, 6, make_state(6), RUN, miou=0.99)
  assert checkpoints.steps(folder) == [1, 4, 5]
  assert restore(folder) == 5


def test_a_deleted_folder_is_told(folder):
  with pytest.raises(InputError, match='the folder is gone, and step 6'):
    with checkpoints.managed(folder) as manager:
      shutil.rmtree(folder)
      checkpoints.save(manager, 6, make_state(6), RUN)
