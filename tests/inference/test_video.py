# SPDX-License-Identifier: Apache-2.0
"""Videos are whole under their name, or not there."""

import os
import pathlib
import resource

import cv2
import numpy as np
import pytest

from attnfd_jax.errors import InputError
from attnfd_jax.inference import video


def read(path):
  """Frames RGB, and their rate."""
  file, frames = cv2.VideoCapture(str(path)), []
  while (found := file.read())[0]:
    frames.append(cv2.cvtColor(found[1], cv2.COLOR_BGR2RGB))
  return frames, file.get(cv2.CAP_PROP_FPS)


def draw(count, size=(48, 64)):
  """Even frames, each of its own color."""
  colors = np.random.default_rng(0).integers(0, 256, (count, 3), np.uint8)
  return [np.tile(color, (*size, 1)) for color in colors]


@pytest.mark.parametrize('name', ['a.mp4', 'ü %d.AVI'])
def test_frames_come_back(tmp_path, name):
  frames = draw(7)
  with video.writer(tmp_path / name, (48, 64), 12.5) as write:
    for frame in frames:
      write(frame)
    assert not (tmp_path / name).exists()
  assert [path.name for path in tmp_path.iterdir()] == [name]
  found, rate = read(tmp_path / name)
  assert rate == pytest.approx(12.5)
  assert [frame.shape for frame in found] == [(48, 64, 3)] * 7
  # Compression, and 16 to 235 in place of 0 to 255.
  assert np.max(np.abs(np.mean(found, (1, 2)) - np.mean(frames, (1, 2)))) < 6


@pytest.mark.parametrize('name', ['a.mp4', 'a.avi'])
def test_odd_sides_lose_a_pixel(tmp_path, name):
  with video.writer(tmp_path / name, (33, 47), 25) as write:
    write(draw(1, (33, 47))[0])
  assert [frame.shape for frame in read(tmp_path / name)[0]] == [(32, 46, 3)]


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_an_end_in_the_middle_leaves_what_was(tmp_path, error):
  path = tmp_path / 'a.mp4'
  for old in (None, b'old'):
    if old:
      path.write_bytes(old)
    with pytest.raises(error), video.writer(path, (48, 64), 25) as write:
      write(draw(1)[0])
      raise error
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [old][: bool(old)]


def test_without_frames_there_is_no_file(tmp_path):
  with video.writer(tmp_path / 'a.mp4', (48, 64), 25):
    pass
  assert not list(tmp_path.iterdir())


@pytest.fixture
def full_disk():
  """No file can grow beyond 60 kB."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures('full_disk')
@pytest.mark.parametrize('name', ['a.mp4', 'a.avi'])
def test_a_full_disk_is_found(tmp_path, name):
  generator = np.random.default_rng(0)
  with (
    pytest.raises(InputError, match='was not written completely'),
    video.writer(tmp_path / name, (48, 64), 25) as write,
  ):
    for _ in range(60):
      write(generator.integers(0, 256, (48, 64, 3), np.uint8))
  assert not list(tmp_path.iterdir())


def test_frames_of_another_size_are_refused(tmp_path):
  with (
    pytest.raises(ValueError, match=r'must be \(48, 64, 3\)'),
    video.writer(tmp_path / 'a.mp4', (48, 64), 25) as write,
  ):
    write(draw(1, (64, 48))[0])
  assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_said(tmp_path):
  with (
    pytest.raises(InputError, match=r'cannot write 64x1 at 25 frames .* \.mp4'),
    video.writer(tmp_path / 'a.mp4', (1, 64), 25),
  ):
    pass
  assert not list(tmp_path.iterdir())
  with (
    pytest.raises(InputError, match='is a folder; name a file'),
    video.writer(tmp_path, (48, 64), 25),
  ):
    pass
  with pytest.raises(OSError), video.writer(tmp_path / 'b/a.mp4', (8, 8), 25):
    pass


@pytest.mark.parametrize('name', ['a.gif', 'a', '.mp4', 'a.mp4.part'])
def test_other_endings_are_refused(name):
  with pytest.raises(InputError, match=r'expected .* ends in \.avi or \.mp4'):
    video.check(pathlib.Path(name), 25)


def test_names_that_are_no_text_are_refused():
  with pytest.raises(InputError, match='the name is not valid UTF-8'):
    video.check(pathlib.Path(os.fsdecode(b'\xff.mp4')), 25)


@pytest.mark.parametrize('fps', [0, -1, 0.5, 1001, np.nan, np.inf], ids=str)
def test_rates_out_of_range_are_refused(fps):
  with pytest.raises(InputError, match='--fps=.* must be from 1 to 1000'):
    video.check(pathlib.Path('a.mp4'), fps)
