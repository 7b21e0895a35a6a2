# SPDX-License-Identifier: Apache-2.0
r"""What the teacher's classifier makes of the map that a student imitates.

  python -m attnfd_jax.main --config=experiments/methods/facade.py \
    --config.data.root=PATH --config.distill.method=fitnet \
    --config.distill.fitnet.taps="('decoder',)" --workdir=DIR
  python experiments/methods/borrowed_classifier.py DIR results/borrowed.json

FitNet's 1x1 convolution maps the student's last map to the teacher's. The
student's own classifier never sees the result; SimKD (arXiv 2203.14001) puts
the teacher's classifier, frozen, on it. Both are scored on val, with the cosine
of the two maps.
"""

import argparse
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import attnfd_jax
from attnfd_jax import metrics
from attnfd_jax.data.sources import load_dataset
from attnfd_jax.devices import sharding
from attnfd_jax.inference import evaluation
from attnfd_jax.models.resizing import resize
from attnfd_jax.runs import checkpoints, loading, logs


class Borrowed:
  """A student whose logits are those of the teacher's classifier."""

  def __init__(self, student, classifier):
    self._student, self._classifier = student, classifier

  def connected(self, variables, image):
    found = self._student.apply(variables['student'], image, train=False)
    return found['features']['decoder'] @ variables['connector'][0, 0]

  def apply(self, variables, image, *, train):
    del train
    coarse = self._classifier.apply(
      variables['classifier'], self.connected(variables, image)
    )
    logits = resize(coarse, *image.shape[1:3])
    return {'logits': logits, 'coarse_logits': coarse}


def connector_of(directory, channels):
  """The kernel [1, 1, c, c'] of fitnet's convolution in a stage's folder."""
  kernel = jax.ShapeDtypeStruct(
    (1, 1, *channels),
    jnp.float32,
    sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
  )
  tree = {'kernel': kernel}
  for name in ('conv', 'regressor_decoder', 'methods_fitnet', 'distiller'):
    tree = {name: tree}
  found, _ = checkpoints.restore(directory / 'checkpoints', {'params': tree})
  return jax.tree.leaves(found)[0]


def mean_cosine(borrowed, variables, teacher, source, info):
  """Mean over the pixels of 8 images of val."""
  side, values = info['eval']['short_side'], []
  for record in evaluation.chosen_records(source, 8, short_side=side):
    image = attnfd_jax.normalize(jnp.asarray(record['image'])[None])
    ours = borrowed.connected(variables, image)
    theirs = teacher[0].apply(teacher[1], image, train=False)
    theirs = theirs['features']['decoder']
    norms = jnp.linalg.norm(ours, axis=-1) * jnp.linalg.norm(theirs, axis=-1)
    values.append(
      jnp.mean(jnp.sum(ours * theirs, -1) / jnp.maximum(norms, 1e-9))
    )
  return float(np.mean(values))


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('run', type=pathlib.Path)
  parser.add_argument('output', type=pathlib.Path)
  options = parser.parse_args()
  student, ours, info = loading.load_network(options.run / 'distill')
  teacher, theirs, _ = loading.load_network(options.run / 'teacher')
  weights = theirs['params']['classifier']
  classifier = nn.Conv(weights['kernel'].shape[-1], (1, 1))
  channels = student.decoder_channels, teacher.decoder_channels
  variables = {
    'student': ours,
    'connector': connector_of(options.run / 'distill', channels),
    'classifier': {'params': weights},
  }
  borrowed = Borrowed(student, classifier)
  source = load_dataset(info['data'], splits=('val',)).splits['val']
  keys = ('protocol', 'batch_size', 'short_side', 'size_multiple')
  given = {key: info['eval'][key] for key in keys}
  given |= {'num_classes': len(info['class_names'])}
  found = {
    'cosine': mean_cosine(borrowed, variables, (teacher, theirs), source, info)
  }
  for name, network, values in (
    ('teacher', teacher, theirs),
    ('student', student, ours),
    ('student_with_the_classifier_of_the_teacher', borrowed, variables),
  ):
    counts = evaluation.evaluate(
      network, values, source, mesh=sharding.make_mesh(), **given
    )
    found[name] = float(metrics.mean_iou(counts))
    print(f'{name}: val mIoU {100 * found[name]:.2f}', flush=True)
  facts = {'seed': info['seed'], 'step': info['checkpoint_step']}
  facts |= {'device': logs.device_name(), 'versions': logs.versions()}
  options.output.write_text(json.dumps(facts | found, indent=1) + '\n')


if __name__ == '__main__':
  main()
