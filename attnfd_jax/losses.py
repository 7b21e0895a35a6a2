# SPDX-License-Identifier: Apache-2.0
"""Losses over arrays: pure, masked, in float32, safe when no pixel counts."""

import jax.numpy as jnp
import numpy as np
import optax

IGNORE_LABEL = 255


def softmax_cross_entropy(logits, labels, *, ignore_label=IGNORE_LABEL):
  """Mean cross-entropy over the pixels that count; 0 if there are none.

  Labels outside the classes must have been refused when data was read: 255
  would give NaN with a finite gradient here, -1 would train the last class.

  Args:
    logits: [b, h, w, k].
    labels: integers [b, h, w]; `ignore_label` does not count.
    ignore_label: value of the pixels to leave out.

  Returns:
    float32 scalar.

  Raises:
    ValueError: if the shapes do not fit.
  """
  if logits.shape[:-1] != labels.shape:
    raise ValueError(f'{logits.shape=} does not fit {labels.shape=}.')
  valid = labels != ignore_label
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(np.promote_types(logits.dtype, np.float32)),
    jnp.where(valid, labels, 0).astype(jnp.int32),
  )
  counted = jnp.sum(valid, dtype=losses.dtype)
  return jnp.sum(losses, where=valid) / jnp.maximum(counted, 1)
