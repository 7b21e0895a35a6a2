# SPDX-License-Identifier: Apache-2.0
"""One confusion matrix over a data set."""

import functools

import grain
import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.data import pipeline, transforms
from attnfd_jax.devices import sharding
from attnfd_jax.inference import predictor
from attnfd_jax.metrics import confusion_matrix
from attnfd_jax.models.deeplab import normalise


@functools.lru_cache(maxsize=4)  # A teacher of the user's is held by it.
def make_eval_step(network, num_classes, mesh):
  """Jitted (variables, batch) -> int32 [k, k]; stages of a network share it."""

  def eval_step(variables, batch):
    image = sharding.split_height(normalise(batch['image']), mesh)
    outputs = network.apply(variables, image, train=False)
    label = sharding.split_height(batch['label'], mesh)
    logits = predictor.scores_at(outputs, *label.shape[1:])
    predictions = jnp.argmax(logits, -1)
    return confusion_matrix(predictions, label, num_classes=num_classes)

  everywhere = sharding.replicated(mesh)
  given = (everywhere, sharding.by_batch(mesh))
  return jax.jit(eval_step, in_shardings=given, out_shardings=everywhere)


def evaluate(
  network,
  variables,
  source,
  *,
  num_classes,
  mesh,
  protocol='native',
  batch_size=8,
  short_side=0,
  **options,
):
  """Pixels by (label, prediction) of a whole source, int64 [k, k].

  Args:
    network: any hashable object whose `apply(variables, image, train=False)`
      takes normalized images [b, h, w, 3] and returns a dict with `logits` [b,
      h, w, k]. If there are `coarse_logits`, too, whose align-corners resize
      `logits` is, the scores come from them.
    source: see data/sources.py.
    mesh: see sharding.make_mesh; every process calls this, reads its share
      of the images and gets the counts of all.
    protocol: 'native' scores at the size of the untouched label, 'reference'
      resizes image and label to a short side of 513 first, as the authors.
    batch_size: rounded up to a multiple of the mesh axis 'data'.
    short_side: of what the network sees in 'native'; 0 leaves their size.
    **options: size_multiple, threads; see pipeline.eval_batches.
  """
  parts = mesh.shape['data']
  options['batch_size'] = -(-batch_size // parts) * parts
  seen = predictor.seen_short_side(protocol, short_side)
  options |= {'short_side': seen, 'resize_labels': protocol == 'reference'}
  batches = pipeline.eval_batches(source, **options)
  variables = sharding.place(variables, sharding.replicated(mesh))
  count = make_eval_step(network, num_classes, mesh)
  place = sharding.by_batch(mesh)
  put = functools.partial(jax.make_array_from_process_local_data, place)
  total = pending = np.zeros((num_classes, num_classes), np.int64)
  for batch in batches:
    following = count(variables, jax.tree.map(put, batch))
    # One batch in flight while the next is read.
    total, pending = total + np.asarray(pending), following
  return total + np.asarray(pending)


def predictions(
  network,
  variables,
  source,
  *,
  protocol='native',
  short_side=0,
  threads=4,
  **options,
):
  """Yields (class ids, label), uint8 [h, w], of one image after the other.

  `evaluate` is faster and counts the same; `options` are of predictor.segment.
  """
  seen = predictor.seen_short_side(protocol, short_side)
  fitted = {'short_side': seen, 'resize_labels': protocol == 'reference'}
  prepare = functools.partial(transforms.fit_record, **fitted)
  records = grain.MapDataset.source(source).map(prepare)
  reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  segment = functools.partial(predictor.segment, network, variables, **options)
  for record in records.to_iter_dataset(reading):
    yield segment(record['image'], record['label'].shape)[0], record['label']


def chosen_records(source, count, *, short_side=0):
  """`count` records spread over the source, all of the size of the first."""
  same = [i for i in range(len(source)) if source.size(i) == source.size(0)]
  chosen = np.linspace(0, len(same) - 1, min(count, len(same)))
  records, fit = (source[same[round(i)]] for i in chosen), transforms.fit_record
  return [fit(record, short_side, resize_labels=True) for record in records]
