# SPDX-License-Identifier: Apache-2.0
"""Files for the Cityscapes server: names, ids, sizes and refusals."""

import json
import zipfile

import cv2
import numpy as np
from PIL import Image
import pytest

from attnfd_jax.data import classes
from attnfd_jax.data.pairs import Dataset
from attnfd_jax.errors import InputError
from attnfd_jax.inference import scoring, submission
from attnfd_jax.runs import loading

# helpers/labels.py of cityscapesScripts, by train id.
IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


class Brightest:
  """Not a network: the class is the red value."""

  def apply(self, variables, image, *, train):
    assert not train and not variables
    red = np.float32(0.485) + np.float32(0.229) * image[..., :1]
    centers = np.arange(19, dtype=np.float32).reshape(1, 1, 1, 19) * 10 / 255
    return {'logits': -abs(red - centers)}


def test_the_writer_gives_label_ids_at_full_size(tmp_path):
  ids = np.arange(19, dtype=np.uint8)[None].repeat(3, 0)
  write = submission.make_writer(
    tmp_path / 'new' / 'out', dataset='cityscapes', protocol='native'
  )
  name = 'zips/x.zip!leftImg8bit/test/bonn/bonn_000003_000019_leftImg8bit.png'
  write(name, ids)
  (path,) = (tmp_path / 'new' / 'out').iterdir()
  assert path.name == 'bonn_000003_000019_leftImg8bit.png'
  with Image.open(path) as file:
    assert file.mode == 'L'
    np.testing.assert_array_equal(np.asarray(file), [IDS] * 3)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'dataset': 'camvid'}, 'the data set cityscapes, this one is camvid; '),
    ({'protocol': 'reference'}, 'add --protocol=native'),
    ({'directory': '.'}, 'exists and is not an empty folder'),
    ({'directory': 'a_file'}, 'exists and is not an empty folder'),
  ],
  ids=['data_set', 'protocol', 'folder', 'file'],
)
def test_refusals(tmp_path, options, message):
  (tmp_path / 'a_file').touch()
  options = {'dataset': 'cityscapes', 'protocol': 'native'} | options
  directory = tmp_path / options.pop('directory', 'new')
  with pytest.raises(InputError, match=f'^--submission.*{message}'):
    submission.make_writer(directory, **options)
  assert [path.name for path in tmp_path.iterdir()] == ['a_file']


def draw_test_split(root, *, zipped):
  """Two cities of one image each; {stem: class ids}."""
  generator, drawn = np.random.default_rng(0), {}
  for city in ('bonn', 'mainz'):
    stem = f'{city}_000000_000019_leftImg8bit'
    drawn[stem] = generator.integers(0, 19, (24, 40), np.uint8)
    image = np.zeros((24, 40, 3), np.uint8)
    image[..., 2] = 10 * drawn[stem]  # Red, for OpenCV.
    data = cv2.imencode('.png', image)[1].tobytes()
    name = f'leftImg8bit/test/{city}/{stem}.png'
    if zipped:
      archive = root / 'leftImg8bit_trainvaltest.zip'
      with zipfile.ZipFile(archive, 'a') as file:
        file.writestr(name, data)
    else:
      (root / name).parent.mkdir(parents=True)
      (root / name).write_bytes(data)
  return drawn


@pytest.mark.parametrize('zipped', [False, True], ids=['folders', 'zip'])
def test_the_test_split_without_classes(tmp_path, monkeypatch, zipped):
  root, output = tmp_path / 'data', tmp_path / 'out'
  root.mkdir()
  drawn = draw_test_split(root, zipped=zipped)
  names, palette = tuple(classes.CITYSCAPES), np.zeros((19, 3), np.uint8)
  dataset = Dataset('cityscapes', names, palette, {'val': []})
  monkeypatch.setattr(scoring, 'load_dataset', lambda config, splits: dataset)
  info = {
    'stage': 'student',
    'student': {
      'network': 'deeplabv3plus',
      'backbone': 'none',
      'width_multiplier': 1,
    },
    'checkpoint_step': 1,
    'class_names': list(names),
    'palette': palette,
    'data': {'root': 'gone', 'threads': 2},
    'eval': {'protocol': 'native', 'size_multiple': 16, 'batch_size': 2},
    'optim': {'dtype': 'float32'},
  }
  monkeypatch.setattr(
    loading, 'load_network', lambda *x, **options: (Brightest(), {}, info)
  )

  def run(**options):
    options = {'split': 'test', 'submission': output} | options
    return scoring.evaluate_checkpoint('run', data_root=root, **options)

  counts, result = run()
  assert counts.sum() == 0 and result['images'] == 2
  assert json.loads(json.dumps(result, allow_nan=False))['miou'] is None
  assert 'mIoU             absent %' in scoring.as_text(counts, result)
  assert {path.stem for path in output.iterdir()} == set(drawn)
  for stem, ids in drawn.items():
    written = np.asarray(Image.open(output / f'{stem}.png'))
    np.testing.assert_array_equal(written, np.array(IDS)[ids])
  with pytest.raises(InputError, match='exists and is not an empty folder'):
    run()
  # Without the flag there is no such split.
  with pytest.raises(InputError, match='test: cityscapes has no such split'):
    run(submission=None)
  # Tiles write the same here: this network looks at single pixels.
  run(submission=tmp_path / 'tiles', tile=(32, 32))
  for path in output.iterdir():
    assert path.read_bytes() == (tmp_path / 'tiles' / path.name).read_bytes()


def test_no_images_are_named(tmp_path):
  with pytest.raises(InputError, match=r'test: not found .*root=PATH'):
    submission.test_images(tmp_path)
