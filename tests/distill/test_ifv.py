# SPDX-License-Identifier: Apache-2.0
"""IFV against NumPy, class by class and pixel by pixel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax import distill
from attnfd_jax.distill import ifv
from attnfd_jax.distill import labels as label_maps
from attnfd_jax.errors import InputError
from attnfd_jax.losses import Mean

# Means of float32 cosines, squared.
CLOSE = {'rtol': 2e-5, 'atol': 1e-7}
CLASSES = 4


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def make_labels(seed=0, shape=(2, 11, 13)):
  labels = np.random.default_rng(seed).integers(0, CLASSES, shape)
  labels[:, 3:5] = 255
  labels[0][labels[0] == 2] = 1  # A class that one image does not have.
  return labels.astype(np.uint8)


def distance(student, teacher, labels):
  """A Mean over images."""
  return Mean.of(
    ifv.variation_distance(student, teacher, labels, num_classes=CLASSES)
  )


def plain_distance(student, teacher, labels):
  """In the order of the paper: masks, centers, cosines."""
  b, h, w, _ = student.shape
  rows = [i * labels.shape[1] // h for i in range(h)]
  columns = [i * labels.shape[2] // w for i in range(w)]
  maps = []
  for features in (student, teacher):
    found = np.ones((b, h, w))
    for image in range(b):
      small = labels[image][rows][:, columns]
      for k in range(CLASSES):
        mask = small == k
        pixels = features[image][mask]
        center = pixels.sum(0) / (len(pixels) + 1e-6)
        lengths = np.linalg.norm(pixels, axis=1) * np.linalg.norm(center)
        found[image][mask] = pixels @ center / lengths
    maps.append(found)
  return ((maps[0] - maps[1]) ** 2).mean()


@pytest.mark.parametrize('size', [(5, 6), (11, 13), (4, 1)])
def test_value(x64, size):
  s, t = normal(0, 2, *size, 5), normal(1, 2, *size, 7)
  labels = make_labels()
  expected = plain_distance(s, t, labels)
  with x64():
    total, count = map(float, jax.jit(distance)(s, t, labels))
  assert count == 2 and expected > 1e-3
  np.testing.assert_allclose(total / count, expected, rtol=1e-9)


def test_the_gradient_is_also_that_of_the_centers(x64):
  s, t = normal(0, 2, 4, 5, 3), normal(1, 2, 4, 5, 3)
  labels = make_labels()
  with x64():
    grads = jax.jit(jax.grad(lambda s: distance(s, t, labels).value))(s)
  grads = np.asarray(grads)
  direction, tiny = normal(2, *s.shape), 1e-6
  up, down = (
    plain_distance(s + sign * tiny * direction, t, labels) for sign in (1, -1)
  )
  expected = (up - down) / (2 * tiny)
  np.testing.assert_allclose(np.sum(grads * direction), expected, rtol=1e-6)


def test_what_is_zero():
  s = normal(0, 2, 5, 6, 4).astype(np.float32)
  t = normal(1, 2, 5, 6, 4).astype(np.float32)
  labels = make_labels()
  mixing = np.linalg.qr(normal(2, 4, 4))[0].astype(np.float32)
  found = distance(s, 3 * s @ mixing, labels).value
  np.testing.assert_allclose(found, 0, atol=1e-12)
  # Nothing is labeled.
  loss_fn = jax.value_and_grad(lambda s, y: distance(s, t, y).value)
  value, grads = loss_fn(s, np.full_like(labels, 255))
  assert value == 0
  np.testing.assert_array_equal(grads, 0)
  # A class of one pixel is its own center.
  alone = np.full((2, 5, 6), 255, np.uint8)
  alone[:, 1, :4] = np.arange(4)
  np.testing.assert_allclose(distance(s, t, alone).value, 0, atol=1e-12)
  # Two maps of zeros.
  for pair in ((0 * s, 0 * s), (0 * s, t), (s, s)):
    value, grads = jax.value_and_grad(
      lambda s, t=pair[1]: distance(s, t, labels).value
    )(pair[0])
    assert np.isfinite(value) and np.isfinite(grads).all()


def test_centers_are_of_an_image():
  s, t = (normal(i, 2, 5, 6, 4).astype(np.float32) for i in (0, 1))
  labels = make_labels()
  whole = distance(s, t, labels)
  parts = [distance(*(x[i : i + 1] for x in (s, t, labels))) for i in range(2)]
  np.testing.assert_allclose(
    whole.total, sum(part.total for part in parts), **CLOSE
  )
  # Ignored pixels add nothing; what is there does not matter.
  small = label_maps.nearest(labels, 5, 6)
  changed = np.where((small == 255)[..., None], 9.0, s).astype(np.float32)
  assert (changed != s).any()
  np.testing.assert_allclose(distance(changed, t, labels), whole, **CLOSE)


def test_labels_are_those_of_pytorch():
  labels = np.arange(2 * 5 * 7).reshape(2, 5, 7)
  found = label_maps.nearest(labels, 2, 3)
  # floor(i 5 / 2), floor(j 7 / 3).
  np.testing.assert_array_equal(found, labels[:, [0, 2]][:, :, [0, 2, 4]])
  np.testing.assert_array_equal(label_maps.nearest(labels, 5, 7), labels)
  larger = label_maps.nearest(labels, 10, 7)
  np.testing.assert_array_equal(larger, np.repeat(labels, 2, 1))


@pytest.mark.torch
@pytest.mark.parametrize(
  ('old', 'size'),
  [
    ((513, 513), (33, 129)),
    ((512, 1024), (64, 128)),
    ((360, 480), (46, 30)),
    ((129, 130), (7, 200)),
  ],
)
def test_labels_against_pytorch(old, size):
  torch = pytest.importorskip('torch')
  labels = np.random.default_rng(0).integers(0, 256, (1, *old))
  expected = torch.nn.functional.interpolate(
    torch.tensor(labels)[None].float(), size, mode='nearest'
  )
  found = label_maps.nearest(labels, *size)
  np.testing.assert_array_equal(found, expected[0].numpy())


# The method.


def make_outputs(seed, channels, dtype=np.float32):
  maps = {'aspp': (3, 4), 'decoder': (5, 6)}
  return {
    'logits': normal(seed, 2, 11, 13, CLASSES).astype(dtype),
    'features': {
      tap: normal(seed + 9, 2, *size, channels).astype(dtype)
      for tap, size in maps.items()
    },
  }


def run(method, *outputs, labels=None):
  labels = make_labels() if labels is None else labels
  apply = functools.partial(method.apply, {}, train=True, step=0)
  return jax.jit(apply)(*outputs, labels)


def test_the_method():
  assert distill.WEIGHTS['ifv'] == 200
  outputs = student, teacher = make_outputs(0, 5), make_outputs(1, 7)
  method = distill.make_method('ifv', *outputs)
  (total, count), terms = run(method, *outputs)
  expected = {
    tap: plain_distance(
      student['features'][tap].astype(float),
      teacher['features'][tap].astype(float),
      make_labels(),
    )
    for tap in ('aspp', 'decoder')
  }
  assert count == 2 and terms == {}
  np.testing.assert_allclose(total / count, expected['aspp'], **CLOSE)
  both, terms = run(ifv.IFV(taps=('aspp', 'decoder', 'gone')), *outputs)
  np.testing.assert_allclose(both.value, sum(expected.values()), **CLOSE)
  for tap, value in expected.items():
    np.testing.assert_allclose(terms[tap], value, **CLOSE)


def test_bfloat16_and_the_teacher():
  outputs = [make_outputs(i, 5, jnp.bfloat16) for i in (0, 1)]

  def loss_fn(*outputs):
    return run(ifv.IFV(), *outputs)[0].value

  value, grads = jax.value_and_grad(loss_fn, (0, 1))(*outputs)
  assert value.dtype == jnp.float32
  assert all((x == 0).all() for x in jax.tree.leaves(grads[1]))
  assert grads[0]['features']['aspp'].dtype == jnp.bfloat16


def test_parts_of_a_batch_add_up():
  outputs = make_outputs(0, 5), make_outputs(1, 7)
  whole, _ = run(ifv.IFV(), *outputs)
  parts = [
    run(
      ifv.IFV(),
      *jax.tree.map(lambda x, i=i: x[i : i + 1], outputs),
      labels=make_labels()[i : i + 1],
    )[0]
    for i in range(2)
  ]
  found = sum(x.total for x in parts) / sum(x.count for x in parts)
  np.testing.assert_allclose(found, whole.value, **CLOSE)


def test_maps_of_other_sizes_are_refused():
  student, teacher = make_outputs(0, 5), make_outputs(1, 7)
  teacher['features']['aspp'] = teacher['features']['decoder']
  message = (
    r"Maps differ in size at 'aspp'.*\(3, 4\), teacher \(5, 6\); set the"
  )
  with pytest.raises(InputError, match=message):
    distill.make_method('ifv', student, teacher)
  distill.make_method('ifv', student, teacher, taps=('decoder',))
  distill.make_method('ifv', student, teacher, match_size='to_student')
