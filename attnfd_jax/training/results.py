# SPDX-License-Identifier: Apache-2.0
"""What a finished stage leaves for people: result.json and pictures.npz."""

import json
import math

import numpy as np

from attnfd_jax.devices import processes
from attnfd_jax.inference import evaluation
from attnfd_jax.models import network as networks
from attnfd_jax.runs import logs


def write(stage, state, directory, *, step):
  """Scores `state`, draws pictures, writes both; returns the result."""
  config, variables = stage.config, state.student_variables()
  records = evaluation.chosen_records(
    stage.dataset.splits['val'],
    config.eval.num_pictures,
    short_side=config.eval.short_side,
  )
  image_size = config.data.crop_size
  if records:
    image_size = records[0]['label'].shape
    pictures = _pictures(stage, state, records)
    if processes.is_first():
      with logs.replacing(directory / 'pictures.npz') as file:
        np.savez_compressed(file, **pictures)
  result = stage.evaluate(variables)
  if config.eval.test_split:
    result['test'] = stage.evaluate(variables, config.eval.test_split)
  result |= {
    'stage': stage.name,
    'dataset': stage.dataset.name,
    'split': 'val',
    'protocol': config.eval.protocol,
    'recipe': config.recipe,
    'step': step,
    'seed': config.seed,
    'network': networks.describe(stage.options),
    'params': networks.count_params(variables),
    'gflops': networks.count_gflops(stage.network, *image_size),
    'image_size': list(image_size),
    'dtype': config.optim.dtype,
    'train_seconds': _train_seconds(directory),
    'device': logs.device_name(),
    'versions': logs.versions(),
  }
  if stage.teacher:
    result |= {
      'method': config.distill.method,
      'teacher': stage.teacher.name,
      'teacher_miou': stage.teacher.miou,
      'attn_lambda': config.distill.attn_lambda,
      'teacher_attention': attention_of(stage.distiller),
    }
  result = _without_nan(result)
  logs.write_json(directory / 'result.json', result)
  return result


def attention_of(distiller):
  """The teacher's attention that AttnFD uses, or 'none'."""
  method = distiller.methods.get('attnfd')
  return method.teacher_attention if method else 'none'


def _pictures(stage, state, records):
  variables = state.student_variables()
  pictures = evaluation.make_pictures(
    stage.network, variables, records, stage.dataset.palette
  )
  if stage.distiller is None or 'attnfd' not in stage.distiller.methods:
    return pictures
  distiller = {
    'params': state.params['distiller'],
    **state.collections['distiller'],
  }
  return pictures | evaluation.attention_maps(
    stage.network,
    stage.teacher.network,
    stage.distiller,
    (variables, stage.teacher.variables, distiller),
    records,
  )


def _without_nan(value):
  """NaN is not JSON: null."""
  if isinstance(value, dict):
    return {key: _without_nan(item) for key, item in value.items()}
  if isinstance(value, float) and math.isnan(value):
    return None
  return value


def _train_seconds(directory):
  """Seconds of all steps, over restarts; no compilation, no evaluation."""
  total, last = 0.0, 0
  for line in (directory / 'metrics.jsonl').read_text().splitlines():
    record = json.loads(line)
    if record['kind'] == 'train':
      # The first step after a start has no time of its own.
      seconds = record.get('step_seconds', 0.0)
      total += seconds * (record['step'] - last)
      last = record['step']
  return total
