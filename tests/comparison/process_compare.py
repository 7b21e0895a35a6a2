# SPDX-License-Identifier: Apache-2.0
"""`compare` with the config and the networks of training/process_run.py."""

import runpy

from training.process_run import get_config as get_config

if __name__ == '__main__':
  runpy.run_module('attnfd_jax.compare', run_name='__main__')
