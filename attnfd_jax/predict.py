# SPDX-License-Identifier: Apache-2.0
r"""Segments images of any size with a trained network.

  python -m attnfd_jax.predict --checkpoint=runs/camvid/distill \
    --input=IMAGE_OR_FOLDER_OR_'GLOB' --output=DIR [--overwrite]

Writes for every image:
  STEM.png             class ids in 8 bits with the palette of the data set
  STEM_colour.png      the same in colours
  STEM_overlay.jpg     the colours over the image
  STEM_confidence.png  with --confidence: probability of the id, 255 is 1
and areas.csv, the share of each class in each image. Images are taken as they
are stored, without the rotation that a camera may note beside them, and seen
by the network at the scale at which its stage was scored.
"""

from concurrent import futures
import csv
import functools
import glob
import os
import pathlib
import sys
import threading

from absl import flags
import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from attnfd_jax import cli
from attnfd_jax import evaluate
from attnfd_jax.data import sources
from attnfd_jax.data import transforms
from attnfd_jax.errors import InputError
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.progress import progress

# Padding to multiples of it bounds the number of compilations.
SIZE_MULTIPLE = 64
# What a folder is searched for; a file that is named may be anything.
ENDINGS = (*sources.IMAGE_ENDINGS, '.bmp', '.tif', '.tiff', '.webp')
_THREADS = 4
_LONGEST = 65500  # Pixels of a side in libjpeg, which writes the overlay.


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
    # As models.layers.resize: corners of pixels stay where they are.
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


def _padded(size):
  return tuple(-(-n // SIZE_MULTIPLE) * SIZE_MULTIPLE for n in size)


class Predictor:
  """A stage's network, ready for one image after another.

  Args:
    checkpoint: folder of a stage.
    scales, flip: averages over them; see evaluate.Averaged.
    step: which checkpoint; the best by default.

  Attributes:
    class_names: in the order of the ids.
    palette: uint8 [k, 3].
    description: one line about the network.
    short_side: of what the network sees, as when the stage was scored; 0 is
      the size of the image.

  Raises:
    InputError: if the folder is no stage, or has no such checkpoint.
  """

  def __init__(self, checkpoint, *, scales=(1.0,), flip=False, step=None):
    network, self._variables, info = evaluate.load_network(
      checkpoint, scales=scales, flip=flip, step=step
    )
    self._step = make_step(network)
    self.class_names, self.palette = info['class_names'], info['palette']
    self.description = evaluate.describe(checkpoint, info)
    self.short_side = evaluate.seen_short_side(info, info['eval']['protocol'])

  def __call__(self, image):
    """Class ids and confidence, uint8 [h, w] each.

    The image is padded right and bottom to multiples of 64 by repeating its
    last column and row, and the result cut again: a border of another colour
    would be one more object, and its mean would enter the pooled branch.
    Confidence is the probability of the id times 255.

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
    seen = image
    if self.short_side:
      size = transforms.fit_short_side((h, w), self.short_side)
      seen = transforms.resize_image(image, size)
    ratio = [
      max(n - 1, 1) / max(m - 1, 1)
      for n, m in zip((h, w), seen.shape[:2], strict=True)
    ]
    bottom, right = (-n % SIZE_MULTIPLE for n in seen.shape[:2])
    seen = np.pad(seen, ((0, bottom), (0, right), (0, 0)), mode='edge')
    found = self._step(
      self._variables,
      seen[None],
      np.array(ratio, np.float32),
      size=_padded((h, w)),
    )
    return tuple(np.asarray(x)[0, :h, :w] for x in found)


def predict(images, checkpoint, *, scales=(1.0,), flip=False, step=None):
  """Class ids of images, a list of uint8 [h, w].

  Reads the checkpoint at each call; for images that come one by one keep a
  `Predictor`.

  Args:
    images: list of uint8 RGB [h, w, 3], each of its own size.
    checkpoint: folder of a stage, e.g. runs/camvid/distill.
    scales, flip, step: see `Predictor`.

  Raises:
    InputError: if the folder is no stage, or has no such checkpoint.
    ValueError: if an image is of another type or shape.
  """
  predictor = Predictor(checkpoint, scales=scales, flip=flip, step=step)
  return [predictor(image)[0] for image in images]


def find_images(pattern):
  """Sorted files of an image, a folder (not its subfolders) or a glob.

  Raises:
    InputError: if there are none.
  """
  if not pattern:
    raise InputError('--input is missing; name an image, a folder or a glob.')
  path = pathlib.Path(pattern)
  if path.is_dir():
    found = [p for p in path.iterdir() if p.suffix.lower() in ENDINGS]
    found = [p for p in found if not p.name.startswith('.')]
    wanted = f'no {", ".join(ENDINGS)} files in it'
  else:
    names = [pattern] if path.is_file() else glob.glob(pattern, recursive=True)
    found = [pathlib.Path(name) for name in names]
    wanted = 'no such file, and nothing matches it as a pattern'
  found = sorted(p for p in found if p.is_file())
  if not found:
    raise InputError(f'--input={pattern}: {wanted}.')
  return found


def plan_outputs(paths, output, *, overwrite=False, confidence=False):
  """Input path -> {kind: file to write}, and the path of areas.csv.

  Raises:
    InputError: if two files would be written to one place, over an input, or
      over anything without `overwrite`; nothing is touched then.
  """
  kinds = {'ids': '.png', 'colour': '_colour.png', 'overlay': '_overlay.jpg'}
  if confidence:
    kinds['confidence'] = '_confidence.png'
  if output.exists() and not output.is_dir():
    raise InputError(f'--output={output} is a file; name a folder.')
  table = output / 'areas.csv'
  plan, writers = {}, {}
  inputs = {path.resolve() for path in paths}
  for path in paths:
    plan[path] = {
      kind: output / f'{path.stem}{ending}' for kind, ending in kinds.items()
    }
    for target in plan[path].values():
      if target in writers:
        raise InputError(
          f'{writers[target]} and {path} would both be written to '
          f'{target.name}; rename one, or predict them into two folders.'
        )
      writers[target] = path
  for target in (*writers, table):
    if target.resolve() in inputs:
      raise InputError(
        f'{target} is an input and would be overwritten; use another --output.'
      )
    if target.exists() and not overwrite:
      raise InputError(
        f'{target} exists; add --overwrite to replace it, or use another '
        '--output.'
      )
  return plan, table


def _encode(path, image, *options):
  """Writes uint8 grey or RGB; OpenCV's own writer hides why it failed."""
  if image.ndim == 3:
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
  path.write_bytes(cv2.imencode(path.suffix, image, options)[1].tobytes())


def write_ids(path, ids, palette):
  """Palette PNG whose pixels are exactly `ids`, uint8 [h, w]."""
  # With fewer colours Pillow packs pixels into 1, 2 or 4 bits.
  colours = np.zeros((256, 3), np.uint8)
  colours[: len(palette)] = palette
  file = Image.fromarray(ids)
  file.putpalette(colours.tobytes())
  file.save(path)


def _write(files, image, ids, confidence, palette):
  colour = palette[ids]
  write_ids(files['ids'], ids, palette)
  _encode(files['colour'], colour)
  mixed = cv2.addWeighted(image, 0.5, colour, 0.5, 0)
  _encode(files['overlay'], mixed, cv2.IMWRITE_JPEG_QUALITY, 90)
  if 'confidence' in files:
    _encode(files['confidence'], confidence)


def predict_files(
  checkpoint,
  pattern,
  output,
  *,
  overwrite=False,
  scales=(1.0,),
  flip=False,
  confidence=False,
  step=None,
):
  """Segments files into a folder; what is written is said at the top.

  Args:
    checkpoint: folder of a stage.
    pattern: an image, a folder or a glob.
    output: folder; made if absent.
    overwrite: replace files that exist.
    scales, flip, step: see `Predictor`.
    confidence: write it as well.

  Returns:
    number of images.

  Raises:
    InputError: before any work if it could not be done as a whole; after it
      if single files were not readable or too large, and were skipped.
  """
  paths = find_images(pattern)
  if not output:
    raise InputError('--output is missing; name a folder for the results.')
  output = pathlib.Path(output)
  plan, table = plan_outputs(
    paths, output, overwrite=overwrite, confidence=confidence
  )
  predictor = Predictor(checkpoint, scales=scales, flip=flip, step=step)
  output.mkdir(parents=True, exist_ok=True)
  print(f'{predictor.description}, on {len(paths)} images; writing to {output}')
  device = threading.Lock()  # One image there, others in reading and writing.

  def work(path):
    """Share of each class, or why there is none."""
    try:
      image = sources.read_image(path)
    except (InputError, OSError) as error:
      return None, str(error)
    if max(image.shape) > _LONGEST:
      h, w = image.shape[:2]
      return None, f'{path}: {w}x{h}, a side is longer than {_LONGEST}.'
    try:
      with device:
        ids, probability = predictor(image)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      h, w = image.shape[:2]
      return None, f'{path}: {w}x{h} needs more memory than the device has.'
    _write(plan[path], image, ids, probability, predictor.palette)
    counts = np.bincount(ids.ravel(), minlength=len(predictor.class_names))
    return counts / ids.size, None

  rows, num_skipped = [], 0
  pool = futures.ThreadPoolExecutor(_THREADS)
  try:
    with progress(len(paths)) as bar:
      for path, (shares, problem) in zip(
        paths, pool.map(work, paths), strict=True
      ):
        bar.update()
        if problem:
          num_skipped += 1
          tqdm.write(f'skipped {problem}', file=sys.stderr)
        else:
          rows.append([path.name, *(f'{share:.6f}' for share in shares)])
  finally:
    pool.shutdown(cancel_futures=True)
  temporary = table.with_name(f'.{table.name}.{os.getpid()}')
  # Names of files are bytes, and not always text.
  with temporary.open('w', newline='', errors='surrogateescape') as file:
    csv.writer(file).writerows([['image', *predictor.class_names], *rows])
  temporary.replace(table)
  if num_skipped:
    raise InputError(
      f'{num_skipped} of {len(paths)} images were skipped, see above; the '
      f'others are in {output}.'
    )
  return len(paths)


def main(argv):
  del argv
  cli.enable_compilation_cache()
  options = flags.FLAGS
  count = predict_files(
    options.checkpoint,
    options.input,
    options.output,
    overwrite=options.overwrite,
    scales=evaluate.parse_scales(options.scales),
    flip=options.flip,
    confidence=options.confidence,
    step=options.step,
  )
  print(f'{count} images: {options.output}')


if __name__ == '__main__':
  # Defined here, so that the verbs can be imported together.
  flags.DEFINE_string('checkpoint', None, 'Folder of a stage.')
  flags.DEFINE_string('input', None, "Image, folder, or 'pattern' in quotes.")
  flags.DEFINE_string('output', None, 'Folder for the results.')
  flags.DEFINE_bool('overwrite', False, 'Replace files that exist.')
  flags.DEFINE_string('scales', '1', 'Mean over these, e.g. 0.75,1,1.25.')
  flags.DEFINE_bool('flip', False, 'Mean with the mirror image.')
  flags.DEFINE_bool('confidence', False, 'Write the probabilities, too.')
  flags.DEFINE_integer('step', None, 'Checkpoint; the best by default.')
  cli.run(main)
