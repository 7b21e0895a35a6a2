# SPDX-License-Identifier: Apache-2.0
r"""Evaluates a trained network on a split of its data set.

  python -m attnfd_jax.evaluate --checkpoint=runs/camvid/distill \
    [--split=test] [--scales=0.75,1,1.25 --flip] [--output=scores.json] \
    [--tile=512x1024 --overlap=0.25] [--boundary] [--submission=DIR]

--checkpoint is the folder of a stage; its config.json names the data set.
Instead, --model=student.onnx evaluates an exported file (with --data_root where
the data set has moved), and --config=FILE the teacher of a config, which may be
a PyTorch module, on the config's data.
--tile is for images that do not fit into memory, --boundary adds boundary IoU,
--submission writes the files that the Cityscapes server expects.
"""

from absl import flags

from attnfd_jax import cli
from attnfd_jax.config import resolve
from attnfd_jax.inference import options, scoring
from attnfd_jax.runs import logs
from attnfd_jax.teachers.sources import load_given


def main() -> None:
  """Evaluates the network and prints its scores."""
  given = cli.own_flags() | options.read(flags.FLAGS)
  del given['output']
  output = cli.output_file('output')
  del given['model']
  given['checkpoint'] = options.checkpoint(
    flags.FLAGS, load_teacher=lambda: load_given(resolve(flags.FLAGS.config))
  )
  counts, result = scoring.evaluate_checkpoint(**given)
  print(scoring.as_text(counts, result))
  if output:
    logs.write_json(output, result)
    print(f'\nscores: {output}')
  if folder := given['submission']:
    print(f'\n{result["images"]} files for the server: {folder}')


if __name__ == '__main__':
  options.define()
  cli.define_config()
  flags.DEFINE_string(
    'data_root', None, 'Folder of the data set, if it has moved.'
  )
  flags.DEFINE_string('split', 'val', 'train, val or test.')
  flags.DEFINE_string(
    'protocol',
    None,
    'native (needed by --submission) or reference; default: as in its run.',
  )
  flags.DEFINE_bool('boundary', False, 'Also report boundary IoU.')
  flags.DEFINE_string('submission', None, 'Folder for the Cityscapes server.')
  flags.DEFINE_string('output', None, 'JSON file to write.')
  cli.run(main, required=['checkpoint|model|config'])
