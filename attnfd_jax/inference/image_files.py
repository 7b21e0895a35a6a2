# SPDX-License-Identifier: Apache-2.0
"""Folders of images in, folders of class ids and pictures out."""

import contextlib
import csv
import glob
import io
import pathlib
import re
import sys
import threading

import grain
import jax
import numpy as np
from PIL import Image

from attnfd_jax import paths as run_paths
from attnfd_jax.data import masks, sources
from attnfd_jax.errors import InputError
from attnfd_jax.inference import video as videos
from attnfd_jax.inference.predictor import Predictor
from attnfd_jax.progress import progress

# What a folder is searched for; a file that is named may be anything.
ENDINGS = (*sources.IMAGE_ENDINGS, '.bmp', '.tif', '.tiff', '.webp')
# Results hold whole frames: only so many are ahead of the one waited for.
_READING = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
_LONGEST = 65500  # Pixels of a side in libjpeg, which writes the overlay.


def _natural(path):
  """Sorts frame_2 before frame_10; paths of equal numbers as they are."""
  parts = [re.split(r'(\d+)', part) for part in path.parts]
  for part in parts:
    part[1::2] = map(int, part[1::2])
  return parts, path


def find_images(pattern):
  """Files of an image, a folder (not its subfolders) or a glob, in the order of
  the numbers in their names; InputError if there are none.
  """
  path = pathlib.Path(pattern)
  if path.is_dir():
    found = [p for p in path.iterdir() if p.suffix.lower() in ENDINGS]
    found = [p for p in found if not p.name.startswith('.')]
    problem = f'no {", ".join(ENDINGS)} files in it'
  else:
    names = [pattern] if path.is_file() else glob.glob(pattern, recursive=True)
    found = [pathlib.Path(name) for name in names]
    problem = 'no such file, and nothing matches it as a pattern'
  found = sorted((p for p in found if p.is_file()), key=_natural)
  if not found:
    raise InputError(f'--input={pattern}: {problem}.')
  return found


def plan_outputs(
  paths, output, *, overwrite=False, confidence=False, video=None
):
  """Input path -> {kind: file to write}, and the path of areas.csv.

  `video` is one more file that will be written, or None.

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
  inputs = {path.resolve() for path in paths}
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


def frame_size(paths):
  """(height, width) of all frames, from their headers; None if no file has a
  readable one.
  """
  sizes = {}
  for path in paths:
    with contextlib.suppress(InputError, OSError):  # It will be skipped.
      sizes.setdefault(masks.read_size(path), path)
  if len(sizes) > 1:
    first, other, *_ = (f'{path} is {w}x{h}' for (h, w), path in sizes.items())
    raise InputError(f'--video: {first}, {other}; frames must have one size.')
  return next(iter(sizes), None)


def write_ids(path, ids, palette):
  """Palette PNG whose pixels are exactly `ids`, uint8 [h, w]."""
  # With fewer colors Pillow packs pixels into 1, 2 or 4 bits.
  colors = np.zeros((256, 3), np.uint8)
  colors[: len(palette)] = palette
  file = Image.fromarray(ids)
  file.putpalette(colors.tobytes())
  file.save(path)


def _write(files, image, ids, confidence, palette):
  """Returns the overlay, uint8 [h, w, 3]."""
  write_ids(files['ids'], ids, palette)
  colors = Image.fromarray(palette[ids])
  colors.save(files['colour'], compress_level=1)
  overlay = Image.blend(Image.fromarray(image), colors, 0.5)
  overlay.save(files['overlay'], quality=90)
  if 'confidence' in files:
    Image.fromarray(confidence).save(files['confidence'], compress_level=1)
  return np.asarray(overlay)


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
  """Segments files into a folder; returns the number of images.

  Args:
    checkpoint: folder of a stage.
    pattern: an image, a folder or a glob.
    output: folder, made if absent; predict.py says what is in it.
    overwrite: replace files that exist.
    confidence: write it as well.
    video: file for the overlays of all images, see video.py, or None.
    fps: its frames a second.
    **options: see `Predictor`.

  Raises:
    InputError: before any work if it could not be done as a whole; after it
      if single files were not readable or too large, and were skipped.
  """
  paths, output = find_images(pattern), pathlib.Path(output)
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
    """Share of each class and the overlay, or (None, why it was skipped)."""
    try:
      image = sources.read_image(path)
      h, w = image.shape[:2]
      if max(h, w) > _LONGEST:
        return None, f'{path}: {w}x{h}, a side is longer than {_LONGEST}.'
      if size and (h, w) != size:
        return None, f'{path}: {w}x{h}, and its header said another size.'
      with device:
        ids, probability = predictor(image)
    except (InputError, OSError) as error:
      return None, str(error)
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

  results = grain.MapDataset.source(paths).map(work).to_iter_dataset(_READING)
  results = progress(len(paths), iterable=results)
  rows, add_frame = [], None
  with contextlib.ExitStack() as stack:
    if size:
      video.parent.mkdir(parents=True, exist_ok=True)
      add_frame = stack.enter_context(videos.writer(video, size, fps))
    for path, (shares, found) in zip(paths, results, strict=True):
      if shares is None:
        results.write(f'skipped {found}', file=sys.stderr)
        continue
      rows.append([path.name, *(f'{share:.6f}' for share in shares)])
      if add_frame:
        add_frame(found)
  text = io.StringIO(newline='')
  csv.writer(text).writerows([['image', *predictor.class_names], *rows])
  with run_paths.replacing(table) as file:
    # Names of files are bytes, and not always text.
    file.write(text.getvalue().encode(errors='surrogateescape'))
  if len(rows) < len(paths):
    places = f'{output} and {video}' if video and rows else output
    raise InputError(
      f'{len(paths) - len(rows)} of {len(paths)} images were skipped, see '
      f'above; the others are in {places}.'
    )
  return len(paths)
