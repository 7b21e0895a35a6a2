# SPDX-License-Identifier: Apache-2.0
"""One confusion matrix over a data set, and pictures of a few images."""

import functools

import grain
import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.data import pipeline
from attnfd_jax.data import transforms
from attnfd_jax.devices import sharding
from attnfd_jax.inference import tiling
from attnfd_jax.metrics import confusion_matrix
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.models.resizing import resize

# Short side of image and label in protocol `reference`; train_kd.py:281.
REFERENCE_SHORT_SIDE = 513


@functools.lru_cache
def make_eval_step(network, num_classes, mesh):
  """Returns jitted (variables, batch) -> confusion matrix int32 [k, k].

  Cached, so that two stages with the same network share one compilation.
  """

  def eval_step(variables, batch):
    image = sharding.split_height(normalise(batch['image']), mesh)
    out = network.apply(variables, image, train=False)
    label = sharding.split_height(batch['label'], mesh)
    # From the coarse scores in one step, whatever the size of the label.
    logits = resize(out.get('coarse_logits', out['logits']), *label.shape[1:])
    predictions = jnp.argmax(logits, -1)
    return confusion_matrix(predictions, label, num_classes=num_classes)

  everywhere = sharding.replicated(mesh)
  return jax.jit(
    eval_step,
    in_shardings=(everywhere, sharding.by_batch(mesh)),
    out_shardings=everywhere,
  )


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
  size_multiple=1,
  threads=4,
):
  """Pixels by (label, prediction) of a whole source, int64 [k, k].

  Args:
    network: called with (variables, image, train=False).
    variables: of the network.
    source: see data/sources.py.
    num_classes: k.
    mesh: see sharding.make_mesh; every process calls this, reads its share
      of the images and gets the counts of all.
    protocol: 'native' scores at the size of the untouched label, 'reference'
      resizes image and label to a short side of 513 first, as the authors.
    batch_size: rounded up to a multiple of the mesh axis 'data'.
    short_side: of what the network sees in protocol 'native'; 0 leaves images
      as they are.
    size_multiple: pad images to multiples; fewer compilations.
    threads: that read.
  """
  parts = mesh.shape['data']
  reference = protocol == 'reference'
  batches = pipeline.eval_batches(
    source,
    batch_size=-(-batch_size // parts) * parts,
    short_side=REFERENCE_SHORT_SIDE if reference else short_side,
    resize_labels=reference,
    size_multiple=size_multiple,
    threads=threads,
  )
  variables = sharding.place(variables, sharding.replicated(mesh))
  count = make_eval_step(network, num_classes, mesh)
  place = sharding.by_batch(mesh)
  total = np.zeros((num_classes, num_classes), np.int64)
  pending = None
  for batch in batches:
    batch = {
      key: jax.make_array_from_process_local_data(place, value)
      for key, value in batch.items()
    }
    following = count(variables, batch)
    # One batch in flight while the next is read.
    if pending is not None:
      total += np.asarray(pending)
    pending = following
  if pending is not None:
    total += np.asarray(pending)
  return total


@functools.lru_cache
def make_scores(network):
  """Jitted (variables, uint8 [1, h, w, 3], size) -> scores [height, width, k].

  The operations of make_eval_step, one image at a time.
  """

  @functools.partial(jax.jit, static_argnames='size')
  def scores(variables, image, *, size):
    out = network.apply(variables, normalise(image), train=False)
    return resize(out.get('coarse_logits', out['logits']), *size)[0]

  return scores


@jax.jit
def _classes(scores):
  return jnp.argmax(scores, -1).astype(jnp.uint8)


def predictions(
  network,
  variables,
  source,
  *,
  protocol='native',
  short_side=0,
  size_multiple=1,
  tile=None,
  overlap=0.25,
  threads=4,
):
  """Yields (class ids, label) of one image after the other, uint8 [h, w] each.

  For what needs them on the host; `evaluate` is faster and counts the same.

  Args:
    network, variables, source, protocol, short_side, size_multiple, threads:
      see `evaluate`.
    tile: (height, width) of what the network sees at a time; scores of
      overlapping tiles are averaged. None, or a tile that covers the image,
      is the whole image.
    overlap: least share of a tile that the next one covers again.
  """
  reference = protocol == 'reference'
  short_side = REFERENCE_SHORT_SIDE if reference else short_side
  scores = make_scores(network)

  def prepare(record):
    return transforms.fit_record(record, short_side, resize_labels=reference)

  def padded(size):
    return transforms.next_multiple(size, size_multiple)

  def of_tile(part):
    return scores(variables, part[None], size=part.shape[:2])

  def segment(image, size):
    if tile is None or tiling.covers(tile, image.shape[:2]):
      image = transforms.pad(image, padded(image.shape[:2]), 0)
      found = scores(variables, image[None], size=padded(size))
      return np.asarray(_classes(found))[: size[0], : size[1]]
    found = tiling.scores(of_tile, image, size, tile=tile, overlap=overlap)
    return np.concatenate([np.argmax(x, -1).astype(np.uint8) for x in found])

  records = grain.MapDataset.source(source).map(prepare)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  for record in records.to_iter_dataset(options):
    yield segment(record['image'], record['label'].shape), record['label']
