# SPDX-License-Identifier: Apache-2.0
r"""The same distillation step in PyTorch, for comparison; needs torch.

  python experiments/speed/peer.py --form=authors --student=resnet18 \
    --teacher=resnet101 --batch=2 --height=257 --width=257

Networks and losses are written down here from METHOD.md for torch (no line is
from the authors' repository). Forms:

- authors: as their train_kd.py runs it: eager float32, the teacher in train
  mode, and gradients through it are recorded although nobody asks for them.
- no_teacher_gradients: the same with torch.no_grad around the teacher.
- best: teacher in eval mode and without gradients, channels_last, bfloat16
  autocast on a GPU, torch.compile, cuDNN benchmark, foreach SGD.
- predict: no step, but the student alone, eager, from bytes to class ids and
  their probabilities.

The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

FORMS = ('authors', 'no_teacher_gradients', 'best', 'predict')
STAGES = {
  'resnet18': (2, 2, 2, 2),
  'resnet34': (3, 4, 6, 3),
  'resnet50': (3, 4, 6, 3),
  'resnet101': (3, 4, 23, 3),
}
# Expansion, features, blocks and stride of MobileNetV2's groups.
MOBILENET = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 1),
  (6, 320, 1, 1),
)
IGNORE_LABEL = 255


def conv_norm(inputs, features, size=1, stride=1, dilation=1, **options):
  options = {'padding': dilation * (size // 2)} | options
  return nn.Sequential(
    nn.Conv2d(
      inputs, features, size, stride, dilation=dilation, bias=False, **options
    ),
    nn.BatchNorm2d(features),
  )


class BasicBlock(nn.Module):
  expansion = 1

  def __init__(self, inputs, width, stride, dilation):
    super().__init__()
    self.conv1 = conv_norm(inputs, width, 3, stride, dilation)
    self.conv2 = conv_norm(width, width, 3, 1, dilation)
    self.shortcut = nn.Identity()
    if stride != 1 or inputs != width:
      self.shortcut = conv_norm(inputs, width, 1, stride)

  def forward(self, x):
    x = F.relu(x)
    return self.conv2(F.relu(self.conv1(x))) + self.shortcut(x)


class Bottleneck(nn.Module):
  expansion = 4

  def __init__(self, inputs, width, stride, dilation):
    super().__init__()
    self.conv1 = conv_norm(inputs, width)
    self.conv2 = conv_norm(width, width, 3, stride, dilation)
    self.conv3 = conv_norm(width, 4 * width)
    self.shortcut = nn.Identity()
    if stride != 1 or inputs != 4 * width:
      self.shortcut = conv_norm(inputs, 4 * width, 1, stride)

  def forward(self, x):
    x = F.relu(x)
    y = F.relu(self.conv2(F.relu(self.conv1(x))))
    return self.conv3(y) + self.shortcut(x)


class ResNet(nn.Module):
  """Low level, tap and main output at output stride 16."""

  def __init__(self, backbone):
    super().__init__()
    deep = backbone in ('resnet50', 'resnet101')
    block = Bottleneck if deep else BasicBlock
    self.stem = conv_norm(3, 64, 7, 2)
    inputs, self.stages = 64, nn.ModuleList()
    for stage, blocks in enumerate(STAGES[backbone]):
      width, layers = 64 * 2**stage, []
      for i in range(blocks):
        stride = 2 if stage in (1, 2) and i == 0 else 1
        dilation = 2 if stage == 3 else 1
        if deep and stage == 3:
          dilation *= 2**i
        layers.append(block(inputs, width, stride, dilation))
        inputs = width * block.expansion
      self.stages.append(nn.Sequential(*layers))
    self.channels = inputs
    self.low_level_channels = 64 * block.expansion

  def forward(self, x):
    x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
    x = self.stages[0](x)
    low_level = F.relu(x)
    for stage in self.stages[1:]:
      x = stage(x)
    return low_level, x, F.relu(x)


class InvertedResidual(nn.Module):
  """Zeros go around the input, before the expansion."""

  def __init__(self, inputs, features, expansion, stride, dilation):
    super().__init__()
    hidden = expansion * inputs
    self.pad = dilation
    self.residual = stride == 1 and inputs == features
    self.expand = nn.Identity()
    if expansion != 1:
      self.expand = nn.Sequential(conv_norm(inputs, hidden), nn.ReLU6())
    self.depthwise = conv_norm(
      hidden, hidden, 3, stride, dilation, padding=0, groups=hidden
    )
    self.project = conv_norm(hidden, features)

  def forward(self, x):
    y = self.expand(F.pad(x, (self.pad,) * 4))
    y = self.project(F.relu6(self.depthwise(y)))
    return x + y if self.residual else y


class MobileNetV2(nn.Module):
  """Low level, tap and main output at output stride 16."""

  channels, low_level_channels = 320, 24
  # Whose expansion the authors compute once more while distilling.
  twice = (3, 6, 13)

  def __init__(self):
    super().__init__()
    self.stem = conv_norm(3, 32, 3, 2)
    inputs, self.blocks = 32, nn.ModuleList()
    for expansion, features, blocks, stride in MOBILENET:
      for i in range(blocks):
        dilation = 2 if features == 320 else 1
        self.blocks.append(
          InvertedResidual(
            inputs, features, expansion, stride if i == 0 else 1, dilation
          )
        )
        inputs = features

  def forward(self, x):
    x = F.relu6(self.stem(x))
    for i, block in enumerate(self.blocks):
      if self.training and i in self.twice:
        with torch.no_grad():
          block.expand(x)
      x = block(x)
      if i == 2:
        low_level = x
    return low_level, x, x


class ASPP(nn.Module):
  def __init__(self, inputs):
    super().__init__()
    self.branches = nn.ModuleList(
      conv_norm(inputs, 256, 1 if rate == 1 else 3, 1, rate)
      for rate in (1, 6, 12, 18)
    )
    self.pool = conv_norm(inputs, 256)
    self.merge = conv_norm(1280, 256)

  def forward(self, x):
    maps = [F.relu(branch(x)) for branch in self.branches]
    pooled = F.relu(self.pool(x.mean((2, 3), keepdim=True)))
    maps.append(pooled.expand(-1, -1, *x.shape[2:]))
    return F.relu(self.merge(torch.cat(maps, 1)))


def resize(x, size):
  return F.interpolate(x, size, mode='bilinear', align_corners=True)


class DeepLab(nn.Module):
  """Logits and the three taps."""

  def __init__(self, backbone, num_classes):
    super().__init__()
    mobile = backbone == 'mobilenet_v2'
    self.backbone = MobileNetV2() if mobile else ResNet(backbone)
    self.aspp = ASPP(self.backbone.channels)
    self.low_level = conv_norm(self.backbone.low_level_channels, 48)
    self.conv1 = conv_norm(304, 256, 3)
    self.conv2 = conv_norm(256, 256, 3)
    self.classifier = nn.Conv2d(256, num_classes, 1)
    self.channels = (self.backbone.channels, 256, 256)

  def forward(self, image):
    low_level, tap, x = self.backbone(image)
    context = self.aspp(x)
    detail = F.relu(self.low_level(low_level))
    y = torch.cat([resize(context, detail.shape[2:]), detail], 1)
    y = F.dropout(F.relu(self.conv1(y)), 0.5, self.training)
    decoded = F.relu(self.conv2(y))
    scores = self.classifier(F.dropout(decoded, 0.1, self.training))
    return resize(scores, image.shape[2:]), (tap, context, decoded)


class CBAM(nn.Module):
  def __init__(self, channels):
    super().__init__()
    hidden = channels // 16
    self.mlp = nn.Sequential(
      nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
    )
    self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
    self.norm = nn.BatchNorm2d(1, momentum=0.01)

  def forward(self, x):
    gate = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
    x = x * torch.sigmoid(gate)[:, :, None, None]
    pooled = torch.cat([x.amax(1, True), x.mean(1, True)], 1)
    return x * torch.sigmoid(self.norm(self.conv(pooled)))


class Distilled(nn.Module):
  """A network with the gates at its taps."""

  def __init__(self, backbone, num_classes):
    super().__init__()
    self.network = DeepLab(backbone, num_classes)
    self.gates = nn.ModuleList(CBAM(c) for c in self.network.channels)

  def forward(self, image):
    logits, taps = self.network(image)
    maps = [g(x) for g, x in zip(self.gates, taps, strict=True)]
    return logits, maps


class Loss(nn.Module):
  """Cross-entropy / b + 2 x AttnFD, METHOD.md section 1."""

  def __init__(self, student, teacher):
    super().__init__()
    channels = zip(
      student.network.channels, teacher.network.channels, strict=True
    )
    self.connectors = nn.ModuleList(conv_norm(s, t) for s, t in channels)

  def forward(self, logits, maps, targets, label):
    batch = len(label)
    loss = F.cross_entropy(logits.float(), label, ignore_index=IGNORE_LABEL)
    loss = loss / batch
    for connector, x, target in zip(
      self.connectors, maps, targets, strict=True
    ):
      s, t = connector(x).float(), target.float()
      difference = s / s.norm() - t / t.norm()
      loss = loss + 2 * difference.square().sum() / batch
    return loss


def make_step(options, device):
  """A function of nothing that makes one step and returns its loss."""
  torch.manual_seed(0)
  best = options.form == 'best'
  teacher = Distilled(options.teacher, options.num_classes).to(device)
  student = Distilled(options.student, options.num_classes).to(device)
  loss_fn = Loss(student, teacher).to(device)
  teacher.train(not best)
  size = (options.batch, 3, options.height, options.width)
  image = torch.randn(size, device=device)
  label = torch.randint(
    options.num_classes, (size[0], *size[2:]), device=device
  )
  if best:
    torch.backends.cudnn.benchmark = True
    for module in (teacher, student, loss_fn):
      module.to(memory_format=torch.channels_last)
    image = image.contiguous(memory_format=torch.channels_last)
    teacher.requires_grad_(False)
  parameters = [*student.parameters(), *loss_fn.parameters()]
  optimizer = torch.optim.SGD(
    parameters,
    0.01,
    0.9,
    weight_decay=5e-4,
    nesterov=True,
    foreach=True if best else None,
  )
  half = best and options.dtype == 'bfloat16'

  def compute(image, label):
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
      with torch.set_grad_enabled(options.form == 'authors'):
        _, targets = teacher(image)
      logits, maps = student(image)
      return loss_fn(logits, maps, targets, label)

  if best and options.compile:
    compute = torch.compile(compute)

  def step():
    optimizer.zero_grad(set_to_none=True)
    loss = compute(image, label)
    loss.backward()
    optimizer.step()
    return loss

  return step


def make_prediction(options, device):
  """A function of nothing that segments the bytes of a batch."""
  torch.manual_seed(0)
  network = DeepLab(options.student, options.num_classes).to(device).eval()
  size = (options.batch, options.height, options.width, 3)
  image = torch.randint(256, size, dtype=torch.uint8)
  mean = torch.tensor((0.485, 0.456, 0.406), device=device)
  deviation = torch.tensor((0.229, 0.224, 0.225), device=device)

  @torch.inference_mode()
  def predict():
    x = (image.to(device).float() / 255 - mean) / deviation
    logits, _ = network(x.permute(0, 3, 1, 2))
    confidence, ids = logits.softmax(1).max(1)
    return (confidence.cpu() * 255).round().byte(), ids.cpu().byte()

  return predict


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--form', choices=FORMS, default='authors')
  parser.add_argument('--student', default='resnet18')
  parser.add_argument('--teacher', default='resnet101')
  parser.add_argument('--batch', type=int, default=2)
  parser.add_argument('--height', type=int, default=257)
  parser.add_argument('--width', type=int, default=257)
  parser.add_argument('--num_classes', type=int, default=21)
  parser.add_argument('--dtype', default='float32', help='of the form best')
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument(
    '--no_compile', dest='compile', action='store_false', help='form best'
  )
  options = parser.parse_args()
  cuda = torch.cuda.is_available()
  device = torch.device('cuda' if cuda else 'cpu')
  if not cuda:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  make = make_prediction if options.form == 'predict' else make_step
  step = make(options, device)
  times = []
  start = time.perf_counter()
  step()
  first = time.perf_counter() - start
  for _ in range(2):
    step()
  if cuda:
    torch.cuda.reset_peak_memory_stats()
  for _ in range(options.steps):
    start = time.perf_counter()
    step()
    if cuda:
      torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
  seconds = statistics.median(times)
  name = torch.cuda.get_device_name() if cuda else f'CPU ({os.cpu_count()})'
  half = options.form == 'best' and options.dtype == 'bfloat16'
  result = vars(options) | {
    'dtype': 'bfloat16' if half else 'float32',
    'teacher_gradients': options.form == 'authors',
    'first_step_seconds': first,
    'step_seconds': seconds,
    'step_seconds_all': times,
    'images_per_second': options.batch / seconds,
    'peak_memory_bytes': torch.cuda.max_memory_allocated() if cuda else None,
    'device': name,
    'versions': {'torch': torch.__version__},
  }
  print(json.dumps(result))


if __name__ == '__main__':
  main()
