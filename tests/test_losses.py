# SPDX-License-Identifier: Apache-2.0
"""Losses: what counts, closed forms in float64, and what has a gradient."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads
import numpy as np
import pytest

from attnfd_jax import losses
from attnfd_jax.models import resizing

# Means of some hundred float32 logarithms.
CLOSE = {'rtol': 2e-6, 'atol': 1e-7}


def value_of(loss):
  """`loss`, divided by what counts."""
  return lambda *args, **options: loss(*args, **options).value


softmax_cross_entropy = value_of(losses.softmax_cross_entropy)
upsampled_cross_entropy = value_of(losses.upsampled_cross_entropy)
ohem_cross_entropy = value_of(losses.ohem_cross_entropy)
focal_loss = value_of(losses.focal_loss)
dice_loss = value_of(losses.dice_loss)


def make(num_classes=5, dtype=np.uint8):
  generator = np.random.default_rng(0)
  logits = 3 * generator.normal(size=(2, 6, 7, num_classes)).astype(np.float32)
  labels = generator.integers(0, num_classes, (2, 6, 7)).astype(dtype)
  return logits, labels


WEIGHTS = (0.5, 3.0, 1.0, 0.0, 7.0)
LOSSES = {
  'ce': softmax_cross_entropy,
  'weighted': functools.partial(softmax_cross_entropy, class_weights=WEIGHTS),
  'ohem': functools.partial(ohem_cross_entropy, threshold=0.2, min_kept=0.3),
  'ohem_weighted': functools.partial(ohem_cross_entropy, class_weights=WEIGHTS),
  'focal': focal_loss,
  'focal_weighted': functools.partial(
    focal_loss, gamma=0.5, class_weights=WEIGHTS
  ),
  'dice': dice_loss,
}
every_loss = pytest.mark.parametrize('loss', LOSSES.values(), ids=LOSSES)


def numpy_log_softmax(logits):
  logits = logits.astype(np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def pixels(logits, labels):
  """Cross-entropy [n], probabilities [n, k], labels [n] of what counts."""
  counted = labels != 255
  log_p, labels = numpy_log_softmax(logits)[counted], labels[counted]
  return -log_p[np.arange(len(labels)), labels], np.exp(log_p), labels


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


def test_a_mean_adds_up_over_parts():
  """However many pixels are ignored in each."""
  logits, labels = make()
  labels[0, :5] = 255
  options = {'class_weights': WEIGHTS}
  for loss, sums in (
    (losses.softmax_cross_entropy, {}),
    (losses.softmax_cross_entropy, options),
    (losses.focal_loss, options),
  ):
    whole = loss(logits, labels, **sums)
    parts = [loss(logits[i:][:1], labels[i:][:1], **sums) for i in range(2)]
    total, count = map(sum, zip(*parts, strict=True))
    # Float32 sums in another order.
    np.testing.assert_allclose(
      losses.Mean(total, count).value, whole.value, rtol=1e-6
    )
    counted = labels[labels != 255]
    expected = np.array(WEIGHTS)[counted].sum() if sums else len(counted)
    np.testing.assert_allclose(whole.count, expected, rtol=1e-6)
    mean = sum(part.value for part in parts) / 2
    assert abs(mean - whole.value) > 1e-3
  assert losses.Mean(jnp.zeros(()), 0.0).value == 0


def test_shapes_must_fit(no_type_checks):
  logits, labels = make()
  with pytest.raises(ValueError, match=r'\(2, 6, 7, 5\).*\(2, 6, 6\)'):
    softmax_cross_entropy(logits, labels[..., :6])


@every_loss
def test_what_is_ignored_does_not_count(loss):
  logits, labels = make()
  counted = np.random.default_rng(1).random(labels.shape) < 0.6
  masked = np.where(counted, labels, 255).astype(np.uint8)
  value, grads = jax.value_and_grad(loss)(logits, masked)
  assert value.dtype == jnp.float32
  np.testing.assert_array_equal(grads[~counted], 0)
  assert np.any(grads[counted] != 0)
  other = np.where(counted[..., None], logits, -7 * logits)
  np.testing.assert_array_equal(loss(other, masked), value)
  # A subset alone: float32 sums in another order.
  subset = logits[counted][None, None], labels[counted][None, None]
  np.testing.assert_allclose(loss(*subset), value, rtol=1e-5)
  renamed = np.where(counted, labels, 99)
  np.testing.assert_array_equal(loss(logits, renamed, ignore_label=99), value)


@every_loss
def test_an_empty_mask_is_zero_with_zero_gradient(loss):
  logits, labels = make()
  labels[:] = 255
  value, grads = jax.value_and_grad(loss)(logits, labels)
  assert value == 0
  np.testing.assert_array_equal(grads, 0)


@every_loss
def test_permuted_classes(loss):
  logits, labels = make()
  labels[0, :2] = 255
  order = np.random.default_rng(3).permutation(5)
  moved = np.append(np.argsort(order), np.full(251, 255)).astype(np.uint8)
  options = getattr(loss, 'keywords', {})
  other = loss
  if 'class_weights' in options:
    weights = tuple(np.array(WEIGHTS)[order])
    other = functools.partial(loss, class_weights=weights)
  np.testing.assert_allclose(
    other(logits[..., order], moved[labels]),
    loss(logits, labels),
    rtol=1e-5,
  )


@every_loss
def test_derivatives(loss, x64):
  logits, labels = make()
  logits, labels = logits[:1, :3, :4].astype(np.float64), labels[:1, :3, :4]
  labels[0, 0, 0] = 255
  with x64():
    check_grads(
      lambda x: loss(x, labels), (jnp.asarray(logits),), 1, ('rev',), rtol=1e-5
    )


@every_loss
def test_a_split_batch_is_one_batch(loss):
  """Means, order and counts are those of all devices."""
  logits, labels = make()
  logits = np.concatenate([logits, logits[:, ::-1] * 0.5])
  labels = np.concatenate([labels, labels])
  labels[0] = 255
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('data',))
  place = NamedSharding(mesh, PartitionSpec('data'))
  split = jax.jit(loss)(*jax.device_put((logits, labels), place))
  # Float32 sums in another order.
  np.testing.assert_allclose(split, loss(logits, labels), rtol=1e-5)


@every_loss
def test_sure_and_right_or_wrong_stays_finite(loss):
  labels = np.zeros((1, 1, 4), np.uint8)
  for logit in (1e4, -1e4):
    logits = jnp.zeros((1, 1, 4, 5)).at[..., 0].set(logit)
    value, grads = jax.value_and_grad(loss)(logits, labels)
    assert np.isfinite(value) and np.all(np.isfinite(grads))
    assert (value == 0) == (logit > 0)


def test_class_weights():
  logits, labels = make()
  labels[0, :3] = 255
  each, _, known = pixels(logits, labels)
  weights = np.array(WEIGHTS)[known]
  expected = (weights * each).sum() / weights.sum()
  loss = LOSSES['weighted']
  np.testing.assert_allclose(loss(logits, labels), expected, **CLOSE)
  for factor in (0.001, 1000):  # Also if they sum to less than 1.
    scaled = softmax_cross_entropy(
      logits, labels, class_weights=[factor * w for w in WEIGHTS]
    )
    np.testing.assert_allclose(scaled, expected, **CLOSE)
  equal = softmax_cross_entropy(logits, labels, class_weights=[2] * 5)
  np.testing.assert_allclose(equal, each.mean(), **CLOSE)
  # All that is left has weight 0.
  labels = np.where(labels == 3, labels, 255)
  value, grads = jax.value_and_grad(loss)(logits, labels)
  assert value == 0 and not np.any(grads)


def test_class_weights_must_be_as_many_as_classes(
  no_type_checks,
):
  logits, labels = make()
  for loss in (softmax_cross_entropy, ohem_cross_entropy, focal_loss):
    with pytest.raises(ValueError, match='2 class_weights for 5 classes'):
      loss(logits, labels, class_weights=(1, 2))


@pytest.mark.parametrize(
  ('threshold', 'min_kept'), [(0.3, 0.0), (0.01, 0.25), (0.3, 0.9)], ids=str
)
def test_ohem_keeps_the_hard_pixels(threshold, min_kept):
  logits, labels = make()
  labels[0, :3] = 255
  each, p, known = pixels(logits, labels)
  right = p[np.arange(len(known)), known]
  count = max(int(np.ceil(min_kept * len(each))), np.sum(right <= threshold))
  expected = np.sort(each)[::-1][:count].mean()
  assert 0 < count < len(each)
  value = ohem_cross_entropy(
    logits, labels, threshold=threshold, min_kept=min_kept
  )
  np.testing.assert_allclose(value, expected, **CLOSE)
  weighted = ohem_cross_entropy(
    logits,
    labels,
    threshold=threshold,
    min_kept=min_kept,
    class_weights=WEIGHTS,
  )
  kept = np.argsort(each)[::-1][:count]
  weights = np.array(WEIGHTS)[known[kept]]
  expected = (each[kept] * weights).sum() / weights.sum()
  np.testing.assert_allclose(weighted, expected, **CLOSE)
  grads = jax.grad(ohem_cross_entropy)(
    logits, labels, threshold=threshold, min_kept=min_kept
  )
  assert np.sum(np.any(grads != 0, -1)) == count


@pytest.mark.parametrize(
  'options',
  [{'threshold': 1.0}, {'min_kept': 1.0}],
  ids=['all_are_hard', 'all_are_kept'],
)
def test_ohem_of_all_pixels_is_cross_entropy(options):
  logits, labels = make()
  labels[0, :3] = 255
  np.testing.assert_allclose(
    ohem_cross_entropy(logits, labels, **options),
    softmax_cross_entropy(logits, labels),
    **CLOSE,
  )


@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0, 2.0], ids=str)
def test_focal(gamma):
  logits, labels = make()
  labels[0, :3] = 255
  each, p, known = pixels(logits, labels)
  right = p[np.arange(len(known)), known]
  expected = ((1 - right) ** gamma * each).mean()
  np.testing.assert_allclose(
    focal_loss(logits, labels, gamma=gamma), expected, **CLOSE
  )
  weights = np.array(WEIGHTS)[known]
  expected = (weights * (1 - right) ** gamma * each).sum() / weights.sum()
  np.testing.assert_allclose(
    focal_loss(logits, labels, gamma=gamma, class_weights=WEIGHTS),
    expected,
    **CLOSE,
  )


def test_dice_is_a_mean_over_the_classes_that_occur():
  logits, labels = make()
  labels[0, :3] = 255
  labels[labels == 2] = 4
  _, p, known = pixels(logits, labels)
  scores = []
  for c in (0, 1, 3, 4):
    y = known == c
    scores.append(2 * p[y, c].sum() / (p[:, c].sum() + y.sum()))
  np.testing.assert_allclose(
    dice_loss(logits, labels), 1 - np.mean(scores), **CLOSE
  )


def test_dice_weighs_small_classes_like_large_ones():
  labels = np.zeros((1, 10, 10), np.uint8)
  labels[0, 0, 0] = 1
  sure = 50.0 * np.eye(2, dtype=np.float32)
  assert dice_loss(sure[labels], labels) < 1e-6
  # One pixel of a hundred is wrong: class 0 has 2 * 99 / 199, class 1 nothing.
  all_background = sure[np.zeros_like(labels)]
  np.testing.assert_allclose(
    dice_loss(all_background, labels), 1 - 198 / 199 / 2, **CLOSE
  )


def test_weights_find_a_rare_class():
  """99:1 pixels that overlap: the minority is found with median frequency."""
  generator = np.random.default_rng(0)
  labels = (np.arange(2000) % 100 == 0).astype(np.uint8).reshape(1, 40, 50)
  x = generator.normal(size=labels.shape) + 2.5 * labels
  x = jnp.asarray(np.stack([np.ones_like(x), x], -1), jnp.float32)

  def recall(loss):
    step = jax.jit(jax.grad(lambda w: loss(x @ w, labels)))
    w = jnp.zeros((2, 2))
    for _ in range(200):
      w = w - 0.5 * step(w)
    found = np.argmax(x @ w, -1)
    return np.mean(found[labels == 1])

  share = np.array([0.99, 0.01])
  weights = tuple(np.median(share) / share)
  assert recall(softmax_cross_entropy) < 0.5
  weighted = functools.partial(softmax_cross_entropy, class_weights=weights)
  assert recall(weighted) > 0.8


@pytest.mark.parametrize('parts', [1, 3, 7])
@pytest.mark.parametrize('size', [(4, 5), (1, 1)], ids=str)
def test_in_parts_it_is_the_loss_of_the_whole(parts, size, x64):
  generator = np.random.default_rng(0)
  coarse = generator.normal(size=(2, *size, 6))
  labels = generator.integers(0, 6, (2, 13, 17)).astype(np.uint8)
  labels[:, :2] = 255

  def whole(coarse):
    return softmax_cross_entropy(resizing.resize(coarse, 13, 17), labels)

  def in_parts(coarse):
    return upsampled_cross_entropy(coarse, labels, parts=parts)

  with x64():  # Else it would be the order of sums that is compared.
    expected, wanted = jax.jit(jax.value_and_grad(whole))(coarse)
    found, gradient = jax.jit(jax.value_and_grad(in_parts))(coarse)
  np.testing.assert_allclose(found, expected, rtol=1e-12)
  np.testing.assert_allclose(gradient, wanted, rtol=1e-9, atol=1e-15)
  nothing = upsampled_cross_entropy(
    coarse.astype(np.float32), np.full_like(labels, 255), parts=parts
  )
  assert nothing == 0
