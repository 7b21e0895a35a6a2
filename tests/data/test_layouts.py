# SPDX-License-Identifier: Apache-2.0
"""Every layout gives the ids that were drawn; every mistake has its message."""

import concurrent.futures
import io
import json
import pathlib
import pickle
import re
import shutil
import sys
import zipfile

import cv2
from data import fixtures
import numpy as np
from PIL import Image
import pytest
import scipy.io

from attnfd_jax.config import default_config
from attnfd_jax.data import classes, coco, files, masks
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import DataError, InputError


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
  folder = tmp_path_factory.mktemp('cache')
  monkeypatch.setenv('XDG_CACHE_HOME', str(folder))
  return folder / 'attnfd_jax' / 'coco'


def load(root, name='camvid', *, strict=True, **keys):
  config = default_config().data
  config.update({'name': name, 'root': str(root), **keys})
  return load_dataset(config, strict=strict)


def load_folder(root, kind, *, strict=True, **keys):
  keys = fixtures.folder_config(kind) | keys
  return load(root, strict=strict, **keys)


def make(root, layout):
  """Fills root; returns what was drawn and the keys of config.data."""
  if layout.startswith('folder '):
    kind = layout.removeprefix('folder ')
    if kind == 'coco':
      pytest.importorskip('pycocotools')
    return fixtures.make_folder(root, kind), fixtures.folder_config(kind)
  if layout == 'camvid':
    return fixtures.make_camvid(root), {'name': 'camvid'}
  if layout.startswith('voc'):
    sbd = layout == 'voc and sbd'
    keys = {'name': 'pascal_voc'}
    if sbd:
      keys['sbd_root'] = str(root / 'benchmark_RELEASE')
    return fixtures.make_voc(root, sbd=sbd), keys
  if layout == 'coco':
    pytest.importorskip('pycocotools')
    return fixtures.make_coco(root), {'name': 'coco'}
  zipped = layout == 'cityscapes zipped'
  return fixtures.make_cityscapes(root, zipped), {'name': 'cityscapes'}


LAYOUTS = (
  'camvid',
  'voc',
  'voc and sbd',
  'cityscapes',
  'cityscapes zipped',
  'coco',
  *(f'folder {kind}' for kind in fixtures.KINDS),
)
NUM_CLASSES = {'camvid': 11, 'voc': 21, 'cityscapes': 19, 'coco': 21}


def assert_drawn(dataset, drawn):
  assert {k: len(v) for k, v in dataset.splits.items()} == {
    split: len(labels) for split, labels in drawn.items()
  }
  for split, labels in drawn.items():
    source = dataset.splits[split]
    assert [source.key(i) for i in range(len(source))] == list(labels)
    for i, label in enumerate(labels.values()):
      np.testing.assert_array_equal(source[i]['label'], label)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_ids_are_those_that_were_drawn(tmp_path, layout):
  drawn, keys = make(tmp_path, layout)
  dataset = load(tmp_path, **keys)
  assert_drawn(dataset, drawn)
  assert not dataset.problems
  k = NUM_CLASSES.get(layout.split()[0], len(fixtures.NAMES))
  assert dataset.num_classes == k == len(set(dataset.class_names))
  assert dataset.palette.shape == (k, 3) and dataset.palette.dtype == np.uint8
  if layout.startswith('folder'):
    assert dataset.class_names == fixtures.NAMES
  seen = np.unique(np.concatenate([list(x.values()) for x in drawn.values()]))
  # Else a wrong order of classes could not be seen.
  assert set(range(k)) <= set(seen.tolist())


@pytest.mark.parametrize('layout', LAYOUTS)
def test_what_a_source_knows(tmp_path, layout):
  _, keys = make(tmp_path, layout)
  source = load(tmp_path, **keys).splits['train']
  copy = pickle.loads(pickle.dumps(source))
  for i in range(len(source)):
    record = source[i]
    assert source.size(i) == record['label'].shape == fixtures.SIZE
    assert record['image'].shape == (*fixtures.SIZE, 3)
    assert record['image'].dtype == record['label'].dtype == np.uint8
    stored = source.encoded(i)
    np.testing.assert_array_equal(stored['label'], record['label'])
    path, _, member = source.name(i).partition('!')
    if member:
      assert stored['image'] == zipfile.ZipFile(path).read(member)
    else:
      assert stored['image'] == pathlib.Path(path).read_bytes()
    again = copy[i]
    for key in record:
      np.testing.assert_array_equal(again[key], record[key])


@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_threads_read_a_zip_at_once(tmp_path, method):
  contents = {f'a/{i}.png': bytes([i]) * (20000 + i) for i in range(40)}
  path = tmp_path / 'x.zip'
  with zipfile.ZipFile(path, 'w', method) as archive:
    for name, content in contents.items():
      member = zipfile.ZipInfo(name)
      # Packers put times and owners between the name and the data.
      member.extra = b'UT\5\0\1\0\0\0\0'
      archive.writestr(member, content, method)
  found = files.list_zip(path, 'a/', ('.png',))
  assert {file.member for file in found} == set(contents)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    read = list(pool.map(files.File.read, found * 5))
    heads = list(pool.map(lambda file: file.read(100), found))
  assert read == [contents[file.member] for file in found] * 5
  assert heads == [contents[file.member][:100] for file in found]
  assert found[0].inner.name == '0.png'
  assert str(found[0]) == f'{path}!a/0.png'


def test_a_damaged_zip_is_named(tmp_path):
  fixtures.make_cityscapes(tmp_path, zipped=True)
  path = tmp_path / 'leftImg8bit_trainvaltest.zip'
  data = bytearray(path.read_bytes())
  middle = data.find(b'IDAT')
  data[middle + 40] ^= 255
  path.write_bytes(data)
  source = load(tmp_path, 'cityscapes').splits['train']
  with pytest.raises(
    DataError, match='zip!.*Bad CRC-32.*copy the zip'
  ) as error:
    source[0]
  assert error.value.kind == 'unreadable'
  path.write_bytes(data[: len(data) // 2])
  files._archive.cache_clear()
  with pytest.raises(DataError, match='not a readable zip.*copy it again'):
    load(tmp_path, 'cityscapes')


def test_the_authors_folder_of_cityscapes(tmp_path):
  drawn = fixtures.make_cityscapes(tmp_path)
  (tmp_path / 'leftImg8bit').rename(tmp_path / 'images')
  assert_drawn(load(tmp_path, 'cityscapes'), drawn)


def test_cityscapes_names_ids_that_do_not_exist(tmp_path):
  fixtures.make_cityscapes(tmp_path)
  source = load(tmp_path, 'cityscapes').splits['val']
  path = next((tmp_path / 'gtFine' / 'val').rglob(f'{source.key(0)}*labelIds*'))
  ids = np.full(fixtures.SIZE, 7, np.uint8)
  ids[0, :3] = 34
  fixtures.write(path, ids)
  message = re.escape(
    f'{path}: values 34 (3 pixels) are not classes; classes are 7 to 8, 11 to '
    '13, 17, 19 to 28, 31 to 33, ignored 0 to 6, 9 to 10, 14 to 16, 18, 29 to '
    '30, 255.'
  )
  with pytest.raises(DataError, match=message):
    source[0]


@pytest.mark.parametrize('inner', ['', 'VOCdevkit', 'VOCdevkit/VOC2012'])
def test_voc_is_found_from_each_folder_above(tmp_path, inner):
  drawn = fixtures.make_voc(tmp_path)
  assert_drawn(load(tmp_path / inner, 'pascal_voc'), drawn)


def test_trainaug_from_a_ready_made_list(tmp_path):
  drawn = fixtures.make_voc(tmp_path)
  voc = tmp_path / 'VOCdevkit' / 'VOC2012'
  augmented = {}
  for key in ['2007_999999', *drawn['train']]:
    _, ids = fixtures.draw(len(augmented) + 50, 21, void=0)
    fixtures.write(voc / 'SegmentationClassAug' / f'{key}.png', ids)
    augmented[key] = ids
  path = voc / 'ImageSets' / 'Segmentation' / 'trainaug.txt'
  path.write_text('\n'.join(augmented))
  dataset = load(tmp_path, 'pascal_voc', train_list='trainaug')
  assert_drawn(dataset, {'train': augmented, 'val': drawn['val']})
  with pytest.raises(
    InputError, match="'trainaug' cannot be combined with .*sbd_root"
  ):
    load(tmp_path, 'pascal_voc', train_list='trainaug', sbd_root='x')


def test_trainaug_has_no_image_of_val_and_voc_masks_win(tmp_path):
  drawn = fixtures.make_voc(tmp_path, sbd=True)
  sbd = tmp_path / 'benchmark_RELEASE'
  dataset = load(tmp_path, 'pascal_voc', sbd_root=str(sbd / 'dataset'))
  train = dataset.splits['train']
  keys = [train.key(i) for i in range(len(train))]
  assert len(keys) == len(set(keys)) == 6 + 3
  assert not set(keys) & set(drawn['val'])
  assert keys[6:] == sorted(keys[6:])
  other = scipy.io.loadmat(sbd / 'dataset' / 'cls' / f'{keys[0]}.mat')
  other = other['GTcls'][0]['Segmentation'][0]
  assert np.any(other != train[0]['label'])  # SBD has another mask for it.


@pytest.mark.parametrize(
  'line', ['{}.jpg', '/JPEGImages/{0}.jpg /SegmentationClass/{0}.png']
)
def test_no_image_of_val_comes_in_by_sbd(tmp_path, line):
  fixtures.make_voc(tmp_path, sbd=True)
  keys = {'sbd_root': str(tmp_path / 'benchmark_RELEASE')}
  expected = load(tmp_path, 'pascal_voc', **keys).splits
  for name in ('train', 'val'):
    path = next(tmp_path.rglob(f'Segmentation/{name}.txt'))
    lines = map(line.format, path.read_text().split())
    path.write_text('\n'.join(lines))
  found = load(tmp_path, 'pascal_voc', **keys).splits
  for split, source in found.items():
    keys = [source.key(i) for i in range(len(source))]
    assert keys == [expected[split].key(i) for i in range(len(source))]
    assert len(source) == len(expected[split])


def test_mistakes_of_sbd(tmp_path, monkeypatch):
  fixtures.make_voc(tmp_path, sbd=True)
  with pytest.raises(DataError, match='cls: no such folder; config.data.sbd_'):
    load(tmp_path, 'pascal_voc', sbd_root=str(tmp_path))
  keys = {'sbd_root': str(tmp_path / 'benchmark_RELEASE')}
  source = load(tmp_path, 'pascal_voc', **keys).splits['train']
  name = f'{source.key(8)}.mat'
  (tmp_path / 'benchmark_RELEASE' / 'dataset' / 'cls' / name).write_text('x')
  with pytest.raises(DataError, match=f'{name}: not a readable SBD mask'):
    source[8]
  monkeypatch.setitem(sys.modules, 'scipy.io', None)
  message = r"needs scipy: pip install 'attnfd_jax\[data\]'"
  with pytest.raises(InputError, match=message):
    load(tmp_path, 'pascal_voc', **keys)


@pytest.fixture
def coco_root(tmp_path):
  pytest.importorskip('pycocotools')
  fixtures.make_coco(tmp_path)
  return tmp_path


def edit_json(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def test_coco_is_drawn_once(coco_root, cache_folder, monkeypatch):
  load(coco_root, 'coco')
  made = {path.name for path in cache_folder.iterdir()}
  assert len(made) == 2
  with monkeypatch.context() as patch:
    patch.delattr(coco, 'draw_label')
    patch.setitem(sys.modules, 'pycocotools.mask', None)  # Is needed once.
    load(coco_root, 'coco').splits['train'][0]
  # Another file: drawn again, and the old masks are gone.
  path = coco_root / 'annotations' / 'instances_val2017.json'
  edit_json(path, lambda content: content['images'].pop(0))
  edit_json(
    path,
    lambda content: content.update(
      annotations=[a for a in content['annotations'] if a['image_id'] != 1]
    ),
  )
  assert len(load(coco_root, 'coco').splits['val']) == 4
  now = {path.name for path in cache_folder.iterdir()}
  assert len(now) == 2 and len(now & made) == 1


def test_coco_leaves_out_images_of_few_pixels(coco_root):
  path = coco_root / 'annotations' / 'instances_val2017.json'
  listed, sizes = len(json.loads(path.read_text())['images']), {}
  for pixels in (1000, 999, 239):
    _, labels, *_ = coco.draw_labels(
      path,
      class_names=('background', *classes.COCO_NAMES),
      min_pixels=pixels,
    )
    sizes[pixels] = len(labels)
  # Of one there are exactly 1000.
  assert sizes == {1000: listed - 1, 999: listed, 239: listed}


def test_a_limit_of_coco_stops_drawing(coco_root, monkeypatch):
  drawn = []
  draw = coco.draw_label
  monkeypatch.setattr(
    coco, 'draw_label', lambda *args: drawn.append(1) or draw(*args)
  )
  dataset = load(coco_root, 'coco', limit=2)
  assert len(drawn) == 4
  assert [len(s) for s in dataset.splits.values()] == [2, 2]


def test_polygons_and_runs():
  pytest.importorskip('pycocotools')
  triangle = {'category_id': 1, 'segmentation': [[2, 2, 42, 2, 2, 42]]}
  label, wrong = coco.draw_label([triangle], (48, 64), {1: 5})
  rows, columns = np.mgrid[:48, :64]
  inside = (rows >= 2) & (columns >= 2) & (rows + columns < 43)
  edge = np.abs(rows + columns - 43) <= 1  # The rule there is not ours.
  assert not wrong
  np.testing.assert_array_equal((label == 5)[~edge], inside[~edge])
  # 5 pixels, 100 others, 63 pixels, by columns; as lists and as COCO's text.
  flat = np.repeat([1, 0, 1], [5, 100, 63]).reshape(14, 12).T
  for counts in ([0, 5, 100, 63], '05T3j1'):
    runs = {'size': [12, 14], 'counts': counts}
    annotations = [{'category_id': 9, 'segmentation': runs}]
    label, wrong = coco.draw_label(annotations, (12, 14), {9: 1})
    assert not wrong
    np.testing.assert_array_equal(label, flat)


def test_the_first_annotation_wins():
  pytest.importorskip('pycocotools')

  def box(category, left):
    corners = [left, 0, left + 6, 0, left + 6, 4, left, 4]
    return {'category_id': category, 'segmentation': [corners]}

  both = [box(1, 0), box(2, 3), box(3, 2)]
  label, _ = coco.draw_label(both, (4, 12), {1: 1, 2: 2})
  assert label[0].tolist() == [1] * 6 + [2] * 3 + [0] * 3


@pytest.mark.parametrize(
  ('segmentation', 'message'),
  [
    ([], 'has no segmentation, as polygons or RLE'),
    ([[1, 2, 3, 4]], 'polygons of at least three corners'),
    ([[1, 2, 3, 4, 5, 6, 7]], 'polygons of at least three corners'),
    ({'size': [9, 9], 'counts': [81]}, r'its RLE has size \[9, 9\]'),
    ({'size': [48, 64], 'counts': [81]}, 'its RLE does not fill the image'),
    (None, 'has no segmentation, as polygons or RLE'),
  ],
  ids=['empty', 'box', 'odd', 'size', 'short', 'none'],
)
def test_wrong_annotations_are_named(tmp_path, segmentation, message):
  _, keys = make(tmp_path, 'folder coco')
  path = tmp_path / 'annotations' / 'instances_val.json'

  def change(content):
    content['annotations'][-1]['segmentation'] = segmentation

  edit_json(path, change)
  message = f'annotation 11 of val_0.jpg: .*{message}'
  with pytest.raises(DataError, match=message):
    load(tmp_path, **keys)
  # The second time the message comes from the cache.
  dataset = load(tmp_path, strict=False, **keys)
  (problem,) = dataset.problems
  assert problem.kind == 'annotation' and problem.file == str(path)
  assert len(dataset.splits['val']) == 4


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda c: c.pop('images'), 'needs images, annotations and categories'),
    (lambda c: c['images'][0].pop('height'), 'height is absent; needs a w'),
    (lambda c: c['images'][0].update(width=0), 'no height or width'),
    (lambda c: c['images'].append(3), 'needs images, annotations and'),
    (lambda c: c['images'][0].update(id=True), 'id is true; needs a whole'),
    (
      lambda c: c['images'].append(c['images'][0] | {'id': 99}),
      'val_3.jpg is listed twice',
    ),
    (
      lambda c: c['annotations'][0].update(category_id=77),
      'annotations of category 77, which the file does not list',
    ),
    (
      lambda c: c['annotations'][0].update(image_id=78),
      'annotations of image 78, which the file does not list',
    ),
    (
      lambda c: c['categories'].pop(),
      "no class 'tree'; it has .*road",
    ),
  ],
  ids=[
    'list',
    'height',
    'width',
    'entry',
    'id',
    'twice',
    'category',
    'image',
    'missing',
  ],
)
def test_wrong_lists_are_named(tmp_path, change, message):
  _, keys = make(tmp_path, 'folder coco')
  path = tmp_path / 'annotations' / 'instances_val.json'
  edit_json(path, change)
  message = rf'instances_val\.json: .*{message}'
  with pytest.raises(DataError, match=message) as error:
    load(tmp_path, **keys)
  assert error.value.kind == 'annotation'


def test_coco_without_json_or_pycocotools(coco_root, monkeypatch):
  path = coco_root / 'annotations' / 'instances_train2017.json'
  path.write_text('{"images": [')
  with pytest.raises(DataError, match='instances_train2017.json: not JSON'):
    load(coco_root, 'coco')
  # What the reference reads are COCO's categories, nobody else's.
  edit = coco_root / 'annotations' / 'instances_val2017.json'
  edit_json(edit, lambda c: c['categories'][0].update(name='cactus'))
  problems = load(coco_root, 'coco', strict=False).problems
  assert "no class 'airplane'; it has background, person" in str(problems[1])
  monkeypatch.setitem(sys.modules, 'pycocotools.mask', None)
  message = r"needs pycocotools: pip install 'attnfd_jax\[data\]'"
  with pytest.raises(InputError, match=message):
    load(coco_root, 'coco')


def test_an_image_of_coco_may_be_missing(coco_root):
  source = load(coco_root, 'coco').splits['val']
  name = source.name(1)
  pathlib.Path(name).unlink()
  with pytest.raises(DataError, match='no partner for .*jpg, which has') as e:
    load(coco_root, 'coco')
  assert (e.value.kind, e.value.file) == ('partner', name)


def test_drawn_masks_name_their_json(tmp_path):
  _, keys = make(tmp_path, 'folder coco')
  path = tmp_path / 'images' / 'val' / 'val_1.jpg'
  Image.new('RGB', (20, 10)).save(path)
  source = load(tmp_path, **keys).splits['val']
  message = (
    r'instances_val\.json \(val_1\.jpg\): mask is 64x48, its image 20x10'
  )
  with pytest.raises(DataError, match=message):
    source[1]


@pytest.mark.parametrize('layout', ['roboflow', 'beside'])
def test_other_places_of_coco_files(tmp_path, layout):
  drawn, keys = make(tmp_path, 'folder coco')
  for split in drawn:
    name = {'val': 'valid'}.get(split, split) if layout == 'roboflow' else split
    (tmp_path / 'images' / split).rename(tmp_path / name)
    if layout == 'roboflow':
      path = tmp_path / 'annotations' / f'instances_{split}.json'
      path.rename(tmp_path / name / '_annotations.coco.json')
  assert_drawn(load(tmp_path, **keys), drawn)


@pytest.mark.parametrize('kind', ['cvat', 'roboflow', 'coco'])
def test_names_choose_among_those_of_the_layout(tmp_path, kind):
  drawn, _ = make(tmp_path, f'folder {kind}')
  chosen = {
    # The first one is what no annotation covers.
    'coco': ('nothing', 'tree'),
  }.get(kind, ('tree', 'background'))
  dataset = load_folder(tmp_path, kind, class_names=chosen)
  assert dataset.class_names == chosen
  table = np.full(256, 255, np.uint8)
  table[list({'coco': (0, 2)}.get(kind, (2, 0)))] = (0, 1)
  for i, label in enumerate(drawn['val'].values()):
    found = dataset.splits['val'][i]['label']
    if kind == 'coco':
      # Road hid trees; it is background now.
      assert np.all(found[label == 2] == 1)
      assert set(np.unique(found).tolist()) <= {0, 1}
    else:
      np.testing.assert_array_equal(found, table[label])
  with pytest.raises(DataError, match="no class 'cactus'.* has "):
    load_folder(tmp_path, kind, class_names=('background', 'cactus'))


def test_further_colors_are_ignored(tmp_path):
  drawn, _ = make(tmp_path, 'folder colors')
  dataset = load_folder(tmp_path, 'colors', class_names=fixtures.NAMES[:2])
  for i, label in enumerate(drawn['train'].values()):
    np.testing.assert_array_equal(
      dataset.splits['train'][i]['label'], np.where(label == 2, 255, label)
    )
  assert dataset.palette.tolist() == [list(c) for c in fixtures.COLORS[:2]]


@pytest.mark.parametrize('mode', ['RGBA', 'P', 'L'])
def test_colors_in_other_modes(tmp_path, mode):
  grays = tuple((v, v, v) for v in (10, 90, 200))
  ids = fixtures.draw(1, 3, void=0)[1]
  image = Image.fromarray(np.array(grays, np.uint8)[ids])
  path = tmp_path / 'a.png'
  if mode == 'P':
    image = Image.fromarray(ids)
    image.putpalette(np.array(grays, np.uint8).tobytes())
  image.convert(mode).save(path)
  with Image.open(path) as stored:
    assert stored.mode == mode
  read = masks.ColorLabels(grays)
  np.testing.assert_array_equal(read(files.File(str(path))), ids)


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    ({'palette': ((0, 0, 0),)}, 'config.data.palette has 1 entries'),
    ({'palette': ((0, 0, 0), (0, 0, 0), (1, 1, 1))}, 'needs a different'),
    ({'palette': ((0, 0, 0), (1, 1), (1, 1, 1))}, r'\(r, g, b\) of 0 to 255'),
    ({'palette': ((0, 0, 0), (1, 1, 256), (1, 1, 1))}, 'of 0 to 255'),
    ({'id_map': (1, 2)}, r'id_map=\(1, 2\) must have a different id'),
    ({'id_map': (1, 2, 2)}, 'must have a different id'),
    ({'id_map': (1, 2, 256)}, 'of 0 to 255'),
    (
      {'id_map': (1, 2, 3), 'palette': fixtures.COLORS},
      'set only one of them',
    ),
    (
      {'layout': 'yolo'},
      "layout='yolo' must be one of auto, pairs, voc",
    ),
    (
      {'layout': 'roboflow', 'id_map': (1, 2, 3)},
      'cannot be used with the layout',
    ),
  ],
  ids=str,
)
def test_keys_that_make_no_sense(tmp_path, keys, message):
  fixtures.make_folder(tmp_path, 'index')
  with pytest.raises(InputError, match=message):
    load_folder(tmp_path, 'index', **keys)


def test_two_layouts_need_a_choice(tmp_path):
  drawn, keys = make(tmp_path, 'folder voc')
  fixtures.make_folder(tmp_path, 'index')
  with pytest.raises(
    InputError, match='pairs or voc; set --config.data.layout'
  ):
    load(tmp_path, **keys)
  assert_drawn(load(tmp_path, layout='voc', **keys), drawn)


@pytest.mark.parametrize(
  ('kind', 'file', 'text', 'message'),
  [
    ('cvat', 'labelmap.txt', 'road:1,2::', 'is not name:red,green,blue'),
    ('cvat', 'labelmap.txt', 'road:1,2,256::', 'is not name:red,green,blue'),
    ('cvat', 'labelmap.txt', 'a:1,2,3::\na:1,2,4::', 'repeats a name'),
    ('cvat', 'labelmap.txt', 'a:1,2,3::\nb:1,2,3::', 'repeats a name'),
    ('cvat', 'labelmap.txt', '# nothing', 'no classes in it'),
    ('roboflow', 'train/_classes.csv', 'x\nroad, 1', 'is not id, name'),
    ('roboflow', 'train/_classes.csv', 'x\n1, a\n1, b', 'repeats a name'),
    ('roboflow', 'train/_classes.csv', 'x', 'no classes in it'),
    ('roboflow', 'valid/_classes.csv', 'x\n1, a', 'its classes differ from'),
  ],
  ids=str,
)
def test_wrong_tables_are_named(tmp_path, kind, file, text, message):
  fixtures.make_folder(tmp_path, kind)
  (tmp_path / file).write_text(text)
  with pytest.raises(DataError, match=rf'{re.escape(file)}: .*{message}') as e:
    load_folder(tmp_path, kind)
  assert e.value.kind == 'annotation'


def test_a_default_list_of_cvat_is_told(tmp_path):
  fixtures.make_folder(tmp_path, 'cvat')
  lists = tmp_path / 'ImageSets' / 'Segmentation'
  for name in ('train', 'val', 'test'):
    (lists / f'{name}.txt').rename(lists / 'default.txt')
  message = r'train\.txt: no such list, but there is default\.txt'
  with pytest.raises(DataError, match=message):
    load_folder(tmp_path, 'cvat')


# Breaks `image` or `mask` of the first example of train; see below.
def cut(image, mask):
  image.write_bytes(image.read_bytes()[:-200])


def vanish(image, mask):
  mask.unlink()


def smaller(image, mask):
  Image.new('L', (60, 40)).save(mask)


def colored(image, mask):
  Image.new('RGB', (64, 48)).save(mask)


def deep(image, mask):
  Image.fromarray(np.zeros((48, 64), np.uint16)).save(mask)


def strange(image, mask):
  ids = np.zeros((48, 64), np.uint8)
  ids[0, :9], ids[1, :5] = 77, 200
  Image.fromarray(ids).save(mask)


def lossy(image, mask):
  Image.new('L', (64, 48)).save(mask, format='JPEG')


def turned(image, mask):
  exif = Image.Exif()
  exif[0x0112] = 3
  Image.new('RGB', (64, 48)).save(image, exif=exif)


def no_text(image, mask):
  mask.write_text('no image')


def nothing(image, mask):
  mask.write_bytes(b'')


KINDS = [
  (vanish, 'partner', r'trainannot: no partner for 0001TP_000000\.png'),
  (cut, 'unreadable', r'train/0001TP_000000\.png: not a readable image'),
  (no_text, 'unreadable', r'annot/0001TP_000000\.png: not a readable mask'),
  (nothing, 'unreadable', r'annot/0001TP_000000\.png: not a readable mask'),
  (smaller, 'size', r'annot/.*: mask is 60x40, its image 64x48 \(width'),
  (colored, 'mode', r'annot/.*mode RGB; expected an 8-bit.*data\.palette='),
  (deep, 'depth', r'annot/.*: mask has 16 bits per pixel; save ids as an 8-'),
  (
    strange,
    'values',
    r'annot/.*: values 77 \(9 pixels\), 200 \(5 pixels\) are not classes; '
    r'classes are 0 to 10, ignored 11, 255\.',
  ),
  (lossy, 'lossy', r'annot/.*: a JPEG mask.*Export the masks as PNG'),
  (turned, 'exif', r'train/.*EXIF orientation 3.*save the image upright'),
]


@pytest.mark.parametrize(
  ('breaks', 'kind', 'message'), KINDS, ids=[f.__name__ for f, *_ in KINDS]
)
def test_every_kind_of_mistake(tmp_path, breaks, kind, message):
  fixtures.make_camvid(tmp_path)
  image = tmp_path / 'train' / '0001TP_000000.png'
  mask = tmp_path / 'trainannot' / image.name
  breaks(image, mask)
  with pytest.raises(DataError, match=message) as caught:
    load(tmp_path).splits['train'][0]
  error = caught.value
  assert error.kind == kind
  wrong = mask
  if breaks in (vanish, cut, turned):
    wrong = image
  assert error.file == str(wrong)
  expected = {77: 9, 200: 5} if kind == 'values' else None
  assert error.values == expected
  # Workers send it to their parent.
  copy = pickle.loads(pickle.dumps(error))
  assert str(copy) == str(error)
  assert (copy.kind, copy.file, copy.values) == (kind, str(wrong), expected)
  # The others can be used.
  source = load(tmp_path, strict=False).splits['train']
  assert set(source[len(source) - 1]) == {'image', 'label'}


def read_by_pillow(path):
  try:
    with Image.open(path) as image:
      return np.asarray(image) if image.mode in 'LP' else None
  except Exception:
    return None


@pytest.mark.parametrize(
  'options',
  [{}, {'transparency': 3}, {'bits': 8}],
  ids=['gray', 'transparent', 'palette'],
)
def test_ids_are_those_of_pillow_whatever_the_damage(tmp_path, options):
  generator = np.random.default_rng(0)
  path = tmp_path / 'a.png'
  ids = generator.integers(0, 255, (31, 65), np.uint8)
  image = Image.fromarray(ids)
  if 'bits' in options:
    image.putpalette(generator.integers(0, 256, 768, np.uint8).tobytes())
  image.save(path, **options)
  np.testing.assert_array_equal(masks.read_mask(path), ids)
  whole, refused = path.read_bytes(), 0
  for _ in range(200):
    data = bytearray(whole)
    start, length = generator.integers((len(data), 20))
    if generator.random() < 0.5:
      data[start] ^= 1 << generator.integers(8)
    else:
      del data[start : start + length]
    path.write_bytes(data)
    expected = read_by_pillow(path)
    if expected is None:
      refused += 1
      with pytest.raises(DataError):
        masks.read_mask(path)
    else:
      np.testing.assert_array_equal(masks.read_mask(path), expected)
  assert 50 < refused < 200


def test_colors_that_are_no_class(tmp_path):
  fixtures.make_folder(tmp_path, 'colors')
  pixels = np.zeros((48, 64, 3), np.uint8)
  pixels[0, :7] = (1, 2, 3)
  pixels[1] = np.arange(64)[:, None] + 100
  path = fixtures.write(tmp_path / 'masks' / 'train' / 'train_0.png', pixels)
  message = rf'{path}: values 1,2,3 \(7 pixels\), .* and 60 more are not cl'
  with pytest.raises(DataError, match=message) as error:
    load_folder(tmp_path, 'colors').splits['train'][0]
  assert error.value.kind == 'values'
  assert error.value.values['1,2,3'] == 7 and len(error.value.values) == 65


def test_truncated_jpeg(tmp_path):
  image, _ = fixtures.draw(0, 3)
  path = tmp_path / 'a.jpg'
  Image.fromarray(image).save(path, quality=95)
  data = path.read_bytes()
  assert masks.decode_image('a', data).shape == image.shape
  # A camera may append a few bytes.
  assert masks.decode_image('a', data + b'\0\0').shape == image.shape
  for length in (len(data) // 2, len(data) - 40):
    with pytest.raises(DataError, match='a: not a readable image'):
      masks.decode_image('a', data[:length])


# A file cannot be taken out of a zip: it is complete or damaged.
@pytest.mark.parametrize(
  'layout', [layout for layout in LAYOUTS if layout != 'cityscapes zipped']
)
def test_all_problems_are_collected(tmp_path, layout):
  drawn, keys = make(tmp_path, layout)
  whole = load(tmp_path, **keys)
  for split in ('train', 'val'):
    name = whole.splits[split].name(0)
    pathlib.Path(name).unlink()
  dataset = load(tmp_path, strict=False, **keys)
  assert [problem.kind for problem in dataset.problems] == ['partner'] * 2
  key = whole.splits['train'].key(0)
  assert key in str(dataset.problems[0])
  assert len(dataset.splits['train']) == len(drawn['train']) - 1
  for i in range(len(dataset.splits['val'])):
    dataset.splits['val'][i]
  message = r'no partner for .*\(And 1 more; python -m attnfd_jax\.check_data'
  with pytest.raises(DataError, match=message):
    load(tmp_path, **keys)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_split_may_be_absent_or_empty(tmp_path, layout):
  _, keys = make(tmp_path, layout)
  message = r'no such folder; is config\.data\.root right'
  with pytest.raises(DataError, match=message) as error:
    load(tmp_path / 'elsewhere', **keys)
  assert error.value.kind == 'split'
  if 'zip' in layout:
    (tmp_path / 'gtFine_trainvaltest.zip').unlink()
  for path in sorted(tmp_path.rglob('*')):
    is_val = re.search('val', path.relative_to(tmp_path).as_posix())
    if is_val and path.is_dir():
      shutil.rmtree(path)
    elif is_val and path.is_file() and path.suffix in ('.txt', '.json', '.csv'):
      path.unlink()
  dataset = load(tmp_path, strict=False, **keys)
  assert {p.kind for p in dataset.problems} == {'split'}
  assert 'val' not in dataset.splits
  if 'zip' not in layout:
    assert dataset.splits['train'][0]['label'].shape == fixtures.SIZE
  with pytest.raises(DataError, match=r'not found|no such list'):
    load(tmp_path, **keys)


def test_lists_as_windows_writes_them(tmp_path):
  drawn = fixtures.make_folder(tmp_path, 'cvat')
  for path in tmp_path.rglob('*.txt'):
    lines = path.read_text().splitlines()
    path.write_bytes(b'\xef\xbb\xbf' + '\r\n'.join([*lines, '']).encode())
  assert_drawn(load_folder(tmp_path, 'cvat'), drawn)


@pytest.mark.parametrize('kind', ['coco', 'roboflow'])
def test_a_wrong_table_leaves_the_other_splits(tmp_path, kind):
  drawn, keys = make(tmp_path, f'folder {kind}')
  name = {'coco': 'annotations/instances_train.json'}
  (tmp_path / name.get(kind, 'train/_classes.csv')).write_text('[1]')
  dataset = load(tmp_path, strict=False, **keys)
  assert [problem.kind for problem in dataset.problems] == ['annotation']
  del drawn['train']
  assert_drawn(dataset, drawn)


def test_an_empty_list_is_an_empty_split(tmp_path):
  fixtures.make_voc(tmp_path)
  lists = tmp_path / 'VOCdevkit' / 'VOC2012' / 'ImageSets' / 'Segmentation'
  (lists / 'val.txt').write_text('\n')
  with pytest.raises(DataError, match=r'val\.txt: no names in it') as error:
    load(tmp_path, 'pascal_voc')
  assert error.value.kind == 'split'


def test_tables_of_ids():
  assert classes.CITYSCAPES_IDS == fixtures.CITY_IDS
  others = sorted({*range(256)} - {*classes.CITYSCAPES_IDS})
  read = masks.IndexLabels(classes.CITYSCAPES_IDS, tuple(others))
  (table,) = read.from_ids('ids', np.arange(256, dtype=np.uint8)[None])
  ids = list(classes.CITYSCAPES_IDS)
  assert table[ids].tolist() == list(range(len(classes.CITYSCAPES)))
  assert len(others) == 256 - 19 and np.all(table[others] == 255)
  # A road, a person and a bicycle.
  assert (table[7], table[24], table[33]) == (0, 11, 18)


def test_categories_of_coco():
  found = classes.COCO_NAMES
  assert found == [name for _, name in fixtures.COCO]
  assert len(found) == len(classes.VOC) - 1
  # Seven have other names in VOC, the others must be in the same place.
  other = {'aeroplane', 'diningtable', 'motorbike', 'pottedplant', 'sofa'}
  other.add('tvmonitor')
  for voc, name in zip(list(classes.VOC)[1:], found, strict=True):
    assert (voc == name) == (voc not in other)


def test_palette_formula():
  expected = np.reshape(fixtures.voc_colors(), (256, 3))
  np.testing.assert_array_equal(classes.voc_palette(256), expected)
  np.testing.assert_array_equal(list(classes.VOC.values()), expected[:21])


def saved(array, form, mode=None, **options):
  """Bytes of an image that Pillow writes."""
  image, file = Image.fromarray(array), io.BytesIO()
  (image.convert(mode) if mode else image).save(file, form, **options)
  return file.getvalue()


def encoded(ending, array):
  return cv2.imencode(ending, array)[1].tobytes()


def pnm(array, most):
  """A binary PGM or PPM of a stated maximum, with a comment."""
  kind = b'P5' if array.ndim == 2 else b'P6'
  head = kind + b'\n# by hand\n%d %d\n%d\n' % (*array.shape[1::-1], most)
  return head + array.astype('>u2' if most > 255 else 'u1').tobytes()


def deep_pixels(most=65535):
  """uint16 [48, 64, 3] whose largest value is `most`."""
  generator = np.random.default_rng(0)
  pixels = generator.integers(0, most, (*fixtures.SIZE, 3), dtype=np.uint16)
  pixels[0, 0] = most
  return pixels


def patched_jp2(pixels):
  """A lossless JPEG 2000 of 12 bits: a shifted one of 16, which Pillow has."""
  data = bytearray(saved(pixels + 30720, 'JPEG2000', irreversible=False))
  for at in (data.find(b'ihdr') + 14, data.find(b'\xff\x4f\xff\x51') + 42):
    assert data[at] == 15
    data[at] = 11
  return bytes(data)


OPAQUE = np.full((*fixtures.SIZE, 1), 65535, np.uint16)
# Of uint16 [h, w, 3] in R, G, B; what stores grays stores the first.
DEEP = {
  'png': lambda x: encoded('.png', x[..., 0]),
  'png_rgb': lambda x: encoded('.png', x[..., ::-1]),
  'png_rgba': lambda x: encoded('.png', np.dstack([x[..., ::-1], OPAQUE])),
  'tiff': lambda x: fixtures.tiff_bytes(x[..., 0]),
  'tiff_rgb': lambda x: fixtures.tiff_bytes(x, photometric=2),
  'pgm': lambda x: pnm(x[..., 0], 65535),
  'ppm': lambda x: pnm(x, 65535),
  'jpeg2000': lambda x: saved(x[..., 0].copy(), 'JPEG2000', irreversible=False),
}


@pytest.mark.parametrize('form', DEEP)
def test_images_of_16_bits_are_their_upper_8(form):
  pixels = deep_pixels()
  expected = pixels >> 8
  if 'rgb' not in form and form != 'ppm':
    expected = np.repeat(expected[..., :1], 3, -1)
  found = masks.decode_image('a', DEEP[form](pixels))
  assert found.dtype == np.uint8
  # OpenCV divides those of a TIFF by 257 instead.
  error = 1 if form == 'tiff_rgb' else 0
  assert np.abs(found - expected.astype(int)).max() <= error


@pytest.mark.parametrize('most', [5, 1023, 4095, 16383], ids=str)
@pytest.mark.parametrize('form', DEEP)
def test_images_of_few_used_bits_are_refused(form, most):
  bits = most.bit_length()
  message = rf'a: 16-bit image .* end at {most} \({bits} bits\) would be nearly'
  with pytest.raises(DataError, match=f'{message} black; .*by one rule') as e:
    masks.decode_image('a', DEEP[form](deep_pixels(most)))
  assert e.value.kind == 'depth'


@pytest.mark.parametrize('form', DEEP)
def test_black_and_dark_images_of_16_bits_are_read(form):
  assert masks.decode_image('a', DEEP[form](deep_pixels(16384))).max() == 64
  black = DEEP[form](np.zeros((*fixtures.SIZE, 3), np.uint16))
  assert not masks.decode_image('a', black).any()


def test_dark_images_of_8_bits_are_decoded_once(monkeypatch):
  calls, decode = [], cv2.imdecode
  monkeypatch.setattr(
    cv2, 'imdecode', lambda *args: calls.append(1) or decode(*args)
  )
  dark = np.full((*fixtures.SIZE, 3), 3, np.uint8)
  for form in ('PNG', 'JPEG', 'BMP', 'TIFF', 'WEBP', 'PPM', 'JPEG2000'):
    masks.decode_image('a', saved(dark, form))
  assert len(calls) == 7


@pytest.mark.parametrize('most', [1, 15, 100, 254, 255, 1023, 4095, 65534])
@pytest.mark.parametrize('channels', [1, 3], ids=['gray', 'rgb'])
def test_stated_maxima_become_255(most, channels):
  pixels = deep_pixels() % (most + 1)
  pixels = (pixels[..., 0] if channels == 1 else pixels).astype(np.uint16)
  expected = np.floor(pixels.astype(float) * 255 / most + 0.5)
  expected = expected.reshape(*fixtures.SIZE, channels)
  found = masks.decode_image('a', pnm(pixels, most))
  np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


def test_a_jpeg2000_of_12_bits_states_them():
  pixels = deep_pixels(4095)[..., 0]
  found = masks.decode_image('a', patched_jp2(pixels))
  np.testing.assert_array_equal(found[..., 0], pixels >> 4)
  # It is dark, and not for unused bits.
  assert masks.decode_image('a', patched_jp2(pixels >> 4)).max() == 15


@pytest.mark.parametrize(
  ('kind', 'options', 'message'),
  [
    ('float32', {'samples': 3}, '1 x 32-bit floats'),
    ('float64', {'samples': 3}, '1 x 64-bit floats'),
    ('int16', {'samples': 2}, '1 x 16-bit signed integers'),
    ('int32', {'samples': 2}, '1 x 32-bit signed integers'),
    ('uint32', {}, '1 x 32-bit integers'),
    ('uint16', {'bits': 12}, '1 x 12-bit integers'),
    ('float32', {'samples': 3, 'channels': 3}, '3 x 32-bit floats'),
    ('uint16', {'channels': 6}, '6 x 16-bit integers'),
  ],
  ids=str,
)
def test_images_of_other_numbers_are_refused(kind, options, message):
  pixels = np.tile(deep_pixels(4095), 2).astype(kind)
  options = dict(options)
  channels = options.pop('channels', 1)
  pixels = pixels[..., :channels] if channels > 1 else pixels[..., 0]
  data = fixtures.tiff_bytes(pixels, **options)
  message = f'a: TIFF of {message} per pixel; .*as gray or RGB of 8'
  with pytest.raises(DataError, match=message) as error:
    masks.decode_image('a', data)
  assert error.value.kind == 'depth'


def few_ids(most):
  ids = np.arange(48 * 64).reshape(48, 64) % (most + 1)
  return ids.astype(np.uint8)


def from_palette(ids, form):
  image, file = Image.fromarray(ids), io.BytesIO()
  image.putpalette(bytes(range(255, -1, -1)) * 3)
  image.save(file, form)
  return file.getvalue()


MASKS = {
  **{
    f'png_{bits}': (fixtures.png_bytes(few_ids(2**bits - 1), bits), bits)
    for bits in (1, 2, 4, 8)
  },
  **{
    f'tiff_{bits}': (fixtures.tiff_bytes(few_ids(2**bits - 1), bits=bits), bits)
    for bits in (1, 2, 4, 8)
  },
  # As viewers show them, white is the last id.
  **{
    f'tiff_white_is_0_{bits}': (
      fixtures.tiff_bytes(
        2**bits - 1 - few_ids(2**bits - 1), bits=bits, photometric=0
      ),
      bits,
    )
    for bits in (1, 2, 4, 8)
  },
  **{
    f'pgm_{bits}': (pnm(few_ids(2**bits - 1), 2**bits - 1), bits)
    for bits in (1, 3, 4, 7, 8)
  },
  **{
    f'one_bit_{form}': (saved(few_ids(1) * 255, form, '1'), 1)
    for form in ('PNG', 'TIFF', 'BMP', 'PPM')
  },
  'fax': (saved(few_ids(1) * 255, 'TIFF', '1', compression='group4'), 1),
  **{
    f'palette_{form}': (from_palette(few_ids(15), form), 4)
    for form in ('PNG', 'GIF', 'BMP', 'TIFF')
  },
  **{
    f'gray_{form}': (saved(few_ids(15), form), 4)
    for form in ('PNG', 'GIF', 'BMP', 'TIFF')
  },
  'webp': (saved(np.dstack([few_ids(15)] * 3), 'WEBP', lossless=True), 4),
  'webp_extended': (
    saved(
      np.dstack([few_ids(15)] * 3), 'WEBP', lossless=True, icc_profile=b'x' * 9
    ),
    4,
  ),
}


@pytest.mark.parametrize('name', MASKS)
def test_masks_are_ids_in_every_exact_format(tmp_path, name):
  data, bits = MASKS[name]
  path = tmp_path / 'mask'
  path.write_bytes(data)
  found = masks.read_mask(path)
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, few_ids(2**bits - 1))
  label = masks.IndexLabels(tuple(range(min(2**bits, 255))))
  np.testing.assert_array_equal(label(files.File(str(path))), found)


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_few_bits_keep_the_colors_that_viewers_show(tmp_path, bits):
  most = 2**bits - 1
  path = tmp_path / 'mask.png'
  path.write_bytes(fixtures.png_bytes(few_ids(most), bits))
  grays = [(255 // most * i,) * 3 for i in range(most + 1)]
  label = masks.ColorLabels(tuple(grays))(files.File(str(path)))
  np.testing.assert_array_equal(label, few_ids(most))


def frames(form):
  first, file = Image.fromarray(few_ids(15)), io.BytesIO()
  others = [Image.fromarray(few_ids(i)) for i in (1, 2)]
  options = {'lossless': True} if form == 'WEBP' else {}
  first.save(file, form, save_all=True, append_images=others, **options)
  return file.getvalue()


GREY = np.dstack([few_ids(15)] * 3)
HINT = r'Its channels are equal: .*save one of them, .*data\.palette='


@pytest.mark.parametrize(
  ('data', 'kind', 'message'),
  [
    (saved(GREY, 'WEBP'), 'lossy', 'a lossy WebP mask'),
    (saved(GREY, 'WEBP', 'RGBA', quality=50), 'lossy', 'a lossy WebP mask'),
    (
      saved(few_ids(15), 'JPEG2000', irreversible=False),
      'lossy',
      'a JPEG 2000 mask',
    ),
    (
      saved(few_ids(15), 'TIFF', compression='jpeg'),
      'lossy',
      'a JPEG-compressed TIFF mask',
    ),
    (frames('GIF'), 'unreadable', '3 frames instead of one'),
    (frames('PNG'), 'unreadable', '3 frames instead of one'),
    (frames('WEBP'), 'unreadable', '3 frames instead of one'),
    (saved(GREY, 'PNG'), 'mode', HINT),
    (saved(GREY, 'PNG', 'RGBA'), 'mode', HINT),
    (saved(GREY, 'PNG', 'LA'), 'mode', HINT),
    (
      saved(deep_pixels(255).astype(np.uint8), 'WEBP', lossless=True),
      'mode',
      'mode RGB; expected an 8-bit PNG of class ids. Convert',
    ),
    (saved(few_ids(15).astype(np.uint16), 'PNG'), 'depth', '16 bits'),
    (fixtures.tiff_bytes(few_ids(15).astype(np.uint16)), 'depth', '16 bits'),
    (
      fixtures.tiff_bytes(few_ids(15).astype(np.float32), samples=3),
      'depth',
      '32 bits',
    ),
  ],
  ids=[
    *('webp', 'webp_alpha', 'jpeg2000', 'tiff_jpeg', 'gif', 'apng', 'webps'),
    *('rgb', 'rgba', 'la', 'webp_colors', 'png16', 'tiff16', 'float'),
  ],
)
def test_masks_that_are_no_exact_ids_are_refused(tmp_path, data, kind, message):
  path = tmp_path / 'mask'
  path.write_bytes(data)
  with pytest.raises(DataError, match=message) as error:
    masks.read_mask(path)
  assert error.value.kind == kind


BOX = [8, 6, 20, 6, 20, 16, 8, 16]
CORNERS = [BOX[i : i + 2] for i in range(0, 8, 2)]
INSIDE = np.zeros((24, 32), np.uint8)
INSIDE[6:16, 8:20] = 1
RUNS = fixtures._runs(INSIDE)['counts']
TEXT = 'V6:>000000000000000000000j8'  # The same, compressed.


def draw_coco(path, change):
  """`coco.draw_labels` of two changed images with a box each."""
  pytest.importorskip('pycocotools')
  images = [
    {'id': i, 'file_name': f'{i}.png', 'height': 24, 'width': 32}
    for i in (1, 2)
  ]
  annotations = [
    {'id': 10 + i, 'image_id': i, 'category_id': 5, 'segmentation': [BOX]}
    for i in (1, 2)
  ]
  content = {'images': images, 'annotations': annotations}
  content['categories'] = [{'id': 5, 'name': 'road'}, {'id': 6, 'name': 'tree'}]
  for annotation in annotations:
    annotation['bbox'] = [8, 6, 12, 10]
  change(content)
  path.write_text(json.dumps(content))
  return coco.draw_labels(path)


def segmented(value):
  """Makes every segmentation `value`."""

  def change(content):
    for annotation in content['annotations']:
      annotation['segmentation'] = value

  return change


def each(key, **fields):
  """Makes fields of each entry functions of what they were."""

  def change(content):
    for entry in content[key]:
      for field, made in fields.items():
        entry[field] = made(entry[field])

  return change


def both(*changes):
  return lambda content: [change(content) for change in changes]


def by_id(*keys):
  def change(content):
    for key in keys:
      content[key] = {str(x.pop('id')): x for x in content[key]}

  return change


def nest(content):
  content['annotations'] = [[x] for x in content['annotations']]


FLAT = 'one flat list of numbers are read as one polygon (2)'
PAIRS = 'of [x, y] pairs are read as polygons (2)'
SIZE = 'RLEs without a size get the size of their images (2)'
NUMBERS = (
  'numbers written as "48" or 48.0 are read as whole numbers ({})'.format
)
NESTED = 'entries in nested lists or by id are read as plain lists ({})'.format
REPAIRED = {
  'as_coco': (lambda content: None, ()),
  'flat': (segmented(BOX), (FLAT,)),
  'pairs': (segmented(CORNERS), (PAIRS,)),
  'lists_of_pairs': (segmented([CORNERS, CORNERS]), (PAIRS,)),
  'opencv': (segmented([[x] for x in CORNERS]), (PAIRS,)),
  'objects': (segmented([{'x': x, 'y': y} for x, y in CORNERS]), (PAIRS,)),
  'nested': (segmented([[BOX]]), (PAIRS,)),
  'rle': (segmented({'size': [24, 32], 'counts': RUNS}), ()),
  'rle_text': (segmented({'size': [24, 32], 'counts': TEXT}), ()),
  'rle_no_size': (segmented({'counts': RUNS}), (SIZE,)),
  'rle_text_no_size': (segmented({'size': None, 'counts': TEXT}), (SIZE,)),
  'rle_floats': (
    segmented({'size': [24.0, 32.0], 'counts': RUNS}),
    (NUMBERS(4),),
  ),
  'rle_strings': (
    segmented({'size': [24, 32], 'counts': [*map(str, RUNS)]}),
    (NUMBERS(2 * len(RUNS)),),
  ),
  'rle_bytes': (
    segmented({'size': [24, 32], 'counts': f"b'{TEXT}'"}),
    ("RLEs written as b'...' are read without b'' (2)",),
  ),
  'float_sizes': (each('images', height=float, width=str), (NUMBERS(4),)),
  'float_ids': (each('annotations', image_id=float), (NUMBERS(2),)),
  'number_strings': (
    each('annotations', image_id=str, category_id=str),
    (NUMBERS(4),),
  ),
  'text_ids': (
    both(
      each('images', id='u{}'.format),
      each('annotations', image_id='u{}'.format, category_id='c{}'.format),
      each('categories', id='c{}'.format),
    ),
    (),
  ),
  'nested_annotations': (nest, (NESTED(2),)),
  'images_by_id': (by_id('images'), (NESTED(1), NUMBERS(2))),
  'all_by_id': (
    by_id('images', 'annotations', 'categories'),
    (NESTED(3), NUMBERS(4)),
  ),
  'blanks': (
    each('categories', name=' {}\t'.format),
    ('spaces around category names are removed (2)',),
  ),
  'twice': (
    lambda c: c['categories'].append({'id': 7, 'name': 'road'}),
    ('categories with the same name are read as one class (1)',),
  ),
}


@pytest.mark.parametrize('name', REPAIRED)
def test_coco_of_other_shapes_is_the_same_and_said(tmp_path, name):
  change, notes = REPAIRED[name]
  path = tmp_path / 'a.json'
  for _ in range(2):  # The second time from the cache.
    names, labels, problems, said = draw_coco(path, change)
    assert (names, problems) == (('background', 'road', 'tree'), [])
    assert len(said) == len(notes)
    for note, text in zip(said, notes, strict=True):
      assert note.text.startswith(f'{path}: ') and note.text.endswith(
        f'{text}.'
      )
    for file in labels.values():
      label = cv2.imdecode(np.frombuffer(file.read(), np.uint8), -1)
      np.testing.assert_array_equal(label, INSIDE)
    assert sorted(labels) == ['1.png', '2.png']


def first(key, **fields):
  return lambda content: content[key][0].update(fields)


def absent(key):
  def change(content):
    for annotation in content['annotations']:
      annotation.pop(key, None)

  return change


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      first('images', height=None),
      r'image 1 \(1\.png\): height is null; needs',
    ),
    (
      first('images', width=48.5),
      r'image 1 \(1\.png\): width is 48\.5; needs a',
    ),
    (first('images', width='wide'), r'image 1 \(1\.png\): width is "wide"; '),
    (first('images', height=0), r'image 1 \(1\.png\): no height or width'),
    (first('images', id=True), r'image true \(1\.png\): id is true; needs'),
    (first('images', file_name=None), 'image 1: file_name is null; needs text'),
    (first('images', file_name=' '), "image 1: file_name ' ' cannot be a name"),
    (
      lambda c: c['images'][1].pop('id'),
      r'image number 2 \(2\.png\): id is abs',
    ),
    (first('annotations', image_id=[1]), 'annotation 11: image_id is a list'),
    (
      first('annotations', category_id=None),
      r'annotation 11 of 1\.png: category_id is null; needs a whole number or',
    ),
    (
      first('annotations', category_id=float('nan')),
      'category_id is NaN; needs',
    ),
    (first('categories', name=7), 'category 5: name is 7; needs text'),
    (lambda c: c['images'].append(None), 'each a list of objects'),
    (lambda c: c.update(annotations=None), 'each a list of objects'),
    (
      absent('segmentation'),
      'none of its 2 annotations has a segmentation, only',
    ),
    (segmented([]), 'none of its 2 annotations has a segmentation, only a box'),
    (
      both(absent('segmentation'), absent('bbox')),
      'none of its 2 annotations has a segmentation; masks need polygons',
    ),
  ],
)
def test_unsound_files_of_coco_name_the_entry(tmp_path, change, message):
  path = tmp_path / 'a.json'
  message = rf'{re.escape(str(path))}: .*{message}'
  with pytest.raises(DataError, match=message) as error:
    draw_coco(path, change)
  assert error.value.kind == 'annotation'


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    (
      None,
      'has no segmentation, as polygons or RLE; draw its outline or remove',
    ),
    ([[]], 'has no segmentation'),
    (BOX[:4], 'needs polygons of at least three corners'),
    (CORNERS[:2], 'needs polygons of at least three corners'),
    ([BOX, [1, 2]], 'needs polygons of at least three corners'),
    ([[1, 2, None, 4, 5, 6]], 'its segmentation has null among the numbers'),
    ([[1, 2, True, 4, 5, 6]], 'its segmentation has true among the numbers'),
    ([['1', '2', '3']], 'its segmentation has "1" among the numbers'),
    ([1, 2, [3, 4]], 'its segmentation has a list among the numbers'),
    ([{'counts': RUNS}], 'its segmentation has an object among the numbers'),
    ([[1, 2, float('nan'), 4, 5, 6]], 'has a corner far outside of the image'),
    ('x', 'its segmentation is "x", not polygons or RLE'),
    (7, 'its segmentation is 7, not polygons or RLE'),
    ({'size': [24, 32]}, 'its segmentation is an object, not polygons or RLE'),
    ({'size': [24, 32], 'counts': None}, 'is not polygons or RLE'),
    ({'size': 7, 'counts': RUNS}, 'is not polygons or RLE'),
    ({'size': [32, 24], 'counts': RUNS}, r'its RLE has size \[32, 24\]'),
    ({'size': [24, 32], 'counts': TEXT[:9]}, 'its RLE does not fill the image'),
    ({'counts': RUNS[:2]}, 'its RLE does not fill the image'),
  ],
)
def test_unsound_segmentations_name_the_annotation(tmp_path, value, message):
  path = tmp_path / 'a.json'
  _, labels, problems, _ = draw_coco(
    path, first('annotations', segmentation=value)
  )
  (problem,) = problems
  assert len(labels) == 2
  message = f'a.json: annotation 11 of 1.png: .*{message}'
  assert re.search(message, str(problem)), str(problem)


def test_ids_that_stand_for_two(tmp_path):
  def change(content):
    content['images'][1]['id'] = content['annotations'][1]['image_id'] = '1'
    content['categories'][1].update(id=5, file_name=[])

  *_, problems, _ = draw_coco(tmp_path / 'a.json', change)
  assert [str(x).partition('a.json: ')[2] for x in problems] == [
    'image id 1 is used by different entries; renumber them.',
    'category id 5 is used by different entries; renumber them.',
  ]


# Lines of a list in VOC's layout, and where the masks are.
LISTED = {
  'ids': ('{}', 'SegmentationClass'),
  'carriage returns': ('{}\r', 'SegmentationClass'),
  'jpg': ('{}.jpg', 'SegmentationClass'),
  'png': ('{}.png', 'SegmentationClass'),
  'path': ('JPEGImages/{}.jpg', 'SegmentationClass'),
  'path from the root': ('/JPEGImages/{}.jpg', 'SegmentationClass'),
  'two names': ('{0}.jpg {0}.png', 'SegmentationClass'),
  'two paths': (
    '/JPEGImages/{0}.jpg /SegmentationClass/{0}.png',
    'SegmentationClass',
  ),
  'two paths elsewhere': ('JPEGImages/{0}.jpg Masks/{0}.png', 'Masks'),
  'a tabulator': (
    'JPEGImages/{0}.jpg\tSegmentationClassAug/{0}.png',
    'SegmentationClassAug',
  ),
}


@pytest.mark.parametrize('kind', LISTED)
@pytest.mark.parametrize('name', ['pascal_voc', 'folder'])
def test_lines_of_a_list(tmp_path, kind, name):
  line, masks_of = LISTED[kind]
  drawn = fixtures.make_voc(tmp_path)
  voc = tmp_path / 'VOCdevkit' / 'VOC2012'
  (voc / 'SegmentationClass').rename(voc / masks_of)
  for split in drawn:
    path = voc / 'ImageSets' / 'Segmentation' / f'{split}.txt'
    path.write_text('\n'.join(map(line.format, drawn[split])))
  keys = {}
  if name == 'folder':
    keys = {'class_names': tuple(classes.VOC), 'layout': 'voc'}
  dataset = load(voc, name, **keys)
  assert_drawn(dataset, drawn)
  # What is not as it stands is said, once for each list.
  changed = kind not in ('ids', 'carriage returns')
  said = [note for note in dataset.notes if 'read as' in note]
  assert len(said) == 2 * changed, dataset.notes


@pytest.mark.parametrize('stem', ['train_aug', 'TrainAug', 'train-aug'])
def test_trainaug_by_other_names(tmp_path, stem):
  drawn = fixtures.make_voc(tmp_path)
  lists = next(tmp_path.rglob('Segmentation/train.txt')).parent
  (lists / f'{stem}.txt').write_text('\n'.join(drawn['train']))
  dataset = load(tmp_path, 'pascal_voc', train_list='trainaug')
  assert_drawn(dataset, drawn)
  assert any(f'{stem}.txt is read' in note for note in dataset.notes)


def test_cityscapes_with_train_ids_alone(tmp_path):
  drawn = fixtures.make_cityscapes(tmp_path)
  for path in [*(tmp_path / 'gtFine').rglob('*_labelIds.png')]:
    key = path.name.removesuffix('_gtFine_labelIds.png')
    split = path.relative_to(tmp_path / 'gtFine').parts[0]
    ids = drawn.get(split, {}).get(key)
    path.unlink()
    if ids is not None:
      fixtures.write(path.with_name(f'{key}_gtFine_labelTrainIds.png'), ids)
  dataset = load(tmp_path, 'cityscapes')
  assert_drawn(dataset, drawn)
  assert any('train ids are read' in note for note in dataset.notes)


# Other places of the pairs of a split, by the tools that write them.
PLACES = [
  '{}/images {}/masks',
  '{}/data {}/labels',
  'img_dir/{} ann_dir/{}',
  'images/{} annotations/{}',
  'images/{} labels/{}',
  '{}/images {}/labels',
  '{} {}_masks',
  '{} {}_labels',
  '{} {}annot',
]


@pytest.mark.parametrize('splits', ['train val', 'training validation'])
@pytest.mark.parametrize('places', PLACES)
def test_pairs_in_other_places(tmp_path, places, splits):
  drawn = fixtures.make_folder(tmp_path / 'plain', 'index')
  for split, other in zip(('train', 'val'), splits.split(), strict=True):
    for kind, place in zip(('images', 'masks'), places.split(), strict=True):
      target = tmp_path / 'root' / place.format(other)
      target.parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / 'plain' / kind / split).rename(target)
  dataset = load(tmp_path / 'root', 'folder', class_names=fixtures.NAMES)
  assert_drawn(dataset, {split: drawn[split] for split in ('train', 'val')})
