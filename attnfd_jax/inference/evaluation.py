# SPDX-License-Identifier: Apache-2.0
"""Evaluates a network on a data set, as one confusion matrix."""

from collections.abc import Iterator
import functools
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.data import pipeline, transforms
from attnfd_jax.data.records import Record, Source
from attnfd_jax.devices import sharding
from attnfd_jax.inference import predictor
from attnfd_jax.metrics import confusion_matrix
from attnfd_jax.models.deeplab import normalize
from attnfd_jax.types import Variables


@functools.lru_cache(maxsize=4)  # It keeps its networks, large ones as well.
def make_eval_step(
  network: Any, num_classes: int, mesh: jax.sharding.Mesh
) -> jax.stages.Wrapped:
  """Jitted (variables, batch) -> int32 [k, k]; cached for equal networks."""

  def eval_step(variables, batch):
    image = sharding.split_height(normalize(batch['image']), mesh)
    outputs = network.apply(variables, image, train=False)
    label = sharding.split_height(batch['label'], mesh)
    logits = predictor.resized_logits(outputs, *label.shape[1:])
    predictions = jnp.argmax(logits, -1)
    return confusion_matrix(predictions, label, num_classes=num_classes)

  replicated = sharding.replicated(mesh)
  inputs = (replicated, sharding.by_batch(mesh))
  return jax.jit(eval_step, in_shardings=inputs, out_shardings=replicated)


def evaluate(
  network: Any,
  variables: Variables,
  source: Source,
  *,
  num_classes: int,
  mesh: jax.sharding.Mesh,
  protocol: str = 'native',
  batch_size: int = 8,
  short_side: int = 0,
  **options: Any,
) -> np.ndarray:
  """Pixel counts by (label, prediction) of a whole source, int64 [k, k].

  Every process must call this; each reads its share of the images, and all get
  the counts of the whole source.

  Args:
    network: any hashable object whose `apply(variables, image, train=False)`
      takes normalized images [b, h, w, 3] and returns a dict with `logits` [b,
      h, w, k]. If there are `coarse_logits` as well, whose align-corners resize
      `logits` is, the predictions come from them.
    variables: of the network.
    source: see data/records.py.
    num_classes: k.
    mesh: see sharding.make_mesh.
    protocol: 'native' scores at the original size of the label, 'reference'
      first resizes image and label to a short side of 513, as the authors do.
    batch_size: rounded up to a multiple of the mesh axis 'data'.
    short_side: in 'native', the short side that images are resized to for the
      network; 0 keeps their size.
    **options: size_multiple, threads; see pipeline.eval_batches.
  """
  parts = mesh.shape['data']
  options['batch_size'] = -(-batch_size // parts) * parts
  seen = predictor.eval_short_side(protocol, short_side)
  options |= {'short_side': seen, 'resize_labels': protocol == 'reference'}
  batches = pipeline.eval_batches(source, **options)
  variables = sharding.place(variables, sharding.replicated(mesh))
  eval_step = make_eval_step(network, num_classes, mesh)
  by_batch = sharding.by_batch(mesh)
  put = functools.partial(jax.make_array_from_process_local_data, by_batch)
  total = pending = np.zeros((num_classes, num_classes), np.int64)
  for batch in batches:
    counts = eval_step(variables, jax.tree.map(put, batch))
    # One batch is in flight while the next one is read.
    total, pending = total + np.asarray(pending), counts
  return total + np.asarray(pending)


def predictions(
  network: Any,
  variables: Variables | None,
  source: Source,
  *,
  protocol: str = 'native',
  short_side: int = 0,
  threads: int = 4,
  **options: Any,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields (class ids, label) of each image, uint8 [h, w].

  `evaluate` is faster and gets the same counts; `options` are those of
  predictor.segment.
  """
  seen = predictor.eval_short_side(protocol, short_side)
  fitted = {'short_side': seen, 'resize_labels': protocol == 'reference'}
  prepare = functools.partial(transforms.fit_record, **fitted)
  records = grain.MapDataset.source(source).map(prepare)
  reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  segment = functools.partial(predictor.segment, network, variables, **options)
  for record in records.to_iter_dataset(reading):
    yield segment(record['image'], record['label'].shape)[0], record['label']


def chosen_records(
  source: Source, count: int, *, short_side: int = 0
) -> list[Record]:
  """`count` records spread over the source, all of the size of the first."""
  same = [i for i in range(len(source)) if source.size(i) == source.size(0)]
  chosen = np.linspace(0, len(same) - 1, min(count, len(same)))
  records, fit = (source[same[round(i)]] for i in chosen), transforms.fit_record
  return [fit(record, short_side, resize_labels=True) for record in records]
