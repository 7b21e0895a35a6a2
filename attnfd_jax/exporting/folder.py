# SPDX-License-Identifier: Apache-2.0
"""Exports a folder: weights, config, ONNX file, model card and pictures.

It has the layout of a repository on a model hub; `attnfd_jax.load` reads it.
"""

from collections.abc import Mapping
import os
import pathlib
import tempfile
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from attnfd_jax.errors import InputError
from attnfd_jax.exporting import agreement, student
from attnfd_jax.inference import predictor
from attnfd_jax.models import network as networks
from attnfd_jax.pytorch import names, weights
from attnfd_jax.runs import conversion, loading, logs
from attnfd_jax.types import StrPath

FORMAT = 'folder'
# Flags of export that apply to a folder.
_TAKES = ('checkpoint', 'output', 'images', 'num_images', 'allow_code')
_SEPARATOR = 4  # Pixels between two pictures.


def options_of(flags: Mapping[str, Any]) -> dict[str, Any]:
  """Arguments of `export_folder` from {flag: value}; InputError for others."""
  for name, value in flags.items():
    if name not in _TAKES and value not in (None, False, 'float32'):
      raise InputError(f'--{name} is not for --format={FORMAT}.')
  return {name: flags[name] for name in _TAKES}


def _check_target(output: StrPath | None) -> pathlib.Path:
  if not output:
    raise InputError('--output is missing; name a folder.')
  if os.path.lexists(output):
    raise InputError(f'--output={output} exists; name another folder.')
  return pathlib.Path(output)


def export_folder(
  checkpoint: StrPath | None,
  output: StrPath | None,
  *,
  allow_code: bool = False,
  **comparison: Any,
) -> list[str]:
  """Exports a stage's best checkpoint to a folder; returns lines to print.

  Args:
    checkpoint: folder of a stage of a DeepLabV3Plus.
    output: a new folder; after an error it does not exist.
    allow_code: see loading.load_network.
    **comparison: images and num_images of student.export_student, for the
      ONNX file.

  Raises:
    InputError: for errors that the user can fix.
  """
  target = _check_target(output)
  student.require_packages('onnx', needed_by=FORMAT)
  if not checkpoint:
    raise InputError('--checkpoint is missing; name the folder of a stage.')
  source = pathlib.Path(checkpoint)
  loaded = loading.load_network(source, allow_code=allow_code)
  network, variables, info = loaded
  if not networks.is_ours(network):
    raise InputError(
      f'{type(network).__name__}: --format=folder is for DeepLabV3Plus, as the '
      'folder would need its code; use --format=stablehlo or safetensors.'
    )
  result = logs.read_json(source / 'result.json')
  if not result:
    raise InputError(
      f'{source}: no result.json, so there are no scores for the card; finish '
      'training the stage, or use --format=onnx or safetensors.'
    )
  target.parent.mkdir(parents=True, exist_ok=True)
  hidden = f'.{target.name}.'
  with tempfile.TemporaryDirectory('', hidden, target.parent) as temporary:
    new = pathlib.Path(temporary, 'folder')
    new.mkdir()
    config = info | {'palette': info['palette'].tolist()}
    logs.write_json(new / 'config.json', conversion.without_places(config))
    # Without attention at the taps, which the forward path does not use.
    path = new / loading.WEIGHTS_FILE
    conversion.write_weights(path, None, network, variables, info)
    _, restored, _ = loading.load_network(new)
    agreement.require_equal(variables, names.flatten(restored))
    lines = student.export_student(
      source, str(new / 'student.onnx'), kind='onnx', uint8=True, **comparison
    )
    shown = _write_pictures(source / 'pictures.npz', new / 'pictures')
    card = make_card(info, result, _baseline(source, info), shown=shown)
    (new / 'README.md').write_text(card)
    new.rename(target)
  # Without the last line, which has the temporary path of the ONNX file.
  listed = ', '.join(sorted(path.name for path in target.iterdir()))
  remark = 'fill in license and limits in README.md before you publish it'
  return [*lines[:-1], f'{target}: {listed}', remark]


def _baseline(source: pathlib.Path, info: Mapping[str, Any]) -> float | None:
  """Val mIoU of the stage `student` of the same run, which has no teacher."""
  path = source.parent / 'student' / 'result.json'
  if info['stage'] != 'distill' or not path.is_file():
    return None
  return logs.read_json(path).get('miou')


def _write_pictures(source: pathlib.Path, target: pathlib.Path) -> bool:
  """Writes predictions.png: rows of images, labels and predictions.

  Returns False if the stage has no pictures.npz.
  """
  if not source.is_file():
    return False
  with np.load(source) as arrays:
    image, label, prediction, palette = (
      arrays[key] for key in ('image', 'label', 'prediction', 'palette')
    )
  colors = np.zeros((256, 3), np.uint8)  # Ignored pixels are black.
  colors[: len(palette)] = palette
  edge = ((0, 0), *[(_SEPARATOR // 2,) * 2] * 2, (0, 0))
  rows = [
    np.concatenate([*np.pad(row, edge, constant_values=255)], 1)
    for row in (image, colors[label], colors[prediction])
  ]
  target.mkdir()
  Image.fromarray(np.concatenate(rows)).save(target / 'predictions.png')
  return True


def _initial_weights(pretrained: dict[str, Any] | str | None) -> str:
  """Describes `pretrained` of a result.json; of a path, the file name."""
  if isinstance(pretrained, dict):
    return weights.describe(pretrained)
  return os.path.basename(pretrained or '')


def make_card(
  info: Mapping[str, Any],
  result: Mapping[str, Any],
  baseline: float | None = None,
  *,
  shown: bool = False,
) -> str:
  """The model card of a stage: Markdown, with a hub's fields at the top.

  Args:
    info: as of loading.load_network.
    result: the stage's result.json.
    baseline: mIoU of the same network trained on labels alone, if known.
    shown: whether there is pictures/predictions.png.
  """
  method = result.get('method') or {}
  teacher = result.get('teacher') or {}
  teacher_text = teacher.get('name', '')
  if teacher.get('miou') is not None:
    teacher_text += f' (val mIoU {logs.percent(teacher["miou"])} %)'
  labels = ''
  if count := result.get('labeled_images'):
    labels = f', {count} labeled images'
    if others := result.get('unlabeled_images'):
      labels += f' and {others} without labels'
  test = (result.get('test') or {}).get('miou')
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  return environment.get_template('card.md').render(
    network=result['network'],
    dataset=result['dataset'],
    class_names=info['class_names'],
    # In the order of their ids; JSON has them sorted by name.
    classes={
      name: logs.percent(result['iou_per_class'].get(name))
      for name in info['class_names']
    },
    params=f'{result["params"]:,}',
    gflops=f'{result["gflops"]:.3g}',
    size=' x '.join(map(str, result['image_size'])),
    method=method.get('title', ''),
    teacher=teacher_text,
    pretrained=_initial_weights(result.get('pretrained')),
    labels=labels,
    miou=logs.percent(result['miou']),
    pixel_accuracy=logs.percent(result['pixel_accuracy']),
    baseline=None if baseline is None else logs.percent(baseline),
    test=None if test is None else logs.percent(test),
    split=result['split'],
    protocol=result['protocol'],
    step=info['checkpoint_step'],
    seed=info['seed'],
    short_side=predictor.stage_short_side(info),
    version=logs.versions()['attnfd_jax'],
    onnx=True,
    shown=shown,
  )
