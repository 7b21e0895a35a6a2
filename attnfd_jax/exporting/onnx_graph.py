# SPDX-License-Identifier: Apache-2.0
"""DeepLabV3Plus as an ONNX graph, with the extra `onnx`.

One function here per module of models/, in its order; `export` compares the
two on images each time. Maps are [b, c, h, w] inside the graph, as ONNX has
them. Norms with running statistics are part of their convolutions.
"""

import functools
import json

import numpy as np
import onnx

from attnfd_jax.models import layers
from attnfd_jax.models import mobilenet_v2
from attnfd_jax.models import resnet
from attnfd_jax.models.deeplab import IMAGE_MEAN
from attnfd_jax.models.deeplab import IMAGE_STD

# Of 2022; later ones bring nothing that is needed here, and fewer readers.
_OPSET, _IR_VERSION = 17, 8
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


class Graph:
  """Operations so far; maps are known by the names of their values.

  Args:
    variables: of the network.
  """

  def __init__(self, variables):
    self.variables = variables
    self.nodes, self.constants = [], []

  def value(self, collection, path):
    """The array at 'a/b/c' in a collection, or the dict."""
    keys = path.split('/')
    return functools.reduce(
      lambda x, key: x[key], keys, self.variables[collection]
    )

  def constant(self, array):
    name = f'constant_{len(self.constants)}'
    array = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
    self.constants.append(array)
    return name

  def op(self, kind, *inputs, output=None, **attributes):
    """Adds one operation; returns the name of its result."""
    output = output or f'{kind.lower()}_{len(self.nodes)}'
    self.nodes.append(
      onnx.helper.make_node(kind, inputs, [output], output, **attributes)
    )
    return output

  def conv(
    self, x, path, *, norm=None, strides=1, dilation=1, padding=None, groups=1
  ):
    """layers.Conv at `path`, with the layers.BatchNorm at `norm` inside."""
    params = self.value('params', path)
    kernel = np.asarray(params['kernel'], np.float64)
    bias = params.get('bias')
    if norm:
      scale, shift = (self.value('params', norm)[k] for k in ('scale', 'bias'))
      mean, var = (self.value('batch_stats', norm)[k] for k in ('mean', 'var'))
      factor = scale / np.sqrt(np.float64(var) + layers.BatchNorm.epsilon)
      kernel, bias = kernel * factor, shift - mean * factor
    size = kernel.shape[0]
    if padding is None:
      padding = dilation * (size - 1) // 2
    weights = [np.float32(kernel.transpose(3, 2, 0, 1))]
    if bias is not None:
      weights.append(np.float32(bias))
    return self.op(
      'Conv',
      x,
      *map(self.constant, weights),
      kernel_shape=[size] * 2,
      strides=[strides] * 2,
      dilations=[dilation] * 2,
      pads=[padding] * 4,
      group=groups,
    )

  def conv_norm(self, x, path, **options):
    return self.conv(x, f'{path}/conv', norm=f'{path}/bn', **options)

  def conv_norm_relu(self, x, path, **options):
    return self.op('Relu', self.conv_norm(x, path, **options))

  def relu6(self, x):
    bounds = (self.constant(np.float32(bound)) for bound in (0, 6))
    return self.op('Clip', x, *bounds)

  def resize(self, x, like):
    """resizing.resize to the height and width of another map."""
    size = self.op(
      'Concat',
      self.op('Shape', x, end=2),
      self.op('Shape', like, start=2),
      axis=0,
    )
    return self.op(
      'Resize',
      x,
      '',
      '',
      size,
      mode='linear',
      coordinate_transformation_mode='align_corners',
    )


def _resnet_block(g, x, path, *, strides, dilation):
  x = g.op('Relu', x)
  names = g.value('params', path)
  if 'conv3' in names:
    y = g.conv_norm_relu(x, f'{path}/conv1')
    y = g.conv_norm_relu(y, f'{path}/conv2', strides=strides, dilation=dilation)
    y = g.conv_norm(y, f'{path}/conv3')
  else:
    y = g.conv_norm_relu(x, f'{path}/conv1', strides=strides, dilation=dilation)
    y = g.conv_norm(y, f'{path}/conv2', dilation=dilation)
  if 'downsample' in names:
    x = g.conv_norm(x, f'{path}/downsample', strides=strides)
  return g.op('Add', x, y)


def _resnet(g, x, output_stride):
  """Stride-4 map and last map, before its ReLU."""
  names = g.value('params', 'backbone')
  x = g.conv_norm_relu(x, 'backbone/stem', strides=2)
  x = g.op('MaxPool', x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
  sizes = [sum(x.startswith(f'layer{i}_') for x in names) for i in range(1, 5)]
  bottleneck = 'conv3' in names['layer1_0']
  table = resnet.block_table(sizes, bottleneck, output_stride)
  for name, stage, strides, dilation in table:
    if stage == 2 and strides == 2:
      low_level = g.op('Relu', x)
    path = f'backbone/{name}'
    x = _resnet_block(g, x, path, strides=strides, dilation=dilation)
  return low_level, x


def _inverted_residual(g, x, path, *, strides, dilation):
  names = g.value('params', path)
  # Before the expansion, as in models/mobilenet_v2.py.
  pads = [0, 0, dilation, dilation] * 2
  y = g.op('Pad', x, g.constant(np.int64(pads)))
  if 'expand' in names:
    y = g.relu6(g.conv_norm(y, f'{path}/expand'))
  hidden = names['depthwise']['conv']['kernel'].shape[-1]
  y = g.conv_norm(
    y,
    f'{path}/depthwise',
    strides=strides,
    dilation=dilation,
    padding=0,
    groups=hidden,
  )
  return g.conv_norm(g.relu6(y), f'{path}/project')


def _mobilenet_v2(g, x, output_stride):
  """Stride-4 map and last map; both are linear."""
  x = g.relu6(g.conv_norm(x, 'backbone/stem', strides=2))
  channels = g.value('params', 'backbone/stem/conv/kernel').shape[-1]
  rows = enumerate(mobilenet_v2.block_table(output_stride), start=1)
  for index, (_, _, strides, dilation) in rows:
    path = f'backbone/block{index}'
    y = _inverted_residual(g, x, path, strides=strides, dilation=dilation)
    before = channels
    kernel = g.value('params', f'{path}/project/conv/kernel')
    channels = kernel.shape[-1]
    x = g.op('Add', x, y) if strides == 1 and channels == before else y
    if index == 3:
      low_level = x
  return low_level, x


def _cbam(g, x, path):
  """models.attention.CBAM, which is trained and in the forward path."""
  params = g.value('params', path)

  def dense(x, name):
    kernel = params[f'{name}_kernel'].T[..., None, None]
    return g.op(
      'Conv', x, g.constant(kernel), g.constant(params[f'{name}_bias'])
    )

  gates = [
    dense(g.op('Relu', dense(g.op(kind, x), 'mlp_reduce')), 'mlp_expand')
    for kind in ('GlobalAveragePool', 'GlobalMaxPool')
  ]
  x = g.op('Mul', x, g.op('Sigmoid', g.op('Add', *gates)))
  pooled = [g.op(kind, x, axes=[1]) for kind in ('ReduceMax', 'ReduceMean')]
  gate = g.conv(
    g.op('Concat', *pooled, axis=1),
    f'{path}/spatial_conv',
    norm=f'{path}/spatial_bn',
  )
  return g.op('Mul', x, g.op('Sigmoid', gate))


def _aspp(g, x, output_stride):
  rate = 96 // output_stride
  branches = [g.conv_norm_relu(x, 'aspp/point')]
  for i in (1, 2, 3):
    branches.append(g.conv_norm_relu(x, f'aspp/atrous{i}', dilation=i * rate))
  pooled = g.conv_norm_relu(g.op('GlobalAveragePool', x), 'aspp/pool')
  branches.append(g.op('Expand', pooled, g.op('Shape', branches[0])))
  return g.conv_norm_relu(g.op('Concat', *branches, axis=1), 'aspp/merge')


def _decoder(g, low_level, context):
  detail = g.conv_norm_relu(low_level, 'decoder/low_level')
  context = g.resize(context, low_level)
  x = g.op('Concat', context, detail, axis=1)
  return g.conv_norm_relu(g.conv_norm_relu(x, 'decoder/conv1'), 'decoder/conv2')


def _network(g, image, network):
  """Logits [b, k, h, w] of normalised images [b, 3, h, w]."""

  def refine(tap, x):
    if not network.in_path_attention:
      return x
    return _cbam(g, x, f'attention_{tap}')

  if network.backbone.startswith('mobilenet'):
    low_level, x = _mobilenet_v2(g, image, network.output_stride)
    x = refine('backbone', x)
  else:
    low_level, x = _resnet(g, image, network.output_stride)
    x = g.op('Relu', refine('backbone', x))
  x = refine('aspp', _aspp(g, x, network.output_stride))
  x = refine('decoder', _decoder(g, low_level, x))
  return g.resize(g.conv(x, 'classifier'), image)


def make_model(network, variables, *, uint8, argmax, metadata):
  """An onnx.ModelProto with the input 'image' [b, h, w, 3], of any size.

  Args:
    network: DeepLabV3Plus.
    variables: of the network, arrays of NumPy.
    uint8: takes RGB of uint8 and normalises it, else normalised float32.
    argmax: 'ids', uint8 [b, h, w]; else 'logits', float32 [b, h, w, k].
    metadata: {name: value of JSON}, written into the file.
  """
  g = Graph(variables)
  x, types = 'image', onnx.TensorProto
  if uint8:
    x = g.op('Cast', x, to=types.FLOAT)
    # The operations of models.deeplab.normalise.
    x = g.op('Div', x, g.constant(np.float32(255)))
    x = g.op('Sub', x, g.constant(np.float32(IMAGE_MEAN)))
    x = g.op('Div', x, g.constant(np.float32(IMAGE_STD)))
  logits = _network(g, g.op('Transpose', x, perm=_TO_NCHW), network)
  size, inputs = ('b', 'h', 'w'), types.UINT8 if uint8 else types.FLOAT
  if argmax:
    ids = g.op('ArgMax', logits, axis=1, keepdims=0)
    output = g.op('Cast', ids, to=types.UINT8, output='ids')
    found = onnx.helper.make_tensor_value_info(output, types.UINT8, size)
  else:
    output = g.op('Transpose', logits, perm=_TO_NHWC, output='logits')
    shape = (*size, network.num_classes)
    found = onnx.helper.make_tensor_value_info(output, types.FLOAT, shape)
  image = onnx.helper.make_tensor_value_info('image', inputs, (*size, 3))
  graph = onnx.helper.make_graph(
    g.nodes, network.backbone, [image], [found], g.constants
  )
  model = onnx.helper.make_model(
    graph,
    producer_name='attnfd_jax',
    ir_version=_IR_VERSION,
    opset_imports=[onnx.helper.make_opsetid('', _OPSET)],
  )
  onnx.helper.set_model_props(
    model, {key: json.dumps(value) for key, value in metadata.items()}
  )
  onnx.checker.check_model(model)
  return model
