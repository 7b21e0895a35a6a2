# SPDX-License-Identifier: Apache-2.0
"""A method of your own, `distill.method=.../masked_memory.py:MaskedMemory`.

The student's last map, with pixels hidden at random, is brought to the
teacher's channels and compared with its map. A memory bank keeps the teacher's
mean vectors of earlier batches: the likeness of the student's to them is to be
that of the teacher's.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class MaskedMemory(nn.Module):
  """See attnfd_jax/distill/method.py for what a method is."""

  tap: str = 'decoder'
  hidden: float = 0.5  # Share of the pixels that the student does not see.
  size: int = 64  # Teacher vectors that are remembered.

  @nn.compact
  def __call__(self, student, teacher, labels, *, train, step):
    """The sum of both distances, and each as a term for the log."""
    del labels, step
    x, target = (side['features'][self.tap] for side in (student, teacher))
    if x.shape[1:3] != target.shape[1:3]:
      x = jax.image.resize(x, (*target.shape[:3], x.shape[-1]), 'linear')
    seen = jax.random.bernoulli(
      self.make_rng('distill'), 1 - self.hidden, (*x.shape[:3], 1)
    )
    x = nn.Conv(target.shape[-1], (3, 3), name='restore')(
      x * seen.astype(x.dtype)
    )
    x, target = x.astype(jnp.float32), target.astype(jnp.float32)
    masked = jnp.mean((x - target) ** 2)

    def unit(pixels):
      mean = jnp.mean(pixels, (1, 2))
      return mean / (jnp.linalg.norm(mean, axis=-1, keepdims=True) + 1e-6)

    ours, theirs = unit(x), unit(target)
    shape = (self.size, target.shape[-1])
    bank = self.variable('memory', 'bank', jnp.zeros, shape)
    likeness = [vectors @ bank.value.T for vectors in (ours, theirs)]
    memory = jnp.mean((likeness[0] - likeness[1]) ** 2)
    if train and self.is_mutable_collection('memory'):
      bank.value = jnp.concatenate([theirs, bank.value])[: self.size]
    return masked + memory, {'masked': masked, 'memory': memory}
