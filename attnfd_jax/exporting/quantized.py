# SPDX-License-Identifier: Apache-2.0
"""ONNX files that compute in int8, held to the scores of the float file.

Static quantization by onnxruntime: QuantizeLinear and DequantizeLinear around
the operations, kernels with a scale per output channel, maps with one scale and
zero point whose range comes from images (the calibration).
"""

import contextlib
import difflib
import errno
import io
import json
import operator
import os
import pathlib
import shutil
import time

import numpy as np
import onnx
from onnxruntime import quantization

from attnfd_jax import metrics
from attnfd_jax.data import masks
from attnfd_jax.errors import explained, InputError, one_of, within
from attnfd_jax.exporting import agreement
from attnfd_jax.inference import evaluation, image_files
from attnfd_jax.inference.onnx_model import OnnxNetwork
from attnfd_jax.progress import progress
from attnfd_jax.runs.logs import percent

METHODS = ('minmax', 'entropy', 'percentile')
NUM_IMAGES = 64  # Of the calibration, at most.
_NUM_PROXY = 4  # Of those, for the search of layers.
_NUM_NAMED = 3  # Layers that are named.
# What computes in int8. Resize is not among them: its time is the same, and
# logits lose (docs/deployment.md).
_OPERATIONS = ['Conv', 'Relu', 'Clip', 'Add', 'MaxPool', 'Pad', 'Concat']
_OPERATIONS += ['GlobalAveragePool']
# Parts that stay in float: the shift of the image is a slow sum in int8, the
# logits decide, and gates multiply whole maps.
_IN_FLOAT = ('input', 'classifier')
_GATES = 'attention_'
# Flags of /proc/cpuinfo: x86 with AVX-512, x86 without, Arm.
_DOT_PRODUCTS = ('avx512_vnni', 'avx_vnni', 'asimddp')


def check_options(*, calibration='minmax', max_drop=0.01, **others):
  """Raises InputError for options of `write` that are wrong in themselves."""
  del others
  one_of('--calibration', calibration, METHODS)
  within('--max_drop', max_drop, 0, 1)


def calibration_images(pattern, info, *, short_side):
  """Images as the network sees them, uint8 [1, h, w, 3], and what they are.

  Those of a file, a folder or a glob; by default of the train split.
  """
  if pattern:
    name, read = f'images of {pattern}', masks.read_image
    source = image_files.find_images(pattern, option='--calibrate')
    source = [*source.values()]
  else:
    dataset, read = info['data']['name'], operator.itemgetter('image')
    name = f'images of the train split of {dataset}'
    source = agreement.split_source(info, 'train')
    if not source:
      what = f'the train split of {dataset} cannot be read here'
      remedy = 'name a folder of images like those it will see'
      raise InputError(f'--calibrate is missing, and {what}; {remedy}.')
  images = agreement.spread(
    source, NUM_IMAGES, read=read, short_side=short_side
  )
  agreement.check_sizes(images, name, option='--calibrate')
  return [x[None] for x in images], f'{len(images)} {name}'


class _OneImage(quantization.CalibrationDataReader):
  """What a calibrator of onnxruntime reads."""

  def __init__(self, image):
    self._images = iter([{'image': image}])

  def get_next(self):
    return next(self._images, None)


def find_ranges(path, images, *, method, folder):
  """Ranges of the maps of a file, as onnxruntime has them.

  Args:
    path: a float file of ours.
    images: uint8 [b, h, w, 3], each of its own size.
    method: of METHODS.
    folder: for a file with all maps as outputs.
  """
  prepare = OnnxNetwork(path).prepared
  with contextlib.redirect_stdout(io.StringIO()):  # It prints its progress.
    calibrator = quantization.create_calibrator(
      pathlib.Path(path),
      _OPERATIONS,
      str(pathlib.Path(folder, 'calibrated.onnx')),
      quantization.CalibrationMethod[
        {'minmax': 'MinMax'}.get(method, method.capitalize())
      ],
    )
    # One at a time: the maps of all images do not fit into memory, arrays of
    # several sizes fail, and CalibMaxIntermediateOutputs forgets ranges.
    for image in progress(len(images), 'calibration', iterable=images):
      calibrator.collect_data(_OneImage(prepare(image)))
    return calibrator.compute_data()


def layers_of(model):
  """Names of the convolutions that can compute in int8, in their order."""
  convs = [node.name for node in model.graph.node if node.op_type == 'Conv']
  return [x for x in convs if x not in _IN_FLOAT and not x.startswith(_GATES)]


def expand(names, layers):
  """The layers that `names` mean: one, or all below a path such as 'aspp'."""
  parts = {x[:i] for x in layers for i, c in enumerate(x) if c == '/'}
  found = []
  for name in names:
    below = [x for x in layers if f'{x}/'.startswith(f'{name}/')]
    if not below and name not in _IN_FLOAT:
      near = difflib.get_close_matches(name, [*layers, *parts], 1)
      near = near or [x for x in sorted(parts) if '/' not in x]
      problem = f'--keep_float={name}: no such layer'
      raise InputError(f'{problem}; try {", ".join(near)}.')
    found += [x for x in below if x not in found]
  return found


def _float_nodes(model, kept):
  """Names of the operations that stay in float with the layers `kept`.

  What follows a layer in float does so up to the next convolution: its result
  would else be rounded there.
  """
  found = {*kept, *_IN_FLOAT}
  for node in model.graph.node:  # Each has the name of its result.
    follows = node.op_type != 'Conv' and not found.isdisjoint(node.input)
    if follows or node.name.startswith(_GATES):
      found.add(node.name)
  return sorted(found)


def make_int8(model, ranges, *, kept=(), facts=()):
  """An onnx.ModelProto with all layers but `kept` in int8; `facts` are added to
  its metadata.
  """
  # quantize_static would calibrate again at each call.
  quantizer = quantization.QDQQuantizer(
    onnx.shape_inference.infer_shapes(model),
    per_channel=True,
    # Weights of 7 bits: without integer dot products x86 adds two products in
    # 16 bits, where those of 8 overflow and the result is another one.
    reduce_range=True,
    weight_qType=quantization.QuantType.QInt8,
    # Signed ones take twice as long on x86.
    activation_qType=quantization.QuantType.QUInt8,
    tensors_range=ranges,
    nodes_to_quantize=[],
    nodes_to_exclude=_float_nodes(model, kept),
    op_types_to_quantize=_OPERATIONS,
    extra_options={},
  )
  quantizer.quantize_model()
  quantizer.model.topological_sort()
  made = quantizer.model.model
  for name, value in dict(facts).items():
    made.metadata_props.add(key=name, value=json.dumps(value))
  onnx.checker.check_model(made)
  return made


def share_of_equal(first, second, images):
  """Share of the pixels of uint8 images [b, h, w, 3] of which two files that
  take the same find the same class.
  """
  same = total = 0
  for image in images:
    prepared = first.prepared(image)
    ids = [x.find(prepared) for x in (first, second)]
    ids = [x if x.ndim == 3 else x.argmax(-1) for x in ids]
    same, total = same + np.sum(np.equal(*ids)), total + ids[0].size
  return float(same / total)


def count_pixels(network, source, info, *, text):
  """Confusion matrix, int64 [k, k], of a file on a source."""
  reading = {
    key: info['eval'][key]
    for key in ('protocol', 'short_side', 'size_multiple')
    if key in info['eval']
  }
  reading['threads'] = info['data']['threads']
  pairs = evaluation.predictions(network, None, source, **reading)
  num_classes, counts = len(info['class_names']), 0
  for pair in progress(len(source), text, iterable=pairs):
    counts += metrics.host_confusion_matrix(*pair, num_classes=num_classes)
  return counts


def describe_classes(before, after, class_names):
  """Lines of a table: IoU of each class in percent, float and int8."""
  pairs = zip(*map(metrics.iou_per_class, (before, after)), strict=True)
  rows = [
    (name, *map(percent, pair), f'{100 * (pair[1] - pair[0]):+.2f}')
    for name, pair in zip(class_names, pairs, strict=True)
  ]
  rows = [('class', 'float %', 'int8 %', 'change'), *rows]
  width = max(len(row[0]) for row in rows)
  return [
    f'  {name:{width}}' + ''.join(f'{cell:>10}' for cell in cells)
    for name, *cells in rows
  ]


def dot_products(path='/proc/cpuinfo'):
  """'has integer dot products (...)' and so on, of this CPU."""
  try:
    words = pathlib.Path(path).read_text().split()
  except OSError:
    return 'may have integer dot products (no /proc/cpuinfo)'
  if found := [x for x in _DOT_PRODUCTS if x in words]:
    return f'has integer dot products ({", ".join(found)})'
  none = ', '.join(_DOT_PRODUCTS)
  return f'has no integer dot products ({none}), so expect less'


def alternate(networks, image, *, rounds=11):
  """Median seconds of each network on what it takes, measured in turns."""
  seconds = []
  for _ in range(rounds + 1):
    seconds.append([])
    for network in networks:
      start = time.perf_counter()
      network.find(image)
      seconds[-1].append(time.perf_counter() - start)
  return np.median(seconds[1:], axis=0)  # The first call allocates.


def rank_layers(write, layers, exact, images):
  """[(share of equal classes, layer)], the best first, for each layer that is
  kept in float alone; `write` makes a network of layers to keep.
  """
  shares = [
    (share_of_equal(exact, write([layer]), images), layer)
    for layer in progress(
      len(layers), 'layers', iterable=layers, unit=' layers'
    )
  ]
  return sorted(shares, reverse=True)


class _Files:
  """int8 files of one float file that differ in what they keep in float."""

  def __init__(self, path, images, *, method, facts):
    self._path, self._facts = path, facts
    self._model = onnx.load(path)
    self.layers = layers_of(self._model)
    with explained('onnxruntime cannot calibrate the file'):
      self._ranges = find_ranges(
        path, images, method=method, folder=path.parent
      )

  def write(self, kept, name='trial.onnx'):
    """The network of a new file beside the float one."""
    facts = {'quantized': self._facts | {'keep_float': [*kept]}}
    model = make_int8(self._model, self._ranges, kept=kept, facts=facts)
    path = self._path.with_name(name)
    path.write_bytes(model.SerializeToString())
    return OnnxNetwork(path)


def _remedy(files, kept, exact, images, *, score, max_drop):
  """What can be done about a file that is too different, measured.

  `score` is of _make_scorer; layers are looked for by the share of equal
  classes on a few images, which is quick.
  """
  images = images[:: -(-len(images) // _NUM_PROXY)]
  before = share_of_equal(exact, files.write(kept), images)
  layers = [x for x in files.layers if x not in kept]
  ranked = rank_layers(lambda x: files.write(kept + x), layers, exact, images)
  best = [(share, x) for share, x in ranked[:_NUM_NAMED] if share > before]
  others = 'try another --calibration, or more images like those of val'
  if not best:
    return f'no single layer is the reason; {others}'
  named = [x for _, x in best]
  text = ', '.join(f'{x} {100 * (share - before):+.2f}' for share, x in best)
  result, drop, _ = score(files.write(kept + named))
  option = f'--keep_float={",".join(kept + named)}'
  mended = f'{option} mends it ({result})'
  if not drop <= max_drop:
    mended = f'{option} is not enough ({result}); {others}'
  return (
    f'the layers that hurt most, by the percent of the pixels of {len(images)} '
    f'calibration images that have the same class as in float (now '
    f'{100 * before:.2f}) when one of them is kept in float: {text}; {mended}'
  )


def _make_scorer(exact, images, info):
  """A function: network -> (text, drop of a fraction, lines of a table)."""
  source, before = agreement.split_source(info), None
  if source:
    before = count_pixels(exact, source, info, text='val, float')

  def score(network):
    after = count_pixels(network, source, info, text='val, int8')
    first, second = map(metrics.mean_iou, (before, after))
    text = f'val mIoU {percent(first)} with float, {percent(second)} with int8'
    table = describe_classes(before, after, info['class_names'])
    return text, first - second, table

  def compare(network):
    share = share_of_equal(exact, network, images)
    text = f'same class at {100 * share:.2f} % of the calibration images, as '
    return f'{text}val cannot be read here', 1 - share, []

  # Without a labeled pixel the mean is NaN.
  is_scored = source and np.isfinite(metrics.mean_iou(before))
  return score if is_scored else compare


def write(
  path,
  info,
  batches,
  *,
  expected,
  text,
  short_side,
  calibrate=None,
  calibration='minmax',
  keep_float=(),
  max_drop=0.01,
):
  """Writes an int8 file beside a float file of ours.

  Args:
    path: the float file, in a folder for temporary ones.
    info: config.json of its stage.
    batches, expected, text: what a fresh process is asked, the results of the
      network, and a text about the former.
    short_side: of the images that the network sees; 0 leaves their size.
    calibrate: file, folder or glob of images; by default the train split.
    calibration: of METHODS (see check_options), how ranges come from values.
    keep_float: names of layers, or of their parts, that stay in float.
    max_drop: the most that val mIoU may drop, a fraction; where val cannot be
      read, the most pixels of the calibration images that may change class.

  Returns:
    the path of the int8 file and lines to print.

  Raises:
    InputError: whenever the user can fix it, and if the drop is larger.
    OSError: if the disk is full.
  """
  # What onnxruntime writes on a full disk is cut off without a word.
  if shutil.disk_usage(path.parent).free < 3 * path.stat().st_size:
    reason = os.strerror(errno.ENOSPC)
    raise OSError(errno.ENOSPC, reason, str(path.parent.parent))
  images, name = calibration_images(calibrate, info, short_side=short_side)
  exact = OnnxNetwork(path)
  facts = {'calibration': calibration, 'images': len(images)}
  layers = layers_of(onnx.load(path))
  kept = expand(keep_float, layers)
  files = _Files(path, images, method=calibration, facts=facts)
  network, new = files.write(kept, 'int8.onnx'), path.with_name('int8.onnx')
  lines = [
    f'int8: {len(layers) - len(kept)} convolutions by {calibration} over '
    f'{name}; in float: {", ".join([*kept, *_IN_FLOAT[1:]])}'
  ]
  score = _make_scorer(exact, images, info)
  result, drop, table = score(network)
  lines += [result, *table]
  if not drop <= max_drop:  # Nor NaN.
    print('\n'.join(lines))
    options = {'score': score, 'max_drop': max_drop}
    remedy = _remedy(files, kept, exact, images, **options)
    raise InputError(
      f'{result}: {drop:.4f} lost, more than --max_drop={max_drop:g}, so '
      f'nothing was kept; {remedy}.'
    )
  found, _ = agreement.run_fresh('onnx', new, batches, {})
  ours = [network.find(x) for x in batches]
  if not agreement.describe(ours, found, '')[1]:
    raise InputError('A fresh process finds other classes than this one.')
  line = f'In a fresh process, int8 against the network, on {text}: '
  lines.append(agreement.describe(expected, found, line)[0])
  share = share_of_equal(exact, network, images)
  lines.append(
    f'same class as the float file at {100 * share:.2f} % of the pixels of '
    'the calibration images'
  )
  return new, [*lines, *_describe_cost(path, new, exact, network, images[0])]


def _describe_cost(path, new, exact, network, image):
  """Lines about the sizes of the two files, and their time for an image."""
  sizes = [x.stat().st_size / 1e6 for x in (path, new)]
  before, after = 1e3 * alternate([exact, network], exact.prepared(image))
  h, w = image.shape[1:3]
  return [
    f'{sizes[1]:.2f} MB, {sizes[0] / sizes[1]:.2f}x smaller than float '
    f'({sizes[0]:.2f} MB)',
    f'{after:.1f} ms an image of {h}x{w} in int8, {before:.1f} ms in float, '
    f'speedup {before / after:.2f}: medians of calls in turns on this CPU, '
    f'which {dot_products()}',
  ]
