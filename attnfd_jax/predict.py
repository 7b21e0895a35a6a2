# SPDX-License-Identifier: Apache-2.0
r"""Segments images of any size with a trained network.

  python -m attnfd_jax.predict --checkpoint=runs/camvid/distill \
    --input=IMAGE_OR_FOLDER_OR_'GLOB' --output=DIR [--overwrite] \
    [--tile=512x1024 --overlap=0.25] [--video=OVERLAYS.mp4 --fps=25]

Instead of --checkpoint: --model=student.onnx, an exported file, or
--config=FILE, the teacher of a config. Writes for every image:
  STEM.png             8-bit class ids with the palette of the data set
  STEM_color.png       the same in colors
  STEM_overlay.jpg     the colors over the image
  STEM_confidence.png  with --confidence: probability of the class, 255 is 1
and areas.csv, the fraction of each class in each image. --min_confidence=0.9
sets pixels of a lower probability to 255, which training ignores; --masks_only
writes only STEM.png: pseudo-labels, as masks that configs/folder.py reads.

Folders are searched recursively, and results keep their relative paths. --tile
is for images that do not fit into memory; --video also writes the overlays as a
video. Images are read as they are stored, without applying their EXIF rotation,
resized as in the evaluation of the checkpoint, in the numerical order of their
names.
"""

from absl import flags

from attnfd_jax import cli
from attnfd_jax.config import resolve
from attnfd_jax.errors import InputError
from attnfd_jax.inference import image_files, options
from attnfd_jax.teachers.sources import load_given


def main() -> None:
  """Segments the images and prints where the results are."""
  given = cli.own_flags() | options.read(flags.FLAGS)
  del given['model']
  given['checkpoint'] = options.checkpoint(
    flags.FLAGS, load_teacher=lambda: load_given(resolve(flags.FLAGS.config))
  )
  if given['fps'] is None:
    given['fps'] = 25.0
  elif not given['video']:
    raise InputError('--fps is for a video; add --video=FILE.mp4.')
  count, kept = image_files.predict_files(pattern=given.pop('input'), **given)
  print(f'{count} images: {given["output"]}')
  if least := given['min_confidence']:
    print(f'{100 * kept:.1f} % of the pixels have a confidence of {least:g}')
  if given['video']:
    print(f'video: {given["video"]}')


if __name__ == '__main__':
  options.define()
  cli.define_config()
  flags.DEFINE_string('input', None, "Image, folder, or 'pattern' in quotes.")
  flags.DEFINE_string('output', None, 'Folder for the results.')
  flags.DEFINE_bool('overwrite', False, 'Replace files that exist.')
  flags.DEFINE_bool('confidence', False, 'Also write the probabilities.')
  flags.DEFINE_float('min_confidence', 0.0, 'Pixels below it become 255.')
  flags.DEFINE_bool('masks_only', False, 'Only write the class ids.')
  flags.DEFINE_string('video', None, 'Video of the overlays, .mp4 or .avi.')
  flags.DEFINE_float('fps', None, 'Frames per second of the video; default 25.')
  cli.run(main, required=['checkpoint|model|config', 'input', 'output'])
