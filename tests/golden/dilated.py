# SPDX-License-Identifier: Apache-2.0
"""The peer of EfficientNet-Lite at output strides that it does not have."""


def take_strides(network, output_stride):
  """Makes dilation of the strides beyond, in all that follows them."""
  stride, dilation = 2, 1
  for block in network._blocks:
    layer = block._depthwise_conv
    layer.dilation = (dilation, dilation)
    if layer.stride[0] == 2 and stride == output_stride:
      layer.stride, dilation = (1, 1), 2 * dilation
    elif layer.stride[0] == 2:
      stride *= 2
  return network
