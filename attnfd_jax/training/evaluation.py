# SPDX-License-Identifier: Apache-2.0
"""One confusion matrix over a data set, and pictures of a few images."""

import jax
import jax.numpy as jnp
import numpy as np

from attnfd_jax.data import pipeline
from attnfd_jax.data import transforms
from attnfd_jax.models.deeplab import normalise
from attnfd_jax.training import sharding
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
    variables: of the network, on the mesh.
    source: see data/sources.py.
    num_classes: k.
    mesh: the batch is split over its axis 'data'.
    protocol: 'native' scores at the size of the untouched label, 'reference'
      resizes image and label to a short side of 513 first, as the authors.
    batch_size: rounded up to a multiple of the devices.
    short_side: of what the network sees in protocol 'native'; 0 leaves images
      as they are.
    size_multiple: pad images to multiples; fewer compilations.
    threads: that read.
  """
  devices = mesh.devices.size
  reference = protocol == 'reference'
  batches = pipeline.eval_batches(
    source,
    batch_size=-(-batch_size // devices) * devices,
    short_side=REFERENCE_SHORT_SIDE if reference else short_side,
    resize_labels=reference,
    size_multiple=size_multiple,
    threads=threads,
  )
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


def chosen_records(source, count, *, short_side=0):
  """`count` records spread over the source, all of the size of the first."""

  def fit(record):
    size = record['label'].shape
    if short_side:
      size = transforms.fit_short_side(size, short_side)
    return {
      'image': transforms.resize_image(record['image'], size),
      'label': transforms.resize_label(record['label'], size),
    }

  same = [i for i in range(len(source)) if source.size(i) == source.size(0)]
  indices = np.linspace(0, len(same) - 1, min(count, len(same)))
  return [fit(source[same[round(i)]]) for i in indices]


def make_pictures(network, variables, records, palette):
  """Arrays for the report: image, label, prediction, palette."""
  image = np.stack([record['image'] for record in records])

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
  maps = refine(variables, image)
  for role, taps in zip(('student', 'teacher'), maps, strict=True):
    for tap, x in taps.items():
      x = np.asarray(x)
      low, high = (f(x, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
      scaled = (x - low) / np.maximum(high - low, 1e-12)
      found[f'{role}_attention_{tap}'] = scaled.astype(np.float16)
  return found
