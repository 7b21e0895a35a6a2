# SPDX-License-Identifier: Apache-2.0
"""Probabilities averaged over scales and mirror images."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Averaged:
  """A network whose probabilities are means over scales and mirror images.

  Takes the place of a network wherever `apply` is called for its logits;
  hashable, so that compiled steps are shared.
  """

  network: object  # Called with (variables, image, train=False).
  scales: tuple[float, ...] = (1.0,)  # Each is one more forward pass, or two.
  flip: bool = False  # Average with the mirror image as well.

  def apply(self, variables, image, *, train):
    """{'logits'}: log of the mean probabilities, float32 [b, h, w, k]."""
    b, h, w, _ = image.shape
    total = 0.0
    for scale in self.scales:
      # Antialiased when it shrinks, half-pixel centers there and back.
      size = [max(round(n * scale), 1) for n in (h, w)]
      scaled = jax.image.resize(image, (b, *size, 3), 'linear')
      for mirrored in (False, True)[: 1 + self.flip]:
        x = scaled[:, :, ::-1] if mirrored else scaled
        logits = self.network.apply(variables, x, train=train)['logits']
        logits = logits[:, :, ::-1] if mirrored else logits
        logits = jax.image.resize(logits, (b, h, w, logits.shape[-1]), 'linear')
        total = total + jax.nn.softmax(logits)
    mean = total / (len(self.scales) * (1 + self.flip))
    return {'logits': jnp.log(jnp.maximum(mean, jnp.finfo(mean.dtype).tiny))}
