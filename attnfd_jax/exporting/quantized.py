# SPDX-License-Identifier: Apache-2.0
"""Exports ONNX files that compute in int8, with mIoU close to the float file.

Static quantization by onnxruntime: QuantizeLinear and DequantizeLinear around
the operations. Kernels have a scale per output channel, feature maps one scale
and zero point, from the range of their values on images (the calibration).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnxruntime import quantization

from attnfd_jax import metrics
from attnfd_jax.data import masks
from attnfd_jax.data.records import Source
from attnfd_jax.errors import (
  check_choice,
  check_range,
  convert_errors,
  InputError,
)
from attnfd_jax.exporting import agreement
from attnfd_jax.inference import evaluation, image_files
from attnfd_jax.inference.onnx_model import OnnxNetwork
from attnfd_jax.progress import progress
from attnfd_jax.runs.logs import count_text, percent
from attnfd_jax.types import StrPath

METHODS = ('minmax', 'entropy', 'percentile')
NUM_IMAGES = 64  # For the calibration, at most.
_NUM_PROXY = 4  # Of those, used to find the layers that hurt.
_NUM_NAMED = 3  # Layers named in the error.
_REST = 0.05  # Seconds between measurements of different networks.
# Operations in int8. Resize is not among them: it would not be faster, and the
# logits would lose accuracy (docs/deployment.md).
_OPERATIONS = ['Conv', 'Relu', 'Clip', 'Add', 'MaxPool', 'Pad', 'Concat']
_OPERATIONS += ['GlobalAveragePool']
# These stay in float: the shift of the image, slow in int8; the first
# convolution, no faster in int8 with its three channels, and sensitive; the
# classifier, sensitive too; and attention, which multiplies whole feature maps.
_IN_FLOAT = ('input', 'backbone/stem', 'classifier')
_GATES = 'attention_'
# Flags of /proc/cpuinfo: x86 with AVX-512, x86 without, Arm.
_DOT_PRODUCTS = ('avx512_vnni', 'avx_vnni', 'asimddp')
# (text with the scores, drop as a fraction, lines of a table).
_Score: TypeAlias = tuple[str, float, list[str]]


def check_options(
  *, calibration: str = 'minmax', max_drop: float = 0.01, **others: Any
) -> None:
  """Raises InputError for options of `write` with invalid values."""
  del others
  check_choice('--calibration', calibration, METHODS)
  check_range('--max_drop', max_drop, 0, 1)


def calibration_images(
  pattern: str | None, info: Mapping[str, Any], *, short_side: int
) -> tuple[list[np.ndarray], str]:
  """Images for the calibration, uint8 [1, h, w, 3], and a description of them.

  Args:
    pattern: a file, a folder or a glob; by default the train split is used.
    info: config.json of the stage.
    short_side: that images are resized to; 0 keeps their size.

  Raises:
    InputError: if there are no images, or they are too small.
  """
  if pattern:
    origin, read = pattern, masks.read_image
    source = image_files.find_images(pattern, option='--calibrate')
    source = [*source.values()]
  else:
    dataset, read = info['data']['name'], operator.itemgetter('image')
    origin = f'the train split of {dataset}'
    source = agreement.split_source(info, 'train')
    if not source:
      problem = f'{origin} cannot be read here'
      remedy = 'name a folder of images like those the network will be used on'
      raise InputError(f'--calibrate is missing, and {problem}; {remedy}.')
  images = agreement.spread(
    source, NUM_IMAGES, read=read, short_side=short_side
  )
  agreement.check_sizes(images, f'images of {origin}', option='--calibrate')
  count = count_text(len(images), 'image')
  return [x[None] for x in images], f'{count} of {origin}'


class _OneImage(quantization.CalibrationDataReader):
  """A reader of one image for onnxruntime's calibrators."""

  def __init__(self, image: np.ndarray):
    self._images = iter([{'image': image}])

  # None at the end, as onnxruntime documents but does not annotate.
  def get_next(self) -> Any:
    return next(self._images, None)


def find_ranges(
  path: StrPath, images: Sequence[np.ndarray], *, method: str, folder: StrPath
) -> Any:
  """Value ranges of the feature maps of a file, as onnxruntime's TensorsData.

  Args:
    path: a float ONNX file of `export`.
    images: uint8 [b, h, w, 3] each, of any sizes.
    method: of METHODS.
    folder: for a temporary file that outputs all feature maps.
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
    # One at a time: the maps of all images do not fit into memory, mixed sizes
    # fail, and CalibMaxIntermediateOutputs forgets ranges.
    for image in progress(len(images), 'calibration', iterable=images):
      calibrator.collect_data(_OneImage(prepare(image)))
    return calibrator.compute_data()


def layers_of(model: onnx.ModelProto) -> list[str]:
  """Names of the convolutions that can compute in int8, in graph order."""
  convs = [node.name for node in model.graph.node if node.op_type == 'Conv']
  return [x for x in convs if x not in _IN_FLOAT and not x.startswith(_GATES)]


def expand(names: Iterable[str], layers: Sequence[str]) -> list[str]:
  """The layers with these names, or below them, as in 'aspp'.

  Raises:
    InputError: if a name matches none; it suggests others.
  """
  parts = {x[:i] for x in layers for i, c in enumerate(x) if c == '/'}
  expanded = []
  for name in names:
    below = [x for x in layers if f'{x}/'.startswith(f'{name}/')]
    if not below and name not in _IN_FLOAT:
      near = difflib.get_close_matches(name, [*layers, *parts], 1)
      near = near or [x for x in sorted(parts) if '/' not in x]
      problem = f'--keep_float={name}: no such layer'
      raise InputError(f'{problem}; try {", ".join(near)}.')
    expanded += [x for x in below if x not in expanded]
  return expanded


def _float_nodes(model: onnx.ModelProto, kept: Iterable[str]) -> list[str]:
  """Names of the operations that stay in float if the layers `kept` do.

  Operations after a float layer stay in float as well, up to the next
  convolution; otherwise they would round its output.
  """
  names = {*kept, *_IN_FLOAT}
  for node in model.graph.node:  # Each has the name of its output.
    follows = node.op_type != 'Conv' and not names.isdisjoint(node.input)
    if follows or node.name.startswith(_GATES):
      names.add(node.name)
  return sorted(names)


def make_int8(
  model: onnx.ModelProto,
  ranges: Any,
  *,
  kept: Iterable[str] = (),
  facts: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
  """The model with all layers in int8, except those in `kept`.

  Args:
    model: a float model of onnx_graph.
    ranges: of find_ranges.
    kept: names of layers that stay in float.
    facts: {name: value}, added to the metadata as JSON.
  """
  # quantize_static would calibrate again at each call.
  quantizer = quantization.QDQQuantizer(
    onnx.shape_inference.infer_shapes(model),
    per_channel=True,
    # 7-bit weights: without integer dot products x86 adds two products in 16
    # bits, where 8-bit weights would overflow and give wrong results.
    reduce_range=True,
    weight_qType=quantization.QuantType.QInt8,
    # Signed activations take twice as long on x86.
    activation_qType=quantization.QuantType.QUInt8,
    tensors_range=ranges,
    nodes_to_quantize=[],
    nodes_to_exclude=_float_nodes(model, kept),
    op_types_to_quantize=_OPERATIONS,
    extra_options={},
  )
  quantizer.quantize_model()
  quantizer.model.topological_sort()
  int8 = quantizer.model.model
  for name, value in (facts or {}).items():
    int8.metadata_props.add(key=name, value=json.dumps(value))
  onnx.checker.check_model(int8)
  return int8


def pixel_agreement(
  first: OnnxNetwork, second: OnnxNetwork, images: Iterable[np.ndarray]
) -> float:
  """Fraction of the pixels where two files predict the same class.

  Both must take the same input; images are uint8 [b, h, w, 3] each.
  """
  same = total = 0
  for image in images:
    prepared = first.prepared(image)
    ids = [x.find(prepared) for x in (first, second)]
    ids = [x if x.ndim == 3 else x.argmax(-1) for x in ids]
    same, total = same + np.sum(np.equal(*ids)), total + ids[0].size
  return float(same / total)


def count_pixels(
  network: OnnxNetwork, source: Source, info: Mapping[str, Any], *, text: str
) -> np.ndarray:
  """Confusion matrix, int64 [k, k], of a file; `text` labels the progress."""
  reading = {
    key: info['eval'][key]
    for key in ('protocol', 'short_side', 'size_multiple')
    if key in info['eval']
  }
  reading['threads'] = info['data']['threads']
  pairs = evaluation.predictions(network, None, source, **reading)
  num_classes = len(info['class_names'])
  counts = np.zeros((num_classes,) * 2, np.int64)
  for pair in progress(len(source), text, iterable=pairs):
    counts += metrics.host_confusion_matrix(*pair, num_classes=num_classes)
  return counts


def describe_classes(
  before: np.ndarray, after: np.ndarray, class_names: Iterable[str]
) -> list[str]:
  """Lines of a table of the IoU of each class, in float and in int8.

  Args:
    before: confusion matrix of the float file.
    after: confusion matrix of the int8 file.
    class_names: of the rows of the matrices.
  """
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


def dot_products(path: StrPath = '/proc/cpuinfo') -> str:
  """'has integer dot products (...)' or similar, about this CPU."""
  try:
    words = pathlib.Path(path).read_text().split()
  except OSError:
    return 'may have integer dot products (no /proc/cpuinfo)'
  if found := [x for x in _DOT_PRODUCTS if x in words]:
    return f'has integer dot products ({", ".join(found)})'
  none = ', '.join(_DOT_PRODUCTS)
  return f'has no integer dot products ({none}), so expect less speedup'


def alternate(
  networks: Sequence[OnnxNetwork], image: np.ndarray, *, rounds: int = 11
) -> np.ndarray:
  """Median seconds of each network on a prepared image, measured in turns."""
  seconds = []
  for _ in range(rounds):
    seconds.append([])
    for network in networks:
      # For a while after a call, its threads wait for the next one in a loop,
      # and would take the cores from those of the other network.
      time.sleep(_REST)
      network.find(image)
      start = time.perf_counter()
      network.find(image)
      seconds[-1].append(time.perf_counter() - start)
  return np.median(seconds, axis=0)


def rank_layers(
  write: Callable[[list[str]], OnnxNetwork],
  layers: Sequence[str],
  exact: OnnxNetwork,
  images: Sequence[np.ndarray],
) -> list[tuple[float, str]]:
  """Ranks layers by what keeping only this one in float improves, best first.

  Args:
    write: makes a network from the layers to keep in float.
    layers: to rank.
    exact: the float file.
    images: see pixel_agreement.

  Returns:
    pairs of the fraction of pixels with the same class, and the layer.
  """
  shares = [
    (pixel_agreement(exact, write([layer]), images), layer)
    for layer in progress(
      len(layers), 'layers', iterable=layers, unit=' layers'
    )
  ]
  return sorted(shares, reverse=True)


class _Files:
  """Makes int8 files from a float file, with different layers in float."""

  def __init__(
    self,
    path: pathlib.Path,
    images: Sequence[np.ndarray],
    *,
    method: str,
    facts: dict[str, Any],
  ):
    self._path, self._facts = path, facts
    self._model = onnx.load(path)
    self.layers = layers_of(self._model)
    with convert_errors('onnxruntime cannot calibrate the file'):
      self._ranges = find_ranges(
        path, images, method=method, folder=path.parent
      )

  def write(self, kept: Sequence[str], name: str = 'trial.onnx') -> OnnxNetwork:
    """Writes a file beside the float file."""
    facts = {'quantized': self._facts | {'keep_float': [*kept]}}
    model = make_int8(self._model, self._ranges, kept=kept, facts=facts)
    path = self._path.with_name(name)
    path.write_bytes(model.SerializeToString())
    return OnnxNetwork(path)


def _remedy(
  files: _Files,
  kept: list[str],
  exact: OnnxNetwork,
  images: Sequence[np.ndarray],
  *,
  score: Callable[[OnnxNetwork], _Score],
  max_drop: float,
) -> str:
  """Finds out what to do if the drop is too large.

  `score` is of _make_scorer. Layers are compared by the fraction of pixels with
  the same class on a few images, which is quick.
  """
  images = images[:: -(-len(images) // _NUM_PROXY)]
  before = pixel_agreement(exact, files.write(kept), images)
  layers = [x for x in files.layers if x not in kept]
  ranked = rank_layers(lambda x: files.write(kept + x), layers, exact, images)
  best = [(share, x) for share, x in ranked[:_NUM_NAMED] if share > before]
  others = 'try another --calibration, or more images like those of val'
  if not best:
    return f'no single layer is the cause; {others}'
  named = [x for _, x in best]
  text = ', '.join(f'{x} {100 * (share - before):+.2f}' for share, x in best)
  result, drop, _ = score(files.write(kept + named))
  option = f'--keep_float={",".join(kept + named)}'
  outcome = f'{option} fixes it ({result})'
  if not drop <= max_drop:
    outcome = f'{option} is not enough ({result}); {others}'
  count = count_text(len(images), 'calibration image')
  return (
    f'{100 * before:.2f} % of the pixels of {count} have the same class as in '
    'float; '
    f'most is gained if one of these layers is kept in float: {text}; {outcome}'
  )


def _make_scorer(
  exact: OnnxNetwork, images: Sequence[np.ndarray], info: Mapping[str, Any]
) -> Callable[[OnnxNetwork], _Score]:
  """A function that compares an int8 file with the float file.

  By val mIoU or, if val cannot be read or has no labels, by the classes on the
  calibration images.
  """

  def compare(network: OnnxNetwork) -> _Score:
    share = pixel_agreement(exact, network, images)
    text = f'same class at {100 * share:.2f} % of the pixels of the calibration'
    return f'{text} images, as val cannot be read here', 1 - share, []

  source = agreement.split_source(info)
  if not source:
    return compare
  before = count_pixels(exact, source, info, text='val, float')
  # Without a labeled pixel the mean is NaN.
  if not np.isfinite(metrics.mean_iou(before)):
    return compare

  def score(network: OnnxNetwork) -> _Score:
    after = count_pixels(network, source, info, text='val, int8')
    miou, int8_miou = map(metrics.mean_iou, (before, after))
    text = (
      f'val mIoU {percent(miou)} with float, {percent(int8_miou)} with int8'
    )
    table = describe_classes(before, after, info['class_names'])
    return text, miou - int8_miou, table

  return score


def write(
  path: pathlib.Path,
  info: Mapping[str, Any],
  batches: Sequence[np.ndarray],
  *,
  expected: Sequence[np.ndarray],
  text: str,
  short_side: int,
  calibrate: str | None = None,
  calibration: str = 'minmax',
  keep_float: Sequence[str] = (),
  max_drop: float = 0.01,
) -> tuple[pathlib.Path, list[str]]:
  """Writes an int8 file beside a float file of `export`.

  Args:
    path: the float file, in a folder for temporary files.
    info: config.json of its stage.
    batches: inputs of both files, for a comparison.
    expected: the outputs of the network for the batches.
    text: describes the batches.
    short_side: that images are resized to; 0 keeps their size.
    calibrate: file, folder or glob of images; by default the train split.
    calibration: of METHODS: how ranges are computed from values.
    keep_float: names of layers, or of their parts, that stay in float.
    max_drop: largest drop of val mIoU, as a fraction; if val cannot be read,
      the largest fraction of the pixels of the calibration images whose class
      changes.

  Returns:
    the path of the int8 file and lines to print.

  Raises:
    InputError: for errors that the user can fix, and if the drop is too large.
    OSError: if the disk is full.
  """
  # On a full disk onnxruntime truncates files without an error.
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
  if not drop <= max_drop:  # Too large, or NaN.
    print('\n'.join(lines))
    remedy = _remedy(files, kept, exact, images, score=score, max_drop=max_drop)
    raise InputError(
      f'{result}: a drop of {drop:.4f}, more than --max_drop={max_drop:g}, so '
      f'no file was written; {remedy}.'
    )
  outputs, _ = agreement.run_fresh('onnx', new, batches, {})
  here = [network.find(x) for x in batches]
  if not agreement.describe(here, outputs, '')[1]:
    raise InputError(
      'The int8 file predicts other classes in a fresh process than here; '
      'please report it.'
    )
  line = f'In a fresh process, int8 against the network, on {text}: '
  lines.append(agreement.describe(expected, outputs, line)[0])
  share = pixel_agreement(exact, network, images)
  lines.append(
    f'same class as the float file at {100 * share:.2f} % of the pixels of '
    'the calibration images'
  )
  return new, [*lines, *_describe_cost(path, new, exact, network, images[0])]


def _describe_cost(
  path: pathlib.Path,
  new: pathlib.Path,
  exact: OnnxNetwork,
  network: OnnxNetwork,
  image: np.ndarray,
) -> list[str]:
  """Lines about the sizes of the two files and their time per image."""
  sizes = [x.stat().st_size / 1e6 for x in (path, new)]
  before, after = 1e3 * alternate([exact, network], exact.prepared(image))
  h, w = image.shape[1:3]
  return [
    f'{sizes[1]:.2f} MB, {sizes[0] / sizes[1]:.2f}x smaller than float '
    f'({sizes[0]:.2f} MB)',
    f'{after:.1f} ms per image of {h}x{w} in int8, {before:.1f} ms in float, '
    f'speedup {before / after:.2f}: medians of alternating calls on this CPU, '
    f'which {dot_products()}',
  ]
