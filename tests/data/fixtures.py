# SPDX-License-Identifier: Apache-2.0
"""Tiny data sets in the official layouts, and the labels that were drawn.

Every make_* fills the folder `root` with images of 48x64 and returns
{split: {key: uint8 [h, w] of train ids}}, 255 = ignored. What the files hold
is written with Pillow, scipy and plain JSON, not by code under test.
"""

import csv
import json
import pathlib
import shutil
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image
import scipy.io

SIZE = (48, 64)
NUM_IMAGES = {'train': 6, 'val': 4, 'test': 4}
NAMES = ('background', 'road', 'tree')  # Of make_folder.
COLORS = ((0, 0, 0), (200, 30, 30), (10, 250, 0))
ID_MAP = (3, 40, 7)
KINDS = (
  'index',
  'palette',
  'colors',
  'id_map',
  'fiftyone',
  'voc',
  'cvat',
  'roboflow',
  'coco',
)
CITY_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
# Category ids and names of COCO in the order of VOC's classes 1 to 20.
COCO = (
  '5 airplane,2 bicycle,16 bird,9 boat,44 bottle,6 bus,3 car,17 cat,62 chair,'
  '21 cow,67 dining table,18 dog,19 horse,4 motorcycle,1 person,'
  '64 potted plant,20 sheep,63 couch,7 train,72 tv'
)
COCO = [(int(x.split()[0]), x.split(' ', 1)[1]) for x in COCO.split(',')]


def draw(seed, num_classes, void=255):
  """Rectangles: image uint8 [48, 64, 3] and ids uint8 [48, 64] with void."""
  generator = np.random.default_rng(seed)
  ids = np.full(SIZE, 7 * seed % num_classes, np.uint8)
  for i in range(8):
    top, left = generator.integers(0, 40), generator.integers(0, 56)
    height, width = generator.integers(6, 24, 2)
    # Following images go on with the next classes.
    value = (7 * seed + i) % num_classes if i else void
    ids[top : top + height, left : left + width] = value
  colors = generator.integers(0, 256, (256, 3), np.uint8)
  noise = generator.integers(0, 16, (*SIZE, 3))
  image = np.clip(colors[ids] + noise, 0, 255).astype(np.uint8)
  return image, ids


def write(path, array, palette=None):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(array)
  if palette is not None:
    image.putpalette(bytes(palette))
  image.save(path)
  return path


def voc_colors():
  """768 numbers by the loop of the devkit's labelcolormap."""
  found = []
  for index in range(256):
    color = [0, 0, 0]
    for shift in range(8):
      for channel in range(3):
        bit = (index >> (3 * shift + channel)) & 1
        color[channel] |= bit << (7 - shift)
    found += color
  return found


def _seed(split, i):
  return 100 * list(NUM_IMAGES).index(split) + i


def make_camvid(root):
  """SegNet's release; void is 11 in the files, every other image a JPEG."""
  root, drawn = pathlib.Path(root), {}
  for split, count in NUM_IMAGES.items():
    drawn[split] = {}
    for i in range(count):
      image, ids = draw(_seed(split, i), 11, void=11)
      key = f'0001TP_{i:06d}'
      write(root / split / f'{key}.{("png", "jpg")[i % 2]}', image)
      write(root / f'{split}annot' / f'{key}.png', ids)
      drawn[split][key] = np.where(ids == 11, 255, ids).astype(np.uint8)
  return drawn


def make_voc(root, sbd=False):
  """VOCdevkit/VOC2012 in `root`, and with `sbd` benchmark_RELEASE beside it.

  SBD lists one image of VOC's train and one of its val, too; what is returned
  for train is then trainaug.
  """
  root, drawn = pathlib.Path(root), {}
  voc = root / 'VOCdevkit' / 'VOC2012'
  lists = voc / 'ImageSets' / 'Segmentation'
  lists.mkdir(parents=True)
  for split in ('train', 'val'):
    drawn[split] = {}
    for i in range(NUM_IMAGES[split]):
      image, ids = draw(_seed(split, i), 21)
      key = f'2007_{_seed(split, i):06d}'
      write(voc / 'JPEGImages' / f'{key}.jpg', image)
      write(voc / 'SegmentationClass' / f'{key}.png', ids, voc_colors())
      drawn[split][key] = ids
    (lists / f'{split}.txt').write_text('\n'.join(drawn[split]) + '\n')
  # The devkit has more images than these lists.
  write(voc / 'JPEGImages' / '2007_999999.jpg', image)
  if sbd:
    folder = root / 'benchmark_RELEASE' / 'dataset'
    (folder / 'cls').mkdir(parents=True)
    extra = {}
    for i in range(5):
      image, ids = draw(500 + i, 21, void=0)  # SBD has no 255.
      key = f'2008_{9 - i:06d}'
      if i == 3:
        key = list(drawn['train'])[0]
      elif i == 4:
        key = list(drawn['val'])[0]
      else:
        extra[key] = ids
      write(folder / 'img' / f'{key}.jpg', image)
      name = folder / 'cls' / f'{key}.mat'
      scipy.io.savemat(name, {'GTcls': {'Boundaries': 0, 'Segmentation': ids}})
      with (folder / ('train.txt', 'val.txt')[i % 2]).open('a') as file:
        file.write(f'{key}\n')
    drawn['train'] |= dict(sorted(extra.items()))
  return drawn


def make_cityscapes(root, zipped=False):
  """leftImg8bit and gtFine, as folders or as the two zip files."""
  root, drawn = pathlib.Path(root), {}
  train_ids = np.full(256, 255, np.uint8)
  train_ids[list(CITY_IDS)] = np.arange(19)
  written = []
  for split in ('train', 'val', 'test'):
    drawn[split] = {}
    for i in range(NUM_IMAGES[split]):
      image, ids = draw(_seed(split, i), 34, void=4)
      city = f'{split}{"ab"[i % 2]}'
      key = f'{city}_{i:06d}_000019'
      if split == 'test':
        ids[:] = 3  # Not public.
      left = f'leftImg8bit/{split}/{city}/{key}_leftImg8bit.png'
      right = f'gtFine/{split}/{city}/{key}_gtFine_'
      written.append(write(root / left, image))
      written.append(write(root / f'{right}labelIds.png', ids))
      other = np.full(SIZE, 7001, np.uint16)
      written.append(write(root / f'{right}instanceIds.png', other))
      written.append(write(root / f'{right}color.png', image))
      drawn[split][key] = train_ids[ids]
  if zipped:
    for name in ('leftImg8bit', 'gtFine'):
      # One of the two packed, so that both ways are read.
      method = zipfile.ZIP_DEFLATED if name == 'gtFine' else zipfile.ZIP_STORED
      path = root / f'{name}_trainvaltest.zip'
      with zipfile.ZipFile(path, 'w', method) as archive:
        archive.writestr('README', 'not an image')
        for file in written:
          if file.relative_to(root).parts[0] == name:
            archive.write(file, file.relative_to(root).as_posix())
      shutil.rmtree(root / name)
  del drawn['test']
  return {split: dict(sorted(drawn[split].items())) for split in drawn}


def _box(top, left, bottom, right):
  """A polygon that is exactly these rows and columns."""
  return [left, top, right, top, right, bottom, left, bottom]


def _runs(mask):
  """Uncompressed RLE of COCO: runs by columns, first of zeros."""
  flat = np.concatenate([[0], mask.T.ravel(), [0]])
  edges = np.flatnonzero(np.diff(flat))
  runs = np.diff(np.concatenate([[0], edges, [mask.size]]))
  return {'size': list(mask.shape), 'counts': runs.tolist()}


def _annotate(ids, foreground, image_id, first):
  """Annotations whose drawing, first one on top, gives `ids`; background 0.

  Each class is an RLE of exactly its pixels; one box of class 1 as a polygon
  comes first and is added to `ids`.
  """
  ids[8:20, 10:30] = 1
  found = [(foreground[0], [_box(8, 10, 20, 30)], 0)]
  # What lies below the box must not win.
  hidden = np.zeros(SIZE, np.uint8)
  hidden[10:18, 12:28] = 1
  for number, category in enumerate(foreground, 1):
    mask = (ids == number).astype(np.uint8)
    found.append((category, _runs(mask | hidden), 1))
  return [
    {
      'id': first + i,
      'image_id': image_id,
      'category_id': category,
      'segmentation': segmentation,
      'iscrowd': crowd,
    }
    for i, (category, segmentation, crowd) in enumerate(found)
  ]


def _write_coco(path, images, categories):
  """images: {file name: (ids, category ids of the classes 1, 2, ...)}."""
  content = {'images': [], 'annotations': []}
  content['categories'] = [{'id': i, 'name': n} for i, n in categories]
  # Not in the order of names.
  for image_id, name in enumerate(reversed(list(images)), 1):
    ids, foreground = images[name]
    content['images'].append(
      {'id': image_id, 'file_name': name, 'height': SIZE[0], 'width': SIZE[1]}
    )
    first = len(content['annotations'])
    content['annotations'] += _annotate(ids, foreground, image_id, first)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


def make_coco(root):
  """COCO 2017; the last image of each split has too few labeled pixels."""
  root, drawn = pathlib.Path(root), {}
  categories = [*COCO, (13, 'stop sign')]
  for split in ('train', 'val'):
    drawn[split], images = {}, {}
    for i in range(NUM_IMAGES[split] + 1):
      image, ids = draw(_seed(split, i), 21, void=0)
      if i == NUM_IMAGES[split]:
        ids[:] = 0
        # With the box of 240 pixels these are 1000, and not more.
        ids[22:40, :40] = 7
        ids[40, :40] = 7
      key = f'{_seed(split, i):012d}'
      write(root / f'{split}2017' / f'{key}.jpg', image)
      images[f'{key}.jpg'] = ids, [c for c, _ in COCO]
      if i < NUM_IMAGES[split]:
        drawn[split][key] = ids
    _write_coco(
      root / 'annotations' / f'instances_{split}2017.json', images, categories
    )
  return drawn


def make_folder(root, kind):
  """A user's set of the three classes NAMES in one of the layouts KINDS.

  `folder_config(kind)` has the keys of config.data that it needs.
  """
  root, drawn = pathlib.Path(root), {}
  for split, count in NUM_IMAGES.items():
    drawn[split], images = {}, {}
    for i in range(count):
      # Colors and annotations have no void.
      void = 0 if kind in ('colors', 'cvat', 'coco') else 255
      image, ids = draw(_seed(split, i), len(NAMES), void)
      # VOC's and CVAT's images lie in one folder.
      key = f'{split}_{i}'
      _write_example(root, kind, split, key, image, ids)
      images[f'{key}.jpg'] = ids, [4, 9]
      drawn[split][key] = ids
    if kind in ('voc', 'cvat'):
      path = root / 'ImageSets' / 'Segmentation' / f'{split}.txt'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text('\n'.join(drawn[split]) + '\n')
    elif kind == 'roboflow':
      with (root / _valid(split) / '_classes.csv').open('w') as file:
        writer = csv.writer(file)
        writer.writerow(['Pixel Value', ' Class'])
        for row in enumerate(NAMES):
          writer.writerow([row[0], f' {row[1]}'])
    elif kind == 'coco':
      path = root / 'annotations' / f'instances_{split}.json'
      _write_coco(path, images, [(4, 'road'), (9, 'tree')])
  if kind == 'cvat':
    lines = ['# label:color_rgb:parts:actions']
    for name, color in zip(NAMES, COLORS, strict=True):
      lines.append(f'{name}:{",".join(map(str, color))}::')
    (root / 'labelmap.txt').write_text('\n'.join(lines) + '\n')
  return drawn


def folder_config(kind):
  """Keys of config.data for make_folder."""
  keys = {'name': 'folder', 'class_names': NAMES}
  if kind in ('cvat', 'roboflow', 'coco'):
    keys['class_names'] = ()  # They bring their own.
  if kind == 'colors':
    keys['palette'] = COLORS
  if kind == 'id_map':
    keys['id_map'] = ID_MAP
  return keys


def _valid(split):
  return 'valid' if split == 'val' else split


def _write_example(root, kind, split, key, image, ids):
  image_path = {
    'fiftyone': root / split / 'data',
    'voc': root / 'JPEGImages',
    'cvat': root / 'JPEGImages',
    'roboflow': root / _valid(split),
  }.get(kind, root / 'images' / split)
  write(image_path / f'{key}.jpg', image)
  folder = {
    'fiftyone': root / split / 'labels',
    'voc': root / 'SegmentationClass',
    'cvat': root / 'SegmentationClass',
    'roboflow': root / _valid(split),
  }.get(kind, root / 'masks' / split)
  if kind in ('colors', 'cvat'):
    write(folder / f'{key}.png', np.array(COLORS, np.uint8)[ids])
  elif kind == 'id_map':
    values = np.full(256, 99, np.uint8)  # Ids that are no class are ignored.
    values[: len(ID_MAP)] = ID_MAP
    write(folder / f'{key}.png', values[ids])
  elif kind in ('palette', 'voc'):
    write(folder / f'{key}.png', ids, voc_colors())
  elif kind == 'roboflow':
    write(folder / f'{key}_mask.png', ids)
  elif kind != 'coco':
    write(folder / f'{key}.png', ids)


def pack_bits(array, bits):
  """Rows of an integer array [h, w], each padded to whole bytes."""
  shifts = np.arange(bits)[::-1]
  rows = (array.astype(np.int64)[..., None] >> shifts & 1).astype(np.uint8)
  return np.packbits(rows.reshape(len(rows), -1), 1)


def png_bytes(array, bits):
  """A gray PNG of 1, 2, 4, 8 or 16 bits, of which Pillow writes few."""

  def chunk(name, data):
    checksum = struct.pack('>I', zlib.crc32(name + data))
    return struct.pack('>I', len(data)) + name + data + checksum

  height, width = array.shape
  header = struct.pack('>IIBBBBB', width, height, bits, 0, 0, 0, 0)
  rows = b''.join(b'\0' + row.tobytes() for row in pack_bits(array, bits))
  parts = (b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts)


def tiff_bytes(array, *, bits=None, samples=1, photometric=1):
  """A little-endian TIFF of [h, w] or [h, w, c] of any type.

  `samples`: 1 for unsigned, 2 for signed integers, 3 for floats; with `bits`
  values are packed; a `photometric` of 0 is 'white is 0', 2 is RGB.
  """
  height, width, *channels = array.shape
  count = channels[0] if channels else 1
  data = (pack_bits(array, bits) if bits else array).tobytes()
  bits = bits or 8 * array.itemsize
  start = 8 + 2 + 10 * 12 + 4
  # Of several channels each has its entry; they lie before the pixels.
  extra = struct.pack(f'<{2 * count}H', *[bits] * count, *[samples] * count)
  first, second = start, start + 2 * count
  if count == 1:
    first, second = bits, samples
  entries = (
    *((256, 4, 1, width), (257, 4, 1, height), (258, 3, count, first)),
    *(
      (259, 3, 1, 1),
      (262, 3, 1, photometric),
      (273, 4, 1, start + len(extra)),
    ),
    *((277, 3, 1, count), (278, 4, 1, height), (279, 4, 1, len(data))),
    (339, 3, count, second),
  )
  directory = b''.join(struct.pack('<HHII', *entry) for entry in entries)
  head = b'II*\0' + struct.pack('<IH', 8, len(entries))
  return head + directory + bytes(4) + extra + data
