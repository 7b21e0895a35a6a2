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
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.models.resizing import resize
from attnfd_jax.training import step

# Short side of image and label in protocol `reference`; train_kd.py:281.
REFERENCE_SHORT_SIDE = 513


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
  count = step.make_eval_step(network, num_classes, mesh)
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

  The operations of step.make_eval_step, one image at a time.
  """

  @functools.partial(jax.jit, static_argnames='size')
  def scores(variables, image, *, size):
    out = network.apply(variables, normalise(image), train=False)
    return resize(out['coarse_logits'], *size)[0]

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


def chosen_records(source, count, *, short_side=0):
  """`count` records spread over the source, all of the size of the first."""

  same = [i for i in range(len(source)) if source.size(i) == source.size(0)]
  indices = np.linspace(0, len(same) - 1, min(count, len(same)))
  return [
    transforms.fit_record(
      source[same[round(i)]], short_side, resize_labels=True
    )
    for i in indices
  ]


def make_pictures(network, variables, records, palette):
  """Arrays for the report: image, label, prediction, palette."""
  image = np.stack([record['image'] for record in records])
  variables = sharding.to_host(variables)

  @jax.jit
  def predict(variables, image):
    out = network.apply(variables, normalise(image), train=False)
    return jnp.argmax(out['logits'], -1).astype(jnp.uint8)

  return {
    'image': image,
    'label': np.stack([record['label'] for record in records]),
    'prediction': np.asarray(predict(variables, image)),
    'palette': palette,
  }


def attention_maps(student, teacher, distiller, variables, records):
  """{'student_attention_<tap>', 'teacher_attention_<tap>'}: float [n, h, w].

  The length of each pixel's refined vector, from 0 to 1 in each map.

  Args:
    student, teacher, distiller: modules.
    variables: of the three, in this order.
    records: as of `chosen_records`.
  """

  @jax.jit
  def refine(variables, image):
    image = normalise(image)
    features = [
      network.apply(parts, image, train=False)['features']
      for network, parts in zip((student, teacher), variables, strict=False)
    ]
    refined = distiller.apply(
      variables[2], *features, train=False, method='refined_maps'
    )
    return jax.tree.map(
      lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1), refined
    )

  image = np.stack([record['image'] for record in records])
  found = {}
  maps = refine(sharding.to_host(variables), image)
  for role, taps in zip(('student', 'teacher'), maps, strict=True):
    for tap, x in taps.items():
      x = np.asarray(x)
      low, high = (f(x, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
      scaled = (x - low) / np.maximum(high - low, 1e-12)
      found[f'{role}_attention_{tap}'] = scaled.astype(np.float16)
  return found
