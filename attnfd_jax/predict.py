# SPDX-License-Identifier: Apache-2.0
r"""Segments images of any size with a trained network.

  python -m attnfd_jax.predict --checkpoint=runs/camvid/distill \
    --input=IMAGE_OR_FOLDER_OR_'GLOB' --output=DIR [--overwrite] \
    [--tile=512x1024 --overlap=0.25] [--video=OVERLAYS.mp4 --fps=25]

Writes for every image:
  STEM.png             class ids in 8 bits with the palette of the data set
  STEM_colour.png      the same in colours
  STEM_overlay.jpg     the colours over the image
  STEM_confidence.png  with --confidence: probability of the id, 255 is 1
and areas.csv, the share of each class in each image. --tile is for images
larger than memory; --video writes the overlays as one file, too. Images are
taken as they are stored, without the rotation that a camera may note beside
them, seen by the network at the scale at which its stage was scored, and in the
order of the numbers in their names.
"""

import collections
from concurrent import futures
import contextlib
import csv
import glob
import os
import pathlib
import re
import sys
import threading
import types

from absl import flags
import cv2
import jax
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from attnfd_jax import cli
from attnfd_jax import evaluate
from attnfd_jax.data import masks
from attnfd_jax.data import sources
from attnfd_jax.errors import InputError
from attnfd_jax.inference import video as videos
from attnfd_jax.inference.predictor import predict as predict
from attnfd_jax.inference.predictor import Predictor
from attnfd_jax.progress import progress

# What a folder is searched for; a file that is named may be anything.
ENDINGS = (*sources.IMAGE_ENDINGS, '.bmp', '.tif', '.tiff', '.webp')
_THREADS = 4
_LONGEST = 65500  # Pixels of a side in libjpeg, which writes the overlay.


def _natural(path):
  """Sorts frame_2 before frame_10; paths of equal numbers as they are."""
  parts = [re.split(r'(\d+)', part) for part in path.parts]
  for part in parts:
    part[1::2] = map(int, part[1::2])
  return parts, path


def find_images(pattern):
  """Files of an image, a folder (not its subfolders) or a glob.

  They are in the order of the numbers in their names.

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
  found = sorted((p for p in found if p.is_file()), key=_natural)
  if not found:
    raise InputError(f'--input={pattern}: {wanted}.')
  return found


def plan_outputs(
  paths, output, *, overwrite=False, confidence=False, video=None
):
  """Input path -> {kind: file to write}, and the path of areas.csv.

  Only checks `video`, the path of one more file, or None.

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
  for target in (*writers, table, *([video] if video else [])):
    if target.resolve() in inputs:
      raise InputError(
        f'{target} is an input and would be overwritten; write elsewhere.'
      )
    if target.exists() and not overwrite:
      raise InputError(
        f'{target} exists; add --overwrite to replace it, or write elsewhere.'
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


def frame_size(paths):
  """(height, width) of all frames, from their headers; None if no file has a
  readable one.

  Raises:
    InputError: if two differ.
  """
  first = size = None
  for path in paths:
    try:
      found = masks.read_size(path)
    except (InputError, OSError):
      continue  # It will be skipped.
    if first is None:
      first, size = path, found
    elif found != size:
      (a, b), (c, d) = size, found
      raise InputError(
        f'--video: {first} is {b}x{a}, {path} is {d}x{c}; frames must have one '
        'size.'
      )
  return size


def _in_order(pool, work, paths):
  """Yields work(path) for one path after the other.

  Only a few are ahead of the one that is waited for: results hold frames.
  """
  begun = collections.deque()
  for path in paths:
    begun.append(pool.submit(work, path))
    if len(begun) > _THREADS:
      yield begun.popleft().result()
  while begun:
    yield begun.popleft().result()


def _write(files, image, ids, confidence, palette):
  """Returns the overlay."""
  colour = palette[ids]
  write_ids(files['ids'], ids, palette)
  _encode(files['colour'], colour)
  mixed = cv2.addWeighted(image, 0.5, colour, 0.5, 0)
  _encode(files['overlay'], mixed, cv2.IMWRITE_JPEG_QUALITY, 90)
  if 'confidence' in files:
    _encode(files['confidence'], confidence)
  return mixed


def predict_files(
  checkpoint,
  pattern,
  output,
  *,
  overwrite=False,
  confidence=False,
  video=None,
  fps=25.0,
  **options,
):
  """Segments files into a folder; what is written is said at the top.

  Args:
    checkpoint: folder of a stage.
    pattern: an image, a folder or a glob.
    output: folder; made if absent.
    overwrite: replace files that exist.
    confidence: write it as well.
    video: file for the overlays of all images, see video.py, or None.
    fps: its frames a second.
    **options: scales, flip, step, tile, overlap; see `Predictor`.

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
  if video:
    video = pathlib.Path(video)
    videos.check(video, fps)
  plan, table = plan_outputs(
    paths, output, overwrite=overwrite, confidence=confidence, video=video
  )
  size = frame_size(paths) if video else None
  predictor = Predictor(checkpoint, **options)
  output.mkdir(parents=True, exist_ok=True)
  print(f'{predictor.description}, on {len(paths)} images; writing to {output}')
  device = threading.Lock()  # One image there, others in reading and writing.

  def work(path):
    """Share of each class and the overlay, or (None, why there is none)."""
    try:
      image = sources.read_image(path)
    except (InputError, OSError) as error:
      return None, str(error)
    h, w = image.shape[:2]
    if max(h, w) > _LONGEST:
      return None, f'{path}: {w}x{h}, a side is longer than {_LONGEST}.'
    if size and (h, w) != size:
      return None, f'{path}: {w}x{h}, and its header said another size.'
    try:
      with device:
        ids, probability = predictor(image)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      return None, (
        f'{path}: {w}x{h} needs more memory than the device has; use --tile, '
        'or a smaller one.'
      )
    overlay = _write(plan[path], image, ids, probability, predictor.palette)
    counts = np.bincount(ids.ravel(), minlength=len(predictor.class_names))
    return counts / ids.size, overlay if size else None

  rows, num_skipped = [], 0
  with contextlib.ExitStack() as stack:
    bar = stack.enter_context(progress(len(paths)))
    if size:
      video.parent.mkdir(parents=True, exist_ok=True)
      add_frame = stack.enter_context(videos.writer(video, size, fps))
    # Left first: nothing is begun for a result that nobody takes.
    pool = futures.ThreadPoolExecutor(_THREADS)
    stack.callback(pool.shutdown, cancel_futures=True)
    for path, (shares, found) in zip(
      paths, _in_order(pool, work, paths), strict=True
    ):
      bar.update()
      if shares is None:
        num_skipped += 1
        tqdm.write(f'skipped {found}', file=sys.stderr)
        continue
      rows.append([path.name, *(f'{share:.6f}' for share in shares)])
      if size:
        add_frame(found)
  temporary = table.with_name(f'.{table.name}.{os.getpid()}')
  # Names of files are bytes, and not always text.
  with temporary.open('w', newline='', errors='surrogateescape') as file:
    csv.writer(file).writerows([['image', *predictor.class_names], *rows])
  temporary.replace(table)
  if num_skipped:
    places = f'{output} and {video}' if video and rows else output
    raise InputError(
      f'{num_skipped} of {len(paths)} images were skipped, see above; the '
      f'others are in {places}.'
    )
  return len(paths)


def main(argv):
  del argv
  cli.enable_compilation_cache()
  options = flags.FLAGS
  if options.fps is not None and not options.video:
    raise InputError('--fps is of a video; add --video=FILE.mp4.')
  count = predict_files(
    options.checkpoint,
    options.input,
    options.output,
    overwrite=options.overwrite,
    confidence=options.confidence,
    video=options.video,
    fps=25.0 if options.fps is None else options.fps,
    scales=evaluate.parse_scales(options.scales),
    flip=options.flip,
    step=options.step,
    tile=evaluate.parse_tile(options.tile),
    overlap=options.overlap,
  )
  print(f'{count} images: {options.output}')
  if options.video:
    print(f'their overlays: {options.video}')


class _Callable(types.ModuleType):
  """`attnfd_jax.predict(images, checkpoint)`; the module has that name."""

  def __call__(self, images, checkpoint, **options):
    return predict(images, checkpoint, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == '__main__':
  # Defined here, so that the verbs can be imported together.
  flags.DEFINE_string('checkpoint', None, 'Folder of a stage.')
  flags.DEFINE_string('input', None, "Image, folder, or 'pattern' in quotes.")
  flags.DEFINE_string('output', None, 'Folder for the results.')
  flags.DEFINE_bool('overwrite', False, 'Replace files that exist.')
  flags.DEFINE_string('scales', '1', 'Mean over these, e.g. 0.75,1,1.25.')
  flags.DEFINE_bool('flip', False, 'Mean with the mirror image.')
  flags.DEFINE_bool('confidence', False, 'Write the probabilities, too.')
  flags.DEFINE_string('tile', None, 'HEIGHTxWIDTH seen at a time.')
  flags.DEFINE_float('overlap', None, 'Share of a tile; 0.25 by default.')
  flags.DEFINE_string('video', None, 'File for the overlays, .mp4 or .avi.')
  flags.DEFINE_float('fps', None, 'Frames a second of it; 25 by default.')
  flags.DEFINE_integer('step', None, 'Checkpoint; the best by default.')
  cli.run(main)
