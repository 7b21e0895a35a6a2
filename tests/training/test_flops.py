# SPDX-License-Identifier: Apache-2.0
"""The count of operations against published tables."""

import pytest

from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.models.network import count_gflops


# Multiply-adds in 1e9 at 513 x 513, 21 classes; METHOD section 2.9.
@pytest.mark.parametrize(
  ('backbone', 'gmacs'),
  [
    ('resnet18', 42.67),
    ('resnet34', 56.67),
    ('resnet50', 72.20),
    ('resnet101', 92.82),
    ('mobilenet_v2', 27.07),
  ],
)
def test_multiply_adds_of_the_reference(backbone, gmacs):
  network = DeepLabV3Plus(backbone, num_classes=21)
  # The table has two decimals.
  assert count_gflops(network, 513, 513) / 2 == pytest.approx(gmacs, abs=6e-3)


def test_operations_scale_with_the_area():
  network = DeepLabV3Plus('resnet18', num_classes=11)
  small, large = count_gflops(network, 64, 64), count_gflops(network, 128, 128)
  # All but the pooled branch of ASPP, which sees one pixel.
  assert large == pytest.approx(4 * small, rel=1e-3)
