# SPDX-License-Identifier: Apache-2.0
r"""Exports a trained network and checks the result on real images.

  python -m attnfd_jax.export --checkpoint=runs/camvid/distill \
    --format=stablehlo|onnx|safetensors|pth --output=FILE [--overwrite] \
    [--uint8] [--argmax] [--weights=float32|bfloat16|int8] [--images=FOLDER] \
    [--num_images=8]
  python -m attnfd_jax.export --checkpoint=runs/camvid/distill --format=onnx \
    --output=FILE --quantize=int8 [--calibrate=IMAGES] [--max_drop=0.01] \
    [--calibration=minmax|entropy|percentile] [--keep_float=NAME,...]
  python -m attnfd_jax.export --checkpoint=runs/camvid/distill \
    --format=folder --output=DIR [--images=FOLDER] [--num_images=8]

Only the network is exported: no teacher, no connectors, no optimizer. A fresh
process then runs the file on real images, and the file is kept only if its
classes agree with the network's. --uint8 includes the normalization, --argmax
the choice of the class; --weights stores the weights in fewer bits.
--quantize=int8 also computes in int8. Activation ranges are calibrated on
images, by default of the train split; the file is evaluated on val beside the
float one and kept only if mIoU drops by at most --max_drop.
--format=folder writes a folder to hand over: weights, config, an ONNX file that
takes RGB bytes, a model card and pictures. attnfd_jax.load and --checkpoint
read it.
"""

from absl import flags
import jax

from attnfd_jax import cli
from attnfd_jax.errors import check_choice
from attnfd_jax.exporting import agreement, folder, stablehlo, student

FORMATS = (*student.FORMATS, folder.FORMAT)


def main() -> None:
  """Writes the file or folder and prints what was checked."""
  # Neither the exported program nor the check may depend on the machine.
  jax.config.update('jax_platforms', 'cpu')
  given = cli.own_flags()
  check_choice('--format', kind := given.pop('format'), FORMATS)
  if kind == folder.FORMAT:
    lines = folder.export_folder(**folder.options_of(given))
  else:
    lines = student.export_student(kind=kind, **given)
  print('\n'.join(lines))


if __name__ == '__main__':
  weights = ', '.join(stablehlo.WEIGHTS)
  flags.DEFINE_string('checkpoint', None, 'Folder of a stage.')
  flags.DEFINE_string('format', 'stablehlo', ', '.join(FORMATS))
  flags.DEFINE_string(
    'output', None, 'File to write; with --format=folder, a new folder.'
  )
  flags.DEFINE_bool('overwrite', False, 'Replace a file that exists.')
  flags.DEFINE_bool(
    'uint8', False, 'The file takes RGB bytes and normalizes them.'
  )
  flags.DEFINE_bool(
    'argmax', False, 'The file returns class ids instead of logits.'
  )
  flags.DEFINE_string('weights', 'float32', weights)
  flags.DEFINE_string(
    'images', None, "Images to check on: folder or 'pattern'."
  )
  default = agreement.NUM_IMAGES
  flags.DEFINE_integer('num_images', default, 'Maximum number of images.', 1)
  flags.DEFINE_string('quantize', None, 'int8: compute in int8; ONNX only.')
  text = (
    "Images to calibrate on: folder or 'pattern'; default: the train split."
  )
  flags.DEFINE_string('calibrate', None, text)
  text = 'minmax (default), entropy or percentile.'
  flags.DEFINE_string('calibration', None, text)
  text = 'Comma-separated layers that stay in float.'
  flags.DEFINE_list('keep_float', None, text)
  text = 'Largest drop of val mIoU; default 0.01.'
  flags.DEFINE_float('max_drop', None, text)
  flags.DEFINE_bool('allow_code', False, 'Run the Python files in the folder.')
  cli.run(main)
