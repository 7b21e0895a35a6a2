# SPDX-License-Identifier: Apache-2.0
r"""Reads every pair of a data set, before a training run meets the broken one.

  python -m attnfd_jax.check_data --config=configs/folder.py \
    --config.data.root=PATH [--contact_sheet=sheet.png] [--output=found.json]

Tells what is wrong by kind with file names, how often the classes occur, and
weights against imbalance. Exit code 0 if the data can be used, 2 if not;
images in two splits and classes that train never shows are only warnings.
"""

import pathlib
import sys

from absl import flags
import cv2
from ml_collections import config_flags

from attnfd_jax import cli
from attnfd_jax.config import resolve
from attnfd_jax.data import checking
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.errors import InputError
from attnfd_jax.reporting import contact_sheet
from attnfd_jax.runs import logs


def _output(flag, ending):
  """The path of a flag, known to be writable before the long part."""
  if not flags.FLAGS[flag].value:
    return None
  path = pathlib.Path(flags.FLAGS[flag].value)
  if path.suffix.lower() != ending or path.is_dir():
    raise InputError(f'--{flag}={path}: name a {ending} file.')
  path.parent.mkdir(parents=True, exist_ok=True)
  return path


def main(argv):
  del argv
  sheet, output = _output('contact_sheet', '.png'), _output('output', '.json')
  config, threads = resolve(flags.FLAGS.config), flags.FLAGS.threads
  threads = config.data.threads if threads is None else threads
  if threads < 1:
    raise InputError(f'--threads={threads} must be positive.')
  with config.unlocked():
    config.data.cache = False  # Each pair is read once; memory stays small.
  # What OpenCV would write about broken files is in the report.
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
  dataset = load_dataset(config.data, strict=False)
  if limit := config.data.limit:
    text = 'only the first pairs of each split are read.'
    print(f'config.data.limit={limit}: {text}')
  required = [x for x in ('train', 'val', config.eval.test_split) if x]
  report, problems = checking.check(dataset, threads, required=required)
  if output:
    logs.write_json(output, report)
  if sheet:
    contact_sheet.draw_sheet(dataset, problems).save(sheet)
  print(checking.as_text(report))
  if not report['usable']:
    sys.exit(2)


if __name__ == '__main__':
  # Defined here, so that the verbs can be imported together.
  config_flags.DEFINE_config_file(
    'config', None, 'configs/NAME.py or configs/NAME.py:VARIANT.'
  )
  flags.DEFINE_string('contact_sheet', None, 'PNG with examples, to write.')
  flags.DEFINE_string('output', None, 'JSON file with all that was found.')
  flags.DEFINE_integer('threads', None, 'As config.data.threads by default.')
  flags.mark_flag_as_required('config')
  cli.run(main)
