# SPDX-License-Identifier: Apache-2.0
"""Predictions of files of any size, what is written, and what is refused."""

import csv
import dataclasses
import json
import shutil
import types

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tiny_run

import attnfd_jax
from attnfd_jax import paths as run_paths
from attnfd_jax.config import default_config
from attnfd_jax.data import sources
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError
from attnfd_jax.inference import evaluation, image_files, tiling
from attnfd_jax.inference import options as flag_options
from attnfd_jax.inference import predictor as predictors
from attnfd_jax.inference.predictor import Predictor
from attnfd_jax.models.deeplab import normalize
from attnfd_jax.models.resizing import resize
from attnfd_jax.runs import loading

SIZES = ((33, 47), (64, 64), (20, 130), (1, 1))


@pytest.fixture(scope='session')
def stage(tmp_path_factory):
  return tiny_run.make_stage(tmp_path_factory)


def _image(height, width, seed=0):
  """Smooth noise, so that predictions have borders, uint8 RGB."""
  generator = np.random.default_rng(seed)
  coarse = generator.integers(0, 256, (6, 6, 3), np.uint8)
  return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def folder(tmp_path):
  """Three images of two sizes, and a file that is none."""
  path = tmp_path / 'images'
  path.mkdir()
  for i, name in enumerate(('a.png', 'b.PNG', 'c d.jpg')):
    Image.fromarray(_image(40 + i // 2, 56, i)).save(path / name)
  (path / 'notes.txt').write_text('no image')
  return path


def _rows(path):
  with path.open(newline='') as file:
    return list(csv.reader(file))


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_ids_are_those_of_the_padded_image(stage, size):
  image = _image(*size)
  (ids,) = attnfd_jax.predict([image], stage)
  assert ids.shape == size
  assert ids.dtype == np.uint8
  h, w = size
  padded = image[
    np.minimum(np.arange(-(-h // 64) * 64), h - 1)[:, None],
    np.minimum(np.arange(-(-w // 64) * 64), w - 1),
  ]
  network, variables, _ = loading.load_network(stage)
  logits = jax.jit(
    lambda x: network.apply(variables, normalize(x), train=False)['logits']
  )(padded[None])
  expected = np.argmax(np.asarray(logits), -1)[0, :h, :w]
  np.testing.assert_array_equal(ids, expected)


class OneRecord:
  """A source of one image."""

  def __init__(self, image, label):
    self._record = {'image': image, 'label': label}

  def __len__(self):
    return 1

  def __getitem__(self, index):
    return self._record

  def size(self, index):
    return self._record['label'].shape


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_one_image_has_one_answer(stage, size):
  """Padding is the same wherever an image is padded to multiples."""
  predictor = Predictor(stage)
  network, variables = predictor.network, predictor.variables
  image = _image(*size)
  expected, _ = predictor(image)
  options = {'size_multiple': 64}
  source = OneRecord(image, expected)
  ((ids, _),) = evaluation.predictions(network, variables, source, **options)
  np.testing.assert_array_equal(ids, expected)
  options |= {'num_classes': len(predictor.class_names), 'batch_size': 1}
  counts = evaluation.evaluate(
    network, variables, source, mesh=sharding.make_mesh(1), **options
  )
  # Every pixel is predicted as it was by the predictor.
  np.testing.assert_array_equal(
    counts, np.diag(np.bincount(expected.ravel(), minlength=len(counts)))
  )


def test_several_classes_are_predicted(stage):
  # Otherwise the comparisons of this file would be empty.
  (ids,) = attnfd_jax.predict([_image(64, 96)], stage)
  assert len(np.unique(ids)) > 1


def _stage_seen_at(stage, directory, **changes):
  info = json.loads((stage / 'config.json').read_text())
  info['eval'] |= changes
  (directory / 'config.json').write_text(json.dumps(info))
  (directory / 'checkpoints').symlink_to(stage / 'checkpoints')
  return directory


def test_the_network_sees_the_short_side_of_its_score(stage, tmp_path):
  seen = _stage_seen_at(stage, tmp_path, short_side=64)
  image = _image(100, 200)
  (ids,) = attnfd_jax.predict([image], seen)
  network, variables, _ = loading.load_network(stage)
  small = np.asarray(
    Image.fromarray(image).resize((128, 64), Image.Resampling.BILINEAR)
  )

  # As evaluation: from the coarse scores to the size of the label.
  @jax.jit
  def direct(x):
    out = network.apply(variables, normalize(x), train=False)
    return resize(out['coarse_logits'], 100, 200)

  expected = np.argmax(np.asarray(direct(small[None])), -1)[0]
  # Positions are rounded otherwise; ties at borders.
  assert np.mean(ids != expected) < 1e-3
  # Padding moves little but the context.
  (narrow,) = attnfd_jax.predict([image[:, :190]], seen)
  assert narrow.shape == (100, 190)
  assert np.mean(narrow[:, :150] != expected[:, :150]) < 0.3


def test_the_reference_protocol_is_seen_at_513(stage, tmp_path):
  seen = _stage_seen_at(stage, tmp_path, protocol='reference')
  assert Predictor(seen).short_side == 513


def test_sizes_share_programs(stage):
  predictor = Predictor(stage)
  predictor(_image(64, 64))
  before = predictors.classify._cache_size()
  for size in ((50, 60), (1, 64), (64, 33)):
    predictor(_image(*size))
  assert predictors.classify._cache_size() == before


def test_averages_differ(stage):
  image = _image(64, 96)
  (ids,) = attnfd_jax.predict([image], stage)
  (averaged,) = attnfd_jax.predict([image], stage, scales=(1.0, 0.5))
  assert averaged.shape == ids.shape
  assert np.any(averaged != ids)


@dataclasses.dataclass(frozen=True)
class Local:
  """Not a network: scores are means over squares of 2 `reach` + 1 pixels."""

  reach: int

  def apply(self, variables, image, *, train):
    assert not train and not variables
    edge = (self.reach, self.reach)
    padded = jnp.pad(image, ((0, 0), edge, edge, (0, 0)), mode='edge')
    width = 2 * self.reach + 1
    means = jax.lax.reduce_window(
      padded, 0.0, jax.lax.add, (1, width, width, 1), (1,) * 4, 'VALID'
    ) / (width * width)
    return {'coarse_logits': means, 'logits': means}


def _local(monkeypatch, reach, *, short_side=0, **options):
  info = {
    'stage': 'student',
    'student': {
      'network': 'deeplabv3plus',
      'backbone': 'none',
      'width_multiplier': 1,
    },
    'class_names': ['a', 'b', 'c'],
    'palette': np.zeros((3, 3), np.uint8),
    'checkpoint_step': 1,
    'eval': {'protocol': 'native', 'short_side': short_side},
  }
  loaded = Local(reach), {}, info
  monkeypatch.setattr(loading, 'load_network', lambda *_, **__: loaded)
  return Predictor('x', **options)


def _near_tile_edges(size, tile, overlap, reach):
  """Pixels for which a tile ends, inside the image, less than `reach` away."""
  near = np.zeros(size, bool)
  for axis, (length, part) in enumerate(zip(size, tile, strict=True)):
    for first in tiling.starts(length, part, overlap):
      for here in (first, first + part):
        if 0 < here < length:
          # On the tile's side of its edge.
          side = (here, here + reach) if here == first else (here - reach, here)
          near[(slice(None),) * axis + (slice(*side),)] = True
  return near


@pytest.mark.parametrize('reach', [0, 2], ids=str)
@pytest.mark.parametrize('overlap', [0.0, 0.4], ids=str)
def test_tiles_are_the_whole_as_far_as_the_network_sees(
  monkeypatch, reach, overlap
):
  tile, image = (64, 96), _image(150, 230)
  image += np.random.default_rng(0).integers(0, 9, image.shape, np.uint8)
  whole = _local(monkeypatch, reach)(image)
  tiles = _local(monkeypatch, reach, tile=tile, overlap=overlap)(image)
  near = _near_tile_edges((150, 230), tile, overlap, reach)
  assert np.mean(near) < 0.3
  np.testing.assert_array_equal(tiles[0][~near], whole[0][~near])
  different = np.abs(tiles[1].astype(int) - whole[1])
  # Rounded at one half to either side.
  assert np.max(different[~near]) <= 1
  assert (np.max(different) > 1) == bool(reach)


@pytest.mark.parametrize('size', [(90, 300), (300, 90), (40, 130)], ids=str)
def test_tiles_of_images_at_another_scale(monkeypatch, size):
  image = _image(*size)
  options = {'short_side': 48}
  whole = _local(monkeypatch, 0, **options)(image)
  tiles = _local(monkeypatch, 0, tile=(64, 64), **options)(image)
  assert tiles[0].shape == tiles[1].shape == size
  # Positions are rounded otherwise; ties at borders.
  assert np.mean(tiles[0] != whole[0]) < 1e-3
  assert np.max(np.abs(tiles[1].astype(int) - whole[1])) <= 2


def test_an_image_that_a_tile_covers_is_seen_whole(stage):
  image = _image(60, 64)
  whole = Predictor(stage)(image)
  tiles = Predictor(stage, tile=(60, 64), overlap=0.5)(image)
  for ours, theirs in zip(tiles, whole, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def _probabilities(scores):
  odds = np.exp(scores - np.max(scores, -1, keepdims=True))
  return odds / np.sum(odds, -1, keepdims=True)


def test_tiles_of_a_network_differ_smoothly(stage):
  # One row of tiles; each pixel away from the ends is in two.
  width, tile = 192, (64, 64)
  image = _image(64, width)
  network, variables, _ = loading.load_network(stage)

  def apply(part):
    size = part.shape[:2]
    scores = predictors.compute_logits
    return np.asarray(scores(network, variables, part[None], size=size)[0])

  def blended(overlap):
    options = {'tile': tile, 'overlap': overlap}
    return np.concatenate(list(tiling.bands(apply, image, **options)))

  whole, found = apply(image), blended(0.5)
  firsts = np.arange(0, 129, 32)
  parts = np.full((5, *whole.shape), np.nan, np.float32)
  for part, x in zip(parts, firsts, strict=True):
    part[:, x : x + 64] = apply(image[:, x : x + 64])
  low, high = np.nanmin(parts, 0), np.nanmax(parts, 0)
  assert np.all(found > low - 1e-4) and np.all(found < high + 1e-4)

  # No worse than the worst tile at that pixel. A probability's slopes by the
  # scores sum to 2 p (1 - p), at most one half.
  bound = np.max(np.nanmax(np.abs(parts - whole), 0), -1, keepdims=True) / 2
  change = np.abs(_probabilities(found) - _probabilities(whole))
  assert np.all(change < bound + 1e-4)
  assert np.max(change) > 0.1

  # From pixel to pixel: as in a tile, and as much of the difference of two
  # tiles as the weights move, one in the 32 pixels that they share.
  steps = np.abs(np.diff(found, axis=1))
  within = np.nanmax(np.abs(np.diff(parts, axis=2)), 0)
  between = np.maximum((high - low)[:, 1:], (high - low)[:, :-1])
  assert np.all(steps < within + between / 32 + 1e-4)

  def jumps(overlap, edges):
    """Largest steps of probabilities at edges of tiles, and elsewhere."""
    found = np.diff(_probabilities(blended(overlap)), axis=1)
    found = np.max(np.abs(found), (0, 2))
    return np.max(found[edges - 1]), np.max(np.delete(found, edges - 1))

  at_edges, elsewhere = jumps(0.5, np.arange(32, 192, 32))
  assert at_edges < elsewhere
  at_edges, elsewhere = jumps(0.0, np.array([64, 128]))
  assert at_edges > elsewhere


@pytest.mark.parametrize(
  'image',
  [
    np.zeros((8, 8, 3), np.float32),
    np.zeros((8, 8), np.uint8),
    np.zeros((8, 8, 4), np.uint8),
    np.zeros((0, 8, 3), np.uint8),
  ],
  ids=['float', 'gray', 'alpha', 'empty'],
)
def test_other_arrays_are_refused(stage, image):
  with pytest.raises(ValueError, match=r'it must be uint8 \[h, w, 3\]'):
    attnfd_jax.predict([image], stage)


def test_palette_png_is_exactly_the_ids(tmp_path):
  ids = np.arange(6, dtype=np.uint8).reshape(2, 3)
  palette = np.random.default_rng(0).integers(0, 256, (6, 3), np.uint8)
  path = tmp_path / 'ids.png'
  image_files.write_ids(path, ids, palette)
  np.testing.assert_array_equal(sources.read_mask(path), ids)
  with Image.open(path) as file:
    assert file.mode == 'P'
    np.testing.assert_array_equal(file.convert('RGB'), palette[ids])
  # Bit depth in the header: readers without Pillow see bytes, too.
  assert path.read_bytes()[24] == 8


def test_masks_of_pseudo_labels(stage, folder, tmp_path):
  """A data set in the layout of configs/folder.py, of confident pixels."""
  root, least = tmp_path / 'set', 0.2
  for split in ('train', 'val'):
    shutil.copytree(folder, root / 'images' / split)
    count, kept = image_files.predict_files(
      stage,
      str(root / 'images' / split),
      root / 'masks' / split,
      min_confidence=least,
      masks_only=True,
    )
  assert count == 3
  names = {path.name for path in (root / 'masks' / 'train').iterdir()}
  assert names == {'a.png', 'b.png', 'c d.png'}
  predictor = Predictor(stage)
  config = default_config().data
  config.name, config.root = 'folder', str(root)
  config.class_names = tuple(predictor.class_names)
  source, shares = sources.load_dataset(config).splits['train'], []
  assert len(source) == 3
  for i in range(3):
    ids, confidence = predictor(source[i]['image'])
    sure = confidence / 255 >= least
    np.testing.assert_array_equal(source[i]['label'], np.where(sure, ids, 255))
    shares.append(sure.mean())
  assert 0 < np.mean(shares) < 1
  np.testing.assert_allclose(kept, np.mean(shares), rtol=1e-6)


def test_what_is_not_sure_is_black(stage, folder, tmp_path):
  output = tmp_path / 'out'
  _, kept = image_files.predict_files(
    stage, str(folder), output, min_confidence=1.0
  )
  assert kept < 0.5
  ids = sources.read_mask(output / 'a.png')
  assert (sources.read_image(output / 'a_color.png')[ids == 255] == 0).all()
  _, *rows = _rows(output / 'areas.csv')
  np.testing.assert_allclose(
    np.mean([[float(x) for x in row[1:]] for row in rows]) * 9, kept, atol=1e-5
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      {'masks_only': True, 'confidence': True},
      '--confidence writes more than mask',
    ),
    ({'masks_only': True, 'video': 'a.mp4'}, '--video writes more than masks'),
    ({'min_confidence': 1.5}, '--min_confidence=1.5'),
  ],
)
def test_masks_alone_are_masks(folder, tmp_path, options, message):
  with pytest.raises(InputError, match=message):
    image_files.predict_files('x', str(folder), tmp_path / 'out', **options)
  assert not (tmp_path / 'out').exists()


def test_all_files_of_a_folder(stage, folder, tmp_path):
  output = tmp_path / 'new' / 'out'
  found = image_files.predict_files(stage, str(folder), output, confidence=True)
  assert found == (3, 1.0)
  names = {path.name for path in output.iterdir()}
  endings = ('.png', '_color.png', '_overlay.jpg', '_confidence.png')
  assert names == {'areas.csv'} | {
    stem + ending for stem in ('a', 'b', 'c d') for ending in endings
  }
  predictor = Predictor(stage)
  header, *rows = _rows(output / 'areas.csv')
  assert header == ['image', *predictor.class_names]
  assert [row[0] for row in rows] == ['a.png', 'b.PNG', 'c d.jpg']
  for name, *shares in rows:
    image = sources.read_image(folder / name)
    expected, confidence = predictor(image)
    stem = output / name.rpartition('.')[0]
    ids = sources.read_mask(f'{stem}.png')
    np.testing.assert_array_equal(ids, expected)
    color = sources.read_image(f'{stem}_color.png')
    np.testing.assert_array_equal(color, predictor.palette[ids])
    overlay = sources.read_image(f'{stem}_overlay.jpg').astype(float)
    # Compression.
    assert np.mean(np.abs(overlay - (image / 2 + color / 2))) < 8
    with Image.open(f'{stem}_confidence.png') as file:
      np.testing.assert_array_equal(file, confidence)
    share = np.bincount(ids.ravel(), minlength=9) / ids.size
    # Six digits.
    np.testing.assert_allclose(np.float64(shares), share, rtol=0, atol=1e-6)


def found_names(pattern, **options):
  found = image_files.find_images(str(pattern), **options)
  return [name.as_posix() for name in found]


def test_images_are_found(folder):
  names = found_names

  assert names(folder) == ['a.png', 'b.PNG', 'c d.jpg']
  assert names(folder / 'a.png') == ['a.png']
  assert names(folder / '*.png') == ['a.png']
  assert names(folder.parent / '**' / '*.jpg') == ['images/c d.jpg']
  brackets = folder / 'a[1].png'
  brackets.write_bytes(b'')
  assert names(brackets) == ['a[1].png']


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
  names = [*(f'frame_{i}.png' for i in range(12)), 'frame_a.png', 'g01.png']
  names += ['g1.png', 'g1b.png', 'g01_2.png', 'g1_10.png', '7.png', '30.png']
  for name in sorted(names):
    (tmp_path / name).write_bytes(b'')
  expected = ['7.png', '30.png', *names[:13]]
  expected += ['g01.png', 'g1.png', 'g01_2.png', 'g1_10.png', 'g1b.png']
  for pattern in (tmp_path, tmp_path / '*.png'):
    assert found_names(pattern) == expected


@pytest.fixture
def tree(tmp_path):
  """Images in folders, linked, hidden, dangling; and what is none."""
  path = tmp_path / 'in'
  (path / 'cam 2' / 'day').mkdir(parents=True)
  (path / '.hidden').mkdir()
  for name in ('f00.png', 'cam 2/f00.png', 'cam 2/day/f00.JPG', '.a.png'):
    Image.fromarray(_image(40, 56)).save(path / name)
  Image.fromarray(_image(40, 56)).save(path / '.hidden/a.png')
  Image.fromarray(_image(40, 56)).save(path / 'cam 2' / 'b.webp')
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  Image.fromarray(_image(40, 56)).save(elsewhere / 'f00.png')
  (path / 'linked').symlink_to(elsewhere)
  (path / 'cam 2' / 'around').symlink_to(path)  # Without an end.
  (path / 'gone.png').symlink_to(tmp_path / 'moved.png')
  for name in ('a.txt', 'cam 2/b.heic', 'linked/c', 'd.csv'):
    (path / name).write_text('')
  return path


TREE = ['cam 2/b.webp', 'cam 2/day/f00.JPG', 'cam 2/f00.png', 'f00.png']
TREE += ['gone.png', 'linked/f00.png']


def test_folders_are_searched_whole(tree, capsys):
  assert found_names(tree) == TREE
  assert capsys.readouterr().out == (
    f'{tree}: left out 4 files of other types: '
    'a.txt, cam 2/b.heic, d.csv, ...\n'
  )


@pytest.mark.parametrize(
  ('pattern', 'names'),
  [
    ('*.png', ['f00.png', 'gone.png']),
    ('*/*.png', ['cam 2/f00.png', 'linked/f00.png']),
    ('cam 2/*', ['b.heic', 'b.webp', 'f00.png']),
    ('c*/day/*', ['cam 2/day/f00.JPG']),
    ('cam 2/f00.png', ['f00.png']),
    ('gone.png', ['gone.png']),
  ],
)
def test_names_are_those_below_the_folders_of_a_pattern(tree, pattern, names):
  assert found_names(tree / pattern) == names


@pytest.mark.parametrize(
  'name', ['trip [2024]', '[a]', 'a*b', 'why?', '[!x]/[y]', '[[]']
)
def test_folders_with_the_letters_of_patterns(folder, name):
  for inside in (name, f'{name}/*', f'{name}/**'):
    path = folder.parent / inside
    path.mkdir(parents=True)
    (path / 'd.png').write_bytes(b'')
    assert found_names(path) == found_names(path / '*.png') == ['d.png']
    assert found_names(path / 'd.png') == ['d.png']
    (path / 'd.png').unlink()
    path.rmdir()
  # Where no such folder is, they are a pattern.
  assert found_names(folder.parent / 'image[rst]' / 'a.*') == ['images/a.png']
  with pytest.raises(InputError, match=r'write \[\[\] for a bracket\.$'):
    image_files.find_images(str(folder / '[2024]' / '*.png'))


def test_patterns_stay_in_their_folder(folder):
  with pytest.raises(InputError, match='write it without ..'):
    image_files.find_images(str(folder / '*' / '..' / '*.png'))


def test_results_are_no_inputs(folder, tmp_path):
  for below in ('out', 'out/cam'):
    (folder / below).mkdir()
    (folder / below / 'a_color.png').write_bytes(b'')
    (folder / below / 'areas.csv').write_bytes(b'')
  names = ['a.png', 'b.PNG', 'c d.jpg']
  assert found_names(folder, output=folder / 'out') == names
  assert (
    found_names(folder / '**' / 'a*.png', output=folder / 'out') == names[:1]
  )
  # A folder beside that only begins alike.
  beside = folder / 'out2'
  beside.mkdir()
  (beside / 'a.png').write_bytes(b'')
  assert 'out2/a.png' in found_names(folder, output=folder / 'out')
  assert len(found_names(folder, output=folder)) == 6
  # A link inside the images to results elsewhere.
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  (elsewhere / 'b_overlay.jpg').write_bytes(b'')
  (folder / 'results').symlink_to(elsewhere)
  assert 'results/b_overlay.jpg' in found_names(folder)
  assert 'results/b_overlay.jpg' not in found_names(folder, output=elsewhere)


def test_results_may_be_written_above_the_images(tmp_path):
  images = tmp_path / 'images'
  images.mkdir()
  Image.new('RGB', (8, 8)).save(images / 'a.png')
  assert found_names(images, output=tmp_path) == ['a.png']


def test_results_keep_their_paths(stage, tree, tmp_path, capsys):
  output = tmp_path / 'out'
  with pytest.raises(InputError, match='1 of 6 images were skipped'):
    image_files.predict_files(stage, str(tree), output)
  printed = capsys.readouterr()
  assert f'skipped {tree / "gone.png"}' in printed.err
  assert 'left out 4 files of other types' in printed.out
  names = [x for x in TREE if x != 'gone.png']
  stems = {name.rpartition('.')[0] for name in names}
  results = {path for path in output.rglob('*') if path.is_file()}
  endings = ('.png', '_color.png', '_overlay.jpg')
  assert results == {output / 'areas.csv'} | {
    output / f'{stem}{end}' for stem in stems for end in endings
  }
  assert [row[0] for row in _rows(output / 'areas.csv')[1:]] == names
  # Again, into a folder of the images themselves.
  inside = tree / 'out'
  for overwrite in (False, True):
    with pytest.raises(InputError, match='1 of 6 images were skipped'):
      image_files.predict_files(stage, str(tree), inside, overwrite=overwrite)


@pytest.mark.parametrize(
  ('stem', 'confidence', 'fits'),
  [
    ('b' * 243, False, True),  # And _overlay.jpg has 12 bytes.
    ('b' * 244, False, False),
    ('b' * 240, True, True),  # _confidence.png has 15.
    ('b' * 241, True, False),
    ('空' * 81, False, True),
    ('空' * 82, False, False),
  ],
  ids=['243', '244', '240', '241', '81 wide', '82 wide'],
)
@pytest.mark.parametrize('made', [False, True], ids=['new', 'there'])
def test_names_that_are_too_long_are_skipped(
  stage, folder, tmp_path, capsys, stem, confidence, fits, made
):
  output, options = tmp_path / 'out', {'confidence': confidence}
  if made:
    output.mkdir()
  path = folder / f'{stem}.png'
  Image.fromarray(_image(8, 8)).save(path)
  if fits:
    image_files.predict_files(stage, str(folder), output, **options)
  else:
    with pytest.raises(InputError, match='1 of 4 images were skipped'):
      image_files.predict_files(stage, str(folder), output, **options)
    message = f'skipped {path}: its results would have names of more than 255'
    assert message in capsys.readouterr().err
    assert not any(x.name.startswith(stem[0] * 9) for x in output.iterdir())
  assert len(_rows(output / 'areas.csv')) == 4 + fits
  assert (output / 'a.png').exists() and (output / 'c d.png').exists()


@pytest.mark.parametrize(
  'error',
  [OSError(28, 'No space left on device'), KeyboardInterrupt(), KeyError('x')],
  ids=['full', 'interrupted', 'other'],
)
def test_areas_are_written_whatever_happens(
  stage, frames, tmp_path, monkeypatch, error
):
  write, left = image_files._write, list(range(7))

  def failing(*arguments):
    if not left:
      raise error
    left.pop()
    return write(*arguments)

  monkeypatch.setattr(image_files, '_write', failing)
  with pytest.raises(type(error)):
    image_files.predict_files(stage, str(frames), tmp_path / 'out')
  rows = _rows(tmp_path / 'out' / 'areas.csv')
  assert rows[0][0] == 'image' and len(rows) <= 8
  assert rows[1][0] == 'frame_0.png'


@pytest.mark.parametrize('made', [False, True], ids=['new', 'there'])
@pytest.mark.parametrize(
  'error',
  [OSError(28, 'No space left on device'), OSError(30, 'Read-only file syst')],
  ids=['full', 'read-only'],
)
def test_a_place_that_cannot_be_written_is_found_first(
  folder, tmp_path, monkeypatch, made, error
):
  def refuse(folder):
    raise error

  output = tmp_path / 'out'
  if made:
    output.mkdir()
  monkeypatch.setattr(run_paths, 'check_writable', refuse)
  monkeypatch.delattr(image_files, 'Predictor')  # Before any work.
  with pytest.raises(InputError) as refused:
    image_files.predict_files('stage', str(folder), output)
  assert str(refused.value) == (
    f'folder {output} cannot be written ({error.strerror}); make it writable, '
    'or name another by --output.'
  )
  assert output.exists() == made


def test_no_images(folder):
  with pytest.raises(InputError, match=r'nothing matches it as a pattern\.$'):
    image_files.find_images(str(folder / '*.tif'))
  (folder / 'empty').mkdir()
  with pytest.raises(InputError, match=r'empty: no \.jpg, .* files in it\.$'):
    image_files.find_images(str(folder / 'empty'))
  (folder / 'empty' / 'a.heic').write_text('')
  with pytest.raises(
    InputError, match=r'in it, 1 file of other types: a\.heic\.$'
  ):
    image_files.find_images(str(folder / 'empty'))


def test_nothing_is_overwritten_unasked(stage, folder, tmp_path):
  output = tmp_path / 'out'
  output.mkdir()
  old = output / 'b_color.png'
  old.write_text('mine')
  with pytest.raises(InputError, match=r'b_color\.png exists; add --overwri'):
    image_files.predict_files(stage, str(folder), output)
  assert [path.name for path in output.iterdir()] == ['b_color.png']
  assert old.read_text() == 'mine'
  options = {'overwrite': True}
  found = image_files.predict_files(stage, str(folder), output, **options)
  assert found == (3, 1.0)
  assert sources.read_image(old).shape == (40, 56, 3)
  (output / 'a.png').unlink()
  with pytest.raises(InputError, match=r'a_color\.png exists'):
    image_files.predict_files(stage, str(folder), output)


def test_inputs_are_never_overwritten(stage, folder):
  before = (folder / 'a.png').read_bytes()
  with pytest.raises(InputError, match=r'a\.png is an input'):
    image_files.predict_files(stage, str(folder), folder, overwrite=True)
  assert (folder / 'a.png').read_bytes() == before


@pytest.mark.parametrize('twin', ['a.jpg', 'a_color.bmp'])
def test_two_results_of_one_name_are_refused(stage, folder, twin, tmp_path):
  Image.fromarray(_image(8, 8)).save(folder / twin)
  with pytest.raises(InputError, match='would both be written to') as caught:
    image_files.predict_files(stage, str(folder), tmp_path / 'out')
  assert str(folder / 'a.png') in str(caught.value)
  assert str(folder / twin) in str(caught.value)
  assert not (tmp_path / 'out').exists()


def test_output_must_be_a_folder(stage, folder, tmp_path):
  with pytest.raises(InputError, match='is a file; name a folder'):
    image_files.predict_files(stage, str(folder), folder / 'notes.txt')
  with pytest.raises(InputError, match='no config.json'):
    image_files.predict_files(tmp_path, str(folder), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_images_that_are_too_large_are_skipped(
  stage, folder, tmp_path, monkeypatch, capsys
):
  call = Predictor.__call__

  def limited(self, image):
    if len(image) > 40:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')
    return call(self, image)

  monkeypatch.setattr(Predictor, '__call__', limited)
  with pytest.raises(InputError, match='1 of 3 images were skipped'):
    image_files.predict_files(stage, str(folder), tmp_path / 'out')
  message = 'c d.jpg: 56x41 needs more memory than the device has; use --tile'
  assert message in capsys.readouterr().err
  assert len(_rows(tmp_path / 'out' / 'areas.csv')) == 3


@pytest.fixture
def frames(tmp_path):
  """Twelve of one size, each of its own brightness."""
  path = tmp_path / 'frames'
  path.mkdir()
  for i in range(12):
    image = np.full((40, 56, 3), 20 * i, np.uint8)
    Image.fromarray(image).save(path / f'frame_{i}.png')
  return path


def _read_video(path):
  file, found = cv2.VideoCapture(str(path)), []
  while (frame := file.read())[0]:
    found.append(cv2.cvtColor(frame[1], cv2.COLOR_BGR2RGB))
  return found


def test_a_video_of_the_overlays(stage, frames, tmp_path, capsys):
  (frames / 'frame_5.png').write_bytes(
    (frames / 'frame_4.png').read_bytes()[:99]
  )
  output, video = tmp_path / 'out', tmp_path / 'new' / 'all.mp4'
  with pytest.raises(
    InputError, match='1 of 12 .* the others are in'
  ) as caught:
    image_files.predict_files(stage, str(frames), output, video=video, fps=10)
  assert str(caught.value).endswith(f'{output} and {video}.')
  assert 'skipped' in capsys.readouterr().err
  assert [path.name for path in video.parent.iterdir()] == ['all.mp4']
  found = _read_video(video)
  expected = [
    sources.read_image(output / f'frame_{i}_overlay.jpg')
    for i in range(12)
    if i != 5
  ]
  assert [frame.shape for frame in found] == [(40, 56, 3)] * 11
  # Neighbors differ by 10 or so; compression.
  np.testing.assert_allclose(
    np.mean(found, (1, 2, 3)), np.mean(expected, (1, 2, 3)), rtol=0, atol=5
  )
  names = [row[0] for row in _rows(output / 'areas.csv')[1:]]
  assert names == [f'frame_{i}.png' for i in range(12) if i != 5]


def test_frames_of_a_video_have_one_size(stage, folder, tmp_path):
  (folder / 'a.png').write_bytes(b'no image, no size')
  output = tmp_path / 'out'
  with pytest.raises(InputError) as caught:
    image_files.predict_files(
      stage, str(folder), output, video=output / 'a.mp4'
    )
  assert str(caught.value) == (
    f'--video: {folder / "b.PNG"} is 56x40, {folder / "c d.jpg"} is 56x41; '
    'frames must have one size.'
  )
  assert not output.exists()


def test_a_video_is_not_overwritten_unasked(stage, frames, tmp_path):
  video, output = tmp_path / 'old.avi', tmp_path / 'out'
  video.write_bytes(b'mine')
  with pytest.raises(InputError, match=r'old\.avi exists; add --overwrite'):
    image_files.predict_files(stage, str(frames), output, video=video)
  assert not output.exists() and video.read_bytes() == b'mine'
  one = str(frames / 'frame_0.png')
  image_files.predict_files(stage, one, output, video=video, overwrite=True)
  assert len(_read_video(video)) == 1
  with pytest.raises(InputError, match=r'old\.avi is an input'):
    image_files.predict_files(
      stage, str(video), tmp_path / 'b', video=video, overwrite=True
    )


def test_an_interrupted_video_is_not_there(
  stage, frames, tmp_path, monkeypatch
):
  call, left = Predictor.__call__, list(range(7))

  def interrupted(self, image):
    if not left:
      raise KeyboardInterrupt
    left.pop()
    return call(self, image)

  monkeypatch.setattr(Predictor, '__call__', interrupted)
  output = tmp_path / 'out'
  with pytest.raises(KeyboardInterrupt):
    image_files.predict_files(
      stage, str(frames), output, video=output / 'all.mp4'
    )
  names = {path.name for path in output.iterdir()}
  assert 'frame_0_overlay.jpg' in names
  assert not any('.mp4' in name for name in names)


def test_an_unreadable_file_does_not_stop_the_others(stage, folder, tmp_path):
  (folder / 'b.PNG').write_bytes(b'\x89PNG but not really')
  (folder / 'empty.jpg').write_bytes(b'')
  output = tmp_path / 'out'
  done = tiny_run.run_verb(
    'predict',
    f'--checkpoint={stage}',
    f'--input={folder}',
    f'--output={output}',
  )
  assert done.returncode == 2
  assert 'Traceback' not in done.stderr
  for name in ('b.PNG', 'empty.jpg'):
    problem = f'skipped {folder / name}: not a readable image'
    assert done.stderr.count(problem) == 1
  assert done.stderr.endswith(
    'error: 2 of 4 images were skipped, see above; the others are in '
    f'{output}.\n'
  )
  assert {path.name for path in output.glob('*.png')} == {
    *('a.png', 'a_color.png', 'c d.png', 'c d_color.png')
  }
  assert [row[0] for row in _rows(output / 'areas.csv')[1:]] == [
    'a.png',
    'c d.jpg',
  ]


def test_the_command_refuses_scales_that_are_no_numbers(stage, folder):
  done = tiny_run.run_verb(
    'predict',
    f'--checkpoint={stage}',
    f'--input={folder}',
    '--output=x',
    '--scales=big',
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: --scales=big: expected positive numb')
  assert done.stderr.count('\n') == 1


def _values(**changes):
  """Values of the shared flags."""
  options = dict.fromkeys(('tile', 'overlap', 'step'))
  options |= {'checkpoint': 'x', 'allow_code': False, 'flip': False}
  return types.SimpleNamespace(**options | {'scales': '1', **changes})


def test_flags_of_tiles():
  given = flag_options.read(_values(tile='64x96', overlap=0.5))
  assert (given['tile'], given['overlap']) == ((64, 96), 0.5)
  given = flag_options.read(_values(allow_code=True))
  assert (given['tile'], given['overlap']) == (None, 0.25)
  assert given['allow_code']


def test_flags_that_do_not_go_together(stage):
  with pytest.raises(InputError, match='--tile=64: expected HEIGHTxWIDTH'):
    flag_options.read(_values(tile='64'))
  with pytest.raises(InputError, match='--overlap needs tiles; add --tile='):
    flag_options.read(_values(overlap=0.5))
  with pytest.raises(InputError, match=r'--overlap=1\.0 must be from 0 to bel'):
    Predictor(stage, overlap=1.0, tile=(64, 64))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((), '--checkpoint is missing: Folder of a stage'),
    (('--checkpoint=x',), '--input is missing: Image, folder'),
    (
      ('--checkpoint=x', '--input=y'),
      '--output is missing: Folder for',
    ),
    (
      ('--checkpoint=x', '--input=y', '--output=z', '--fps=9'),
      '--fps is for a video; add --video=FILE.mp4.',
    ),
  ],
  ids=['checkpoint', 'input', 'output', 'fps'],
)
def test_the_command_says_what_is_missing(arguments, message):
  done = tiny_run.run_verb('predict', *arguments)
  assert done.returncode == 2
  assert done.stderr.startswith(f'error: {message}')
