# SPDX-License-Identifier: Apache-2.0
"""Scores by the verb against those of training, and its messages."""

import dataclasses
import json

from data import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from attnfd_jax.config import default_config
from attnfd_jax.data import classes
from attnfd_jax.errors import InputError
from attnfd_jax.inference import options as flag_options
from attnfd_jax.inference import scoring
from attnfd_jax.inference.predictor import Averaged


@pytest.fixture(scope='session')
def stage(tmp_path_factory):
  return tiny_run.make_stage(tmp_path_factory)


@pytest.fixture(scope='module')
def plain(stage):
  return scoring.evaluate_checkpoint(stage)


@dataclasses.dataclass(frozen=True)
class Shifted:
  """Not a network: scores are the image, one pixel to the right."""

  def apply(self, variables, image, *, train):
    assert not train
    logits = jnp.roll(image, 1, axis=2)
    return {'logits': logits}


def test_scores_are_those_of_training(stage, plain):
  counts, result = plain
  stored = json.loads((stage / 'result.json').read_text())
  shared = ('miou', 'pixel_accuracy', 'class_accuracy', 'fw_iou', 'step')
  shared += ('iou_per_class', 'accuracy_per_class', 'dataset', 'split')
  shared += ('protocol', 'stage')
  assert {key: result[key] for key in shared} == {
    key: stored[key] for key in shared
  }
  assert counts.dtype == np.int64
  assert result['images'] == 2


def test_a_kept_step_can_be_chosen(stage, plain):
  other = {1: 2, 2: 1}[plain[1]['step']]
  counts, result = scoring.evaluate_checkpoint(stage, step=other)
  assert result['step'] == other
  assert np.any(counts != plain[0])
  assert counts.sum() == plain[0].sum()


@pytest.mark.parametrize(
  'options', [{'flip': True}, {'scales': (0.5, 1.0)}], ids=['flip', 'scales']
)
def test_averages_score_the_same_pixels_otherwise(stage, plain, options):
  counts, result = scoring.evaluate_checkpoint(stage, **options)
  np.testing.assert_array_equal(counts.sum(1), plain[0].sum(1))
  assert np.any(counts != plain[0])
  assert result['flip'] == options.get('flip', False)
  assert result['scales'] == list(options.get('scales', [1.0]))


def test_other_split_and_protocol(stage, plain):
  _, train = scoring.evaluate_checkpoint(stage, split='train')
  assert (train['split'], train['images']) == ('train', 8)
  counts, result = scoring.evaluate_checkpoint(stage, protocol='reference')
  assert (result['protocol'], result['short_side']) == ('reference', 513)
  # 32 x 48 becomes 513 x 769.
  assert counts.sum() > 200 * plain[0].sum()


def test_averaged_without_anything_to_average_is_the_network():
  image = jax.random.normal(jax.random.key(0), (2, 8, 6, 3))
  logits = Shifted().apply({}, image, train=False)['logits']
  out = Averaged(Shifted()).apply({}, image, train=False)
  # One softmax and its logarithm.
  np.testing.assert_allclose(
    out['logits'], jax.nn.log_softmax(logits), rtol=1e-5, atol=1e-6
  )


def test_averaged_over_mirror_images_mirrors():
  network = Averaged(Shifted(), (1.0, 0.5), True)
  image = jax.random.normal(jax.random.key(0), (1, 8, 12, 3))

  def apply(x):
    return network.apply({}, x, train=False)['logits']

  # Sums in another order.
  np.testing.assert_allclose(
    apply(image[:, :, ::-1])[:, :, ::-1], apply(image), rtol=1e-5, atol=1e-5
  )
  one_way = Averaged(Shifted(), (1.0, 0.5))
  assert np.any(
    np.abs(one_way.apply({}, image, train=False)['logits'] - apply(image)) > 0.1
  )


def test_averaged_is_a_mean_of_probabilities():
  averaged = Averaged(Shifted(), (0.5, 1.0, 2.0), True)
  image = jnp.broadcast_to(jnp.array([0.3, -0.7, 0.0]), (2, 16, 12, 3))
  out = averaged.apply({}, image, train=False)
  # All views of a constant image agree.
  expected = Shifted().apply({}, image, train=False)['logits']
  np.testing.assert_allclose(
    out['logits'], jax.nn.log_softmax(expected), rtol=1e-5, atol=1e-6
  )
  assert out['logits'].dtype == jnp.float32
  # Compiled evaluation is cached by the network.
  assert hash(averaged) == hash(Averaged(Shifted(), (0.5, 1.0, 2.0), True))


@pytest.mark.parametrize('scale', [0.5, 1.5, 2.0, 3.0], ids=str)
def test_averaged_scales_keep_places(scale):
  """Linear ramps survive linear resizing; half a pixel of shift would not."""
  x, y = np.meshgrid(np.arange(24.0), np.arange(16.0))
  image = np.stack([0.1 * x, 0.2 * y, np.ones_like(x)], -1)[None]
  seen = []

  class Identity(Shifted):
    def apply(self, variables, image, *, train):
      seen.append(image.shape)
      return {'logits': image}

  averaged = Averaged(Identity(), (scale,), True)
  image = jnp.asarray(image, jnp.float32)
  out = averaged.apply({}, image, train=False)['logits']
  assert seen == [(1, int(16 * scale), int(24 * scale), 3)] * 2
  inner = (0, slice(4, -4), slice(4, -4))
  # Antialiasing at odd ratios is off by 0.004; a quarter pixel would be 0.02.
  np.testing.assert_allclose(
    out[inner], jax.nn.log_softmax(image)[inner], rtol=0, atol=0.006
  )


def test_a_tile_that_covers_the_images_changes_nothing(stage, plain):
  for tile in ((32, 48), (64, 999)):
    counts, result = scoring.evaluate_checkpoint(stage, tile=tile)
    np.testing.assert_array_equal(counts, plain[0])
    assert result == plain[1] | {'tile': list(tile), 'overlap': 0.25}


def test_tiles_score_all_pixels(stage, plain):
  counts, result = scoring.evaluate_checkpoint(
    stage, tile=(32, 32), overlap=0.5
  )
  np.testing.assert_array_equal(counts.sum(1), plain[0].sum(1))
  assert np.any(counts != plain[0])
  assert (result['tile'], result['overlap']) == ([32, 32], 0.5)
  text = scoring.as_text(counts, result)
  assert text.splitlines()[0].endswith('; tiles of 32x32, overlap 0.5')


def test_boundary_scores(stage, plain):
  counts, result = scoring.evaluate_checkpoint(stage, boundary=True)
  np.testing.assert_array_equal(counts, plain[0])
  per_class = result['boundary_iou_per_class']
  assert list(per_class) == list(result['iou_per_class'])
  known = [x for x in per_class.values() if x is not None]
  assert result['boundary_miou'] == pytest.approx(np.mean(known))
  assert result['boundary_miou'] != result['miou']
  rest = {k: v for k, v in result.items() if not k.startswith('boundary')}
  assert rest == plain[1]
  text = scoring.as_text(counts, result)
  assert 'boundary mIoU   ' in text
  assert len({len(line) for line in text.splitlines()[-10:]}) == 1
  assert 'boundary' not in scoring.as_text(*plain)


def test_text_has_all_scores_in_percent(plain):
  counts, result = plain
  text = scoring.as_text(counts, result)
  assert text.startswith('val split, protocol native: scored at the size of')
  assert f'mIoU            {100 * result["miou"]:7.2f} %' in text
  for word in ('class accuracy', 'pixel accuracy', 'fwIoU', 'pavement'):
    assert word in text


def test_text_of_absent_classes():
  counts = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
  result = {
    'split': 'test',
    'protocol': 'reference',
    'short_side': 513,
    'scales': [0.75, 1.0],
    'flip': True,
    'tile': None,
    'miou': 0.775,
    'class_accuracy': 0.875,
    'pixel_accuracy': 0.875,
    'fw_iou': None,
    'iou_per_class': {'a': 0.75, 'b': 0.8, 'c': None},
    'accuracy_per_class': {'a': 0.75, 'b': 1.0, 'c': None},
  }
  lines = scoring.as_text(counts, result).splitlines()
  assert lines[0].endswith('scales 0.75, 1; averaged with the mirror image')
  header = ['class', 'IoU', '%', 'accuracy', '%', 'pixels', '%']
  assert lines[-4].split() == header
  assert lines[-3].split() == ['a', '75.00', '75.00', '50.00']
  assert lines[-2].split() == ['b', '80.00', '100.00', '50.00']
  assert lines[-1].split() == ['c', 'absent', 'absent', '0.00']
  assert 'fwIoU            absent %' in lines


@pytest.mark.parametrize('text', ['', 'a', '1,,2', '0', '1,-1', 'nan', 'inf'])
def test_scales_must_be_numbers(text):
  with pytest.raises(InputError, match=r'--scales=.*: expected positive num'):
    flag_options.parse_scales(text)


@pytest.mark.parametrize(
  'text', ['', '512', '31x64', '64x', '1x2x3', '-64x64', 'axb', '64.5x64']
)
def test_tiles_must_be_two_sizes(text):
  with pytest.raises(InputError, match=r'--tile=.*: expected HEIGHTxWIDTH'):
    flag_options.parse_tile(text)


def test_tiles_are_read():
  assert flag_options.parse_tile('512x1024') == (512, 1024)
  assert flag_options.parse_tile('32X48') == (32, 48)
  assert flag_options.parse_tile(None) is None


def test_scales_are_read():
  assert flag_options.parse_scales('0.75, 1') == (0.75, 1.0)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'protocol': 'pixel'}, "--protocol='pixel' must be one of native, refer"),
    ({'split': 'all'}, "--split='all' must be one of train, val, test"),
    ({'split': 'test'}, 'test: scenes has no such split; it has train, val'),
    ({'overlap': 1.0}, '--overlap=1.0 must be from 0 to below 1'),
    ({'submission': 'new'}, 'for the data set cityscapes, this one is scenes'),
    ({'step': 77}, r'no checkpoint 77; have \[1, 2\]'),
  ],
  ids=['protocol', 'word', 'split', 'overlap', 'submission', 'step'],
)
def test_wrong_values_are_named(stage, options, message):
  with pytest.raises(InputError, match=message):
    scoring.evaluate_checkpoint(stage, **options)


def test_wrong_folders_are_named(stage, tmp_path):
  with pytest.raises(InputError, match='no config.json'):
    scoring.evaluate_checkpoint(tmp_path)
  with pytest.raises(InputError, match='is a run; name one of its stages'):
    scoring.evaluate_checkpoint(stage.parent)


def _as_camvid(stage, directory, **changes):
  """The stage with another data set in its config."""
  info = json.loads((stage / 'config.json').read_text()) | changes
  info['data'] |= {'name': 'camvid', 'root': 'gone'}
  (directory / 'config.json').write_text(json.dumps(info))
  (directory / 'checkpoints').symlink_to(stage / 'checkpoints')


def test_a_missing_data_set_names_the_flag(stage, tmp_path):
  _as_camvid(stage, tmp_path)
  with pytest.raises(InputError, match=r'^gone: .*\(--data_root=PATH\)'):
    scoring.evaluate_checkpoint(tmp_path)
  with pytest.raises(InputError, match='^elsewhere: '):
    scoring.evaluate_checkpoint(tmp_path, data_root='elsewhere')


def test_the_command_prints_and_writes(stage, plain, tmp_path):
  output = tmp_path / 'new' / 'scores.json'
  done = tiny_run.run_verb(
    'evaluate', f'--checkpoint={stage}', f'--output={output}'
  )
  assert done.returncode == 0, done.stderr
  assert '2 images of the val split of scenes' in done.stdout
  assert f'scores: {output}' in done.stdout
  result = json.loads(output.read_text())
  assert {*result} == {*plain[1]}
  # One device there, several here.
  assert result['miou'] == pytest.approx(plain[1]['miou'], abs=0.01)


def test_the_command_refuses_an_overlap_of_nothing(stage):
  done = tiny_run.run_verb('evaluate', f'--checkpoint={stage}', '--overlap=0.5')
  assert done.returncode == 2
  assert done.stderr == (
    'error: --overlap needs tiles; add --tile=HEIGHTxWIDTH.\n'
  )


def test_the_command_says_what_is_missing():
  done = tiny_run.run_verb('evaluate')
  assert done.returncode == 2
  assert done.stderr == (
    'error: --checkpoint is missing: Folder of a stage, such as '
    'runs/quickstart/distill.\n'
  )


def test_data_root_is_read_in_place_of_shards(tmp_path):
  fixtures.make_camvid(tmp_path)
  data = default_config().data.to_dict()
  data |= {'name': 'camvid', 'root': 'gone', 'prepared': str(tmp_path / 'gone')}
  info = {'data': data, 'class_names': list(classes.CAMVID)}
  _, source = scoring.load_split(info, str(tmp_path), 'val')
  assert source.name(0).startswith(str(tmp_path))
