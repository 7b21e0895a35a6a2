# SPDX-License-Identifier: Apache-2.0
"""A student of your own: a small U-Net, `student.network=.../unet.py:UNet`."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class UNet(nn.Module):
  """Three scales with skips; sides of images are multiples of 4."""

  num_classes: int
  dtype: jnp.dtype | None = None
  width: int = 16

  @nn.compact
  def __call__(self, image, *, train):
    """Normalized [b, h, w, 3] -> Outputs, see attnfd_jax/models/network.py."""

    def block(x, features):
      x = nn.Conv(features, (3, 3), use_bias=False, dtype=self.dtype)(x)
      return nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x))

    fine = block(image, self.width)
    middle = block(nn.max_pool(fine, (2, 2), (2, 2)), 2 * self.width)
    x = bottom = block(nn.max_pool(middle, (2, 2), (2, 2)), 4 * self.width)
    for skip in (middle, fine):
      x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), 'linear')
      x = block(jnp.concatenate([x, skip], -1), skip.shape[-1])
    logits = nn.Conv(self.num_classes, (1, 1), dtype=self.dtype)(x)
    features = {'backbone': bottom, 'decoder': x}
    return {'logits': logits.astype(jnp.float32), 'features': features}
