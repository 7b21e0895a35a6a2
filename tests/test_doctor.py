# SPDX-License-Identifier: Apache-2.0
"""What doctor says about machines, most of them made up."""

import importlib.metadata
import tempfile

import jax
from PIL import Image
import pytest
import tiny_run

from attnfd_jax import cli
from attnfd_jax.devices import diagnosis


def found(versions):
  def find(name):
    if name not in versions:
      raise importlib.metadata.PackageNotFoundError(name)
    return versions[name]

  lines = ['jax>=0.7.2', 'orbax-checkpoint>=0.12.4,<1', 'torch; extra == "x"']
  return list(diagnosis.check_versions(lines, find))


@pytest.mark.parametrize(
  ('versions', 'wrong', 'remedy'),
  [
    ({'jax': '0.7.2', 'orbax-checkpoint': '0.12.10'}, [], ''),
    ({'jax': '0.10.0.dev3', 'orbax-checkpoint': '0.12.4'}, [], ''),
    (
      {'jax': '0.7.1', 'orbax-checkpoint': '0.13'},
      ['jax 0.7.1'],
      'jax[cuda13]',
    ),
    (
      {'jax': '0.8', 'orbax-checkpoint': '1.0'},
      ['orbax-checkpoint 1.0, but <1 is needed'],
      "'orbax-checkpoint>=0.12.4,<1'",
    ),
    ({'orbax-checkpoint': '0.12.4'}, ['jax is not installed'], "'jax>=0.7.2'"),
  ],
  ids=['floor', 'newer', 'older', 'cap', 'absent'],
)
def test_versions(versions, wrong, remedy):
  findings = found(versions)
  bad = [finding for finding in findings if finding.remedy]
  assert len(findings) == 2 and len(bad) == len(wrong)
  for finding, text in zip(bad, wrong, strict=True):
    assert finding.text.startswith(text) and remedy in finding.remedy


@pytest.mark.parametrize(
  ('backend', 'options', 'text', 'remedy'),
  [
    ('gpu', {}, 'backend gpu', ''),
    ('cpu', {}, 'no plugin', ''),
    ('cpu', {'platforms': 'cpu'}, 'as set by JAX_PLATFORMS=cpu', ''),
    ('cpu', {'has_gpu': True}, 'there is an NVIDIA GPU', "'jax[cuda13]'"),
    ('cpu', {'installed': ['libtpu']}, 'support for TPU', "'jax[tpu]'"),
    (
      'cpu',
      {'installed': ['jax-cuda12-plugin'], 'has_gpu': True},
      'support for NVIDIA GPU is installed',
      "'jax[cuda]'",
    ),
  ],
  ids=['gpu', 'none', 'asked', 'no plugin', 'tpu', 'plugin'],
)
def test_why_it_is_the_cpu(backend, options, text, remedy):
  options = {'platforms': '', 'installed': [], 'has_gpu': False} | options
  finding = diagnosis.check_backend(backend, **options)
  assert text in finding.text
  assert bool(finding.remedy) == bool(remedy) and remedy in finding.remedy


@pytest.mark.parametrize(
  ('platforms', 'error', 'text', 'remedy'),
  [
    ('cuda', AssertionError(), "='cuda' (AssertionError)", 'unset JAX_PLAT'),
    (
      'gpuu',
      RuntimeError('Backend gpuu is unknown\nmore'),
      "='gpuu' (RuntimeError Backend gpuu is unknown)",
      'unset JAX_PLATFORMS to use what there is, or install the plugin',
    ),
    ('', RuntimeError('driver'), "='' (RuntimeError dri", 'set JAX_PLATFORMS='),
    ('x', KeyError('y'), "='x' (KeyError 'y')", 'unset JAX_PLATFORMS'),
  ],
  ids=['absent', 'typo', 'driver', 'other'],
)
def test_no_backend(monkeypatch, platforms, error, text, remedy):
  def fails():
    raise error

  assert diagnosis.check_start() is None
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setattr(jax, 'local_devices', fails)
  finding = diagnosis.check_start()
  assert finding.text.startswith('no backend starts with JAX_PLATFORMS=')
  assert text in finding.text and finding.remedy.startswith(remedy)
  assert list(diagnosis.find_all('.'))[-1] == finding


QUICK = f'--config={tiny_run.ROOT}/configs/quickstart.py'
MEASURE = ('--steps=1', '--height=32', '--width=32')


@pytest.mark.parametrize('platform', ['cuda', 'gpuu'])
@pytest.mark.parametrize(
  ('verb', 'arguments'),
  [
    ('main', (QUICK, '--workdir=TMP/run')),
    ('evaluate', ('--checkpoint=STAGE',)),
    ('predict', ('--checkpoint=STAGE', '--input=TMP/a.png', '--output=TMP/o')),
    ('convert', ('--source=STAGE', '--target=TMP/a.pth')),
    ('benchmark', ('train', '--method=none', *MEASURE)),
    ('benchmark', ('predict', *MEASURE)),
    ('benchmark', ('data', QUICK)),
  ],
  ids=lambda x: x if isinstance(x, str) else x[0].partition('=')[0],
)
def test_commands_say_what_doctor_says(
  tmp_path, tmp_path_factory, verb, arguments, platform
):
  stage = tiny_run.make_stage(tmp_path_factory)
  Image.new('RGB', (64, 48)).save(tmp_path / 'a.png')
  names = {'STAGE': str(stage), 'TMP': str(tmp_path)}
  for name, path in names.items():
    arguments = [x.replace(name, path) for x in arguments]
  done = tiny_run.run_verb(verb, *arguments, JAX_PLATFORMS=platform)
  (line,) = done.stderr.splitlines()
  start = f'error: no backend starts with JAX_PLATFORMS={platform!r} ('
  assert line.startswith(start) and done.returncode == 2
  assert '; unset JAX_PLATFORMS to use what there is, or install' in line
  assert not (tmp_path / 'run').exists() and not (tmp_path / 'o').exists()


def test_other_faults_are_not_explained_by_the_backend(monkeypatch, capsys):
  with pytest.raises(RuntimeError, match='ours'), cli._readable(ValueError):
    raise RuntimeError('ours')
  monkeypatch.setattr(jax, 'local_devices', lambda: 1 / 0)
  with pytest.raises(KeyError), cli._readable(ValueError):
    raise KeyError('not of JAX')
  with pytest.raises(SystemExit), cli._readable(ValueError):
    raise ValueError('bad input')
  assert capsys.readouterr().err == 'error: bad input\n'


def test_memory_preallocation():
  off = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  assert 'off' in diagnosis.check_memory('gpu', off).text
  half = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.5'}
  assert '50% of each GPU' in diagnosis.check_memory('gpu', half).text
  assert '75%' in diagnosis.check_memory('gpu', {}).text
  assert 'none on cpu' in diagnosis.check_memory('cpu', {}).text


@pytest.mark.parametrize(
  ('mode', 'libc', 'tunables', 'text'),
  [
    ('always [madvise] never', '2.36', '', 'a tenth faster'),
    ('always [madvise] never', '2.36', 'glibc.malloc.hugetlb=0', 'a tenth'),
    ('always [madvise] never', '2.36', 'glibc.malloc.hugetlb=1', 'in huge'),
    ('always [madvise] never', '2.31', '', 'in small pages'),
    ('[always] madvise never', '2.36', '', 'in huge pages'),
    ('always madvise [never]', '2.36', 'glibc.malloc.hugetlb=1', 'in small'),
    ('', '', '', 'in small pages'),
  ],
)
def test_pages(mode, libc, tunables, text):
  found = diagnosis.check_pages(
    mode, tunables, libc=('glibc' if libc else '', libc)
  )
  assert text in found.text
  assert ('a tenth' in found.text) == ('a tenth' in text)
  assert not found.remedy


def test_folders(tmp_path, monkeypatch):
  there = diagnosis.check_folder(tmp_path / 'a' / 'b', 'workdir', '--workdir')
  assert 'writable' in there.text and not (tmp_path / 'a').exists()
  full = diagnosis.check_folder(
    tmp_path, 'workdir', '--workdir', least_free=float('inf')
  )
  assert full.remedy.startswith('make room')

  def forbidden(**options):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(tempfile, 'TemporaryFile', forbidden)
  shut = diagnosis.check_folder(tmp_path, 'workdir', '--workdir')
  assert 'cannot be written (Permission denied)' in shut.text and shut.remedy


def test_every_device_computes():
  for device in jax.devices():
    finding = diagnosis.check_device(device)
    assert f'cpu:{device.id} ' in finding.text and not finding.remedy


def test_devices_that_fail_or_are_wrong():
  def fails(*arguments):
    raise RuntimeError('no algorithm\nand more')

  finding = diagnosis.check_device(jax.devices()[0], fails)
  assert 'a convolution fails (RuntimeError no algorithm)' in finding.text
  assert finding.remedy
  finding = diagnosis.check_device(jax.devices()[0], lambda *a: (1.0, [2.0]))
  assert 'gives 1, not' in finding.text and finding.remedy


def test_exit_codes(tmp_path):
  # In whatever folder the tests run: of a disk of a few GB.
  good = tiny_run.run_verb('doctor', f'--workdir={tmp_path}')
  if good.returncode:
    assert 'GB free' in good.stdout and '-> make room' in good.stdout
  else:
    assert good.stdout.endswith('Ready.\n')
  assert 'convolution and gradient in' in good.stdout
  (tmp_path / 'file').write_text('')
  bad = tiny_run.run_verb('doctor', f'--workdir={tmp_path / "file"}')
  assert bad.returncode == 1
  assert 'WRONG workdir' in bad.stdout and '-> make it writable' in bad.stdout
  assert bad.stdout.splitlines()[-1] == '1 problem found.'
