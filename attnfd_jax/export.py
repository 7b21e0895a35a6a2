# SPDX-License-Identifier: Apache-2.0
r"""Writes a trained network for other programs, and proves that it agrees.

  python -m attnfd_jax.export --checkpoint=runs/camvid/distill \
    --format=stablehlo|onnx|safetensors|pth --output=FILE [--overwrite] \
    [--uint8] [--argmax] [--weights=float32|bfloat16|int8] [--images=FOLDER] \
    [--num_images=8]
  python -m attnfd_jax.export --checkpoint=runs/camvid/distill --format=onnx \
    --output=FILE --quantize=int8 [--calibrate=IMAGES] [--max_drop=0.01] \
    [--calibration=minmax|entropy|percentile] [--keep_float=NAME,...]
  python -m attnfd_jax.export --checkpoint=runs/camvid/distill \
    --format=folder --output=DIR [--images=FOLDER] [--num_images=8]

Only the network is written: no teacher, no connectors, no optimiser. The file
is then run by a fresh process on real images, and has its name only if it
finds the classes that the network finds. --uint8 puts the normalisation into
the file, --argmax the choice of the class, --weights stores them in fewer bits.
--quantize=int8 also computes in int8. The ranges of its maps come from images,
by default of the train split; the file is scored on val beside the one in
float, and has its name only if mIoU drops by at most --max_drop.
--format=folder is a folder to hand over: weights, config, an ONNX file of RGB
bytes, a model card and pictures; attnfd_jax.load and --checkpoint read it.
"""

from absl import flags
import jax

from attnfd_jax import cli
from attnfd_jax.errors import one_of
from attnfd_jax.exporting import agreement, folder, stablehlo, student

FORMATS = (*student.FORMATS, folder.FORMAT)


def main():
  # Neither the program nor the comparison may depend on the machine.
  jax.config.update('jax_platforms', 'cpu')
  given = cli.own_flags()
  one_of('--format', kind := given.pop('format'), FORMATS)
  if kind == folder.FORMAT:
    lines = folder.export_folder(**folder.options_of(given))
  else:
    lines = student.export_student(kind=kind, **given)
  print('\n'.join(lines))


if __name__ == '__main__':
  weights = ', '.join(stablehlo.WEIGHTS)
  flags.DEFINE_string('checkpoint', None, 'Folder of a stage.')
  flags.DEFINE_string('format', 'stablehlo', ', '.join(FORMATS))
  flags.DEFINE_string('output', None, 'File to write; a new folder of folder.')
  flags.DEFINE_bool('overwrite', False, 'Replace a file that exists.')
  flags.DEFINE_bool('uint8', False, 'Images are RGB bytes, normalised inside.')
  flags.DEFINE_bool('argmax', False, 'Class ids in place of logits.')
  flags.DEFINE_string('weights', 'float32', weights)
  flags.DEFINE_string('images', None, "To compare on: folder or 'pattern'.")
  most = agreement.NUM_IMAGES
  flags.DEFINE_integer('num_images', most, 'How many of them, at most.', 1)
  flags.DEFINE_string('quantize', None, 'int8: compute in it; ONNX only.')
  text = "To calibrate on: folder or 'pattern'; the train split by default."
  flags.DEFINE_string('calibrate', None, text)
  text = 'minmax (default), entropy or percentile.'
  flags.DEFINE_string('calibration', None, text)
  text = 'Layers that stay in float, between commas.'
  flags.DEFINE_list('keep_float', None, text)
  text = 'Most that val mIoU may drop; 0.01 by default.'
  flags.DEFINE_float('max_drop', None, text)
  flags.DEFINE_bool('allow_code', False, 'Run Python files of the folder.')
  cli.run(main)
