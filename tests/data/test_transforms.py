# SPDX-License-Identifier: Apache-2.0
"""Augmentation moves image and label together, and only as it is told."""

import cv2
import numpy as np
from PIL import Image
import pytest

from attnfd_jax.data import transforms
from attnfd_jax.data.transforms import Augment

PLAIN = {'flip': 0.0, 'blur': 0.0, 'scale_range': (1.0, 1.0)}


def make_record(h, w):
  """Position in the image: rows in red, columns in green; label 8 x 8 tiles."""
  rows, columns = np.mgrid[:h, :w]
  image = np.stack([rows, columns, 0 * rows + 50], -1).astype(np.uint8)
  return {
    'image': image,
    'label': ((rows // 8 + columns // 8) % 5).astype('u1'),
  }


def generator(seed):
  return np.random.default_rng(seed)


def blobs(h, w, seed):
  """Labels 0, 1 and 2 in large patches, and an image that encodes them."""
  coarse = generator(seed).integers(0, 3, (4, 5), np.uint8)
  label = cv2.resize(coarse, (w, h), interpolation=cv2.INTER_NEAREST_EXACT)
  return {'image': np.stack([100 * label + 20] * 3, -1), 'label': label}


@pytest.mark.parametrize('size', [(40, 60), (60, 40), (33, 33)], ids=str)
@pytest.mark.parametrize('crop', [(32, 48), (64, 64)], ids=str)
def test_results_have_the_size_of_the_crop(size, crop):
  augment = Augment(36, crop, photometric=1.0)
  for seed in range(10):
    record = make_record(*size)
    before = {key: value.copy() for key, value in record.items()}
    result = augment.random_map(record, generator(seed))
    assert set(result) == {'image', 'label'}
    assert result['image'].shape == (*crop, 3)
    assert result['label'].shape == crop
    assert result['image'].dtype == result['label'].dtype == np.uint8
    for key, value in before.items():  # Cached records are shared.
      np.testing.assert_array_equal(record[key], value)


@pytest.mark.parametrize('scale', [0.5, 0.8, 1.0, 1.7], ids=str)
def test_image_and_label_move_together(scale):
  augment = Augment(60, (48, 48), scale_range=(scale, scale), blur=0.0)
  counted = 0
  for seed in range(20):
    result = augment.random_map(blobs(60, 75, seed), generator(seed))
    inside = result['label'] != 255
    # Between patches the image is interpolated: only flat areas count.
    kernel = np.ones((3, 3), np.uint8)
    gray = result['image'][..., 0]
    flat = cv2.dilate(gray, kernel) == cv2.erode(gray, kernel)
    flat &= inside
    np.testing.assert_array_equal(
      result['image'][flat][:, 0], 100 * result['label'][flat] + 20
    )
    counted += flat.mean()
  assert counted / 20 > 0.2


@pytest.mark.parametrize('scale', [1.1, 1.5, 2, 3])
def test_shrinking_is_about_that_of_pillow(scale):
  """White noise, the hardest image: what is skipped or kept is seen at once."""
  h, w = 240, 320
  size = (round(h / scale), round(w / scale))
  noise = generator(0).integers(0, 256, (h, w, 3), np.uint8)
  record = {'image': noise, 'label': np.zeros((h, w), np.uint8)}
  image, _ = transforms._resized_window(
    record, full=size, start=(0, 0), size=size
  )
  expected = transforms.resize(noise, size).astype(float)
  error = np.abs(image - expected)[2:-2, 2:-2].mean()
  # INTER_AREA alone is up to 15 levels off, plain interpolation up to 44.
  assert error < 8
  assert image.std() == pytest.approx(expected.std(), rel=0.1)


def test_a_blur_that_is_left_out_would_change_nothing():
  noise = generator(0).integers(0, 256, (60, 60, 3), np.uint8)
  least = transforms._LEAST_SIGMA
  np.testing.assert_array_equal(cv2.GaussianBlur(noise, (0, 0), least), noise)
  assert np.any(cv2.GaussianBlur(noise, (0, 0), least + 0.02) != noise)


def test_crops_are_windows_of_the_image():
  record = make_record(40, 60)
  augment = Augment(40, (24, 32), **PLAIN)
  tops, lefts = set(), set()
  for seed in range(200):
    result = augment.random_map(record, generator(seed))
    top, left = result['image'][0, 0, :2]
    tops.add(int(top))
    lefts.add(int(left))
    for key, value in record.items():
      window = value[top : top + 24, left : left + 32]
      np.testing.assert_array_equal(result[key], window)
  # Both ends are reached: 17 x 29 places, 200 draws.
  assert (min(tops), max(tops)) == (0, 16)
  assert (min(lefts), max(lefts)) == (0, 28)
  assert len(lefts) >= 27


def test_flip_is_a_mirror():
  record = make_record(40, 40)
  augment = Augment(40, (40, 40), **PLAIN | {'flip': 1.0})
  result = augment.random_map(record, generator(0))
  for key, value in record.items():
    np.testing.assert_array_equal(result[key], value[:, ::-1])


def test_flips_are_as_often_as_told():
  record = make_record(32, 32)
  augment = Augment(32, (32, 32), **PLAIN | {'flip': 0.25})
  rng = generator(0)
  flips = sum(
    augment.random_map(record, rng)['image'][0, 0, 1] > 0 for _ in range(800)
  )
  # The deviation of the mean of 800 draws is 0.015; five of them.
  np.testing.assert_allclose(flips / 800, 0.25, rtol=0, atol=0.077)


@pytest.mark.parametrize('fill', [255, 0], ids=['ignore', 'background'])
def test_padding_is_right_and_bottom(fill):
  record = make_record(32, 40)
  record = {'image': record['image'] | 1, 'label': record['label'] + 1}
  augment = Augment(32, (48, 56), label_fill=fill, **PLAIN)
  result = augment.random_map(record, generator(0))
  np.testing.assert_array_equal(result['label'][:32, :40], record['label'])
  np.testing.assert_array_equal(result['image'][:32, :40], record['image'])
  outside = np.ones((48, 56), bool)
  outside[:32, :40] = False
  assert np.all(result['label'][outside] == fill)
  assert np.all(result['image'][outside] == 0)


def test_scale_stays_in_its_range():
  """The result is not padded: the ramp's slope tells the scale."""
  augment = Augment(48, (24, 24), scale_range=(0.5, 2.0), flip=0.0, blur=0.0)
  ramp = np.zeros((96, 96, 3), np.uint8)
  ramp[..., 0] = 2 * np.arange(96)[:, None]
  record = {'image': ramp, 'label': ramp[..., 0] // 64}
  scales = []
  for seed in range(300):
    rows = augment.random_map(record, generator(seed))['image'][2:-2, 5, 0]
    scales.append(2 * 19 / (float(rows[-1]) - float(rows[0])))
  # 96 pixels become 24 to 96. One of 8 to 38 gray values is rounded, and a
  # window of whole pixels is up to two pixels too large.
  assert 0.22 < min(scales) < 0.30
  assert 0.85 < max(scales) < 1.15
  # Uniform in the size, not in its logarithm.
  np.testing.assert_allclose(np.mean(scales), 0.625, rtol=0.1, atol=0)


def test_only_the_base_size_of_a_fixed_scale():
  record = make_record(64, 96)
  augment = Augment(32, (64, 64), **PLAIN)
  label = augment.random_map(record, generator(0))['label']
  inside = label != 255
  assert np.all(inside[:32, :48]) and inside.sum() == 32 * 48


def turned(record, seed, **options):
  """A record and what Augment makes of it: rotation, else the identity."""
  augment = Augment(80, (80, 80), **PLAIN | options)
  return augment.random_map(record, generator(seed))


def slopes(result):
  """How (row, column) of the source change by row and column, and the rest.

  Fitted to pixels of make_record far from what rotation leaves empty.
  """
  rows, columns = np.mgrid[28:52, 28:52]
  places = np.stack([rows, columns, np.ones_like(rows)], -1).reshape(-1, 3)
  values = result['image'][28:52, 28:52, :2].reshape(-1, 2).astype(float)
  fit, *_ = np.linalg.lstsq(places, values, rcond=None)
  return fit[:2].T, np.abs(places @ fit - values).max(), fit.T @ [39.5, 39.5, 1]


def test_rotation_turns_about_the_center():
  angles = []
  for seed in range(60):
    matrix, rest, center = slopes(
      turned(make_record(80, 80), seed, rotation=30.0)
    )
    # Gray values are whole numbers, and OpenCV's places multiples of 1/32.
    assert rest < 0.6
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(2), rtol=0, atol=0.02)
    np.testing.assert_allclose(center, 39.5, rtol=0, atol=0.1)
    assert np.linalg.det(matrix) > 0  # Not a mirror image.
    angles.append(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
  assert -31 < min(angles) < -20 and 20 < max(angles) < 31


def test_rotation_ignores_what_lies_outside():
  record = make_record(80, 80)
  record = {'image': record['image'] | 1, 'label': record['label']}
  for seed in range(10):
    # Padding is background in this data set; the corners are unknown.
    result = turned(record, seed, rotation=40.0, label_fill=0)
    outside = result['label'] == 255
    assert np.all(result['label'][30:50, 30:50] < 5)
    matrix, _, _ = slopes(result)
    rows, columns = np.mgrid[:80, :80] - 39.5
    source = np.abs(np.einsum('ij,jhw->ihw', matrix, [rows, columns])).max(0)
    # Half a pixel for rounding to the nearest, one for the fitted slopes.
    assert np.all(outside[source > 41.5])
    assert not np.any(outside[source < 38.5])
    assert np.all(result['image'][source > 42] == 0)


def test_rotation_fills_from_the_image_where_it_can():
  """A window far from the border has real pixels in its corners."""
  augment = Augment(200, (60, 60), **PLAIN | {'rotation': 45.0})
  record = make_record(200, 200)
  full = 0
  for seed in range(40):
    result = augment.random_map(record, generator(seed))
    middle = result['image'][30, 30, :2].astype(int)
    if np.all(np.abs(middle - 100) < 56):  # 60 / sqrt 2 from the border.
      assert not np.any(result['label'] == 255)
      full += 1
  assert full > 5


@pytest.mark.parametrize('scale', [0.5, 1.6], ids=str)
def test_rotated_image_and_label_move_together(scale):
  augment = Augment(
    60, (48, 48), scale_range=(scale, scale), blur=0.0, rotation=20.0
  )
  counted = 0
  for seed in range(20):
    result = augment.random_map(blobs(60, 75, seed), generator(seed))
    kernel = np.ones((5, 5), np.uint8)
    gray = result['image'][..., 0]
    flat = cv2.dilate(gray, kernel) == cv2.erode(gray, kernel)
    flat &= cv2.dilate(result['label'], kernel) != 255
    np.testing.assert_array_equal(gray[flat], 100 * result['label'][flat] + 20)
    counted += flat.mean()
  assert counted / 20 > 0.04


def test_wide_crops():
  record = blobs(256, 512, 0)
  augment = Augment(512, (512, 1024), photometric=0.5, rotation=5.0)
  result = augment.random_map(record, generator(1))
  assert result['image'].shape == (512, 1024, 3)
  assert result['label'].shape == (512, 1024)
  assert np.any(result['label'] != 255)
  # At scale 1 only the size differs: every second pixel is one of the record.
  plain = Augment(512, (512, 1024), **PLAIN).random_map(record, generator(1))
  np.testing.assert_array_equal(plain['label'][::2, ::2], record['label'])


@pytest.mark.parametrize('option', ['blur', 'photometric'])
def test_the_label_sees_geometry_only(option):
  record = blobs(40, 60, 0)
  off = Augment(40, (32, 32), blur=0.0)
  on = Augment(40, (32, 32), **{'blur': 0.0, option: 1.0})
  changed = 0
  for seed in range(10):
    plain = off.random_map(record, generator(seed))
    result = on.random_map(record, generator(seed))
    np.testing.assert_array_equal(result['label'], plain['label'])
    changed += np.any(result['image'] != plain['image'])
  assert changed >= 6  # Weak blurs round to nothing.


def test_strength_0_changes_nothing_but_rounding():
  image = generator(0).integers(0, 256, (32, 32, 3), np.uint8)
  result = transforms.distort(image, generator(1), strength=0.0)
  # RGB to 8-bit HSV and back: hue has 180 steps.
  np.testing.assert_allclose(
    result.astype(int), image.astype(int), rtol=0, atol=6
  )


def test_strength_bounds_the_change_of_brightness():
  gray = np.full((4, 4, 3), 128, np.uint8)
  rng = generator(0)
  values = np.array(
    [
      int(transforms.distort(gray, rng, strength=0.5)[0, 0, 0])
      for _ in range(300)
    ]
  )
  # 128 is the fixed point of contrast; 25 % of 256 is 64, half of it 32.
  assert values.min() >= 128 - 33 and values.max() <= 128 + 32
  assert values.min() < 100 and values.max() > 156


def test_distortion_wraps_hue_and_clips():
  colors = np.array([[[255, 0, 0], [0, 255, 0], [255, 255, 255], [0, 0, 0]]])
  rng = generator(0)
  for _ in range(100):
    red, green, white, black = transforms.distort(
      colors.astype(np.uint8), rng, strength=1.0
    )[0].astype(int)
    # At most 18 degrees of hue: the leading channel stays the leading one.
    assert red.argmax() == 0 and green.argmax() == 1
    assert white.min() >= 255 - 64 - 64 - 1 and black.max() <= 128


def test_a_generator_gives_one_result():
  augment = Augment(40, (32, 32), photometric=1.0)
  record = blobs(50, 60, 0)
  first, second, other = (
    augment.random_map(record, generator(seed)) for seed in (3, 3, 4)
  )
  for key in record:
    np.testing.assert_array_equal(first[key], second[key])
  assert np.any(first['image'] != other['image'])


def test_classes_keep_their_shares():
  """No class is favored by crop, scale or flip."""
  label = np.zeros((64, 64), np.uint8)
  label[:, 16:] = 1  # A quarter and three quarters.
  label[32:] += 2
  record = {'image': np.zeros((64, 64, 3), np.uint8), 'label': label}
  augment = Augment(64, (64, 64), scale_range=(0.5, 1.0))
  rng = generator(0)
  counts = np.zeros(256)
  for _ in range(200):
    counts += np.bincount(
      augment.random_map(record, rng)['label'].ravel(), minlength=256
    )
  shares = counts[:4] / counts[:4].sum()
  # Nearest pixels: a border lies within half a pixel of 32 to 64.
  expected = [1 / 8, 3 / 8, 1 / 8, 3 / 8]
  np.testing.assert_allclose(shares, expected, rtol=0.02, atol=0)
  # Sizes n uniform in 32..64: n^2 / 64^2 is inside, 0.584 on average.
  np.testing.assert_allclose(
    1 - counts[255] / counts.sum(), 0.584, rtol=0, atol=0.06
  )


@pytest.mark.parametrize(
  ('size', 'short', 'expected'),
  [
    ((360, 480), 513, (513, 684)),
    ((1024, 2048), 513, (513, 1026)),
    ((500, 375), 513, (684, 513)),
    ((100, 151), 50, (50, 75)),
  ],
  ids=str,
)
def test_fit_short_side(size, short, expected):
  assert transforms.fit_short_side(size, short) == expected


@pytest.mark.parametrize('size', [(20, 31), (64, 96), (40, 57)], ids=str)
def test_resizing_is_that_of_pillow(size):
  record = blobs(40, 57, 0)
  record['image'] = generator(1).integers(0, 256, (40, 57, 3), np.uint8)
  image = transforms.resize(record['image'], size)
  label = transforms.resize(record['label'], size, Image.Resampling.NEAREST)
  width_height = size[::-1]
  expected = Image.fromarray(record['image'])
  expected = expected.resize(width_height, Image.Resampling.BILINEAR)
  np.testing.assert_array_equal(image, np.asarray(expected))
  expected = Image.fromarray(record['label'])
  expected = expected.resize(width_height, Image.Resampling.NEAREST)
  np.testing.assert_array_equal(label, np.asarray(expected))
  assert image.shape == (*size, 3) and label.shape == size


def test_pad_keeps_what_fits():
  x = np.ones((4, 5), np.uint8)
  assert transforms.pad_edges(x, (4, 5), 9) is x
  padded = transforms.pad_edges(x, (6, 5), 9)
  assert padded.shape == (6, 5)
  assert np.all(padded[:4] == 1) and np.all(padded[4:] == 9)
