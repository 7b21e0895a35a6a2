# SPDX-License-Identifier: Apache-2.0
r"""PyTorch files into folders of ours, and back; torch is not needed.

  python -m attnfd_jax.convert --source=teacher.pth.tar --target=runs/teacher \
    [--backbone=resnet101 --num_classes=21] [--class_names=road,car,...]
  python -m attnfd_jax.convert --source=runs/camvid/distill --target=a.pth

The folder can be evaluated and predicted with, and be a teacher. --target ends
in .pth, .pth.tar or .safetensors when --source is a folder.
"""

import json

from absl import flags

from attnfd_jax import cli
from attnfd_jax.config import default_config, resolve
from attnfd_jax.runs import conversion


def main():
  config = json.loads(resolve(default_config()).to_json_best_effort())
  print('\n'.join(conversion.convert(config=config, **cli.own_flags())))


if __name__ == '__main__':
  flags.DEFINE_string('source', None, 'PyTorch file, or folder of a stage.')
  flags.DEFINE_string('target', None, 'Folder, or file; must not exist.')
  flags.DEFINE_string('backbone', None, 'As in the file by default.')
  flags.DEFINE_integer('num_classes', None, 'As in the file by default.')
  flags.DEFINE_list('class_names', [], 'Names in the order of ids.')
  flags.DEFINE_bool('in_path_attention', None, 'CBAMs are in the forward path.')
  flags.DEFINE_bool('allow_missing', False, 'Fill what is missing at random.')
  flags.DEFINE_bool('allow_code', False, 'Run Python files of the folder.')
  cli.run(main)
