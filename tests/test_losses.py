# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy: what counts, and what has a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnfd_jax.losses import softmax_cross_entropy

# Means of some hundred float32 logarithms.
CLOSE = {'rtol': 2e-6, 'atol': 1e-7}


def make(num_classes=5, dtype=np.uint8):
  generator = np.random.default_rng(0)
  logits = 3 * generator.normal(size=(2, 6, 7, num_classes)).astype(np.float32)
  labels = generator.integers(0, num_classes, (2, 6, 7)).astype(dtype)
  return logits, labels


def numpy_cross_entropy(logits, labels):
  """Mean of -log softmax in float64; logits [n, k], labels [n]."""
  logits = logits.astype(np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  return -log_p[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize('dtype', [np.uint8, np.int32])
def test_mask_equals_subset(dtype):
  logits, labels = make(dtype=dtype)
  counted = np.random.default_rng(1).random(labels.shape) < 0.6
  masked = np.where(counted, labels, 255).astype(dtype)
  loss = softmax_cross_entropy(logits, masked)
  assert loss.dtype == jnp.float32
  expected = numpy_cross_entropy(logits[counted], labels[counted])
  np.testing.assert_allclose(loss, expected, **CLOSE)
  # What is ignored has no influence at all.
  other = np.where(counted[..., None], logits, -7 * logits)
  np.testing.assert_array_equal(softmax_cross_entropy(other, masked), loss)


def test_gradient_is_probability_minus_one_hot():
  logits, labels = make()
  labels[0, :3] = 255
  grads = jax.grad(softmax_cross_entropy)(logits, labels)
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(-1, keepdims=True)
  counted = labels != 255
  expected = p - np.eye(256)[labels][..., :5]
  expected = expected * counted[..., None] / counted.sum()
  np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(grads[~counted], 0)


def test_nothing_to_count_is_zero_with_zero_gradient():
  logits, labels = make()
  labels[:] = 255
  loss, grads = jax.value_and_grad(softmax_cross_entropy)(logits, labels)
  assert loss == 0
  np.testing.assert_array_equal(grads, 0)


def test_other_ignore_label():
  logits, labels = make()
  loss = softmax_cross_entropy(logits, labels, ignore_label=0)
  counted = labels != 0
  expected = numpy_cross_entropy(logits[counted], labels[counted])
  np.testing.assert_allclose(loss, expected, **CLOSE)


def test_bfloat16_logits_are_summed_in_float32():
  logits, labels = make()
  logits = jnp.asarray(logits, jnp.bfloat16)
  loss = softmax_cross_entropy(logits, labels)
  assert loss.dtype == jnp.float32
  exact = np.asarray(logits, np.float32).reshape(-1, 5)
  expected = numpy_cross_entropy(exact, labels.reshape(-1))
  np.testing.assert_allclose(loss, expected, **CLOSE)


def test_large_logits_stay_finite():
  logits = jnp.array([[[[1e4, -1e4, 0.0]]]])
  loss, grads = jax.value_and_grad(softmax_cross_entropy)(
    logits, jnp.array([[[1]]])
  )
  assert loss == 2e4
  np.testing.assert_array_equal(grads, [[[[1, -1, 0]]]])


def test_shapes_must_fit():
  logits, labels = make()
  with pytest.raises(ValueError, match=r'\(2, 6, 7, 5\).*\(2, 6, 6\)'):
    softmax_cross_entropy(logits, labels[..., :6])
