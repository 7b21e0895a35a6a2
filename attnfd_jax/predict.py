# SPDX-License-Identifier: Apache-2.0
r"""Segments images of any size with a trained network.

  python -m attnfd_jax.predict --checkpoint=runs/camvid/distill \
    --input=IMAGE_OR_FOLDER_OR_'GLOB' --output=DIR [--overwrite] \
    [--tile=512x1024 --overlap=0.25] [--video=OVERLAYS.mp4 --fps=25]

In place of --checkpoint: --model=student.onnx, a file of export, or
--config=FILE, the teacher that the config gives.
Writes for every image:
  STEM.png             class ids in 8 bits with the palette of the data set
  STEM_colour.png      the same in colors
  STEM_overlay.jpg     the colors over the image
  STEM_confidence.png  with --confidence: probability of the id, 255 is 1
and areas.csv, the share of each class in each image. --min_confidence=0.9 makes
pixels of a lower probability 255, which training ignores; --masks_only writes
STEM.png alone: pseudo-labels, masks as configs/folder.py reads them.

Folders are searched with those below them, and results keep their paths in
them. --tile is for images larger than memory; --video writes the overlays as
one file, too. Images are taken as they are stored, without the rotation that a
camera may note beside them, seen by the network at the scale at which its stage
was scored, and in the order of the numbers in their names.
"""

from absl import flags

from attnfd_jax import cli
from attnfd_jax.config import resolve
from attnfd_jax.errors import InputError
from attnfd_jax.inference import image_files, options
from attnfd_jax.teachers.sources import load_given


def main():
  given = cli.own_flags() | options.read(flags.FLAGS)
  del given['model']
  given['checkpoint'] = options.checkpoint(
    flags.FLAGS, load_teacher=lambda: load_given(resolve(flags.FLAGS.config))
  )
  if given['fps'] is None:
    given['fps'] = 25.0
  elif not given['video']:
    raise InputError('--fps is of a video; add --video=FILE.mp4.')
  count, kept = image_files.predict_files(pattern=given.pop('input'), **given)
  print(f'{count} images: {given["output"]}')
  if least := given['min_confidence']:
    print(f'{100 * kept:.1f} % of the pixels have a confidence of {least:g}')
  if given['video']:
    print(f'their overlays: {given["video"]}')


if __name__ == '__main__':
  options.define()
  cli.define_config()
  flags.DEFINE_string('input', None, "Image, folder, or 'pattern' in quotes.")
  flags.DEFINE_string('output', None, 'Folder for the results.')
  flags.DEFINE_bool('overwrite', False, 'Replace files that exist.')
  flags.DEFINE_bool('confidence', False, 'Write the probabilities, too.')
  flags.DEFINE_float('min_confidence', 0.0, 'Pixels below it become 255.')
  flags.DEFINE_bool('masks_only', False, 'Write the class ids alone.')
  flags.DEFINE_string('video', None, 'File for the overlays, .mp4 or .avi.')
  flags.DEFINE_float('fps', None, 'Frames a second of it; 25 by default.')
  cli.run(main, required=['checkpoint|model|config', 'input', 'output'])
