# SPDX-License-Identifier: Apache-2.0
"""Exports DeepLabV3Plus as an ONNX graph; needs the extra `onnx`.

One function per module of models/, in the same order. Feature maps are [b, c,
h, w], as in ONNX, and norms are folded into their convolutions.
"""

from collections.abc import Mapping
import json
from typing import Any

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
from attnfd_jax.types import Variables

# From 2022: newer ones add nothing needed here, and fewer programs read them.
_OPSET, _IR_VERSION = 17, 8


def _fold_norms(
  params: Mapping[str, np.ndarray],
  stats: Mapping[str, np.ndarray],
  trunk_epsilon: float,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{path of a Conv or ConvNorm: (kernel [o, i, h, w], bias [o])}."""
  convs = {}
  for name, kernel in params.items():
    path, _, leaf = name.rpartition('/')
    if leaf != 'kernel':
      continue
    kernel = np.asarray(kernel, np.float64).transpose(3, 2, 0, 1)
    norm = f'{path.removesuffix("conv")}bn'
    if f'{norm}/scale' in params:
      epsilon = layers.BatchNorm.epsilon
      epsilon = trunk_epsilon if path.startswith('backbone/') else epsilon
      variance = np.asarray(stats[f'{norm}/var'], np.float64) + epsilon
      factor = params[f'{norm}/scale'] / np.sqrt(variance)
      kernel = kernel * factor[:, None, None, None]
      bias = params[f'{norm}/bias'] - stats[f'{norm}/mean'] * factor
    else:
      bias = params[f'{path}/bias']
    kernel, bias = np.asarray(kernel, np.float32), np.asarray(bias, np.float32)
    convs[path.removesuffix('/conv')] = kernel, bias
  return convs


class Graph:
  """A graph under construction; feature maps are names of values.

  Attributes:
    params: {path: array} of the network.
    convs: {path: (kernel, bias)} of convolutions with their norms folded in.
    nodes: operations so far.
    constants: arrays so far.
  """

  def __init__(self, variables: Variables, trunk_epsilon: float):
    # Any: the annotations of Flax allow empty nodes.
    params: Any = traverse_util.flatten_dict(variables['params'], sep='/')
    stats: Any = traverse_util.flatten_dict(variables['batch_stats'], sep='/')
    self.params: dict[str, np.ndarray] = params
    self.convs = _fold_norms(params, stats, trunk_epsilon)
    self.nodes, self.constants = [], []

  def op(
    self,
    kind: str,
    *inputs: str | np.ndarray | np.generic,
    output: str | None = None,
    **attributes: Any,
  ) -> str:
    """Adds an operation on names or constants; returns the output name."""
    names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
    output = output or f'{kind.lower()}_{len(self.nodes)}'
    node = onnx.helper.make_node(kind, names, [output], output, **attributes)
    self.nodes.append(node)
    return output

  def _constant(self, array: np.ndarray | np.generic) -> str:
    name = f'constant_{len(self.constants)}'
    array = np.ascontiguousarray(array)
    self.constants.append(onnx.numpy_helper.from_array(array, name))
    return name

  def conv(
    self,
    x: str,
    path: str,
    *,
    strides: int = 1,
    dilation: int = 1,
    padding: int | str | None = None,
  ) -> str:
    """layers.Conv or layers.ConvNorm at `path`; `padding` may be 'same'."""
    kernel, bias = self.convs[path]
    size, depthwise = kernel.shape[-1], path.endswith('depthwise')
    form: dict[str, Any] = {
      'kernel_shape': [size] * 2,
      'strides': [strides] * 2,
      'dilations': [dilation] * 2,
      'group': len(kernel) if depthwise else 1,
    }
    if padding == 'same' and strides > 1:
      form['auto_pad'] = 'SAME_UPPER'  # Depends on the size of the image.
    else:
      padding = dilation * (size - 1) // 2 if padding in (None, 'same') else 0
      form['pads'] = [padding] * 4
    # Named by its path, for --keep_float and for viewers of the file.
    return self.op('Conv', x, kernel, bias, output=path, **form)

  def conv_relu(self, x: str, path: str, **options: Any) -> str:
    """`conv`, then a ReLU."""
    return self.op('Relu', self.conv(x, path, **options))

  def relu6(self, x: str) -> str:
    """ReLU6."""
    return self.op('Clip', x, np.float32(0), np.float32(6))

  def resize(self, x: str, like: str) -> str:
    """resizing.resize to the height and width of another feature map."""
    sizes = self.op('Shape', x, end=2), self.op('Shape', like, start=2)
    size = self.op('Concat', *sizes, axis=0)
    corners = {'coordinate_transformation_mode': 'align_corners'}
    return self.op('Resize', x, '', '', size, mode='linear', **corners)


def _resnet_block(
  g: Graph, x: str, path: str, *, strides: int, dilation: int
) -> str:
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


def _resnet(g: Graph, x: str, module: resnet.ResNet) -> tuple[str, str]:
  x = g.conv_relu(x, 'backbone/stem', strides=2)
  x = g.op('MaxPool', x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
  low_level = ''  # Of no value: onnx.checker would refuse it.
  form = module.stage_sizes, module.bottleneck, module.output_stride
  for name, stage, strides, dilation in resnet.block_table(*form):
    if stage == 2 and strides == 2:
      low_level = g.op('Relu', x)
    path = f'backbone/{name}'
    x = _resnet_block(g, x, path, strides=strides, dilation=dilation)
  return low_level, x


def _inverted_residual(
  g: Graph, x: str, path: str, *, strides: int, dilation: int
) -> str:
  # Before the expansion, as in models/mobilenet_v2.py.
  pads = np.array([0, 0, dilation, dilation] * 2, np.int64)
  y = g.op('Pad', x, pads)
  if f'{path}/expand' in g.convs:
    y = g.relu6(g.conv(y, f'{path}/expand'))
  form = {'strides': strides, 'dilation': dilation, 'padding': 0}
  y = g.conv(y, f'{path}/depthwise', **form)
  return g.conv(g.relu6(y), f'{path}/project')


def _mobilenet_v2(
  g: Graph, x: str, module: mobilenet_v2.MobileNetV2
) -> tuple[str, str]:
  low_level, x = '', g.relu6(g.conv(x, 'backbone/stem', strides=2))
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


def _efficientnet_lite(
  g: Graph, x: str, module: efficientnet_lite.EfficientNetLite
) -> tuple[str, str]:
  x = g.relu6(g.conv(x, 'backbone/stem', strides=2, padding='same'))
  low_level = ''
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


# Functions of (graph, image, module) that return the low-level and last map.
_TRUNKS = {
  resnet.ResNet: _resnet,
  mobilenet_v2.MobileNetV2: _mobilenet_v2,
  efficientnet_lite.EfficientNetLite: _efficientnet_lite,
}


def _cbam(g: Graph, x: str, path: str) -> str:
  """models.attention.CBAM inside the forward path."""

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


def _aspp(g: Graph, x: str, output_stride: int) -> str:
  rate = 96 // output_stride
  branches = [g.conv_relu(x, 'aspp/point')]
  for i in (1, 2, 3):
    branches.append(g.conv_relu(x, f'aspp/atrous{i}', dilation=i * rate))
  pooled = g.conv_relu(g.op('GlobalAveragePool', x), 'aspp/pool')
  branches.append(g.op('Expand', pooled, g.op('Shape', branches[0])))
  return g.conv_relu(g.op('Concat', *branches, axis=1), 'aspp/merge')


def _decoder(g: Graph, low_level: str, context: str) -> str:
  detail = g.conv_relu(low_level, 'decoder/low_level')
  context = g.resize(context, low_level)
  x = g.op('Concat', context, detail, axis=1)
  return g.conv_relu(g.conv_relu(x, 'decoder/conv1'), 'decoder/conv2')


def _network(
  g: Graph, image: str, network: deeplab.DeepLabV3Plus, module: Any
) -> str:
  """Logits [b, k, h, w] of normalized images [b, 3, h, w]."""

  def refine(tap, x):
    return _cbam(g, x, f'attention_{tap}') if network.in_path_attention else x

  low_level, x = _TRUNKS[type(module)](g, image, module)
  x = refine('backbone', x)
  if module.relu_after_tap:
    x = g.op('Relu', x)
  x = refine('aspp', _aspp(g, x, network.output_stride))
  x = refine('decoder', _decoder(g, low_level, x))
  return g.resize(g.conv(x, 'classifier'), image)


def _input_scaling(
  module: Any, *, uint8: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Factor and summand, [3] each, from the input to the first convolution."""
  factor, summand = np.ones(3), np.zeros(3)
  if uint8:  # models.deeplab.normalize.
    factor = 1 / (255 * np.array(layers.IMAGE_STD))
    summand = -np.array(layers.IMAGE_MEAN) / layers.IMAGE_STD
  if isinstance(module, efficientnet_lite.EfficientNetLite):
    scale = np.array(efficientnet_lite.IMAGE_SCALE)
    factor = factor * scale
    summand = summand * scale + efficientnet_lite.IMAGE_SHIFT
  return factor, summand


def _scale_input(
  g: Graph, x: str, factor: np.ndarray, summand: np.ndarray
) -> str:
  """Applies `_input_scaling`; the factor is folded into the first kernel.

  The summand remains an operation, because the convolution pads with zeros.
  """
  kernel, bias = g.convs['backbone/stem']
  kernel = np.asarray(kernel * factor[:, None, None], np.float32)
  g.convs['backbone/stem'] = kernel, bias
  if not summand.any():
    return x
  shift = np.asarray(summand / factor, np.float32)[:, None, None]
  return g.op('Add', x, shift, output='input')


def make_model(
  network: deeplab.DeepLabV3Plus,
  variables: Variables,
  *,
  uint8: bool,
  argmax: bool,
  metadata: Mapping[str, Any],
) -> onnx.ModelProto:
  """The ONNX equivalent of stablehlo.make_forward.

  Its input is 'image', its output 'ids' or 'logits'.

  Args:
    network: to export.
    variables: of the network.
    uint8: see stablehlo.make_forward.
    argmax: see stablehlo.make_forward.
    metadata: {name: value}, stored in the model as JSON.
  """
  make_module: Any = deeplab.BACKBONES[network.backbone]
  module = make_module(output_stride=network.output_stride)
  g = Graph(variables, getattr(module, 'epsilon', layers.BatchNorm.epsilon))
  types, info = onnx.TensorProto, onnx.helper.make_tensor_value_info
  x, size = 'image', ('b', 'h', 'w')
  image = info(x, types.UINT8 if uint8 else types.FLOAT, (*size, 3))
  x = g.op('Transpose', x, perm=(0, 3, 1, 2))  # Faster before the cast.
  x = g.op('Cast', x, to=types.FLOAT) if uint8 else x
  x = _scale_input(g, x, *_input_scaling(module, uint8=uint8))
  logits = _network(g, x, network, module)
  if argmax:
    ids = g.op('ArgMax', logits, axis=1, keepdims=0)
    g.op('Cast', ids, to=types.UINT8, output='ids')
    output = info('ids', types.UINT8, size)
  else:
    g.op('Transpose', logits, perm=(0, 2, 3, 1), output='logits')
    output = info('logits', types.FLOAT, (*size, network.num_classes))
  name, opsets = network.backbone, [onnx.helper.make_opsetid('', _OPSET)]
  graph = onnx.helper.make_graph(g.nodes, name, [image], [output], g.constants)
  model = onnx.helper.make_model(graph, opset_imports=opsets)
  model.producer_name, model.ir_version = 'attnfd_jax', _IR_VERSION
  properties = {key: json.dumps(value) for key, value in metadata.items()}
  onnx.helper.set_model_props(model, properties)
  onnx.checker.check_model(model)
  return model
