# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile input ends in one line, and costs neither time nor
memory; experiments/faults/fuzz.py is the long form.
"""

import functools
import importlib.util
import io
import json
import os
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import time
import types
import zipfile
import zlib

import numpy as np
from PIL import Image
import pytest
import xla_flags

from attnfd_jax.config import default_config
from attnfd_jax.data import cache, coco, files, mask_values, masks, sources
from attnfd_jax.errors import DataError, InputError
from attnfd_jax.inference import image_files
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.runs import loading
from attnfd_jax.training import experiment

ROOT = pathlib.Path(__file__).parents[2]
PATH = ROOT / 'experiments' / 'faults' / 'fuzz.py'
COMMANDS = 10
# Pillow and NumPy warn of what is refused after it.
pytestmark = pytest.mark.filterwarnings('ignore')


@functools.cache
def load_fuzz():
  spec = importlib.util.spec_from_file_location('fuzz', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module', autouse=True)
def commands():
  """A process of random command lines, beside the other tests."""
  with subprocess.Popen(
    [sys.executable, PATH, f'--count={COMMANDS}', '--kinds=commands'],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': xla_flags.quick()},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as process:
    yield process
    process.kill()


@pytest.mark.parametrize(
  ('kind', 'count'),
  [
    ('images', 80),
    ('archives', 30),
    ('weights', 30),
    ('tables', 50),
    ('config', 8),
  ],
)
def test_random_input(kind, count, monkeypatch):
  fuzz = load_fuzz()
  monkeypatch.setattr(
    networks,
    'abstract_variables',
    functools.lru_cache(networks.abstract_variables),
  )
  refused = sum(fuzz.run_case(kind, 'test', i) for i in range(count))
  # A generator that only makes rubbish, or none, would show nothing.
  assert count / 5 < refused <= count


@pytest.mark.parametrize('size', [(60000, 60000), (20000, 20000)])
def test_declared_pixels_take_no_memory(tmp_path, size):
  path = tmp_path / 'large.png'
  path.write_bytes(load_fuzz().make_png(*size, color=2))
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  start = time.perf_counter()
  for read in (masks.read_image, masks.read_size):
    with pytest.raises(DataError, match='exceeds limit of 178956970 pixels'):
      read(path)
  with pytest.raises(DataError, match='exceeds limit of 178956970 pixels'):
    masks.read_mask(path)
  assert time.perf_counter() - start < 1
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e5


@pytest.mark.parametrize('progressive', [False, True])
def test_declared_pixels_of_a_jpeg_take_no_memory(progressive):
  file = io.BytesIO()
  image = Image.fromarray(np.zeros((24, 40), np.uint8))
  image.save(file, 'JPEG', progressive=progressive, comment=b'\xff\xc0' * 9)
  data = file.getvalue()
  size = data.index(struct.pack('>HH', 24, 40))
  for height, width in ((65500, 65500), (0, 40)):
    declared = struct.pack('>HH', height, width)
    data = data[:size] + declared + data[size + 4 :]
    with pytest.raises(DataError) as error:
      masks.decode_image('x', data)
    assert ('exceeds limit' in str(error.value)) == (height > 0)


def test_declared_chunk_takes_no_memory():
  """OpenCV 5 would take 2 GB before it sees that the file is shorter."""
  data = load_fuzz().make_png(8, 8, pixels=bytes(72))
  assert masks.decode_image('x', data).shape == (8, 8, 3)
  # What comes behind the end is nobody's.
  assert masks.decode_image('x', data + b'\xff' * 99).shape == (8, 8, 3)
  at = data.index(b'IDAT') - 4
  long = data[:at] + b'\x7f\xff\xff\xff' + data[at + 4 :]
  start = time.perf_counter()
  with pytest.raises(DataError, match='not a readable image'):
    masks.decode_image('x', long)
  assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
  'name', 'jpeg png png_exif bmp gif tiff webp ppm jpeg2000 deep_color'.split()
)
def test_whole_files_are_read(tmp_path, name):
  fuzz = load_fuzz()
  path = tmp_path / 'image'
  path.write_bytes(fuzz.make_seeds()[name])
  assert masks.read_image(path).shape == (*fuzz.SIZE, 3)
  assert masks.read_size(path) == fuzz.SIZE


def test_programs_are_no_images(tmp_path):
  """Pillow hands EPS to Ghostscript."""
  path = tmp_path / 'mask.png'
  Image.new('RGB', (8, 8)).save(path, 'EPS')
  with pytest.raises(DataError, match='not an image'):
    masks.read_mask(path)


def test_colors_of_another_kind(tmp_path, monkeypatch):
  """Pillow 10 does not make RGB of them."""

  def convert(image, mode):
    raise ValueError(f'conversion from {image.mode} to {mode} not supported')

  path = tmp_path / 'mask.png'
  Image.new('RGB', (8, 8)).convert('LAB').save(path, 'TIFF')
  monkeypatch.setattr(Image.Image, 'convert', convert)
  with pytest.raises(DataError, match='conversion from LAB to RGB'):
    masks.ColorLabels(((0, 0, 0),))(files.File(str(path)))


def test_bands_of_colors_are_one_mask(tmp_path, monkeypatch):
  ids = np.random.default_rng(0).integers(0, 3, (23, 7))
  colors = ((9, 0, 0), (0, 0, 200), (3, 3, 3))
  path = tmp_path / 'mask.png'
  Image.fromarray(np.array(colors, np.uint8)[ids]).save(path)
  monkeypatch.setattr(masks, '_BAND', 20)  # Two rows, and one at the end.
  label = masks.ColorLabels(colors)(files.File(str(path)))
  np.testing.assert_array_equal(label, ids)
  with pytest.raises(DataError) as error:
    masks.ColorLabels(colors[:2])(files.File(str(path)))
  assert error.value.values == {'3,3,3': int((ids == 2).sum())}


def test_damaged_exif_is_none(tmp_path):
  data = b'\xff\xd8\xff\xe1\x00\x0cExif\0\0MM\0\0' + bytes(40) + b'\xff\xd9'
  masks.check_upright(files.File('x'), data)


def make_zip(path, data, **fields):
  """One packed member whose entry in the directory is changed."""
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('a.png', data)
    for name, value in fields.items():
      setattr(archive.infolist()[0], name, value)
  return files.File(str(path), 'a.png')


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'file_size': 10}, 'Bad CRC-32.*; copy the zip again'),
    ({'file_size': 2**40}, '1099511627776 bytes, too large for an image'),
    ({'header_offset': 2**63}, 'cannot be read'),
  ],
  ids=['bomb', 'size', 'offset'],
)
def test_members_that_lie(tmp_path, fields, message):
  member = make_zip(tmp_path / 'a.zip', bytes(1 << 24), **fields)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(DataError, match=message) as error:
    member.read()
  assert len(str(error.value).splitlines()) == 1
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e5


def as_checkpoint(path, program):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', program)
  return path


NESTED = b']q\0' + b'](h\0h\0eq\0' * 64
TEXT = b'X\0\0\x10\0' + b'a' * (1 << 20) + b'q\0'
ITEMS = b'](' + b'N' * (1 << 20) + b'eq\0'


@pytest.mark.parametrize(
  ('program', 'message'),
  [
    (TEXT + b'c_codecs\nencode\n(h\0tR' * 900, 'fill the memory'),
    (ITEMS + b'ctorch\nSize\n(h\0tR' * 900, 'fill the memory'),
    (NESTED + b'ctorch\ndevice\n(h\0tR', 'no mapping of names'),
    (NESTED + b'cnumpy\ndtype\n(h\0tR', "numpy.dtype\\('list'\\)"),
    (NESTED + b'h\0\x93', "refuses to load 'list.list'"),
    (NESTED + b'(h\0h\0h\0h\0h\0tQ', "persistent 'list'"),
    (b'}' + pickle.dumps(10**5000, 2)[2:-1] + b'Ns', 'no mapping of names'),
  ],
  ids=['encode', 'size', 'device', 'dtype', 'global', 'persistent', 'number'],
)
def test_pickles_that_grow(tmp_path, program, message):
  """Few bytes that ask for gigabytes, or for 2^64 words of a message."""
  path = as_checkpoint(tmp_path / 'a.pth', b'\x80\x02' + program + b'.')
  with pytest.raises(torch_files.TorchFileError, match=message) as error:
    torch_files.read_state_dict(path)
  assert len(str(error.value)) < 400


def draw(segmentation):
  """(label, problems) of one annotation in an image of 24x32."""
  annotation = {'category_id': 1, 'segmentation': segmentation}
  return coco.draw_label([annotation], (24, 32), {1: 1})


def test_compressed_runs_are_those_of_pycocotools():
  encode = pytest.importorskip('pycocotools.mask').encode
  generator = np.random.default_rng(0)
  for share in (0, 0.01, 0.5, 1):
    mask = (generator.random((24, 32)) < share).astype(np.uint8)
    counts = encode(np.asfortranarray(mask))['counts'].decode()
    label, wrong = draw({'size': [24, 32], 'counts': counts})
    assert not wrong
    np.testing.assert_array_equal(label, mask)


@pytest.mark.parametrize(
  ('segmentation', 'message'),
  [
    ({'size': [24, 32], 'counts': 'P`04O1N2'}, 'does not fill the image'),
    ({'size': [24, 32], 'counts': 'oooooo'}, 'is cut off'),
    ({'size': [24, 32], 'counts': 'oooooooooo'}, 'is damaged'),
    ({'size': [24, 32], 'counts': '\xe9'}, 'is damaged'),
    ({'size': [24, 32], 'counts': [-5, 773]}, 'does not fill the image'),
    ({'size': [24, 32], 'counts': [767.5, 0.5]}, 'does not fill the image'),
    ([[0, 0, 1e9, 0, 0, 1e9]], 'far outside of the image'),
    ([[0, 0, float('nan'), 0, 0, 1]], 'far outside of the image'),
  ],
)
def test_runs_and_polygons_stay_inside(segmentation, message):
  """pycocotools writes past its memory for these, or walks for minutes."""
  label, ((_, error),) = draw(segmentation)
  assert not label.any()
  assert message in str(error)


def entries(change):
  image = {'id': 1, 'file_name': 'a.png', 'height': 24, 'width': 32}
  categories = [{'id': 1, 'name': 'road'}]
  content = {'images': [image], 'annotations': [], 'categories': categories}
  change(content)
  return json.dumps(content)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('[' * 100000, 'not JSON'),
    (entries(lambda c: c['images'][0].update(height=True)), 'height is true'),
    (entries(lambda c: c['images'][0].update(height=10**8)), '178956970 pix'),
    (entries(lambda c: c['images'][0].update(file_name='\ud800')), 'a name'),
    (entries(lambda c: c['images'][0].update(file_name='a\0b')), 'be a name'),
    (entries(lambda c: c['images'][0].update(file_name='x' * 70000)), 'a name'),
    (
      entries(
        lambda c: c['categories'].extend(
          {'id': i, 'name': f'n{i}'} for i in range(2, 300)
        )
      ),
      '300 classes, more than 255',
    ),
  ],
  ids=['deep', 'bool', 'large', 'surrogate', 'nul', 'long', 'classes'],
)
def test_hostile_annotations(tmp_path, content, message):
  path = tmp_path / 'instances.json'
  path.write_text(content)
  with pytest.raises(DataError, match=message) as error:
    coco.draw_labels(path)
  assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
  ('read', 'text', 'message'),
  [
    (mask_values.read_labelmap, f'a:{"9" * 5000},0,0::', 'is not name:red'),
    (
      mask_values.read_classes_csv,
      f'id,name\n{"9" * 5000},a',
      'is not id, name',
    ),
    (mask_values.read_classes_csv, f'id,name\n0,{"a" * 200000}', 'not a table'),
  ],
  ids=['color', 'id', 'field'],
)
def test_long_fields_of_tables(tmp_path, read, text, message):
  path = tmp_path / 'table'
  path.write_text(text)
  with pytest.raises(DataError, match=message) as error:
    read(path)
  assert len(str(error.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
  'names', [('a', 'a'), (1, 2), ('a', ''), ([],), tuple(map(str, range(256)))]
)
def test_class_names_must_be_names(tmp_path, names):
  (tmp_path / 'masks' / 'train').mkdir(parents=True)
  config = default_config().data.to_dict()
  config |= {'name': 'folder', 'root': str(tmp_path), 'class_names': names}
  with pytest.raises(InputError, match='config.data.class_names must be 2 or'):
    sources.load_dataset(config)
  config |= {'class_names': ('a', 'b'), 'palette': (1, 2)}
  with pytest.raises(InputError, match='config.data.palette has 2 entries'):
    sources.load_dataset(config)


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('num_epochs', float('inf'), 'must be from'),
    ('optim.weight_decay', float('nan'), 'must be'),
    ('optim.warmup_epochs', -1.0, 'must be from 0 to 10000'),
    ('optim.momentum', 1.5, 'must be from 0 to 1'),
    ('seed', -1, 'must be'),
    ('data.base_size', 2**63, 'must be from'),
    ('data.train_scenes', 0, 'must be from 1 to 1e+06'),
    ('data.image_size', (48.5, 64), 'must be (height, width)'),
    ('data.crop_size', (10**6, 64), 'must be (height, width)'),
    ('data.crop_size', ('a', 'b'), 'must be (height, width)'),
    ('data.scale_range', (2.0, 0.5), 'must be (least, most)'),
    ('data.scale_range', (1e-9, 1.0), 'leave a pixel of base_size'),
    ('data.workers', -1, 'must be from 0 to 1024'),
    ('student.aspp_channels', -1, 'must be from 1 to 65536'),
    ('student.head_dropout', 2.0, 'must be from 0 to 1'),
    ('teacher.width_multiplier', 0.0, 'must be from 0.001 to 64'),
    ('distill.kd.temperature', 0.0, 'must be from 0.001 to 1e+06'),
    ('eval.size_multiple', 0, 'must be 1 or more'),
    ('teacher.backbone', None, 'leave it out for its default'),
  ],
)
def test_values_out_of_range(tmp_path, key, value, message):
  """In one line that names the value, before anything is written."""
  config = default_config()
  group, _, name = key.rpartition('.')
  target = config
  for part in filter(None, group.split('.')):
    target = target[part]
  target[name] = value
  config.distill.method = 'attnfd+kd'
  with pytest.raises(InputError) as error:
    experiment.train(config, tmp_path / 'run')
  text = str(error.value)
  assert f'{name}=' in text and message in text and '\n' not in text
  assert not (tmp_path / 'run').exists()


def test_names_that_are_no_text(tmp_path, monkeypatch, capsys):
  """File names are bytes: a camera, a zip or a script may write any."""
  odd = os.fsdecode(b'\xff\xfe.png')
  Image.new('RGB', (40, 33)).save(tmp_path / odd)
  Image.new('RGB', (65501, 1)).save(tmp_path / 'long.png')
  assert cache.digest([files.File(str(tmp_path / odd))])
  fake = types.SimpleNamespace(
    description='fake',
    class_names=('a', 'b'),
    palette=np.zeros((2, 3), np.uint8),
  )
  ids = np.zeros((33, 40), np.uint8)

  class Fake:
    def __init__(self, *_, **__):
      self.__dict__.update(vars(fake))

    def __call__(self, image):
      assert image.shape == (33, 40, 3)
      return ids, ids

  monkeypatch.setattr(image_files, 'Predictor', Fake)
  output = tmp_path / 'output'
  with pytest.raises(InputError, match='1 of 2 images were skipped'):
    image_files.predict_files('x', str(tmp_path), output)
  # JPEG has no longer sides; the overlay would be an empty file.
  assert '65501x1, a side is longer than 65500' in capsys.readouterr().err
  assert not list(output.glob('long*'))
  table = (output / 'areas.csv').read_bytes()
  assert b'\xff\xfe.png,1.000000,0.000000' in table


@pytest.mark.parametrize('text', ['', '7', '[1]', '{"stage": "student"}'])
def test_damaged_description_of_a_stage(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(InputError, match='config.json: damaged'):
    loading.load_network(tmp_path)


def test_absent_weights_are_told_with_their_key():
  with pytest.raises(InputError, match='pretrained of config.teacher or'):
    torch_models.load_pretrained('/gone', None)


def test_generators_write_whole_files():
  """Else all that is refused would say nothing about the faults."""
  fuzz = load_fuzz()
  ids = np.arange(35, dtype=np.uint8).reshape(5, 7) % 4
  image = masks.open_image(fuzz.interlaced(ids))
  np.testing.assert_array_equal(np.asarray(image), ids)
  chunks = fuzz.split_chunks(fuzz.make_png(7, 5, pixels=bytes(40)))
  assert [kind for kind, _ in chunks] == [b'IHDR', b'IDAT', b'IEND']
  assert zlib.decompress(chunks[1][1]) == bytes(40)


def test_random_commands(commands):
  """Exit code 2 and one line, whatever is wrong."""
  output, _ = commands.communicate(timeout=60)
  assert commands.returncode == 0, output
  assert f"'refused': {COMMANDS}, 'accepted': 0, 'failed': 0" in output
