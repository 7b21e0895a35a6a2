# SPDX-License-Identifier: Apache-2.0
"""DeepLabV3Plus as an ONNX graph, with the extra `onnx`.

One function here per module of models/, in its order. Maps are [b, c, h, w]
inside, as ONNX has them, and norms are part of their convolutions.
"""

import json

from flax import traverse_util
import numpy as np
import onnx

from attnfd_jax.models import (
  deeplab,
  efficientnet_lite,
  layers,
  mobilenet_v2,
  resnet,
)

# Of 2022; later ones bring nothing that is needed here, and fewer readers.
_OPSET, _IR_VERSION = 17, 8


def _fold_norms(params, stats, trunk_epsilon):
  """{path of a Conv or ConvNorm: (kernel [o, i, h, w], bias [o])}."""
  found = {}
  for name, kernel in params.items():
    path, _, leaf = name.rpartition('/')
    if leaf != 'kernel':
      continue
    kernel = np.float64(kernel).transpose(3, 2, 0, 1)
    norm = f'{path.removesuffix("conv")}bn'
    if f'{norm}/scale' in params:
      epsilon = layers.BatchNorm.epsilon
      epsilon = trunk_epsilon if path.startswith('backbone/') else epsilon
      variance = np.float64(stats[f'{norm}/var']) + epsilon
      factor = params[f'{norm}/scale'] / np.sqrt(variance)
      kernel = kernel * factor[:, None, None, None]
      bias = params[f'{norm}/bias'] - stats[f'{norm}/mean'] * factor
    else:
      bias = params[f'{path}/bias']
    found[path.removesuffix('/conv')] = np.float32(kernel), np.float32(bias)
  return found


class Graph:
  """Operations so far; maps are known by the names of their values."""

  def __init__(self, variables, trunk_epsilon):
    self.params, stats = (
      traverse_util.flatten_dict(variables[part], sep='/')
      for part in ('params', 'batch_stats')
    )
    self.convs = _fold_norms(self.params, stats, trunk_epsilon)
    self.nodes, self.constants = [], []

  def op(self, kind, *inputs, output=None, **attributes):
    """Adds one operation on names or constant arrays; names its result."""
    names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
    output = output or f'{kind.lower()}_{len(self.nodes)}'
    node = onnx.helper.make_node(kind, names, [output], output, **attributes)
    self.nodes.append(node)
    return output

  def _constant(self, array):
    name = f'constant_{len(self.constants)}'
    array = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
    self.constants.append(array)
    return name

  def conv(self, x, path, *, strides=1, dilation=1, padding=None):
    """layers.Conv or layers.ConvNorm at `path`; `padding` may be 'same'."""
    kernel, bias = self.convs[path]
    size, depthwise = kernel.shape[-1], path.endswith('depthwise')
    form = {'kernel_shape': size, 'strides': strides, 'dilations': dilation}
    form = {name: [n] * 2 for name, n in form.items()}
    form['group'] = len(kernel) if depthwise else 1
    if padding == 'same' and strides > 1:
      form['auto_pad'] = 'SAME_UPPER'  # By the size, which is not known here.
    else:
      padding = dilation * (size - 1) // 2 if padding in (None, 'same') else 0
      form['pads'] = [padding] * 4
    # By its path, for whoever looks at the file or names one of its layers.
    return self.op('Conv', x, kernel, bias, output=path, **form)

  def conv_relu(self, x, path, **options):
    return self.op('Relu', self.conv(x, path, **options))

  def relu6(self, x):
    return self.op('Clip', x, np.float32(0), np.float32(6))

  def resize(self, x, like):
    """resizing.resize to the height and width of another map."""
    sizes = self.op('Shape', x, end=2), self.op('Shape', like, start=2)
    size = self.op('Concat', *sizes, axis=0)
    corners = {'coordinate_transformation_mode': 'align_corners'}
    return self.op('Resize', x, '', '', size, mode='linear', **corners)


def _resnet_block(g, x, path, *, strides, dilation):
  x = g.op('Relu', x)
  if f'{path}/conv3' in g.convs:
    y = g.conv_relu(x, f'{path}/conv1')
    y = g.conv_relu(y, f'{path}/conv2', strides=strides, dilation=dilation)
    y = g.conv(y, f'{path}/conv3')
  else:
    y = g.conv_relu(x, f'{path}/conv1', strides=strides, dilation=dilation)
    y = g.conv(y, f'{path}/conv2', dilation=dilation)
  if f'{path}/downsample' in g.convs:
    x = g.conv(x, f'{path}/downsample', strides=strides)
  return g.op('Add', x, y)


def _resnet(g, x, module):
  x = g.conv_relu(x, 'backbone/stem', strides=2)
  x = g.op('MaxPool', x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
  form = module.stage_sizes, module.bottleneck, module.output_stride
  for name, stage, strides, dilation in resnet.block_table(*form):
    if stage == 2 and strides == 2:
      low_level = g.op('Relu', x)
    path = f'backbone/{name}'
    x = _resnet_block(g, x, path, strides=strides, dilation=dilation)
  return low_level, x


def _inverted_residual(g, x, path, *, strides, dilation):
  # Before the expansion, as in models/mobilenet_v2.py.
  y = g.op('Pad', x, np.int64([0, 0, dilation, dilation] * 2))
  if f'{path}/expand' in g.convs:
    y = g.relu6(g.conv(y, f'{path}/expand'))
  form = {'strides': strides, 'dilation': dilation, 'padding': 0}
  y = g.conv(y, f'{path}/depthwise', **form)
  return g.conv(g.relu6(y), f'{path}/project')


def _mobilenet_v2(g, x, module):
  x = g.relu6(g.conv(x, 'backbone/stem', strides=2))
  features = len(g.convs['backbone/stem'][0])
  rows = enumerate(mobilenet_v2.block_table(module.output_stride), start=1)
  for index, (_, _, strides, dilation) in rows:
    path = f'backbone/block{index}'
    y = _inverted_residual(g, x, path, strides=strides, dilation=dilation)
    inputs, features = features, len(g.convs[f'{path}/project'][0])
    x = g.op('Add', x, y) if strides == 1 and inputs == features else y
    if index == 3:
      low_level = x
  return low_level, x


def _efficientnet_lite(g, x, module):
  x = g.relu6(g.conv(x, 'backbone/stem', strides=2, padding='same'))
  features = len(g.convs['backbone/stem'][0])
  table = efficientnet_lite.block_table(module.depth, module.output_stride)
  for index, (stage, *_, strides, dilation) in enumerate(table):
    path, y = f'backbone/block{index}', x
    if f'{path}/expand' in g.convs:
      y = g.relu6(g.conv(y, f'{path}/expand'))
    form = {'strides': strides, 'dilation': dilation, 'padding': 'same'}
    y = g.relu6(g.conv(y, f'{path}/depthwise', **form))
    y = g.conv(y, f'{path}/project')
    inputs, features = features, len(g.convs[f'{path}/project'][0])
    x = g.op('Add', x, y) if strides == 1 and inputs == features else y
    if stage == 2:
      low_level = x
  return low_level, x


_TRUNKS = {
  resnet.ResNet: _resnet,
  mobilenet_v2.MobileNetV2: _mobilenet_v2,
  efficientnet_lite.EfficientNetLite: _efficientnet_lite,
}


def _cbam(g, x, path):
  """models.attention.CBAM, which is trained and in the forward path."""

  def dense(x, name, pool):
    kernel, bias = (g.params[f'{path}/{name}_{k}'] for k in ('kernel', 'bias'))
    output = f'{path}/{name}_{pool}'
    return g.op('Conv', x, kernel.T[..., None, None], bias, output=output)

  gates = []
  for pool, kind in (('mean', 'GlobalAveragePool'), ('max', 'GlobalMaxPool')):
    hidden = dense(g.op(kind, x), 'mlp_reduce', pool)
    hidden = g.op('Relu', hidden, output=f'{path}/mlp_{pool}')
    gates.append(dense(hidden, 'mlp_expand', pool))
  gate = g.op('Add', *gates, output=f'{path}/mlp')
  x = g.op('Mul', x, g.op('Sigmoid', gate))
  pooled = [g.op(kind, x, axes=[1]) for kind in ('ReduceMax', 'ReduceMean')]
  pooled = g.op('Concat', *pooled, axis=1, output=f'{path}/pooled')
  gate = g.conv(pooled, f'{path}/spatial_conv')
  return g.op('Mul', x, g.op('Sigmoid', gate))


def _aspp(g, x, output_stride):
  rate = 96 // output_stride
  branches = [g.conv_relu(x, 'aspp/point')]
  for i in (1, 2, 3):
    branches.append(g.conv_relu(x, f'aspp/atrous{i}', dilation=i * rate))
  pooled = g.conv_relu(g.op('GlobalAveragePool', x), 'aspp/pool')
  branches.append(g.op('Expand', pooled, g.op('Shape', branches[0])))
  return g.conv_relu(g.op('Concat', *branches, axis=1), 'aspp/merge')


def _decoder(g, low_level, context):
  detail = g.conv_relu(low_level, 'decoder/low_level')
  context = g.resize(context, low_level)
  x = g.op('Concat', context, detail, axis=1)
  return g.conv_relu(g.conv_relu(x, 'decoder/conv1'), 'decoder/conv2')


def _network(g, image, network, module):
  """Logits [b, k, h, w] of normalised images [b, 3, h, w]."""

  def refine(tap, x):
    return _cbam(g, x, f'attention_{tap}') if network.in_path_attention else x

  low_level, x = _TRUNKS[type(module)](g, image, module)
  x = refine('backbone', x)
  if module.relu_after_tap:
    x = g.op('Relu', x)
  x = refine('aspp', _aspp(g, x, network.output_stride))
  x = refine('decoder', _decoder(g, low_level, x))
  return g.resize(g.conv(x, 'classifier'), image)


def _input_scaling(module, *, uint8):
  """Factor and summand, [3] each, from the images that a file is given to what
  the first convolution of `module` sees.
  """
  factor, summand = np.ones(3), np.zeros(3)
  if uint8:  # models.deeplab.normalise.
    factor = 1 / (255 * np.array(layers.IMAGE_STD))
    summand = -np.array(layers.IMAGE_MEAN) / layers.IMAGE_STD
  if isinstance(module, efficientnet_lite.EfficientNetLite):
    scale = np.array(efficientnet_lite.IMAGE_SCALE)
    factor = factor * scale
    summand = summand * scale + efficientnet_lite.IMAGE_SHIFT
  return factor, summand


def _scale_input(g, x, factor, summand):
  """`factor` becomes part of the first kernel; `summand` stays an operation,
  for that convolution pads with zeros.
  """
  kernel, bias = g.convs['backbone/stem']
  kernel = np.float32(kernel * factor[:, None, None])
  g.convs['backbone/stem'] = kernel, bias
  if not summand.any():
    return x
  shift = np.float32(summand / factor)[:, None, None]
  return g.op('Add', x, shift, output='input')


def make_model(network, variables, *, uint8, argmax, metadata):
  """An onnx.ModelProto that does what stablehlo.make_forward does: from 'image'
  to 'ids' or 'logits'. `metadata` is {name: value of JSON}, stored in it.
  """
  module = deeplab.BACKBONES[network.backbone]
  module = module(output_stride=network.output_stride)
  g = Graph(variables, getattr(module, 'epsilon', layers.BatchNorm.epsilon))
  types, info = onnx.TensorProto, onnx.helper.make_tensor_value_info
  x, size = 'image', ('b', 'h', 'w')
  image = info(x, types.UINT8 if uint8 else types.FLOAT, (*size, 3))
  x = g.op('Transpose', x, perm=(0, 3, 1, 2))  # Of bytes it is faster.
  x = g.op('Cast', x, to=types.FLOAT) if uint8 else x
  x = _scale_input(g, x, *_input_scaling(module, uint8=uint8))
  logits = _network(g, x, network, module)
  if argmax:
    ids = g.op('ArgMax', logits, axis=1, keepdims=0)
    g.op('Cast', ids, to=types.UINT8, output='ids')
    found = info('ids', types.UINT8, size)
  else:
    g.op('Transpose', logits, perm=(0, 2, 3, 1), output='logits')
    found = info('logits', types.FLOAT, (*size, network.num_classes))
  name, opsets = network.backbone, [onnx.helper.make_opsetid('', _OPSET)]
  graph = onnx.helper.make_graph(g.nodes, name, [image], [found], g.constants)
  model = onnx.helper.make_model(graph, opset_imports=opsets)
  model.producer_name, model.ir_version = 'attnfd_jax', _IR_VERSION
  metadata = {key: json.dumps(value) for key, value in metadata.items()}
  onnx.helper.set_model_props(model, metadata)
  onnx.checker.check_model(model)
  return model
