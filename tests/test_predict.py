# SPDX-License-Identifier: Apache-2.0
"""Predictions of files of any size, what is written, and what is refused."""

import csv
import json

import cv2
import jax
import numpy as np
from PIL import Image
import pytest
import tiny_run

from attnfd_jax import evaluate
from attnfd_jax import predict
from attnfd_jax.data import sources
from attnfd_jax.errors import InputError
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.models.layers import resize

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
  (ids,) = predict.predict([image], stage)
  assert ids.shape == size
  assert ids.dtype == np.uint8
  h, w = size
  padded = image[
    np.minimum(np.arange(-(-h // 64) * 64), h - 1)[:, None],
    np.minimum(np.arange(-(-w // 64) * 64), w - 1),
  ]
  network, variables, _ = evaluate.load_network(stage)
  logits = jax.jit(
    lambda x: network.apply(variables, normalise(x), train=False)['logits']
  )(padded[None])
  expected = np.argmax(np.asarray(logits), -1)[0, :h, :w]
  np.testing.assert_array_equal(ids, expected)


def test_several_classes_are_predicted(stage):
  # Otherwise the comparisons of this file would be empty.
  (ids,) = predict.predict([_image(64, 96)], stage)
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
  (ids,) = predict.predict([image], seen)
  network, variables, _ = evaluate.load_network(stage)
  small = np.asarray(
    Image.fromarray(image).resize((128, 64), Image.Resampling.BILINEAR)
  )

  # As evaluation: from the coarse scores to the size of the label.
  @jax.jit
  def direct(x):
    out = network.apply(variables, normalise(x), train=False)
    return resize(out['coarse_logits'], 100, 200)

  expected = np.argmax(np.asarray(direct(small[None])), -1)[0]
  # Positions are rounded otherwise; ties at borders.
  assert np.mean(ids != expected) < 1e-3
  # Padding moves little but the context.
  (narrow,) = predict.predict([image[:, :190]], seen)
  assert narrow.shape == (100, 190)
  assert np.mean(narrow[:, :150] != expected[:, :150]) < 0.3


def test_the_reference_protocol_is_seen_at_513(stage, tmp_path):
  seen = _stage_seen_at(stage, tmp_path, protocol='reference')
  assert predict.Predictor(seen).short_side == 513


def test_sizes_share_programs(stage):
  predictor = predict.Predictor(stage)
  predictor(_image(64, 64))
  before = predictor._step._cache_size()
  for size in ((50, 60), (1, 64), (64, 33)):
    predictor(_image(*size))
  assert predictor._step._cache_size() == before


def test_averages_differ(stage):
  image = _image(64, 96)
  (ids,) = predict.predict([image], stage)
  (averaged,) = predict.predict([image], stage, scales=(1.0, 0.5))
  assert averaged.shape == ids.shape
  assert np.any(averaged != ids)


@pytest.mark.parametrize(
  'image',
  [
    np.zeros((8, 8, 3), np.float32),
    np.zeros((8, 8), np.uint8),
    np.zeros((8, 8, 4), np.uint8),
    np.zeros((0, 8, 3), np.uint8),
  ],
  ids=['float', 'grey', 'alpha', 'empty'],
)
def test_other_arrays_are_refused(stage, image):
  with pytest.raises(ValueError, match=r'it must be uint8 \[h, w, 3\]'):
    predict.predict([image], stage)


def test_palette_png_is_exactly_the_ids(tmp_path):
  ids = np.arange(6, dtype=np.uint8).reshape(2, 3)
  palette = np.random.default_rng(0).integers(0, 256, (6, 3), np.uint8)
  path = tmp_path / 'ids.png'
  predict.write_ids(path, ids, palette)
  np.testing.assert_array_equal(sources.read_mask(path), ids)
  with Image.open(path) as file:
    assert file.mode == 'P'
    np.testing.assert_array_equal(file.convert('RGB'), palette[ids])
  # Bit depth in the header: readers without Pillow see bytes, too.
  assert path.read_bytes()[24] == 8


def test_all_files_of_a_folder(stage, folder, tmp_path):
  output = tmp_path / 'new' / 'out'
  count = predict.predict_files(stage, str(folder), output, confidence=True)
  assert count == 3
  names = {path.name for path in output.iterdir()}
  endings = ('.png', '_colour.png', '_overlay.jpg', '_confidence.png')
  assert names == {'areas.csv'} | {
    stem + ending for stem in ('a', 'b', 'c d') for ending in endings
  }
  predictor = predict.Predictor(stage)
  header, *rows = _rows(output / 'areas.csv')
  assert header == ['image', *predictor.class_names]
  assert [row[0] for row in rows] == ['a.png', 'b.PNG', 'c d.jpg']
  for name, *shares in rows:
    image = sources.read_image(folder / name)
    expected, confidence = predictor(image)
    stem = output / name.rpartition('.')[0]
    ids = sources.read_mask(f'{stem}.png')
    np.testing.assert_array_equal(ids, expected)
    colour = sources.read_image(f'{stem}_colour.png')
    np.testing.assert_array_equal(colour, predictor.palette[ids])
    overlay = sources.read_image(f'{stem}_overlay.jpg').astype(float)
    # Compression.
    assert np.mean(np.abs(overlay - (image / 2 + colour / 2))) < 8
    with Image.open(f'{stem}_confidence.png') as file:
      np.testing.assert_array_equal(file, confidence)
    share = np.bincount(ids.ravel(), minlength=9) / ids.size
    # Six digits.
    np.testing.assert_allclose(np.float64(shares), share, rtol=0, atol=1e-6)


def test_images_are_found(folder):
  def names(pattern):
    return [path.name for path in predict.find_images(str(pattern))]

  assert names(folder) == ['a.png', 'b.PNG', 'c d.jpg']
  assert names(folder / 'a.png') == ['a.png']
  assert names(folder / '*.png') == ['a.png']
  assert names(folder.parent / '**' / '*.jpg') == ['c d.jpg']
  brackets = folder / 'a[1].png'
  brackets.write_bytes(b'')
  assert names(brackets) == ['a[1].png']


def test_no_images(folder):
  with pytest.raises(InputError, match=r'nothing matches it as a pattern\.$'):
    predict.find_images(str(folder / '*.tif'))
  (folder / 'empty').mkdir()
  with pytest.raises(InputError, match=r'empty: no \.jpg, .* files in it\.$'):
    predict.find_images(str(folder / 'empty'))
  with pytest.raises(InputError, match='^--input is missing'):
    predict.find_images(None)


def test_nothing_is_overwritten_unasked(stage, folder, tmp_path):
  output = tmp_path / 'out'
  output.mkdir()
  old = output / 'b_colour.png'
  old.write_text('mine')
  with pytest.raises(InputError, match=r'b_colour\.png exists; add --overwri'):
    predict.predict_files(stage, str(folder), output)
  assert [path.name for path in output.iterdir()] == ['b_colour.png']
  assert old.read_text() == 'mine'
  assert predict.predict_files(stage, str(folder), output, overwrite=True) == 3
  assert sources.read_image(old).shape == (40, 56, 3)
  (output / 'a.png').unlink()
  with pytest.raises(InputError, match=r'a_colour\.png exists'):
    predict.predict_files(stage, str(folder), output)


def test_inputs_are_never_overwritten(stage, folder):
  before = (folder / 'a.png').read_bytes()
  with pytest.raises(InputError, match=r'a\.png is an input'):
    predict.predict_files(stage, str(folder), folder, overwrite=True)
  assert (folder / 'a.png').read_bytes() == before


@pytest.mark.parametrize('twin', ['a.jpg', 'a_colour.bmp'])
def test_two_results_of_one_name_are_refused(stage, folder, twin, tmp_path):
  Image.fromarray(_image(8, 8)).save(folder / twin)
  with pytest.raises(InputError, match='would both be written to') as caught:
    predict.predict_files(stage, str(folder), tmp_path / 'out')
  assert str(folder / 'a.png') in str(caught.value)
  assert str(folder / twin) in str(caught.value)
  assert not (tmp_path / 'out').exists()


def test_output_must_be_a_folder(stage, folder, tmp_path):
  with pytest.raises(InputError, match='is a file; name a folder'):
    predict.predict_files(stage, str(folder), folder / 'notes.txt')
  with pytest.raises(InputError, match='--output is missing'):
    predict.predict_files(stage, str(folder), None)
  with pytest.raises(InputError, match='no config.json'):
    predict.predict_files(tmp_path, str(folder), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_images_that_are_too_large_are_skipped(
  stage, folder, tmp_path, monkeypatch, capsys
):
  call = predict.Predictor.__call__

  def limited(self, image):
    if len(image) > 40:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory')
    return call(self, image)

  monkeypatch.setattr(predict.Predictor, '__call__', limited)
  with pytest.raises(InputError, match='1 of 3 images were skipped'):
    predict.predict_files(stage, str(folder), tmp_path / 'out')
  message = 'c d.jpg: 56x41 needs more memory than the device has.'
  assert message in capsys.readouterr().err
  assert len(_rows(tmp_path / 'out' / 'areas.csv')) == 3


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
    *('a.png', 'a_colour.png', 'c d.png', 'c d_colour.png')
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
