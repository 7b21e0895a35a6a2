# SPDX-License-Identifier: Apache-2.0
"""Folders of images in, folders of class ids and pictures out."""

import codecs
import contextlib
import csv
import glob
import os
import pathlib
import re
import threading

import grain
import jax
import numpy as np
from PIL import Image

from attnfd_jax import paths as run_paths
from attnfd_jax.data import files, masks, sources
from attnfd_jax.devices import diagnosis
from attnfd_jax.errors import InputError, within
from attnfd_jax.inference import video as videos
from attnfd_jax.inference.predictor import Predictor
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.progress import progress, write

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


def _is_file(path):
  """Also a link to nothing, which is said to be broken, and not left out."""
  return path.is_file() or (path.is_symlink() and not path.exists())


def find_images(pattern, option='--input', *, output=None):
  """{name: path} of an image, a folder with those below it, or a glob, in the
  order of their numbers; what is left out of a folder is printed.

  Names are relative to the folder, or to the folders that a glob begins with.
  What `output`, a folder below those, has is no input.
  """
  root, others = pathlib.Path(pattern), []
  if root.is_dir():
    names, others = files.walk(root)
    problem = f'no {", ".join(files.IMAGE_ENDINGS)} files in it'
  elif root.is_file():
    root, names = root.parent, [root.name]
  else:
    # A folder that is there may have brackets in its name.
    root = next(x for x in root.parents if x.is_dir())
    rest = pathlib.Path(pattern).relative_to(root)
    if '..' in rest.parts:  # Results would leave their folder.
      raise InputError(f'{option}={pattern}: write it without ..')
    names = glob.glob(str(rest), root_dir=root, recursive=True)
    problem = 'no such file, and nothing matches it as a pattern'
    if '[' in str(rest):
      problem += ', in which [[] is a bracket'
  searched, results = (
    os.path.join(os.path.realpath(x), '') for x in (root, output or root)
  )

  def is_input(name):
    path = os.path.realpath(root / name)
    return results == searched or not path.startswith(results)

  names, others = filter(is_input, names), [*filter(is_input, others)]
  found = {pathlib.Path(x): root / x for x in names if _is_file(root / x)}
  shown = ', '.join(others[:3]) + ', ...' * (len(others) > 3)
  left_out = f'{len(others)} of other endings: {shown}' * bool(others)
  if not found:
    raise InputError(
      f'{option}={pattern}: {problem}{left_out and ", "}{left_out}.'
    )
  if left_out:
    print(f'{pattern}: left out {left_out}', flush=True)
  return {x: found[x] for x in sorted(found, key=_natural)}


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
  """Returns the overlay, uint8 [h, w, 3]; confidence has a target if asked, and
  without any but the first there is no overlay.
  """
  plain, *others = targets
  write_ids(plain, ids, palette)
  if not others:
    return None
  colored, mixed, *certain = others
  # Of ids that are no class, black.
  palette = np.pad(palette, ((0, 256 - len(palette)), (0, 0)))
  colors = Image.fromarray(palette[ids])
  colors.save(colored, compress_level=1)
  overlay = Image.blend(Image.fromarray(image), colors, 0.5)
  overlay.save(mixed, quality=90)
  for path in certain:
    Image.fromarray(confidence).save(path, compress_level=1)
  return np.asarray(overlay)


def _write_areas(output, rows):
  with run_paths.replacing(output / 'areas.csv') as file:
    # Names of files are bytes, and not always text.
    text = codecs.getwriter('utf-8')(file, 'surrogateescape')
    csv.writer(text).writerows(rows)


def predict_files(
  checkpoint,
  pattern,
  output,
  *,
  overwrite=False,
  confidence=False,
  min_confidence=0.0,
  masks_only=False,
  video=None,
  fps=25.0,
  **options,
):
  """Segments files into a folder, see predict.py; returns their number and the
  share of the pixels that are at least of `min_confidence`, a mean over images.

  InputError before any work if it could not be done as a whole; after it, if
  single files were not readable or too large, and were skipped.
  """
  output = pathlib.Path(output)
  if output.exists() and not output.is_dir():
    raise InputError(f'--output={output} is a file; name a folder.')
  images = find_images(pattern, output=output)
  within('--min_confidence', min_confidence, 0, 1)
  for flag, given in (('--confidence', confidence), ('--video', video)):
    if masks_only and given:
      raise InputError(f'{flag} is more than masks; leave out --masks_only.')
  endings = _RESULTS[:1] if masks_only else _RESULTS[: 3 + confidence]
  targets, skipped = {}, []
  for name, path in images.items():
    results = [name.with_name(f'{name.stem}{end}') for end in endings]
    longest = max(len(os.fsencode(x.name)) for x in results)
    if longest > run_paths.LONGEST_NAME:
      what = f'names of more than {run_paths.LONGEST_NAME} bytes'
      skipped.append(f'{path}: its results would have {what}; rename it.')
    else:
      targets[path] = [output / x for x in results]
  names, paths = {path: name for name, path in images.items()}, [*targets]
  others, size = [output / 'areas.csv'] * (not masks_only), None
  if video:
    video = pathlib.Path(video)
    videos.check(video, fps)
    others, size = [*others, video], frame_size(paths)
  check_outputs(targets, others, overwrite=overwrite)
  diagnosis.require_writable(output, '--output')
  predictor = Predictor(checkpoint, **options)
  if (confidence or min_confidence) and not predictor.has_confidence:
    flag = '--confidence' if confidence else '--min_confidence'
    remedy = 'export it again without --argmax'
    raise InputError(f'{flag}: the file finds class ids alone; {remedy}.')
  for folder in {
    output,
    *(x.parent for results in targets.values() for x in results),
  }:
    folder.mkdir(parents=True, exist_ok=True)
  print(
    f'{predictor.description}, on {len(images)} images; writing to {output}'
  )
  for text in skipped:
    write(f'skipped {text}')
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
    ids, certain = found
    ids = np.where(certain < 255 * min_confidence, IGNORE_LABEL, ids)
    ids = ids.astype(np.uint8)
    overlay = _write(targets[path], image, ids, certain, predictor.palette)
    num_classes = len(predictor.class_names)
    counts = np.bincount(ids.ravel(), minlength=num_classes)[:num_classes]
    return counts / ids.size, overlay if size else None

  results = grain.MapDataset.source(paths).map(work).to_iter_dataset(_READING)
  results = progress(len(paths), iterable=results)
  rows, kept, frames = [], [], contextlib.nullcontext()
  if size:
    video.parent.mkdir(parents=True, exist_ok=True)
    frames = videos.writer(video, size, fps)
  try:
    with frames as add_frame:
      for path, (shares, found) in zip(paths, results, strict=True):
        if shares is None:
          write(f'skipped {found}')
          continue
        kept.append(shares.sum())
        shares = (f'{share:.6f}' for share in shares)
        rows.append([names[path].as_posix(), *shares])
        if add_frame:
          add_frame(found)
  finally:  # Of what there is, whatever stopped it.
    if not masks_only:
      _write_areas(output, [['image', *predictor.class_names], *rows])
  if len(rows) < len(images):
    places = f'{output} and {video}' if video and rows else output
    skipped = f'{len(images) - len(rows)} of {len(images)} images were skipped'
    raise InputError(f'{skipped}, see above; the others are in {places}.')
  return len(images), float(np.mean(kept))
