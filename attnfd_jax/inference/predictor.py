# SPDX-License-Identifier: Apache-2.0
"""Predicts class ids of images of any size: whole, in tiles, or averaged."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import operator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.data import transforms
from attnfd_jax.data.records import Size
from attnfd_jax.errors import InputError
from attnfd_jax.inference import tiling
from attnfd_jax.inference.onnx_model import OnnxNetwork
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import normalize
from attnfd_jax.models.resizing import resize
from attnfd_jax.runs import loading
from attnfd_jax.types import AnyArray, Config, StrPath, Variables

# Short side of image and label in protocol `reference`; train_kd.py:281.
REFERENCE_SHORT_SIDE = 513


def eval_short_side(protocol: str, short_side: int = 0) -> int:
  """Short side that images are resized to for a network; 0 keeps their size."""
  return REFERENCE_SHORT_SIDE if protocol == 'reference' else short_side


def stage_short_side(info: Mapping[str, Any]) -> int:
  """`eval_short_side` for the config.json of a stage."""
  settings = info['eval']
  return eval_short_side(settings['protocol'], settings.get('short_side', 0))


def eval_size(size: Size, settings: Config) -> Size:
  """(height, width) of an image of `size` as the network gets it in evaluation.

  `settings` is the group `eval` of a config.
  """
  side = eval_short_side(settings['protocol'], settings['short_side'])
  size = transforms.fit_short_side(size, side) if side else size
  return transforms.next_multiple(size, settings['size_multiple'])


def describe(checkpoint: Any, info: Mapping[str, Any]) -> str:
  """'runs/quickstart/distill, step 320: resnet18 x0.125', or as info has it."""
  if 'description' in info:
    return info['description']
  name = networks.describe(info[loading.role_of(info)])
  return f'{checkpoint}, step {info["checkpoint_step"]}: {name}'


def resized_logits(
  outputs: Mapping[str, Any],
  height: int,
  width: int,
  *,
  ratio: AnyArray | None = None,
) -> AnyArray:
  """Logits [b, height, width, k] from Outputs, resized only once.

  Args:
    outputs: of a network; the coarse logits are preferred.
    height: of the result.
    width: of the result.
    ratio: float32 [2], the size of a pixel of the image in the result, where
      the two cover different areas; by default their corners are aligned.
  """
  logits = outputs['logits']
  maps = outputs.get('coarse_logits', logits)
  if ratio is None:
    return resize(maps, height, width)
  if 1 in maps.shape[1:3]:
    maps = logits  # The distance between pixels is undefined for one pixel.
  sizes = zip(logits.shape[1:3], maps.shape[1:3], strict=True)
  steps = [(n - 1) / (m - 1) for n, m in sizes]
  scale = ratio * jnp.array(steps, jnp.float32)
  shape = (len(maps), height, width, maps.shape[-1])
  return jax.image.scale_and_translate(
    maps, shape, (1, 2), scale, 0.5 * (1 - scale), 'linear', antialias=False
  )


@functools.partial(jax.jit, static_argnames=('network', 'size'))
def compute_logits(
  network: Any,
  variables: Variables,
  image: AnyArray,
  ratio: AnyArray | None = None,
  *,
  size: Size,
) -> AnyArray:
  """Logits of uint8 images [b, h, w, 3] at `size`; compiled for each size."""
  outputs = network.apply(variables, normalize(image), train=False)
  return resized_logits(outputs, *size, ratio=ratio)


def _decide(logits: Any, xp: ModuleType) -> tuple[Any, Any]:
  """Class ids and confidence, uint8; `xp` is numpy or jax.numpy."""
  largest = xp.max(logits, -1, keepdims=True)
  odds = xp.sum(xp.exp(logits - largest), -1)
  ids = xp.argmax(logits, -1)
  return ids.astype(xp.uint8), xp.round(255 / odds).astype(xp.uint8)


@functools.partial(jax.jit, static_argnames=('network', 'size'))
def classify(
  network: Any,
  variables: Variables,
  image: AnyArray,
  ratio: AnyArray | None = None,
  *,
  size: Size,
) -> tuple[jax.Array, jax.Array]:
  """Class ids and confidence, uint8 [b, *size] each; see `segment`."""
  logits = compute_logits(network, variables, image, ratio, size=size)
  return _decide(logits, jnp)


@functools.partial(jax.jit, static_argnames='size')
def _resize_logits(logits, ratio, *, size):
  return resized_logits({'logits': logits}, *size, ratio=ratio)


def _logits(
  network: Any,
  variables: Variables | None,
  image: np.ndarray,
  ratio: np.ndarray | None = None,
  *,
  size: Size,
) -> AnyArray:
  """`compute_logits`, also for an exported file."""
  if not isinstance(network, OnnxNetwork):
    return compute_logits(network, variables, image, ratio, size=size)
  logits = network.run(image)
  if ratio is None and logits.shape[1:3] == size:
    return logits
  return _resize_logits(logits, ratio, size=size)


def _classes(
  network: Any,
  variables: Variables | None,
  image: np.ndarray,
  ratio: np.ndarray | None,
  *,
  size: Size,
) -> Iterable[AnyArray]:
  """`classify`, also for an exported file."""
  if not isinstance(network, OnnxNetwork):
    return classify(network, variables, image, ratio, size=size)
  logits = _logits(network, variables, image, ratio, size=size)
  return _decide(np.asarray(logits), np)


def segment(
  network: Any,
  variables: Variables | None,
  image: np.ndarray,
  size: Size,
  *,
  tile: Sequence[int] | None = None,
  overlap: float = 0.25,
  size_multiple: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
  """Class ids of one image and their confidence, uint8 [*size] each.

  The confidence is the probability of the class times 255.

  Args:
    network: see evaluation.evaluate; or an OnnxNetwork.
    variables: of the network; None for a file.
    image: uint8 RGB [h, w, 3].
    size: (height, width) of the result.
    tile: (height, width) of overlapping tiles, see tiling.bands. By default,
      and if a tile covers the image, the network gets the image in one piece.
    overlap: see tiling.bands.
    size_multiple: images and tiles are padded to multiples of this, by
      repeating the edge, so that few sizes are compiled.
  """
  seen = image.shape[:2]
  padded = functools.partial(transforms.next_multiple, multiple=size_multiple)
  if tile is None or all(map(operator.ge, tile, seen)):
    ratio = None
    if size_multiple > 1 and tuple(size) != seen:
      # Both are padded, but not in proportion.
      last, last_seen = np.maximum((size, seen), 2) - 1
      ratio = np.asarray(last / last_seen, np.float32)
    image = transforms.pad_edges(image, padded(seen))[None]
    maps = _classes(network, variables, image, ratio, size=padded(size))
    ids, confidence = (np.asarray(x)[0, : size[0], : size[1]] for x in maps)
    return ids, confidence

  def tile_logits(part):
    h, w = part.shape[:2]
    # Few sizes are compiled, too, where the image is smaller than a tile.
    rows, columns = padded((h, w))
    full = min(rows, tile[0]), min(columns, tile[1])
    part = transforms.pad_edges(part, full)[None]
    logits = _logits(network, variables, part, size=full)
    return np.asarray(logits)[0, :h, :w]

  bands = tiling.bands(tile_logits, image, tile=tile, overlap=overlap)
  if tuple(size) != seen:  # Here all logits of the image are in memory.
    bands = tiling.resized(np.concatenate(list(bands)), size)
  ids, confidence = zip(*(_decide(band, np) for band in bands), strict=True)
  return np.concatenate(ids), np.concatenate(confidence)


@dataclasses.dataclass(frozen=True)
class Averaged:
  """A network whose probabilities are averaged over scales and mirror images.

  It can replace a network wherever `apply` is called for its logits, and is
  hashable, so that compiled functions are shared.
  """

  network: Any  # Called with (variables, image, train=False).
  scales: tuple[float, ...] = (1.0,)  # Each is one more forward pass, or two.
  flip: bool = False  # Average with the mirror image as well.

  def apply(
    self, variables: Variables, image: jax.Array, *, train: bool
  ) -> dict[str, jax.Array]:
    """{'logits'}: log of the mean probabilities, float32 [b, h, w, k]."""
    b, h, w, _ = image.shape
    total: Any = 0.0
    for scale in self.scales:
      # Antialiased where it shrinks; half-pixel centers both ways.
      size = [max(round(n * scale), 1) for n in (h, w)]
      scaled = jax.image.resize(image, (b, *size, 3), 'linear')
      for step in (1, -1)[: 1 + self.flip]:
        x = scaled[:, :, ::step]
        outputs = self.network.apply(variables, x, train=train)
        logits = outputs['logits'][:, :, ::step]
        logits = jax.image.resize(logits, (b, h, w, logits.shape[-1]), 'linear')
        total = total + jax.nn.softmax(logits)
    mean = total / (len(self.scales) * (1 + self.flip))
    return {'logits': jnp.log(jnp.maximum(mean, jnp.finfo(mean.dtype).tiny))}


class Predictor:
  """The network of a stage, ready to segment one image after another.

  Args:
    checkpoint: folder of a stage, or what teachers.sources.load_given or
      onnx_model.load returns.
    scales: probabilities are averaged over these; see `Averaged`.
    flip: average with the mirror image as well.
    tile: (height, width) of the overlapping tiles in which larger images are
      processed; their logits are averaged.
    overlap: least fraction of a tile that the next one covers as well, in [0,
      1).
    **options: of loading.load_network: step, allow_code.

  Attributes:
    network: as of loading.load_network, or `Averaged`.
    variables: as of loading.load_network.
    info: as of loading.load_network.
    class_names: in the order of the class ids.
    palette: colors in the same order, uint8 [k, 3].
    description: one line about the network.
    short_side: that images are resized to, as in the evaluation of the stage;
      0 keeps their size.
    has_confidence: False for a file that returns class ids, where the
      confidence is 255 everywhere.
    views: dict of scales and flip.
    tiles: dict of tile and overlap.

  Raises:
    InputError: as load_network; if the overlap is out of its range.
  """

  def __init__(
    self,
    checkpoint: StrPath | loading.Loaded,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    tile: Sequence[int] | None = None,
    overlap: float = 0.25,
    **options: Any,
  ):
    if not 0 <= overlap < 1:
      raise InputError(f'--overlap={overlap} must be from 0 to below 1.')
    self.views = {'scales': list(scales), 'flip': flip}
    self.tiles: dict[str, Any] = {
      'tile': tile and list(tile),
      'overlap': tile and overlap,
    }
    if isinstance(checkpoint, tuple):
      network, self.variables, info = checkpoint
    else:
      loaded = loading.load_network(checkpoint, **options)
      network, self.variables, info = loaded
    self.has_confidence = (
      not isinstance(network, OnnxNetwork) or network.has_logits
    )
    if flip or tuple(scales) != (1,):
      if isinstance(network, OnnxNetwork):
        raise InputError('--scales and --flip are for a stage, not for a file.')
      network = Averaged(network, tuple(scales), flip)
    self.network, self.info = network, info
    self.description = describe(checkpoint, info)
    self.class_names, self.palette = info['class_names'], info['palette']
    self.short_side = stage_short_side(info)

  def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class ids and confidence, uint8 [h, w] each, of uint8 RGB [h, w, 3].

    The confidence is the probability of the class times 255; see `segment`.
    """
    if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
      problem = f'image is {image.dtype} {image.shape}'
      raise ValueError(f'{problem}; it must be uint8 [h, w, 3].')
    seen, size = transforms.fit_image(image, self.short_side), image.shape[:2]
    # Multiples of 64: few sizes are compiled.
    return segment(
      self.network, self.variables, seen, size, size_multiple=64, **self.tiles
    )


def predict(
  images: Iterable[np.ndarray], checkpoint: StrPath, **options: Any
) -> list[np.ndarray]:
  """Class ids of images, uint8 [h, w] each.

  Args:
    images: uint8 RGB [h, w, 3] each, of any sizes.
    checkpoint: folder of a stage, e.g. runs/camvid/distill. Each call reads it;
      for images that arrive one by one, keep a `Predictor`.
    **options: scales, flip, tile, overlap, step, allow_code; see `Predictor`.
  """
  predictor = Predictor(checkpoint, **options)
  return [predictor(image)[0] for image in images]
