# SPDX-License-Identifier: Apache-2.0
"""Writes the results of a finished stage: result.json and pictures.npz."""

from collections.abc import Sequence
import functools
import json
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnfd_jax import distill, paths
from attnfd_jax.data.pairs import UNLABELED
from attnfd_jax.data.records import Record
from attnfd_jax.devices import processes, sharding
from attnfd_jax.inference import evaluation
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import normalize
from attnfd_jax.pytorch import weights
from attnfd_jax.runs import loading, logs
from attnfd_jax.training.stage import Stage
from attnfd_jax.training.step import TrainState
from attnfd_jax.types import Config


def write(
  stage: Stage,
  state: TrainState,
  directory: epath.Path,
  *,
  step: int,
  log: logs.StageLog,
) -> dict[str, Any]:
  """Scores `state`, draws pictures and writes both; returns the result.

  Args:
    stage: the finished stage.
    state: of its best checkpoint.
    directory: folder of the stage.
    step: of the checkpoint.
    log: of the stage, for training times.
  """
  config, variables = stage.config, state.variables('student')
  options, source = config.eval, stage.dataset.splits['val']
  records = evaluation.chosen_records(
    source, options.num_pictures, short_side=options.short_side
  )
  image_size = config.data.crop_size
  if records:
    image_size = records[0]['label'].shape
    pictures = make_pictures(stage, state, records)
    if processes.is_first():
      with paths.replacing(directory / 'pictures.npz') as file:
        # None of the names is an option of the function.
        np.savez_compressed(file, **pictures)  # pyright: ignore[reportArgumentType]
  result = stage.evaluate(variables)
  if options.test_split:
    result['test'] = stage.evaluate(variables, options.test_split)
  result |= {
    'stage': stage.name,
    'dataset': stage.dataset.name,
    'split': 'val',
    'protocol': options.protocol,
    'recipe': config.recipe,
    'step': step,
    'seed': config.seed,
    'labeled_images': len(stage.dataset.splits['train']),
    'unlabeled_images': len(stage.dataset.splits.get(UNLABELED, ())),
    'network': networks.describe(stage.options),
    'pretrained': _first_weights(stage.options),
    'params': optax.tree.size(variables.get('params', {})),
    'gflops': networks.count_gflops(stage.network, *image_size),
    'image_size': list(image_size),
    'dtype': config.optim.dtype,
    'train_seconds': log.train_seconds(),
    'step_seconds': log.last('train', 'step_seconds'),
    'device': logs.device_name(),
    'versions': logs.versions(),
  }
  teacher, distiller = stage.teacher, stage.distiller
  if teacher is not None and distiller is not None:
    method = config.distill.method
    result['teacher'] = {
      'name': teacher.name,
      'miou': stage.teacher_miou,
      'source': getattr(teacher, 'source', config.teacher.factory),
    }
    if fingerprint := getattr(teacher, 'fingerprint', ''):
      result['teacher']['sha256'] = fingerprint
    # As they are used: the config may ask for what this teacher lacks.
    used = json.dumps(distiller.options(), default=str)
    result['method'] = {
      'name': method,
      'title': distill.title(method),
      'options': json.loads(used),
      'pictures': distiller.pictures_note,
    }
    trained = sharding.to_host(state.variables('distiller'))
    gates = distiller.student_attention_variables(trained)
    if gates and processes.is_first():
      loading.write_attention(directory, gates)
  result = logs.without_nan(result)
  logs.write_json(directory / 'result.json', result)
  return result


def _first_weights(options: Config) -> Any:
  """Origin of the pretrained weights: a path, facts on a download, or None."""
  if options.pretrained == weights.NAME:
    return weights.facts(options.backbone)
  return options.pretrained or None


def make_pictures(
  stage: Stage, state: TrainState, records: Sequence[Record]
) -> dict[str, np.ndarray]:
  """Arrays for the report: image, label, prediction, palette and maps.

  The maps of the method are 'map_<role>_<name>': float16 [n, h, w], from 0 to
  1.

  Args:
    stage: the finished stage.
    state: of its best checkpoint.
    records: images with their labels, all of the same size.
  """
  image = np.stack([record['image'] for record in records])
  student = sharding.to_host(state.variables('student'))
  forward = functools.partial(stage.network.apply, train=False)

  @jax.jit
  def predict(variables, image):
    logits = forward(variables, normalize(image))['logits']
    return jnp.argmax(logits, -1).astype(jnp.uint8)

  pictures = {
    'image': image,
    'label': np.stack([record['label'] for record in records]),
    'prediction': np.asarray(predict(student, image)),
    'palette': stage.dataset.palette,
  }
  teacher, distiller = stage.teacher, stage.distiller
  if teacher is None or distiller is None or not distiller.pictures_note:
    return pictures

  @jax.jit
  def draw(student_variables, teacher_variables, variables, image):
    image = normalize(image)
    outputs = (
      forward(student_variables, image),
      teacher.apply(teacher_variables, image),
    )
    return distiller.apply(variables, *outputs, train=False, method='pictures')

  others = teacher.variables, state.variables('distiller')
  drawn = draw(student, *sharding.to_host(others), image)
  for role, maps in drawn.items():
    for name, x in maps.items():
      x = np.asarray(x, np.float32)
      x = x - np.min(x, axis=(1, 2), keepdims=True)
      x = x / np.maximum(np.max(x, axis=(1, 2), keepdims=True), 1e-12)
      pictures[f'map_{role}_{name}'] = x.astype(np.float16)
  return pictures
