# SPDX-License-Identifier: Apache-2.0
"""A stage's network on images of any size, whole or in tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax import evaluate
from attnfd_jax.data import transforms
from attnfd_jax.inference import evaluation
from attnfd_jax.inference import tiling
from attnfd_jax.models.deeplab import normalise

# Padding to multiples of it bounds the number of compilations.
SIZE_MULTIPLE = 64


@functools.lru_cache
def make_step(network):
  """Returns jitted (variables, uint8 image, ratio, size) -> ids, confidence.

  `ratio` is (result - 1) / (image - 1) of height and width before padding, an
  array, and `size` that of the padded result: one program serves many sizes.
  """

  @functools.partial(jax.jit, static_argnames='size')
  def step(variables, image, ratio, *, size):
    out = network.apply(variables, normalise(image), train=False)
    coarse = out['coarse_logits']
    h, w = (
      (n - 1) / (m - 1)
      for n, m in zip(image.shape[1:3], coarse.shape[1:3], strict=True)
    )
    # As models.resizing: corners of pixels stay where they are.
    scale = ratio * jnp.array([h, w], jnp.float32)
    logits = jax.image.scale_and_translate(
      coarse,
      (1, *size, coarse.shape[-1]),
      (1, 2),
      scale,
      0.5 * (1 - scale),
      'linear',
      antialias=False,
    )
    ids = jnp.argmax(logits, -1).astype(jnp.uint8)
    confidence = jnp.max(jax.nn.softmax(logits), -1)
    return ids, jnp.round(255 * confidence).astype(jnp.uint8)

  return step


def _decide(scores):
  """As the end of `make_step`, of scores [h, w, k] on the host."""
  ids = np.argmax(scores, -1).astype(np.uint8)
  odds = np.exp(scores - np.max(scores, -1, keepdims=True))
  return ids, np.round(255 / np.sum(odds, -1)).astype(np.uint8)


def _padded(size):
  return transforms.next_multiple(size, SIZE_MULTIPLE)


def _pad(image, size):
  """Pads right and bottom by repeating the last column and row.

  A border of another colour would be one more object, and its mean would enter
  the pooled branch.
  """
  bottom, right = (n - m for n, m in zip(size, image.shape[:2], strict=True))
  return np.pad(image, ((0, bottom), (0, right), (0, 0)), mode='edge')


class Predictor:
  """A stage's network, ready for one image after another.

  Args:
    checkpoint: folder of a stage.
    scales, flip: averages over them; see evaluate.Averaged.
    step: which checkpoint; the best by default.
    tile: (height, width) that the network sees at a time, or None. Scores of
      overlapping tiles are averaged; see training/tiling.py.
    overlap: least share of a tile that the next one covers again, in [0, 1);
      0.25 by default.

  Attributes:
    class_names: in the order of the ids.
    palette: uint8 [k, 3].
    description: one line about the network.
    short_side: of what the network sees, as when the stage was scored; 0 is
      the size of the image.

  Raises:
    InputError: if the folder is no stage, or has no such checkpoint; if the
      overlap is out of its range.
  """

  def __init__(
    self,
    checkpoint,
    *,
    scales=(1.0,),
    flip=False,
    step=None,
    tile=None,
    overlap=None,
  ):
    self._tile, self._overlap = tile, evaluate.overlap_of(tile, overlap)
    network, self._variables, info = evaluate.load_network(
      checkpoint, scales=scales, flip=flip, step=step
    )
    self._step = make_step(network)
    self._scores = evaluation.make_scores(network)
    self.class_names, self.palette = info['class_names'], info['palette']
    self.description = evaluate.describe(checkpoint, info)
    self.short_side = evaluate.seen_short_side(info, info['eval']['protocol'])

  def __call__(self, image):
    """Class ids and confidence, uint8 [h, w] each.

    Confidence is the probability of the id times 255. An image that is no
    larger than a tile is seen whole, padded to multiples of 64.

    Args:
      image: uint8 RGB [h, w, 3], of any size.
    """
    if (
      image.dtype != np.uint8
      or image.ndim != 3
      or image.shape[2] != 3
      or not image.size
    ):
      raise ValueError(
        f'image is {image.dtype} {image.shape}; it must be uint8 [h, w, 3].'
      )
    h, w = image.shape[:2]
    seen = transforms.fit_image(image, self.short_side)
    covered = not self._tile or tiling.covers(self._tile, seen.shape[:2])
    return (self._whole if covered else self._tiled)(seen, (h, w))

  def _whole(self, image, size):
    ratio = [
      max(n - 1, 1) / max(m - 1, 1)
      for n, m in zip(size, image.shape[:2], strict=True)
    ]
    image = _pad(image, _padded(image.shape[:2]))
    found = self._step(
      self._variables,
      image[None],
      np.array(ratio, np.float32),
      size=_padded(size),
    )
    h, w = size
    return tuple(np.asarray(x)[0, :h, :w] for x in found)

  def _tiled(self, image, size):
    def apply(part):
      h, w = part.shape[:2]
      # Where the image is smaller than a tile, few sizes are compiled, too.
      seen = tuple(map(min, _padded((h, w)), self._tile))
      scores = self._scores(self._variables, _pad(part, seen)[None], size=seen)
      return np.asarray(scores)[:h, :w]

    found = [
      _decide(scores)
      for scores in tiling.scores(
        apply, image, size, tile=self._tile, overlap=self._overlap
      )
    ]
    return tuple(np.concatenate(x) for x in zip(*found, strict=True))


def predict(images, checkpoint, **options):
  """Class ids of images, a list of uint8 [h, w].

  Reads the checkpoint at each call; for images that come one by one keep a
  `Predictor`.

  Args:
    images: list of uint8 RGB [h, w, 3], each of its own size.
    checkpoint: folder of a stage, e.g. runs/camvid/distill.
    **options: scales, flip, step, tile, overlap; see `Predictor`.

  Raises:
    InputError: as `Predictor`.
    ValueError: if an image is of another type or shape.
  """
  predictor = Predictor(checkpoint, **options)
  return [predictor(image)[0] for image in images]
