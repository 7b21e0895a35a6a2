# SPDX-License-Identifier: Apache-2.0
"""Our recipe `reference` beside the authors' own code, number by number.

  python experiments/parity/compare.py --reference=CLONE [--output=F.json]

Needs the extra `parity` (torch). Float32 on the CPU, highest precision; errors
are relative to the largest value of the reference tensor.
"""

import argparse
import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch

from attnfd_jax import attnfd_loss
from attnfd_jax import torch_models
from attnfd_jax.distill import WeightedSum
from attnfd_jax.losses import softmax_cross_entropy
from attnfd_jax.training import logs
from attnfd_jax.training import optim
from attnfd_jax.training import state as states
from attnfd_jax.training import step as steps
from attnfd_jax.training.sharding import make_mesh

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import reference as authors

TAPS = ('backbone', 'aspp', 'decoder')
CLASSES, BATCH, SIZE = 21, 4, 65


def nchw(x):
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x):
  return np.moveaxis(x.detach().numpy(), 1, -1)


def error(ours, theirs):
  """Largest difference over largest value."""
  theirs = np.asarray(theirs)
  scale = max(np.abs(theirs).max(), 1e-30)
  return float(np.abs(np.asarray(ours) - theirs).max() / scale)


def make_batch(seed):
  """Normalised images and labels with ignored pixels.

  Images are patches of colour: over white noise the pooled branch of ASPP
  normalises four nearly equal values, and rounding comes out amplified.
  """
  dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
  generator = np.random.default_rng(seed)

  def patches(x):
    return np.repeat(np.repeat(x, 16, 1), 16, 2)[:, :SIZE, :SIZE]

  cells = -(-SIZE // 16)
  colours = generator.normal(size=(BATCH, cells, cells, 3))
  colours += 2 * generator.normal(size=(BATCH, 1, 1, 3))
  image = patches(colours)
  image = (image + 0.3 * generator.normal(size=image.shape)).astype(dtype)
  label = patches(generator.integers(0, CLASSES, (BATCH, cells, cells)))
  label = label.astype(np.uint8)
  label[generator.random(label.shape) < 0.1] = 255
  return image, label


def load_pair(distiller, student):
  pair = torch_models.load_torch_distiller(
    distiller.state_dict(),
    student_backbone=student,
    teacher_backbone='resnet101',
    num_classes=CLASSES,
  )
  off = {name: 0.0 for name in ('decoder_dropout', 'head_dropout')}
  if jax.config.jax_enable_x64:
    wide = {
      f'{role}_variables': jax.tree.map(
        lambda x: np.asarray(x, np.float64), getattr(pair, f'{role}_variables')
      )
      for role in ('student', 'teacher', 'distiller')
    }
    pair = dataclasses.replace(pair, **wide)
  return pair, pair.student.clone(**off), pair.teacher.clone(**off)


def compare_eval(distiller, student, image):
  """Logits, taps and attention maps in eval mode, of both networks."""
  pair, *networks = load_pair(distiller, student)
  distiller.eval()
  found, ours = {}, {}
  for role, network, theirs in zip(
    ('student', 'teacher'),
    networks,
    (distiller.s_net, distiller.t_net),
    strict=True,
  ):
    variables = getattr(pair, f'{role}_variables')
    ours[role] = network.apply(variables, image, train=False)
    with torch.no_grad():
      features, attention, logits = theirs.extract_feature(nchw(image))
    found[f'{role} logits'] = error(ours[role]['logits'], nhwc(logits))
    maps = zip(TAPS, features[3:], attention, strict=True)
    for tap, feature, refined in maps:
      found[f'{role} {tap}'] = error(ours[role]['features'][tap], nhwc(feature))
      ours[role, tap] = nhwc(refined)
  maps = pair.distiller.apply(
    pair.distiller_variables,
    ours['student']['features'],
    ours['teacher']['features'],
    train=False,
    method='refined_maps',
  )
  for role, refined in zip(('student', 'teacher'), maps, strict=True):
    for tap in TAPS:
      found[f'{role} attention {tap}'] = error(refined[tap], ours[role, tap])
  return found


def compare_gradients(distiller, student, image, label, losses):
  """Both loss terms and every gradient of one training step."""
  pair, network, teacher = load_pair(distiller, student)
  distiller.train()
  logits, attn = distiller(nchw(image))
  ce = losses(logits, torch.from_numpy(label.astype(np.float32)))
  distiller.zero_grad()
  (ce + attn).backward()
  target = teacher.apply(pair.teacher_variables, image, train=True, mutable=[])
  target = target[0] if isinstance(target, tuple) else target

  def loss_fn(params):
    stats = {'batch_stats': pair.student_variables['batch_stats']}
    out, _ = network.apply(
      {'params': params['student'], **stats},
      image,
      train=True,
      mutable=['batch_stats'],
    )
    ours_ce = softmax_cross_entropy(out['logits'], label) / image.shape[0]
    state = dict(pair.distiller_variables)
    state.pop('params')
    distance, _ = attnfd_loss(
      params['distiller'],
      state,
      out['features'],
      target['features'],
      distiller=pair.distiller,
      train=True,
    )
    return ours_ce + 2.0 * distance, (ours_ce, 2.0 * distance)

  params = {
    'student': pair.student_variables['params'],
    'distiller': pair.distiller_variables['params'],
  }
  grads, ours = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
  found = {
    'loss ce': error(ours[0], ce.item()),
    'loss attention': error(ours[1], attn.item()),
  }
  theirs = {
    name: parameter.grad.numpy()
    for name, parameter in distiller.named_parameters()
    if parameter.grad is not None
  }
  wanted = named(pair, grads)
  errors = {
    name: error(value, theirs[name])
    for name, value in wanted.items()
    if '.mlp.' not in name  # In no group of their optimiser.
  }
  worst = sorted(errors, key=errors.get)[-3:]
  found[f'gradients, worst of {len(errors)} tensors'] = errors[worst[-1]]
  print('  worst gradients:', {name: f'{errors[name]:.1e}' for name in worst})
  return found


def named(pair, tree):
  """{their name: array} of trained variables {'student', 'distiller'}."""
  from attnfd_jax import torch_names

  gates, connectors = {}, {}
  for module, value in tree['distiller'].items():
    kind, tap = module.rsplit('_', 1)
    (gates if kind == 'student_gates' else connectors)[tap] = value
  tensors = {
    f's_net.{name}': value
    for name, value in torch_models.export_torch(
      {'params': tree['student']},
      {'params': gates},
      backbone=pair.student.backbone,
    ).items()
    if '_level_features.' not in name
  }
  return tensors | torch_names.export(
    {'params': connectors},
    lambda path: torch_names.connector_name(*path.split('/', 1)),
  )


def trajectory(distiller, student, reference, *, epoch_steps, num_steps):
  """Losses and weights of both over the end of epoch 0, step by step."""
  _, _, LR_Scheduler, SegmentationLosses = reference
  lr = 0.007 * BATCH / 6
  networks = distiller.s_net
  options = dict(momentum=0.9, weight_decay=5e-4, nesterov=True)
  main = torch.optim.SGD(
    [
      {'params': networks.get_1x_lr_params(), 'lr': lr},
      {'params': networks.get_10x_lr_params(), 'lr': lr * 10},
    ],
    **options,
  )
  first = torch.optim.SGD(
    [{'params': distiller.Connectors.parameters(), 'lr': lr * 10}], **options
  )
  epochs = num_steps // epoch_steps
  scheduler = LR_Scheduler('poly', lr, epochs, epoch_steps)
  losses = SegmentationLosses(cuda=False).build_loss(mode='ce')

  pair, network, teacher = load_pair(distiller, student)
  schedule = optim.poly_schedule(lr, num_steps=num_steps, power=0.9)
  tx = optim.make_optimizer(
    schedule,
    connector_schedule='first_epoch',
    epoch_steps=epoch_steps,
    mlp_frozen=True,
  )
  sum_of = WeightedSum({'attnfd': pair.distiller}, {'attnfd': 2.0})
  wrapped = {
    part: {'methods_attnfd': value}
    for part, value in pair.distiller_variables.items()
  }
  state = states.make_state(
    {'student': pair.student_variables, 'distiller': wrapped}, tx, ema=False
  )
  state = jax.tree.map(jnp.array, state)
  train_step = steps.make_train_step(
    network,
    tx,
    teacher=teacher,
    distiller=sum_of,
    schedule=schedule,
    mesh=make_mesh(),
    teacher_bn='batch',
    ce_batch_division=True,
  )
  rows = []
  for index in range(num_steps):
    image, label = make_batch(100 + index)
    epoch, i = divmod(index, epoch_steps)
    optimizer = first if epoch == 0 else main
    scheduler(optimizer, i, epoch, 0.0)
    optimizer.zero_grad()
    distiller.train()
    logits, attn = distiller(nchw(image))
    loss = losses(logits, torch.from_numpy(label.astype(np.float32))) + attn
    loss.backward()
    optimizer.step()
    state, metrics = train_step(
      state,
      pair.teacher_variables,
      {'image': image, 'label': label},
      jax.random.key(0),
    )
    weights = compare_state(distiller, pair, state)
    rows.append(
      {
        'step': index + 1,
        'epoch': epoch,
        'loss': error(metrics['loss'], loss.item()),
        **weights,
      }
    )
    texts = (
      f'{key} {value if isinstance(value, int | str) else f"{value:.1e}"}'
      for key, value in rows[-1].items()
    )
    print('  ', *texts, flush=True)
  return rows


def compare_state(distiller, pair, state):
  """Worst relative error of all weights and of all running statistics."""
  theirs = {
    name: tensor.numpy() for name, tensor in distiller.state_dict().items()
  }
  inner = {
    'student': state.params['student'],
    'distiller': state.params['distiller']['methods_attnfd'],
  }
  errors = {
    name: error(value, theirs[name])
    for name, value in named(pair, inner).items()
  }
  worst = max(errors, key=errors.get)
  inner = {
    'student': state.collections['student']['batch_stats'],
    'distiller': state.collections['distiller']['batch_stats'][
      'methods_attnfd'
    ],
  }
  statistics = max(
    error(value, theirs[name])
    for name, value in named(pair, inner).items()
    if not name.endswith('num_batches_tracked')
  )
  return {
    'weights': errors[worst],
    'median': float(np.median(list(errors.values()))),
    'statistics': statistics,
    'worst': worst,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--reference', required=True)
  parser.add_argument('--output')
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--students', default='resnet18,mobilenet_v2')
  parser.add_argument(
    '--float64', action='store_true', help='On both sides: is it rounding?'
  )
  options = parser.parse_args()
  jax.config.update('jax_enable_x64', options.float64)
  jax.config.update('jax_default_matmul_precision', 'highest')
  reference = authors.import_reference(options.reference)
  losses = reference[3](cuda=False).build_loss(mode='ce')
  results = {}
  for student in options.students.split(','):
    image, label = make_batch(0)

    def fresh(student=student):
      theirs = authors.build_distiller(reference, student, num_classes=CLASSES)
      return theirs.double() if options.float64 else theirs

    print(f'ResNet-101 -> {student}', flush=True)
    found = compare_eval(fresh(), student, image)
    found |= compare_gradients(fresh(), student, image, label, losses)
    for name, value in found.items():
      print(f'  {name:36} {value:.1e}', flush=True)
    rows = trajectory(
      fresh(), student, reference, epoch_steps=4, num_steps=options.steps
    )
    results[student] = {'errors': found, 'trajectory': rows}
  if options.output:
    logs.write_json(
      options.output,
      {
        'results': results,
        'versions': logs.versions() | {'torch': torch.__version__},
        'device': logs.device_name(),
        'batch': BATCH,
        'size': SIZE,
      },
    )


if __name__ == '__main__':
  main()
