# SPDX-License-Identifier: Apache-2.0
"""A comparison by one job of two processes: one table, written by the first."""

import json
import pathlib

import job
import pytest

SCRIPT = pathlib.Path(__file__).with_name('process_compare.py')


@pytest.mark.slow
def test_two_processes_are_one_comparison(tmp_path):
  arguments = [f'--workdir={tmp_path / "c"}', '--equal=seconds']
  # The second fails in all processes.
  workers = job.start(SCRIPT, '--methods=kd,ofd', *arguments)
  printed = job.output_of(workers)
  assert '| KD | 0 |' in printed[0] and '[compare]' not in printed[1]
  found = json.loads((tmp_path / 'c' / 'compare.json').read_text())
  kd, ofd = found['rows']
  assert kd['val']['n'] == 1 and kd['equal'] == 'seconds'
  assert 'has no map' in ofd['failed']
