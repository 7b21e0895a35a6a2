# SPDX-License-Identifier: Apache-2.0
"""Runs at gs://, as etils.epath sees them; Orbax writes beside, on the disk."""

import json
import pathlib
import types

from etils import epath
from etils.epath import testing
import pytest
import small_run

from attnfd_jax import paths
from attnfd_jax.errors import InputError
from attnfd_jax.runs import checkpoints, loading
from attnfd_jax.training import experiment


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """The folder that gs://bucket is, for everything but arrays."""
  folder = tmp_path / 'bucket'
  folder.mkdir()

  def local(path):
    return str(path).replace('gs://bucket', str(folder))

  def on_disk(original, path, *arguments, **options):
    return original(local(path), *arguments, **options)

  def move(original, path, target, **options):
    return original(local(path), local(target), **options)

  def find(original, path):
    found = original(local(path))
    if not str(path).startswith('gs://'):
      return found
    return [str(x).replace(str(folder), 'gs://bucket') for x in found]

  names = ('exists', 'isdir', 'listdir', 'makedirs', 'mkdir', 'open')
  names += ('remove', 'rmtree', 'stat')
  mocks = dict.fromkeys(names, on_disk)
  mocks |= {'rename': move, 'replace': move, 'copy': move, 'glob': find}
  # TensorStore has no mock: checkpoints go to the same folder by its path.
  as_local = types.SimpleNamespace(as_path=lambda path: epath.Path(local(path)))
  monkeypatch.setattr(checkpoints, 'paths', as_local)
  with testing.mock_epath(**mocks):
    yield folder


def test_a_run_in_a_bucket(bucket, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  config = small_run.make_config()
  config.stages = ('teacher', 'distill')
  workdir = 'gs://bucket/run'
  results = experiment.train(config, workdir)
  folder = bucket / 'run'
  names = {path.name for path in folder.iterdir()}
  # No lock, which objects cannot have.
  assert names == {
    *('config.json', 'results.json', 'report.html', 'teacher', 'distill')
  }
  for stage in ('teacher', 'distill'):
    assert (
      json.loads((folder / stage / 'result.json').read_text())
      == (results[stage])
    )
    kinds = [x['kind'] for x in small_run.read_lines(folder / stage)]
    assert kinds == ['train', 'train', 'eval', 'train', 'train', 'eval']
    assert 'finished: val mIoU' in (folder / stage / 'log.txt').read_text()
  assert [path.name for path in tmp_path.iterdir()] == ['bucket']
  network, variables, info = loading.load_network(f'{workdir}/distill')
  assert info['stage'] == 'distill' and network.num_classes == 9
  assert 'params' in variables
  capsys.readouterr()
  # Again, with one result lost: the log resumes where it was uploaded.
  (folder / 'distill' / 'result.json').unlink()
  assert (
    experiment.train(config, workdir)['distill']['miou']
    == (results['distill']['miou'])
  )
  printed = capsys.readouterr().out
  assert '[teacher] already finished' in printed
  assert '[distill] resumed from step 4' in printed
  assert len(small_run.read_lines(folder / 'distill')) == 6


def test_without_its_package_one_line_says_so(monkeypatch):
  def missing(*arguments):
    raise ImportError('Please install gcsfs')

  with testing.mock_epath(exists=missing):
    with pytest.raises(InputError, match=r"pip install 'attnfd_jax\[gcs\]'"):
      paths.as_path('gs://bucket/run')


def test_a_folder_of_this_machine_is_absolute(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  found = paths.as_path('runs/a')
  assert pathlib.Path(found) == tmp_path / 'runs' / 'a'
  assert not paths.is_remote(found)
