# SPDX-License-Identifier: Apache-2.0
"""Pseudo-labels against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax.distill import pseudo
from attnfd_jax.errors import InputError

CLOSE = {'rtol': 1e-6, 'atol': 1e-6}
SHAPE = (3, 4, 5, 6)


def outputs(seed):
  generator = np.random.default_rng(seed)
  logits = 2 * generator.normal(size=SHAPE).astype(np.float32)
  return {'logits': logits, 'features': {}}


def labels(unlabeled):
  found = np.random.default_rng(5).integers(0, 6, SHAPE[:3]).astype(np.uint8)
  found[:, 0] = 255
  found[unlabeled] = 255
  return found


def run(student, teacher, label, **options):
  method = attnfd_jax.make_method('pseudo', student, teacher, **options)

  def loss_fn(student):
    loss, terms = method.apply({}, student, teacher, label, train=True, step=0)
    return loss.value, terms

  (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(student)
  return loss, terms['kept'], grads['logits']


@pytest.mark.parametrize('everywhere', [False, True])
@pytest.mark.parametrize('min_confidence', [0.0, 0.5, 0.8])
def test_value_gradient_and_share(min_confidence, everywhere):
  student, teacher, label = outputs(0), outputs(1), labels([0, 2])
  loss, kept, grads = run(
    student,
    teacher,
    label,
    min_confidence=min_confidence,
    everywhere=everywhere,
  )
  p, q = (np.exp(x['logits'].astype(np.float64)) for x in (teacher, student))
  p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
  sure = p.max(-1) >= min_confidence
  taught = sure.copy()
  if not everywhere:
    taught[1] = False
  one_hot = np.eye(6)[p.argmax(-1)]
  expected = -np.log(np.sum(q * one_hot, -1))[taught].mean()
  np.testing.assert_allclose(loss, expected, **CLOSE)
  share = sure.mean() if everywhere else sure[[0, 2]].mean()
  np.testing.assert_allclose(kept, share, **CLOSE)
  expected = (q - one_hot) * taught[..., None] / taught.sum()
  np.testing.assert_allclose(grads, expected, **CLOSE)


@pytest.mark.parametrize(
  ('unlabeled', 'min_confidence'), [([], 0.0), ([0, 1, 2], 1.0)]
)
def test_nothing_to_teach(unlabeled, min_confidence):
  loss, kept, grads = run(
    outputs(0), outputs(1), labels(unlabeled), min_confidence=min_confidence
  )
  assert loss == kept == 0 and not np.any(grads)


def test_the_labels_that_predict_would_write():
  logits = jnp.asarray(outputs(1)['logits'])
  found = pseudo.confident_labels(logits, min_confidence=0.6)
  p = np.asarray(jax.nn.softmax(logits))
  expected = np.where(p.max(-1) >= 0.6, p.argmax(-1), 255)
  np.testing.assert_array_equal(found, expected)


def test_a_share_is_from_0_to_1():
  with pytest.raises(InputError, match='config.distill.pseudo: min_confidence'):
    attnfd_jax.make_method('pseudo', outputs(0), outputs(1), min_confidence=2.0)
