# SPDX-License-Identifier: Apache-2.0
"""Runs of all stages with networks that compile fast, and their comparison."""

import contextlib
import json

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import tiny_run

from attnfd_jax.models import layers, resizing
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.runs import checkpoints

STAGES = ('teacher', 'student', 'distill')


class Small(DeepLabV3Plus):
  """Two convolutions with the same options, which compile fast."""

  @nn.compact
  def __call__(self, image, *, train, dropout=None):
    dropout = train if dropout is None else dropout
    channels = round(8 * self.width_multiplier)

    def block(name, x, strides):
      module = layers.ConvNorm(channels, strides=strides, name=name)
      return nn.relu(module(x, train=train))

    x = block('backbone', image, 8)
    x = resizing.resize(x, *(n // 4 for n in image.shape[1:3]))
    x = tap = block('decoder', x, 1)
    x = nn.Dropout(self.decoder_dropout)(x, deterministic=not dropout)
    coarse = layers.Conv(self.num_classes, 1, name='classifier')(x)
    logits = resizing.resize(coarse, *image.shape[1:3])
    return {
      'logits': logits,
      'coarse_logits': coarse,
      'features': {'decoder': tap},
    }


networks.NETWORKS['small'] = Small


def interrupting(function, call):
  """`function`, in whose `call`-th call, from 1, somebody presses Ctrl-C."""
  calls = []

  def interrupt(*arguments, **options):
    calls.append(arguments)
    if len(calls) == call:
      raise KeyboardInterrupt
    return function(*arguments, **options)

  return interrupt


@contextlib.contextmanager
def kept_programs(cache):
  """Programs are kept in the folder `cache`, however fast they compile."""
  names = {
    'jax_compilation_cache_dir': str(cache),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': 0,
  }
  before = {name: getattr(jax.config, name) for name in names}
  for name, value in names.items():
    jax.config.update(name, value)
  try:
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def make_config():
  """Two epochs of two steps in each stage, scored after every epoch."""
  config = tiny_run.tiny_config()
  config.stages = STAGES
  config.teacher.network = config.student.network = 'small'
  config.optim.name, config.optim.lr = 'sgd', 0.05
  config.num_epochs = config.teacher.num_epochs = 2.0
  config.eval.every_epochs = 1.0
  config.log_every_steps = 1
  config.eval.num_pictures = 1
  config.checkpoint.keep_best = 1
  # The phases and the average are part of what a checkpoint must bring back.
  config.distill.attnfd.connector_schedule = 'first_epoch'
  config.optim.ema_decay = 0.5
  config.teacher.in_path_attention = True
  # Alike, so that two stages share a program.
  config.teacher.width_multiplier = config.student.width_multiplier = 0.5
  return config


def read_lines(directory):
  text = (directory / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def untimed(records):
  """Without what the clock says."""
  clock = {'step_seconds', 'images_per_second', 'data_wait'}
  return [{k: v for k, v in r.items() if k not in clock} for r in records]


def read_result(directory):
  result = json.loads((directory / 'result.json').read_text())
  clock = ('train_seconds', 'step_seconds')
  return {k: v for k, v in result.items() if k not in clock}


def stored_states(directory):
  """Step -> leaves of the whole state, as they are on disk."""
  folder = directory / 'checkpoints'
  return {
    step: restore_numpy(folder / str(step) / 'state')
    for step in checkpoints.steps(folder)
  }


def restore_numpy(path):
  with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(path).item_metadata.tree
    restore_args = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata
    )
    args = ocp.args.PyTreeRestore(restore_args=restore_args)
    return checkpointer.restore(path, args=args)


def assert_same_run(ours, theirs):
  """Bit for bit: results, metrics, checkpoints with the optimizer."""
  assert read_result(ours) == read_result(theirs)
  assert untimed(read_lines(ours)) == untimed(read_lines(theirs))
  first, second = stored_states(ours), stored_states(theirs)
  assert set(first) == set(second)
  for step, state in first.items():
    assert_same_tree(state, second[step])
    assert len(jax.tree.leaves(state)) > 20


def assert_same_tree(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
