# SPDX-License-Identifier: Apache-2.0
r"""Converts PyTorch checkpoints to stage folders and back, without torch.

  python -m attnfd_jax.convert --source=teacher.pth.tar --target=runs/teacher \
    [--backbone=resnet101 --num_classes=21] [--class_names=road,car,...]
  python -m attnfd_jax.convert --source=runs/camvid/distill --target=a.pth

evaluate, predict and export read the folder, and teacher.checkpoint can name
it. If --source is a folder, --target ends in .pth, .pth.tar or .safetensors.
"""

import json

from absl import flags

from attnfd_jax import cli
from attnfd_jax.config import default_config, resolve
from attnfd_jax.runs import conversion


def main() -> None:
  """Converts and prints what was written."""
  config = json.loads(resolve(default_config()).to_json_best_effort())
  print('\n'.join(conversion.convert(config=config, **cli.own_flags())))


if __name__ == '__main__':
  flags.DEFINE_string('source', None, 'PyTorch file or folder of a stage.')
  flags.DEFINE_string('target', None, 'New folder or file.')
  flags.DEFINE_string('backbone', None, 'Default: as in the file.')
  flags.DEFINE_integer('num_classes', None, 'Default: as in the file.')
  flags.DEFINE_list('class_names', [], 'Class names in the order of ids.')
  flags.DEFINE_bool('in_path_attention', None, 'The network applies its CBAMs.')
  flags.DEFINE_bool(
    'allow_missing', False, 'Initialize missing weights at random.'
  )
  flags.DEFINE_bool('allow_code', False, 'Run the Python files in the folder.')
  cli.run(main)
