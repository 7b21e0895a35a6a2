# SPDX-License-Identifier: Apache-2.0
"""Folders of images in, folders of class ids and pictures out."""

import codecs
import contextlib
import csv
import glob
import os
import pathlib
import re
import sys
import threading

import grain
import jax
import numpy as np
from PIL import Image

from attnfd_jax import paths as run_paths
from attnfd_jax.data import files, masks, sources
from attnfd_jax.errors import InputError
from attnfd_jax.inference import video as videos
from attnfd_jax.inference.predictor import Predictor
from attnfd_jax.progress import progress

# What a folder is searched for; a file that is named may be anything.
ENDINGS = files.IMAGE_ENDINGS
# Of the class ids, in colors, over the image, and with `confidence`.
_RESULTS = ('.png', '_colour.png', '_overlay.jpg', '_confidence.png')
# Results hold whole frames: only so many are ahead of the one waited for.
_READING = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
_LONGEST = 65500  # Pixels of a side in libjpeg, which writes the overlay.


def _natural(path):
  """Sorts frame_2 before frame_10; paths of equal numbers as they are."""
  parts = [re.split(r'(\d+)', part) for part in path.parts]
  for part in parts:
    part[1::2] = map(int, part[1::2])
  return parts, path


def find_images(pattern, option='--input'):
  """Files of an image, folder or glob, in the order of their numbers."""
  if os.path.isdir(pattern):
    names = [file.path for file in files.walk(pattern).files.values()]
    problem = f'no {", ".join(ENDINGS)} files in it'
  else:
    exact = os.path.isfile(pattern)
    names = [pattern] if exact else glob.glob(pattern, recursive=True)
    problem = 'no such file, and nothing matches it as a pattern'
  found = {pathlib.Path(name) for name in names if os.path.isfile(name)}
  if not found:
    raise InputError(f'{option}={pattern}: {problem}.')
  return sorted(found, key=_natural)


def check_outputs(results, others, *, overwrite):
  """Raises InputError if what {input: paths} or `others` name would be written
  over each other, over an input, or over anything without `overwrite`.
  """
  writers = {}
  for path, targets in results.items():
    for target in targets:
      if (other := writers.setdefault(target, path)) is not path:
        both = f'{other} and {path} would both be written to {target.name}'
        raise InputError(f'{both}; rename one.')
  inputs = {path.resolve() for path in results}
  for target in (*writers, *others):
    if target.resolve() in inputs:
      raise InputError(f'{target} is an input; write elsewhere.')
    if target.exists() and not overwrite:
      raise InputError(f'{target} exists; add --overwrite or write elsewhere.')


def frame_size(paths):
  """(height, width) of all frames by their headers; None without a readable."""
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
  file = Image.fromarray(ids)
  # With fewer colors Pillow packs pixels into 1, 2 or 4 bits.
  file.putpalette(np.pad(palette, ((0, 256 - len(palette)), (0, 0))).tobytes())
  file.save(path)


def _write(targets, image, ids, confidence, palette):
  """Returns the overlay, uint8 [h, w, 3]; confidence has a target if asked."""
  plain, colored, mixed, *certain = targets
  write_ids(plain, ids, palette)
  colors = Image.fromarray(palette[ids])
  colors.save(colored, compress_level=1)
  overlay = Image.blend(Image.fromarray(image), colors, 0.5)
  overlay.save(mixed, quality=90)
  for path in certain:
    Image.fromarray(confidence).save(path, compress_level=1)
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
  """Segments files into a folder, see predict.py; returns their number.

  InputError before any work if it could not be done as a whole; after it, if
  single files were not readable or too large, and were skipped.
  """
  paths, output = find_images(pattern), pathlib.Path(output)
  if output.exists() and not output.is_dir():
    raise InputError(f'--output={output} is a file; name a folder.')
  others, size = [output / 'areas.csv'], None
  if video:
    video = pathlib.Path(video)
    videos.check(video, fps)
    others, size = [*others, video], frame_size(paths)
  endings = _RESULTS[: 3 + confidence]
  targets = {x: [output / f'{x.stem}{end}' for end in endings] for x in paths}
  check_outputs(targets, others, overwrite=overwrite)
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
        found = predictor(image)
    except (InputError, OSError) as error:
      return None, str(error)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      problem = f'{path}: {w}x{h} needs more memory than the device has'
      return None, f'{problem}; use --tile, or a smaller one.'
    overlay = _write(targets[path], image, *found, predictor.palette)
    ids = found[0].ravel()
    counts = np.bincount(ids, minlength=len(predictor.class_names))
    return counts / ids.size, overlay if size else None

  results = grain.MapDataset.source(paths).map(work).to_iter_dataset(_READING)
  results = progress(len(paths), iterable=results)
  rows, frames = [], contextlib.nullcontext()
  if size:
    video.parent.mkdir(parents=True, exist_ok=True)
    frames = videos.writer(video, size, fps)
  with frames as add_frame:
    for path, (shares, found) in zip(paths, results, strict=True):
      if shares is None:
        results.write(f'skipped {found}', file=sys.stderr)
        continue
      rows.append([path.name, *(f'{share:.6f}' for share in shares)])
      if add_frame:
        add_frame(found)
  with run_paths.replacing(output / 'areas.csv') as file:
    # Names of files are bytes, and not always text.
    text = codecs.getwriter('utf-8')(file, 'surrogateescape')
    csv.writer(text).writerows([['image', *predictor.class_names], *rows])
  if len(rows) < len(paths):
    places = f'{output} and {video}' if video and rows else output
    skipped = f'{len(paths) - len(rows)} of {len(paths)} images were skipped'
    raise InputError(f'{skipped}, see above; the others are in {places}.')
  return len(paths)
