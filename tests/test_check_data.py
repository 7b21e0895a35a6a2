# SPDX-License-Identifier: Apache-2.0
"""Every broken file is named with what to do; sound sets are counted."""

import concurrent.futures
import json
import pathlib
import time

from data import fixtures
import numpy as np
from PIL import Image
import pytest
import tiny_run

from attnfd_jax.config import default_config
from attnfd_jax.data import checking, frequencies
from attnfd_jax.data.sources import Dataset, load_dataset
from attnfd_jax.errors import DataError
from attnfd_jax.reporting import contact_sheet

CAMVID = tiny_run.ROOT.parent / 'shared' / 'camvid'
needs_camvid = pytest.mark.skipif(
  not (CAMVID / 'train').is_dir(), reason=f'no CamVid at {CAMVID}'
)
# DATA section 5.
CAMVID_WEIGHTS = (
  *(0.2793, 0.2017, 4.7865, 0.1490, 1, 0.4217),
  *(3.8467, 1.9736, 0.7889, 6.3747, 8.8587),
)


def load(root, name='camvid', **keys):
  config = default_config().data
  config.update({'name': name, 'root': str(root), **keys})
  return load_dataset(config, strict=False)


def report(root, **keys):
  """What is found, and its lines."""
  found, _ = checking.check(load(root, **keys), 2)
  return found, checking.as_text(found).splitlines()


# Each breaks `image` or `mask` and returns the one to be named.
def no_partner(image, mask):
  mask.unlink()
  return image


def cut_image(image, mask):
  image.write_bytes(image.read_bytes()[:-200])
  return image


def empty_image(image, mask):
  image.write_bytes(b'')
  return image


def cut_mask(image, mask):
  mask.write_bytes(mask.read_bytes()[:-60])
  return mask


def empty_mask(image, mask):
  mask.write_bytes(b'')
  return mask


def text_mask(image, mask):
  mask.write_text('no image')
  return mask


def smaller(image, mask):
  return fixtures.write(mask, np.zeros((40, 60), np.uint8))


def rgb(image, mask):
  return fixtures.write(mask, np.zeros((48, 64, 3), np.uint8))


def rgba(image, mask):
  return fixtures.write(mask, np.zeros((48, 64, 4), np.uint8))


def deep(image, mask):
  return fixtures.write(mask, np.zeros((48, 64), np.uint16))


def strange(image, mask):
  ids = np.zeros((48, 64), np.uint8)
  ids[0, :9], ids[1, :5] = 77, 200
  return fixtures.write(mask, ids)


def lossy(image, mask):
  Image.new('L', (64, 48)).save(mask, format='JPEG')
  return mask


def turned(image, mask):
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.new('RGB', (64, 48)).save(image, exif=exif)
  return image


# Kind, and words of the line.
BROKEN = {
  no_partner: ('partner', 'no partner for'),
  cut_image: ('unreadable', 'not a readable image'),
  empty_image: ('unreadable', 'not a readable image'),
  cut_mask: ('unreadable', 'not a readable mask'),
  empty_mask: ('unreadable', 'not a readable mask'),
  text_mask: ('unreadable', 'not a readable mask'),
  smaller: ('size', 'mask is 60x40, its image 64x48'),
  rgb: ('mode', 'mode RGB; expected'),
  rgba: ('mode', '--config.data.palette='),
  deep: ('depth', '16 bits'),
  strange: ('values', '77 (9 pixels), 200 (5 pixels)'),
  lossy: ('lossy', 'JPEG mask'),
  turned: ('exif', 'upright'),
}


def break_pair(root, how, split='train', number=0):
  """The file that should be named."""
  image = sorted((root / split).iterdir())[number]
  return how(image, root / f'{split}annot' / f'{image.stem}.png')


@pytest.mark.parametrize('how', BROKEN, ids=[f.__name__ for f in BROKEN])
def test_every_broken_file_is_named(tmp_path, how):
  fixtures.make_camvid(tmp_path)
  path = break_pair(tmp_path, how, 'val', 2)
  kind, words = BROKEN[how]
  found, lines = report(tmp_path)
  (problem,) = found['problems']
  assert (problem['kind'], problem['file']) == (kind, str(path))
  heading = lines.index(f'problem: {checking.KINDS[kind]} (1)')
  (line,) = [x for x in lines[heading:] if words in x and x[:2] == '  ']
  assert path.name in line
  assert lines[-1].startswith('not usable: 1 problem, ')
  # The others are counted.
  assert found['splits']['val']['usable_pairs'] == 3


def test_values_are_summed_over_files(tmp_path):
  fixtures.make_camvid(tmp_path)
  for number in range(2):
    break_pair(tmp_path, strange, 'train', number)
  ids = np.full((48, 64), 200, np.uint8)
  fixtures.write(break_pair(tmp_path, strange, 'val'), ids)
  _, lines = report(tmp_path)
  many = 48 * 64 + 10
  total = f'200 ({many} pixels in 3 files), 77 (18 pixels in 2 files)'
  assert f'  in total: {total}' in lines


def test_what_is_kept_of_an_error_is_small(tmp_path):
  fixtures.make_folder(tmp_path, 'colors')
  pixels = np.zeros((48, 64, 3), np.uint8)
  pixels[..., 1] = np.arange(48)[:, None]
  pixels[..., 2] = np.arange(64)  # The first one is background.
  pixels[20] = (1, 2, 3)
  fixtures.write(tmp_path / 'masks' / 'val' / 'val_0.png', pixels)
  dataset = load(tmp_path, **fixtures.folder_config('colors'))
  _, problems = checking.check(dataset, 2)
  (problem,) = problems['val'].values()
  assert len(problem.values) == 256 and problem.values['1,2,3'] == 64
  # The message tells five of all.
  assert f'and {47 * 64 - 1 + 1 - 5} more' in str(problem)
  # Frames would keep arrays.
  assert (
    problem.__traceback__ is problem.__cause__ is problem.__context__ is None
  )


def test_five_files_of_a_kind_are_listed(tmp_path):
  fixtures.make_camvid(tmp_path)
  paths = [break_pair(tmp_path, rgb, 'train', i) for i in range(6)]
  paths.append(break_pair(tmp_path, rgb, 'val'))
  found, lines = report(tmp_path)
  start = lines.index(f'problem: {checking.KINDS["mode"]} (7)')
  listed = lines[start + 1 : start + 6]
  for path, line in zip(paths, listed, strict=False):
    assert line.startswith(f'  {path}: ')
  assert lines[start + 6] == '  and 2 more'
  # No pixel of train was counted: no shares, and weights that do nothing.
  assert not any('class_weights' in line for line in lines)
  assert [*found['weights'].values()] == [1] * 11
  assert 'unseen' not in found['warnings']


def test_problems_come_in_a_fixed_order():
  problems = [
    {'kind': kind, 'message': message}
    for kind, message in (
      ('new kind', 'c'),
      ('exif', 'b'),
      ('split', 'a'),
      ('exif', 'd'),
    )
  ]
  assert [*checking.problem_lines(problems, {})] == [
    'problem: missing or empty splits (1)',
    '  a',
    f'problem: {checking.KINDS["exif"]} (2)',
    '  b',
    '  d',
    'problem: new kind (1)',
    '  c',
  ]


@pytest.mark.parametrize('empty', [False, True], ids=['absent', 'empty'])
def test_a_split_without_files(tmp_path, empty):
  fixtures.make_camvid(tmp_path)
  for folder in (tmp_path / 'val', tmp_path / 'valannot'):
    for path in folder.iterdir():
      path.unlink()
    if not empty:
      folder.rmdir()
  found, lines = report(tmp_path)
  (problem,) = found['problems']
  assert problem['kind'] == 'split'
  assert problem['file'] == str(tmp_path / 'val')
  assert 'problem: missing or empty splits (1)' in lines


def test_a_split_that_the_layout_does_not_miss(tmp_path):
  fixtures.make_folder(tmp_path, 'index')
  dataset = load(tmp_path, **fixtures.folder_config('index'))
  assert checking.check(dataset, 1)[0]['usable']
  del dataset.splits['test']
  found, _ = checking.check(dataset, 1, required=('train', 'val', 'test'))
  (problem,) = found['problems']
  assert problem['kind'] == 'split'
  assert problem['message'] == 'folder: no pairs in the split test.'


def test_images_in_two_splits_are_a_warning(tmp_path):
  fixtures.make_camvid(tmp_path)
  source = tmp_path / 'train' / '0001TP_000002.png'
  # Equal pixels in files that differ.
  copy = tmp_path / 'val' / '0001TP_000000.png'
  with Image.open(source) as image:
    image.save(copy, compress_level=1)
  assert copy.read_bytes() != source.read_bytes()
  # A copy in the same split is none.
  other = tmp_path / 'train' / '0001TP_000004.png'
  other.write_bytes(source.read_bytes())
  found, lines = report(tmp_path)
  assert found['warnings'] == {'duplicate': [f'train {source} = val {copy}']}
  assert 'warning: images that are in two splits (1)' in lines
  assert lines[-1] == 'usable: 14 pairs (6 train, 4 val, 4 test), 1 warning.'


def test_unlabeled_images(tmp_path):
  fixtures.make_camvid(tmp_path / 'camvid')
  folder = tmp_path / 'more'
  for i in range(3):
    image, _ = fixtures.draw(900 + i, 11)
    fixtures.write(folder / f'{i}.png', image)
  (folder / '1.png').write_bytes((folder / '0.png').read_bytes())
  train = tmp_path / 'camvid' / 'train' / '0001TP_000002.png'
  (folder / '3.png').write_bytes(train.read_bytes())
  found, lines = report(tmp_path / 'camvid', unlabeled=str(folder))
  assert found['warnings'] == {
    'duplicate': [f'train {train} = unlabeled {folder}/3.png'],
    'copy': [f'unlabeled {folder}/0.png = unlabeled {folder}/1.png'],
  }
  assert 'unlabeled: 4 images, all 64x48' in lines
  pairs = '14 pairs (6 train, 4 val, 4 test)'
  assert lines[-1] == f'usable: {pairs} and 4 unlabeled images, 2 warnings.'


@pytest.mark.parametrize('split', ['val', 'test'])
def test_unlabeled_images_of_val_or_test_are_refused(tmp_path, split):
  fixtures.make_camvid(tmp_path / 'camvid')
  source = tmp_path / 'camvid' / split / '0001TP_000002.png'
  copy = tmp_path / 'more' / 'other.png'
  copy.parent.mkdir()
  with Image.open(source) as image:
    image.save(copy, compress_level=1)
  found, lines = report(tmp_path / 'camvid', unlabeled=str(copy.parent))
  assert not found['usable']
  (problem,) = found['problems']
  assert (problem['kind'], problem['file']) == ('leak', str(copy))
  assert f'  {copy}: is {split} {source}, which must not be trained with; ' in (
    '\n'.join(lines)
  )
  assert lines[-1].startswith(
    'not usable: 1 problem, 14 pairs and 1 unlabeled image read; '
  )


def test_broken_unlabeled_images_are_named(tmp_path):
  fixtures.make_camvid(tmp_path / 'camvid')
  broken = tmp_path / 'more' / 'broken.jpg'
  broken.parent.mkdir()
  broken.write_bytes(b'no image')
  dataset = load(tmp_path / 'camvid', unlabeled=str(broken.parent))
  found, problems = checking.check(dataset, 2)
  (problem,) = found['problems']
  assert (problem['kind'], problem['split']) == ('unreadable', 'unlabeled')
  assert problem['file'] == str(broken) and not found['usable']
  # Its row is the only one without pictures.
  contact_sheet.draw_sheet(dataset, problems)


def test_shape_is_part_of_an_image():
  a, b = np.zeros((2, 6, 3), np.uint8), np.zeros((3, 4, 3), np.uint8)
  assert checking.digest(a) != checking.digest(b)
  c = a.copy()
  c[-1, -1, -1] = 1
  assert checking.digest(c) != checking.digest(a)
  view = np.zeros((2, 12, 3), np.uint8)[:, ::2]  # Not contiguous.
  assert checking.digest(view) == checking.digest(a)


def test_classes_that_train_never_shows(tmp_path):
  fixtures.make_folder(tmp_path, 'index')
  names = (*fixtures.NAMES, 'sea')
  for path in (tmp_path / 'masks' / 'train').iterdir():
    ids = np.array(Image.open(path))
    fixtures.write(path, np.where(ids == 2, 0, ids).astype(np.uint8))
  found, lines = report(tmp_path, name='folder', class_names=names)
  assert found['warnings'] == {
    'unseen': ['tree: only in val, test', 'sea: nowhere']
  }
  assert found['problems'] == []
  assert lines[-1].endswith('2 warnings.')
  assert found['weights']['sea'] == 1


def test_the_table_is_of_the_pixels_that_were_drawn(tmp_path):
  drawn = fixtures.make_camvid(tmp_path)
  found, lines = report(tmp_path)
  for split, labels in drawn.items():
    stack = np.stack(list(labels.values()))
    counts = found['splits'][split]
    for i, name in enumerate(found['class_names']):
      assert counts['pixels'][name] == np.sum(stack == i)
      assert counts['images'][name] == np.any(stack == i, (1, 2)).sum()
    ignored = 100 * np.mean(stack == 255)
    pairs = f'{split}: {len(labels)} pairs, all 64x48, {ignored:.2f} % ignored'
    assert pairs in lines
  train = np.stack(list(drawn['train'].values()))
  valid = np.sum(train != 255)
  (row,) = [line.split() for line in lines if line.startswith('road ')]
  assert row[1] == f'{100 * np.sum(train == 3) / valid:.2f}'
  assert row[2] == str(np.any(train == 3, (1, 2)).sum())
  assert row[-1] == f'{found["weights"]["road"]:.4f}'


def test_the_line_to_paste_is_a_tuple_of_the_weights(tmp_path):
  fixtures.make_camvid(tmp_path)
  found, lines = report(tmp_path)
  (line,) = [x for x in lines if '--config.loss.class_weights=' in x]
  pasted = json.loads(
    line.split('=')[-1].strip('"').translate({40: 91, 41: 93})
  )
  weights = [*found['weights'].values()]
  np.testing.assert_allclose(pasted, weights, rtol=5e-3)
  assert min(pasted) > 0


def test_no_weight_is_rounded_to_nothing():
  train = {name: {'a': 1, 'b': 1} for name in ('pixels', 'images')}
  weights = {'a': 2.34567e-5, 'b': 12.34567}
  *_, line = checking.class_lines(weights, {'train': train})
  assert line.endswith('class_weights="(2.35e-05, 12.3457)"')


def test_sizes_are_ordered_by_area():
  sizes = {(10, 90): 3, (30, 20): 1, (50, 20): 1}
  pixels = sum(h * w * n for (h, w), n in sizes.items())
  split = {
    'pairs': 5,
    'usable_pairs': 5,
    'num_pixels': pixels,
    'pixels': {'a': pixels},
    'sizes': [
      {'height': h, 'width': w, 'images': n} for (h, w), n in sizes.items()
    ],
  }
  (line,) = checking.split_lines({'train': split})
  assert line == (
    'train: 5 pairs, 3 sizes from 20x30 to 20x50, median 90x10, 0.00 % ignored'
  )


class Counting:
  """A source of random labels that notes what is read."""

  def __init__(self, num_records, num_classes):
    generator = np.random.default_rng(0)
    self.labels = [
      generator.integers(0, num_classes, (5 + i, 7)).astype(np.uint8)
      for i in range(num_records)
    ]
    for label in self.labels:
      label[label == 1] = 255
    self.read = []

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    self.read.append(index)
    label = self.labels[index]
    return {'image': np.repeat(label[..., None], 3, -1), 'label': label}

  def name(self, index):
    return str(index)


@pytest.mark.parametrize('threads', [1, 4])
def test_every_pair_is_opened_once(threads):
  splits = {'train': Counting(30, 4), 'val': Counting(3, 4)}
  palette = np.zeros((4, 3), np.uint8)
  dataset = Dataset('x', tuple('abcd'), palette, splits)
  checking.check(dataset, threads)
  for source in splits.values():
    assert sorted(source.read) == list(range(len(source)))


def test_counts_of_a_source():
  source = Counting(9, 4)
  rows = frequencies.count_labels(source, 4, 3)
  assert sorted(source.read) == list(range(9))
  expected = [
    [*(np.sum(label == i) for i in range(4)), np.sum(label == 255)]
    for label in source.labels
  ]
  np.testing.assert_array_equal(rows, expected)
  assert not rows[:, 1].any()


def test_counts_of_nothing():
  rows = frequencies.count_labels([], 3, 1)
  assert rows.shape == (0, 4) and rows.dtype == np.int64
  weights = frequencies.median_frequency_weights(rows)
  np.testing.assert_array_equal(weights, np.ones(3))


def test_values_past_the_classes_are_ignored():
  label = np.array([[0, 1, 2], [9, 255, 1]], np.uint8)
  np.testing.assert_array_equal(frequencies.count_label(label, 2), [1, 2, 3])
  label[:] = 0
  np.testing.assert_array_equal(frequencies.count_label(label, 2), [6, 0, 0])


def test_labels_are_counted_without_their_images():
  class Labels(Counting):
    def label(self, index):
      return self.labels[index]

  source = Labels(4, 3)
  rows = frequencies.count_labels(source, 3, 2)
  assert source.read == [] and len(rows) == 4
  again = frequencies.count_labels(Counting(4, 3), 3, 2)
  np.testing.assert_array_equal(rows, again)


def test_median_frequency_weights():
  # Shares 0.5, 0.1, 0.2: the median is 0.2.
  rows = np.array([[50, 0, 0, 0, 50], [0, 2, 0, 0, 18], [0, 0, 8, 0, 32]])
  found = frequencies.median_frequency_weights(rows)
  np.testing.assert_allclose(found, [0.4, 2, 1, 1], rtol=1e-12)
  # Twice the images change nothing.
  again = frequencies.median_frequency_weights(np.concatenate([rows, rows]))
  np.testing.assert_array_equal(found, again)
  none = frequencies.median_frequency_weights(0 * rows)
  np.testing.assert_array_equal(none, np.ones(4))


@pytest.mark.parametrize('inside', [True, False], ids=['error', 'ctrl-c'])
def test_the_reading_ends_early(inside):
  begun = []

  def read(index):
    begun.append(index)
    time.sleep(1e-3)
    if inside and index == 3:
      raise DataError('three', 'values', '3')
    return index

  with pytest.raises(DataError if inside else KeyboardInterrupt):
    for _ in frequencies.map_records(read, range(1000), 2):
      if not inside:
        raise KeyboardInterrupt
  assert len(begun) < 50
  assert [*frequencies.map_records(read, range(3), 2)] == [0, 1, 2]


def _sheet(dataset):
  _, problems = checking.check(dataset, 1)
  return np.asarray(contact_sheet.draw_sheet(dataset, problems))


def test_the_sheet_shows_labels_in_their_colors(tmp_path):
  drawn = fixtures.make_camvid(tmp_path)
  dataset = load(tmp_path)
  sheet = _sheet(dataset)
  table = np.zeros((256, 3), np.uint8)
  table[:11] = dataset.palette
  found = []
  for row in range(9):
    # Images of 64x48 are shown as they are, and the label is in the middle.
    x, step = 8 + 248, 180 + 14 + 8
    y = sheet.shape[0] - (9 - row) * step + 14
    found.append(sheet[y : y + 48, x : x + 64])
  expected = [
    list(drawn[s].values())[i]
    for s, i in (
      ('train', 0),
      ('train', 2),
      ('train', 5),
      ('val', 0),
      ('val', 1),
      ('val', 3),
      ('test', 0),
      ('test', 1),
      ('test', 3),
    )
  ]
  for cell, label in zip(found, expected, strict=True):
    np.testing.assert_array_equal(cell, table[label])


@pytest.mark.parametrize('how', BROKEN, ids=[f.__name__ for f in BROKEN])
def test_the_sheet_shows_what_can_be_decoded(tmp_path, how):
  fixtures.make_camvid(tmp_path)
  whole = _sheet(load(tmp_path))
  break_pair(tmp_path, how)
  sheet = _sheet(load(tmp_path))
  # An image that has no mask is no pair; of all others a part can be seen.
  rows = 0 if how is no_partner else 1
  assert sheet.shape[0] == whole.shape[0] + rows * (180 + 14 + 8)
  pink = np.all(sheet == (255, 0, 255), -1).sum()
  assert pink == (14 if how is strange else 0)


def test_wrong_colors_are_pink(tmp_path):
  fixtures.make_folder(tmp_path, 'colors')
  path = tmp_path / 'masks' / 'train' / 'train_3.png'
  pixels = np.array(Image.open(path))
  pixels[5, :8] = (1, 2, 3)
  fixtures.write(path, pixels)
  sheet = _sheet(load(tmp_path, **fixtures.folder_config('colors')))
  assert np.all(sheet == (255, 0, 255), -1).sum() == 8


# Commands, as users have them.


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """Name -> (folder, finished process)."""
  folders = {n: tmp_path_factory.mktemp(n) for n in ('sound', 'broken')}
  arguments = {}
  for name, folder in folders.items():
    fixtures.make_camvid(folder / 'camvid')
    arguments[name] = (
      f'--config={tiny_run.ROOT}/configs/camvid.py',
      f'--config.data.root={folder / "camvid"}',
      f'--output={folder / "new" / "found.json"}',
      f'--contact_sheet={folder / "sheet.png"}',
    )
  root = folders['broken'] / 'camvid'
  for path in (root / 'val').iterdir():
    path.unlink()
  pairs = [('train', i) for i in range(6)] + [('test', i) for i in range(4)]
  for how in (
    cut_image,
    text_mask,
    smaller,
    rgb,
    rgba,
    deep,
    strange,
    lossy,
    turned,
    empty_mask,
  ):
    break_pair(root, how, *pairs.pop())
  fixtures.write(root / 'trainannot' / 'lonely.png', np.zeros((2, 2), np.uint8))
  arguments['broken'] += ('--config.data.limit=6',)
  arguments['flag'] = (arguments['sound'][0], '--threads=0')
  arguments['ending'] = (arguments['sound'][0], '--contact_sheet=sheet')
  folders |= {name: None for name in ('flag', 'ending')}

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    processes = pool.map(
      lambda name: tiny_run.run_verb('check_data', *arguments[name]), arguments
    )
    return {
      name: (folders[name], process)
      for name, process in zip(arguments, processes, strict=True)
    }


def test_a_sound_set_ends_with_0(done):
  folder, process = done['sound']
  assert process.returncode == 0, process.stderr
  lines = process.stdout.splitlines()
  assert lines[-1] == 'usable: 14 pairs (6 train, 4 val, 4 test), 0 warnings.'
  assert 'Traceback' not in process.stderr
  assert '14/14' in process.stderr  # The progress bar.
  content = json.loads((folder / 'new' / 'found.json').read_text())
  assert content['usable'] and content['problems'] == []
  assert content['verdict'] == lines[-1]
  train = content['splits']['train']
  assert (train['pairs'], train['usable_pairs']) == (6, 6)
  assert train['sizes'] == [{'height': 48, 'width': 64, 'images': 6}]
  assert sum(train['pixels'].values()) < train['num_pixels'] == 6 * 48 * 64
  assert list(content['weights']) == sorted(content['class_names'])
  with Image.open(folder / 'sheet.png') as sheet:
    assert sheet.size[1] > 9 * 180


def test_a_broken_set_ends_with_2_and_a_line_for_each_file(done):
  folder, process = done['broken']
  assert process.returncode == 2, process.stderr
  assert 'Traceback' not in process.stderr
  lines = process.stdout.splitlines()
  assert 'limit=6' in lines[0]
  headings = [line for line in lines if line.startswith('problem: ')]
  # No annotations and no unlabeled images here, and what is left shows more
  # than one class.
  assert len(headings) == len(checking.KINDS) - 3
  found = [line for line in lines if line.startswith(f'  {folder}')]
  # Two in 'mode', three in 'unreadable', and the masks of val lack images.
  assert len(found) == len({*found}) == 12
  assert lines[-1].startswith('not usable: 12 problems, 10 pairs read; ')
  content = json.loads((folder / 'new' / 'found.json').read_text())
  assert not content['usable'] and len(content['problems']) == 12
  (wrong,) = [x for x in content['problems'] if x['kind'] == 'values']
  assert wrong['values'] == {'77': 9, '200': 5}
  assert {'split', 'kind', 'file', 'message'} <= set(wrong)
  assert pathlib.Path(wrong['file']).exists()
  assert (folder / 'sheet.png').exists()


@pytest.mark.parametrize(
  ('name', 'line'),
  [
    (
      'flag',
      'error: --threads=0: expected a whole number of 1 or more, such as 8.',
    ),
    (
      'ending',
      'error: --contact_sheet=sheet: name a file, such as result.png.',
    ),
  ],
)
def test_wrong_flags_are_one_line(done, name, line):
  _, process = done[name]
  assert process.returncode == 2
  assert process.stdout == '' and process.stderr == f'{line}\n'


@needs_camvid
def test_the_real_camvid():
  dataset = load(CAMVID)
  assert not dataset.problems
  sizes = {name: len(source) for name, source in dataset.splits.items()}
  assert sizes == {'train': 367, 'val': 101, 'test': 233}
  rows = frequencies.count_labels(dataset.splits['train'], 11, 2)
  weights = frequencies.median_frequency_weights(rows)
  np.testing.assert_allclose(weights, CAMVID_WEIGHTS, rtol=0, atol=5.1e-5)
