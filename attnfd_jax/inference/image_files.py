# SPDX-License-Identifier: Apache-2.0
"""Segments image files into a folder of class ids, pictures and areas."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
import contextlib
import csv
import glob
import os
import pathlib
import re
import threading
from typing import Any

import grain
import jax
import numpy as np
from PIL import Image

from attnfd_jax import paths as run_paths
from attnfd_jax.data import files, masks, sources
from attnfd_jax.data.records import Size
from attnfd_jax.devices import diagnosis
from attnfd_jax.errors import check_range, InputError
from attnfd_jax.inference import video as videos
from attnfd_jax.inference.predictor import Predictor
from attnfd_jax.losses import IGNORE_LABEL
from attnfd_jax.progress import progress, write
from attnfd_jax.runs import loading, logs
from attnfd_jax.types import StrPath

# Class ids, the same in colors, colors over the image, and confidence.
_RESULTS = ('.png', '_color.png', '_overlay.jpg', '_confidence.png')
# Small, because the results in the buffer hold frames of full size.
_READING = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
_LONGEST = 65500  # Limit of a side in libjpeg, which writes the overlay.


def _natural(path: pathlib.Path) -> tuple[list, pathlib.Path]:
  """Sort key with frame_2 before frame_10; ties are broken by the path."""
  parts = [re.split(r'(\d+)', part) for part in path.parts]
  for part in parts:
    part[1::2] = map(int, part[1::2])
  return parts, path


def _is_file(path: pathlib.Path) -> bool:
  """True also for broken links: reading them reports the error."""
  return path.is_file() or (path.is_symlink() and not path.exists())


def find_images(
  pattern: StrPath, option: str = '--input', *, output: StrPath | None = None
) -> dict[pathlib.Path, pathlib.Path]:
  """Finds images as {name: path}, sorted by the numbers in their names.

  Names are relative to the folder, or to the folder where the glob begins.
  Files of a folder that are no images are counted in a line on the screen.

  Args:
    pattern: an image, a folder, which is searched recursively, or a glob.
    option: the flag to name in errors.
    output: folder whose files are not used as inputs, if it is below the
      folder that is searched.

  Raises:
    InputError: if there are no images.
  """
  root, others = pathlib.Path(pattern), []
  if root.is_dir():
    names, others = files.walk(root)
    problem = f'no {", ".join(files.IMAGE_ENDINGS)} files in it'
  elif root.is_file():
    root, names = root.parent, [root.name]
    problem = 'the file is in the output folder'
  else:
    # Existing folders may have brackets in their names.
    root = next(x for x in root.parents if x.is_dir())
    below = pathlib.Path(pattern).relative_to(root)
    if '..' in below.parts:  # Results would be outside of the output folder.
      raise InputError(f'{option}={pattern}: write it without ..')
    names = glob.glob(str(below), root_dir=root, recursive=True)
    problem = 'no such file, and nothing matches it as a pattern'
    if '[' in str(below):
      problem += '; write [[] for a bracket'
  searched, results = (
    os.path.join(os.path.realpath(x), '') for x in (root, output or root)
  )

  def is_input(name):
    # All are, if the output is the searched folder or above it.
    path = os.path.realpath(root / name)
    return searched.startswith(results) or not path.startswith(results)

  names, others = filter(is_input, names), [*filter(is_input, others)]
  images = {pathlib.Path(x): root / x for x in names if _is_file(root / x)}
  shown = ', '.join(others[:3]) + ', ...' * (len(others) > 3)
  left_out = f'{logs.count_text(len(others), "file")} of other types: {shown}'
  left_out *= bool(others)
  if not images:
    raise InputError(
      f'{option}={pattern}: {problem}{left_out and ", "}{left_out}.'
    )
  if left_out:
    print(f'{pattern}: left out {left_out}', flush=True)
  return {x: images[x] for x in sorted(images, key=_natural)}


def check_outputs(
  results: Mapping[pathlib.Path, Iterable[pathlib.Path]],
  others: Iterable[pathlib.Path],
  *,
  overwrite: bool,
) -> None:
  """Raises InputError if files to be written would replace others.

  Args:
    results: {input: files to be written for it}.
    others: further files to be written.
    overwrite: allow to replace existing files, but never an input or another
      result.
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


def frame_size(paths: Iterable[pathlib.Path]) -> Size | None:
  """(height, width) of all frames, by their headers; None if all are damaged.

  Raises:
    InputError: if the sizes differ.
  """
  sizes = {}
  for path in paths:
    with contextlib.suppress(InputError, OSError):  # Skipped later.
      sizes.setdefault(masks.read_size(path), path)
  if len(sizes) > 1:
    first, other, *_ = (f'{path} is {w}x{h}' for (h, w), path in sizes.items())
    raise InputError(f'--video: {first}, {other}; frames must have one size.')
  return next(iter(sizes), None)


def write_ids(path: StrPath, ids: np.ndarray, palette: np.ndarray) -> None:
  """Writes a palette PNG whose pixel values are `ids`, uint8 [h, w]."""
  file = Image.fromarray(ids)
  # With fewer colors Pillow would pack pixels into 1, 2 or 4 bits.
  file.putpalette(np.pad(palette, ((0, 256 - len(palette)), (0, 0))).tobytes())
  file.save(path)


def _write(
  targets: Sequence[pathlib.Path],
  image: np.ndarray,
  ids: np.ndarray,
  confidence: np.ndarray,
  palette: np.ndarray,
) -> np.ndarray | None:
  """Writes the first of _RESULTS to `targets`; returns the overlay, if any."""
  ids_path, *others = targets
  write_ids(ids_path, ids, palette)
  if not others:
    return None
  color_path, overlay_path, *confidence_paths = others
  # Ids without a class are black.
  palette = np.pad(palette, ((0, 256 - len(palette)), (0, 0)))
  colors = Image.fromarray(palette[ids])
  colors.save(color_path, compress_level=1)
  overlay = Image.blend(Image.fromarray(image), colors, 0.5)
  overlay.save(overlay_path, quality=90)
  for path in confidence_paths:
    Image.fromarray(confidence).save(path, compress_level=1)
  return np.asarray(overlay)


def _write_areas(output: pathlib.Path, rows: Iterable[Sequence[str]]) -> None:
  with run_paths.replacing(output / 'areas.csv') as file:
    # File names are bytes, not always valid text.
    text = codecs.getwriter('utf-8')(file, 'surrogateescape')
    csv.writer(text).writerows(rows)


def predict_files(
  checkpoint: StrPath | loading.Loaded,
  pattern: StrPath,
  output: StrPath,
  *,
  overwrite: bool = False,
  confidence: bool = False,
  min_confidence: float = 0.0,
  masks_only: bool = False,
  video: StrPath | None = None,
  fps: float = 25.0,
  **options: Any,
) -> tuple[int, float]:
  """Segments image files into a folder, as described in predict.py.

  Args:
    checkpoint: as of Predictor.
    pattern: see find_images.
    output: folder for the results.
    overwrite: replace existing files.
    confidence: write the confidence as well.
    min_confidence: pixels with a lower probability become 255, in [0, 1].
    masks_only: write the class ids only.
    video: file for the overlays.
    fps: its frames per second.
    **options: of Predictor.

  Returns:
    the number of images, and the fraction of their pixels with a confidence of
    at least `min_confidence`, averaged over the images.

  Raises:
    InputError: before any work, if the results cannot be written; at the end,
      if some images were unreadable or too large, and were skipped.
  """
  output = pathlib.Path(output)
  if output.exists() and not output.is_dir():
    raise InputError(f'--output={output} is a file; name a folder.')
  images = find_images(pattern, output=output)
  check_range('--min_confidence', min_confidence, 0, 1)
  for flag, value in (('--confidence', confidence), ('--video', video)):
    if masks_only and value:
      raise InputError(
        f'{flag} writes more than masks; leave out --masks_only.'
      )
  endings = _RESULTS[:1] if masks_only else _RESULTS[: 3 + confidence]
  targets, skipped = {}, []
  for name, path in images.items():
    results = [name.with_name(f'{name.stem}{end}') for end in endings]
    longest = max(len(os.fsencode(x.name)) for x in results)
    if longest > run_paths.LONGEST_NAME:
      problem = f'names of more than {run_paths.LONGEST_NAME} bytes'
      skipped.append(f'{path}: its results would have {problem}; rename it.')
    else:
      targets[path] = [output / x for x in results]
  names, paths = {path: name for name, path in images.items()}, [*targets]
  others, size = [output / 'areas.csv'] * (not masks_only), None
  video = pathlib.Path(video) if video else None
  if video:
    videos.check(video, fps)
    others, size = [*others, video], frame_size(paths)
  check_outputs(targets, others, overwrite=overwrite)
  diagnosis.require_writable(output, '--output')
  predictor = Predictor(checkpoint, **options)
  if (confidence or min_confidence) and not predictor.has_confidence:
    flag = '--confidence' if confidence else '--min_confidence'
    remedy = 'export it again without --argmax'
    raise InputError(f'{flag}: the file returns class ids only; {remedy}.')
  for folder in {
    output,
    *(x.parent for results in targets.values() for x in results),
  }:
    folder.mkdir(parents=True, exist_ok=True)
  count = logs.count_text(len(images), 'image')
  print(f'{predictor.description}, on {count}; writing to {output}')
  for text in skipped:
    write(f'skipped {text}')
  device = threading.Lock()  # The other threads read and write meanwhile.

  def work(path):
    """Area of each class and the overlay, or (None, why it was skipped)."""
    try:
      image = sources.read_image(path)
      h, w = image.shape[:2]
      if max(h, w) > _LONGEST:
        return None, f'{path}: {w}x{h}, a side is longer than {_LONGEST}.'
      if size and (h, w) != size:
        return None, f'{path}: {w}x{h}, which differs from its header.'
      try:
        with device:
          ids, certainty = predictor(image)
      except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
          raise
        problem = f'{path}: {w}x{h} needs more memory than the device has'
        return None, f'{problem}; use --tile, or a smaller image.'
    except (InputError, OSError) as error:
      return None, str(error)
    ids = np.where(certainty < 255 * min_confidence, IGNORE_LABEL, ids)
    ids = ids.astype(np.uint8)
    overlay = _write(targets[path], image, ids, certainty, predictor.palette)
    num_classes = len(predictor.class_names)
    counts = np.bincount(ids.ravel(), minlength=num_classes)[:num_classes]
    return counts / ids.size, overlay if size else None

  results = grain.MapDataset.source(paths).map(work).to_iter_dataset(_READING)
  results = progress(len(paths), iterable=results)
  rows, confident, frames = [], [], contextlib.nullcontext()
  if video and size:
    video.parent.mkdir(parents=True, exist_ok=True)
    frames = videos.writer(video, size, fps)
  try:
    with frames as add_frame:
      for path, (areas, result) in zip(paths, results, strict=True):
        if areas is None:
          write(f'skipped {result}')
          continue
        confident.append(areas.sum())
        areas = (f'{area:.6f}' for area in areas)
        rows.append([names[path].as_posix(), *areas])
        if add_frame:
          add_frame(result)
  finally:  # Also after an error or an interruption.
    if not masks_only:
      _write_areas(output, [['image', *predictor.class_names], *rows])
  if len(rows) < len(images):
    places = f'{output} and {video}' if video and rows else output
    problem = f'{len(images) - len(rows)} of {len(images)} images were skipped'
    raise InputError(f'{problem}, see above; the others are in {places}.')
  return len(images), float(np.mean(confident))
