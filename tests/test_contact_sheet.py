# SPDX-License-Identifier: Apache-2.0
"""What a contact sheet shows of broken records, whatever their files are."""

import time

from data import fixtures
import numpy as np
from PIL import Image
import pytest

from attnfd_jax.config import default_config
from attnfd_jax.data.sources import Dataset, load_dataset
from attnfd_jax.errors import DataError
from attnfd_jax.reporting import contact_sheet
from attnfd_jax.reporting.contact_sheet import draw_sheet

TOP, ROW = 14 + 2 * 8, 180 + 14 + 8  # Heights of a legend line and of a row.
LABEL = 8 + 240 + 8  # Where the cells of labels start.


class Broken:
  """A source of one record, of whose files only the names are known."""

  def __init__(self, image):
    self._image = str(image)

  def __len__(self):
    return 1

  def name(self, index):
    return self._image


def sheet_of(image, mask, values=None):
  """Pixels of the sheet of one broken record."""
  palette = np.array([(1, 2, 3)], np.uint8)
  dataset = Dataset('x', ('a',), palette, {'train': Broken(image)})
  problem = DataError('broken', 'values', mask, values)
  return np.asarray(draw_sheet(dataset, {'train': {0: problem}}))


def pink(sheet):
  return np.all(sheet == (255, 0, 255), -1)


def test_a_single_wrong_pixel_can_be_seen(tmp_path):
  mask = np.zeros((1000, 2001), np.uint8)
  mask[501, 1003] = 40
  path = fixtures.write(tmp_path / 'mask.png', mask)
  sheet = sheet_of(tmp_path / 'gone.png', path, {40: 1})
  assert 1 <= pink(sheet).sum() <= 9
  black = np.all(sheet[TOP + 14 :] == 0, -1)
  rows, columns = black.any(1).nonzero()[0], black.any(0).nonzero()[0]
  assert (len(rows), len(columns)) == (120, 240)


def test_long_masks_are_drawn_soon(tmp_path):
  """The reach of a wrong pixel was a hundredth of the longer side, squared."""
  mask = np.ones((2_000_000, 1), np.uint8)
  path = fixtures.write(tmp_path / 'mask.png', mask)
  start = time.perf_counter()
  sheet = sheet_of(tmp_path / 'gone.png', path, {1: 9})
  assert time.perf_counter() - start < 2
  assert pink(sheet)[TOP + 14 :][:180, LABEL].all()


def test_members_of_a_zip(tmp_path):
  fixtures.make_cityscapes(tmp_path, zipped=True)
  config = default_config().data
  config.update({'name': 'cityscapes', 'root': str(tmp_path)})
  source = load_dataset(config, strict=False).splits['val']
  name = source.name(1)
  assert '!' in name
  image = sheet_of(name, name)[TOP + 14 :][:48, 8:][:, :64]
  np.testing.assert_array_equal(image, source[1]['image'])
  assert len(sheet_of(f'{name}.gone', f'{name}.gone')) == TOP


@pytest.mark.parametrize('kind', ['gray', 'deep', 'program', 'text', 'absent'])
def test_files_of_all_kinds(tmp_path, kind):
  path = tmp_path / 'image.png'
  if kind in ('gray', 'deep'):
    fixtures.write(path, np.zeros((4, 4), 'u1' if kind == 'gray' else 'u2'))
  elif kind == 'program':
    # Pillow hands EPS to Ghostscript.
    Image.new('RGB', (8, 8)).save(path, 'EPS')
  elif kind == 'text':
    path.write_text('no image')
  height = TOP + (ROW if kind in ('gray', 'deep') else 0)
  assert len(sheet_of(path, path)) == height


def test_captions_of_any_length(tmp_path):
  fixtures.write(tmp_path / 'mask.png', np.zeros((4, 4), np.uint8))
  name = f'{"x" * 200_000}\nand ü'
  start = time.perf_counter()
  assert len(sheet_of(name, tmp_path / 'mask.png')) == TOP + ROW
  assert len(sheet_of(tmp_path / 'mask.png', name)) == TOP + ROW
  assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('road', '7 road'),
    ('Fahrr\u00e4der', '7 Fahrrader'),
    ('\u5929\u7a7a', r'7 \u5929\u7a7a'),
    ('\u0633\u0645\u0627', r'7 \u0633\u0645\u0627'),
    ('\u0938\u095c\u0915', None),
    ('\U0001f697', r'7 \U0001f697'),
    ('a\ud800', r'7 a\ud800'),
  ],
  ids=['ascii', 'accent', 'chinese', 'arabic', 'devanagari', 'emoji', 'none'],
)
def test_names_of_classes_in_any_script(name, text):
  """The built-in font has no more: a number, and letters or their codes."""
  found = contact_sheet._shorten(f'7 {name}', 24)
  assert found.isascii() and '?' not in found and found.startswith('7 ')
  assert text is None or found == text
