# SPDX-License-Identifier: Apache-2.0
r"""Checks every image and mask of a data set before training.

  python -m attnfd_jax.check_data --config=configs/folder.py \
    --config.data.root=PATH [--contact_sheet=sheet.png] [--output=found.json]

Reports problems by kind with file names, the frequency of each class, and class
weights against imbalance. Exit code 0 if the data can be used, 2 if not. Images
in two splits and classes without training pixels are warnings; an image of val
or test among the unlabeled images is an error.
"""

import sys

from absl import flags
import cv2

from attnfd_jax import cli
from attnfd_jax.config import resolve
from attnfd_jax.data import checking
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.reporting import contact_sheet
from attnfd_jax.runs import logs


def main() -> None:
  """Checks the data set and exits with 2 if it cannot be used."""
  sheet = cli.output_file('contact_sheet', '.png')
  output = cli.output_file('output', '.json')
  config = resolve(flags.FLAGS.config)
  threads = flags.FLAGS.threads or config.data.threads
  config.data.cache = False  # Each pair is read only once.
  # OpenCV's warnings about broken files: the report has them.
  cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
  dataset = load_dataset(config.data, strict=False)
  if limit := config.data.limit:
    print(f'config.data.limit={limit}: only {limit} of each split are read.')
  for role in ('teacher', 'student'):
    if limit := config[role].labeled_limit:
      what = f'config.{role}.labeled_limit={limit} limits training only'
      print(f'{what}; all pairs are read here.')
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
  cli.define_config()
  flags.DEFINE_string('contact_sheet', None, 'PNG file with examples to write.')
  flags.DEFINE_string('output', None, 'JSON file with all problems to write.')
  flags.DEFINE_integer('threads', None, 'Default: config.data.threads.', 1)
  cli.run(main, required=['config'])
