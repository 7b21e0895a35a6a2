# SPDX-License-Identifier: Apache-2.0
"""Class ids of images of any size, whole, in tiles, averaged over views."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.data import transforms
from attnfd_jax.errors import InputError
from attnfd_jax.inference import tiling
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.models.resizing import resize
from attnfd_jax.runs import loading

# Short side of image and label in protocol `reference`; train_kd.py:281.
REFERENCE_SHORT_SIDE = 513


def seen_short_side(protocol, short_side=0):
  """Short side of the images that a network sees; 0 leaves their size."""
  return REFERENCE_SHORT_SIDE if protocol == 'reference' else short_side


def seen_short_side_of(info):
  """As `seen_short_side`, of the stage with that config.json."""
  settings = info['eval']
  return seen_short_side(settings['protocol'], settings.get('short_side', 0))


def seen_size(size, settings):
  """(height, width) at which a network sees an image of `size` when it is
  scored by the group `eval` of a config.
  """
  side = seen_short_side(settings['protocol'], settings['short_side'])
  size = transforms.fit_short_side(size, side) if side else size
  return transforms.next_multiple(size, settings['size_multiple'])


def describe(checkpoint, info):
  """'runs/quickstart/distill, step 320: resnet18 x0.125', or what it says."""
  if 'description' in info:
    return info['description']
  name = networks.describe(info[loading.role_of(info)])
  return f'{checkpoint}, step {info["checkpoint_step"]}: {name}'


def scores_at(outputs, height, width, *, ratio=None):
  """Logits [b, height, width, k] of Outputs in one bilinear step.

  `ratio`, float32 [2], is the size of a pixel of the image in the result; by
  default both end at the same place, corners aligned.
  """
  logits = outputs['logits']
  maps = outputs.get('coarse_logits', logits)
  if ratio is None:
    return resize(maps, height, width)
  if 1 in maps.shape[1:3]:
    maps = logits  # A single pixel has no distance to scale.
  sizes = zip(logits.shape[1:3], maps.shape[1:3], strict=True)
  steps = [(n - 1) / (m - 1) for n, m in sizes]
  scale = ratio * jnp.array(steps, jnp.float32)
  shape = (len(maps), height, width, maps.shape[-1])
  return jax.image.scale_and_translate(
    maps, shape, (1, 2), scale, 0.5 * (1 - scale), 'linear', antialias=False
  )


@functools.partial(jax.jit, static_argnames=('network', 'size'))
def compute_scores(network, variables, image, ratio=None, *, size):
  """`scores_at` of uint8 images [b, h, w, 3], compiled once for a size."""
  outputs = network.apply(variables, normalise(image), train=False)
  return scores_at(outputs, *size, ratio=ratio)


def _decide(logits, xp):
  """Class ids and probabilities times 255, uint8; `xp` is NumPy or JAX's."""
  largest = xp.max(logits, -1, keepdims=True)
  odds = xp.sum(xp.exp(logits - largest), -1)
  ids = xp.argmax(logits, -1)
  return ids.astype(xp.uint8), xp.round(255 / odds).astype(xp.uint8)


@functools.partial(jax.jit, static_argnames=('network', 'size'))
def classify(network, variables, image, ratio=None, *, size):
  """Class ids and confidence, uint8 [b, *size] each; see `segment`."""
  logits = compute_scores(network, variables, image, ratio, size=size)
  return _decide(logits, jnp)


def is_file(network):
  """Whether a network is an exported file, which runs outside of JAX."""
  return getattr(network, 'is_file', False)


@functools.partial(jax.jit, static_argnames='size')
def _fit_scores(logits, ratio, *, size):
  return scores_at({'logits': logits}, *size, ratio=ratio)


def _scores(network, variables, image, ratio=None, *, size):
  """`compute_scores`, also of a file."""
  if not is_file(network):
    return compute_scores(network, variables, image, ratio, size=size)
  logits = network.run(image)
  if ratio is None and logits.shape[1:3] == tuple(size):
    return logits
  return _fit_scores(logits, ratio, size=size)


def _classes(network, variables, image, ratio=None, *, size):
  """`classify`, also of a file."""
  if not is_file(network):
    return classify(network, variables, image, ratio, size=size)
  return _decide(
    np.asarray(_scores(network, None, image, ratio, size=size)), np
  )


def segment(
  network, variables, image, size, *, tile=None, overlap=0.25, size_multiple=1
):
  """Class ids of one image and their probabilities times 255, uint8 of `size`.

  The network sees the image, uint8 [h, w, 3], whole if `tile` is None or covers
  it, see tiling.bands, and padded to multiples of `size_multiple` by repeating
  the edge, for fewer compilations.
  """
  seen = image.shape[:2]
  padded = functools.partial(transforms.next_multiple, multiple=size_multiple)
  if tile is None or all(map(operator.ge, tile, seen)):
    ratio = None
    if size_multiple > 1 and tuple(size) != seen:
      # Both are padded, but not in proportion.
      last, last_seen = np.maximum((size, seen), 2) - 1
      ratio = np.float32(last / last_seen)
    image = transforms.pad_edges(image, padded(seen))[None]
    found = _classes(network, variables, image, ratio, size=padded(size))
    return tuple(np.asarray(x)[0, : size[0], : size[1]] for x in found)

  def score_tile(part):
    h, w = part.shape[:2]
    # Where the image is smaller than a tile, few sizes are compiled, too.
    full = tuple(map(min, padded((h, w)), tile))
    part = transforms.pad_edges(part, full)[None]
    logits = _scores(network, variables, part, size=full)
    return np.asarray(logits)[0, :h, :w]

  bands = tiling.bands(score_tile, image, tile=tile, overlap=overlap)
  if tuple(size) != seen:  # All logits of the image are held.
    bands = tiling.resized(np.concatenate(list(bands)), size)
  found = [_decide(band, np) for band in bands]
  return tuple(np.concatenate(x) for x in zip(*found, strict=True))


@dataclasses.dataclass(frozen=True)
class Averaged:
  """A network whose probabilities are means over scales and mirror images.

  Takes the place of a network wherever `apply` is called for its logits;
  hashable, so that compiled steps are shared.
  """

  network: object  # Called with (variables, image, train=False).
  scales: tuple[float, ...] = (1.0,)  # Each is one more forward pass, or two.
  flip: bool = False  # Average with the mirror image as well.

  def apply(self, variables, image, *, train):
    """{'logits'}: log of the mean probabilities, float32 [b, h, w, k]."""
    b, h, w, _ = image.shape
    total = 0.0
    for scale in self.scales:
      # Antialiased when it shrinks, half-pixel centers there and back.
      size = [max(round(n * scale), 1) for n in (h, w)]
      scaled = jax.image.resize(image, (b, *size, 3), 'linear')
      for way in (1, -1)[: 1 + self.flip]:
        x = scaled[:, :, ::way]
        outputs = self.network.apply(variables, x, train=train)
        logits = outputs['logits'][:, :, ::way]
        logits = jax.image.resize(logits, (b, h, w, logits.shape[-1]), 'linear')
        total = total + jax.nn.softmax(logits)
    mean = total / (len(self.scales) * (1 + self.flip))
    return {'logits': jnp.log(jnp.maximum(mean, jnp.finfo(mean.dtype).tiny))}


class Predictor:
  """A stage's network, ready for one image after another.

  Args:
    checkpoint: folder of a stage, or what teachers.sources.load_given or
      onnx_model.load returns.
    scales, flip: averages over them; see `Averaged`.
    tile: (height, width) that the network sees at a time, of images that are
      larger; logits of overlapping tiles are averaged.
    overlap: least share of a tile that the next one covers again, in [0, 1).
    **options: of loading.load_network: step, allow_code.

  Attributes:
    network, variables, info: as of loading.load_network; averaged if asked.
    class_names, palette: in the order of the ids; uint8 [k, 3].
    description: one line about the network.
    short_side: of what the network sees, as when the stage was scored; 0 is
      the size of the image.
    has_confidence: whether confidences are more than 255 everywhere.
    views, tiles: dicts of scales and flip, of tile and overlap.

  Raises:
    InputError: as load_network; if the overlap is out of its range.
  """

  def __init__(
    self,
    checkpoint,
    *,
    scales=(1.0,),
    flip=False,
    tile=None,
    overlap=0.25,
    **options,
  ):
    if not 0 <= overlap < 1:
      raise InputError(f'--overlap={overlap} must be from 0 to below 1.')
    self.views = {'scales': list(scales), 'flip': flip}
    self.tiles = {'tile': tile and list(tile), 'overlap': tile and overlap}
    if isinstance(checkpoint, tuple):
      network, self.variables, info = checkpoint
    else:
      loaded = loading.load_network(checkpoint, **options)
      network, self.variables, info = loaded
    self.has_confidence = getattr(network, 'has_logits', True)
    if flip or tuple(scales) != (1,):
      if is_file(network):
        raise InputError('--scales and --flip are for a stage, not for a file.')
      network = Averaged(network, tuple(scales), flip)
    self.network, self.info = network, info
    self.description = describe(checkpoint, info)
    self.class_names, self.palette = info['class_names'], info['palette']
    self.short_side = seen_short_side_of(info)

  def __call__(self, image):
    """Class ids and confidence, uint8 [h, w], of uint8 RGB [h, w, 3].

    The latter is the probability of the id times 255; see `segment`.
    """
    if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
      what = f'image is {image.dtype} {image.shape}'
      raise ValueError(f'{what}; it must be uint8 [h, w, 3].')
    seen, size = transforms.fit_image(image, self.short_side), image.shape[:2]
    options = self.tiles | {'size_multiple': 64}  # To compile for few sizes.
    return segment(self.network, self.variables, seen, size, **options)


def predict(images, checkpoint, **options):
  """Class ids of images, a list of uint8 [h, w].

  Args:
    images: list of uint8 RGB [h, w, 3], each of its own size.
    checkpoint: folder of a stage, e.g. runs/camvid/distill. It is read at each
      call; for images that come one by one keep a `Predictor`.
    **options: scales, flip, tile, overlap, step, allow_code; see `Predictor`.
  """
  predictor = Predictor(checkpoint, **options)
  return [predictor(image)[0] for image in images]
