# SPDX-License-Identifier: Apache-2.0
"""Our recipe `reference` beside the authors' own code, number by number.

  python experiments/parity/compare.py --reference=CLONE [--output=F.json]

Needs the extra `parity` (torch). On the CPU, in float32 at the highest
precision or, with --float64, in float64; errors are relative to the largest
value of the reference tensor.
"""

import argparse
import functools
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch

from attnfd_jax import attnfd_loss
from attnfd_jax.config import default_config, resolve
from attnfd_jax.devices.sharding import make_mesh
from attnfd_jax.distill import make_distiller
from attnfd_jax.losses import softmax_cross_entropy
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import names as torch_names
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.runs import logs
from attnfd_jax.teachers.teacher import FrozenNetwork
from attnfd_jax.training import optim
from attnfd_jax.training import step as steps
from attnfd_jax.training.task_loss import make_task_loss

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import reference as authors

TAPS = ('backbone', 'aspp', 'decoder')
CLASSES, BATCH, SIZE, LAMBDA = 21, 4, 65, 2.0
GRADIENT_BATCHES = 4
TEACHER = 'resnet101'
# Of the training run: XLA's float64 convolutions on a CPU are slow.
SMALL_TEACHER = 'resnet18'


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
  """Normalized images and labels with ignored pixels.

  Images are patches of color: over white noise the pooled branch of ASPP
  normalizes four nearly equal values, and rounding comes out amplified.
  """
  dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
  generator = np.random.default_rng(seed)

  def patches(x):
    return np.repeat(np.repeat(x, 16, 1), 16, 2)[:, :SIZE, :SIZE]

  cells = -(-SIZE // 16)
  colors = generator.normal(size=(BATCH, cells, cells, 3))
  colors += 2 * generator.normal(size=(BATCH, 1, 1, 3))
  image = patches(colors)
  image = (image + 0.3 * generator.normal(size=image.shape)).astype(dtype)
  label = patches(generator.integers(0, CLASSES, (BATCH, cells, cells)))
  label = label.astype(np.uint8)
  label[generator.random(label.shape) < 0.1] = 255
  return image, label


def load_pair(distiller, student, teacher=TEACHER):
  pair = torch_models.load_torch_distiller(
    distiller.state_dict(),
    student_backbone=student,
    teacher_backbone=teacher,
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
    pair = pair._replace(**wide)
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


def compare_export(reference, distiller, student, image):
  """Logits of their DeepLab after a strict load of the file that we export."""
  pair, network, _ = load_pair(distiller, student)
  gates = pair.distiller_variables
  attention = {
    part: {tap: gates[part][f'student_gates_{tap}'] for tap in TAPS}
    for part in ('params', 'batch_stats')
  }
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'student.pth'
    tensors = torch_models.export_torch(
      pair.student_variables, attention, backbone=student
    )
    torch_files.write_torch(path, {'state_dict': tensors})
    stored = torch.load(path, weights_only=True)['state_dict']
  theirs = authors.build_network(reference, student, num_classes=CLASSES)
  theirs.to(next(distiller.parameters()).dtype).eval()
  theirs.load_state_dict(stored, strict=True)
  with torch.no_grad():
    logits = theirs(nchw(image))
  ours = network.apply(pair.student_variables, image, train=False)['logits']
  return {'exported .pth, strict load, logits': error(ours, nhwc(logits))}


def compare_gradients(reference, fresh, student):
  """Both loss terms and every gradient of one training step, on some batches.

  Beside them the distance of the authors' code from itself in float64: where
  an activation changes its sign by rounding, a gradient jumps.
  """
  criterion = reference[3](cuda=False).build_loss(mode='ce')
  distiller, wide = fresh(), fresh().double()
  pair, network, teacher = load_pair(distiller, student)
  ours = jax.jit(functools.partial(our_gradients, pair, network, teacher))
  found = {'ce': [], 'attention': [], 'gradients': [], 'rounding': []}
  for seed in range(GRADIENT_BATCHES):
    image, label = make_batch(seed)
    terms, theirs = their_gradients(distiller, criterion, image, label)
    _, exact = their_gradients(wide, criterion, image, label)
    our_terms, gradients = ours(image, label)
    for name, our_term, term in zip(
      ('ce', 'attention'), our_terms, terms, strict=True
    ):
      found[name].append(error(our_term, term))
    trained = {
      name: value
      for name, value in named(pair, gradients).items()
      if '.mlp.' not in name  # In no group of their optimizer.
    }
    for name, pairs in (
      ('gradients', [(trained[key], theirs[key]) for key in trained]),
      ('rounding', [(theirs[key], exact[key]) for key in trained]),
    ):
      found[name].append(max(error(*arrays) for arrays in pairs))
  print(f'  one step, {len(trained)} gradient tensors, {seed + 1} batches')
  for name, values in found.items():
    print(f'    {name:12}', *(f'{value:.1e}' for value in values), flush=True)
  return found | {'tensors': len(trained)}


def their_gradients(distiller, criterion, image, label):
  """Both terms, and {name: gradient}."""
  dtype = next(distiller.parameters()).dtype
  distiller.train()
  distiller.zero_grad()
  logits, attention = distiller(nchw(image).to(dtype))
  ce = criterion(logits, torch.from_numpy(label).to(dtype))
  (ce + attention).backward()
  return (ce.item(), attention.item()), {
    name: parameter.grad.numpy().copy()
    for name, parameter in distiller.named_parameters()
    if parameter.grad is not None
  }


def our_gradients(pair, network, teacher, image, label):
  """Both terms, and the gradients as {'student', 'distiller'}."""
  target, _ = teacher.apply(
    pair.teacher_variables, image, train=True, mutable=['batch_stats']
  )
  state = dict(pair.distiller_variables)
  params = {
    'student': pair.student_variables['params'],
    'distiller': state.pop('params'),
  }

  def loss_fn(params):
    variables = {**pair.student_variables, 'params': params['student']}
    out, _ = network.apply(
      variables, image, train=True, mutable=['batch_stats']
    )
    ce = softmax_cross_entropy(out['logits'], label).value / image.shape[0]
    distance, _ = attnfd_loss(
      params['distiller'],
      state,
      out['features'],
      target['features'],
      distiller=pair.distiller,
      train=True,
    )
    return ce + LAMBDA * distance, (ce, LAMBDA * distance)

  gradients, terms = jax.grad(loss_fn, has_aux=True)(params)
  return terms, gradients


def named(pair, tree):
  """{their name: array} of trained variables {'student', 'distiller'}."""
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


def trajectory(reference, fresh, student, *, epoch_steps, num_steps):
  """Losses and weights of both over the end of epoch 0, step by step.

  A third run shows what rounding alone does: the authors' code once more, from
  weights that differ in the last place, beside itself.
  """
  lr = 0.007 * BATCH / 6  # train_kd.py:289.
  nudged = fresh()
  authors.nudge(nudged.s_net)
  theirs, again = (
    authors.Training(
      reference,
      distiller,
      lr=lr,
      epochs=-(-num_steps // epoch_steps),
      epoch_steps=epoch_steps,
    )
    for distiller in (fresh(), nudged)
  )
  pair, network, other = load_pair(theirs.distiller, student, SMALL_TEACHER)
  schedule = optim.poly_schedule(
    lr, num_steps=-(-num_steps // epoch_steps) * epoch_steps, power=0.9
  )
  config = default_config()
  config.recipe = 'reference'
  config.distill.attnfd.weight = LAMBDA
  config = resolve(config)
  teacher = FrozenNetwork(
    other,
    pair.teacher_variables,
    name=SMALL_TEACHER,
    class_names=tuple(map(str, range(CLASSES))),
    batch_statistics=config.distill.teacher_bn == 'batch',
    gates=pair.distiller_variables['teacher'],
  )
  distiller = make_distiller('attnfd', config.distill).adapted(network, teacher)
  tx = optim.make_optimizer(
    schedule,
    connector_schedule=distiller.connector_schedule,
    epoch_steps=epoch_steps,
    groups=distiller.parameter_groups(),
  )
  wrapped = {
    part: {'methods_attnfd': value}
    for part, value in pair.distiller_variables.items()
  }
  state = steps.make_state(
    {'student': pair.student_variables, 'distiller': wrapped}, tx, ema=False
  )
  state = jax.tree.map(jnp.array, state)
  train_step = steps.make_train_step(
    network,
    tx,
    task_loss=make_task_loss(config.loss),
    teacher=teacher,
    distiller=distiller,
    schedule=schedule,
    mesh=make_mesh(),
    ce_batch_division=config.distill.ce_batch_division,
  )
  rows = []
  for index in range(num_steps):
    image, label = make_batch(100 + index)
    batch = (nchw(image), torch.from_numpy(label.astype(np.float32)))
    loss, own_loss = (run.step(index, *batch) for run in (theirs, again))
    state, metrics = train_step(
      state,
      pair.teacher_variables,
      {'image': image, 'label': label},
      jax.random.key(0),
    )
    tensors = theirs.tensors()
    rows.append(
      {
        'step': index + 1,
        'epoch': index // epoch_steps,
        'loss': error(metrics['loss'], loss),
        **worst_errors(our_tensors(pair, state), tensors),
        'rounding': {
          'loss': error(own_loss, loss),
          **worst_errors(again.tensors(), tensors),
        },
      }
    )
    print_row(rows[-1])
  return rows


def print_row(row):
  def text(values):
    return '  '.join(
      f'{key} {values[key]:.1e}'
      for key in ('loss', 'weights', 'median', 'statistics')
    )

  print(
    f'  {row["step"]:2} (epoch {row["epoch"]})  {text(row)}  | rounding alone '
    f'{text(row["rounding"])}',
    flush=True,
  )


def our_tensors(pair, state):
  """{their name: array} of a train state: weights and running statistics."""
  params = {
    'student': state.params['student'],
    'distiller': state.params['distiller']['methods_attnfd'],
  }
  statistics = {
    'student': state.collections['student']['batch_stats'],
    'distiller': state.collections['distiller']['batch_stats'][
      'methods_attnfd'
    ],
  }
  return named(pair, params) | named(pair, statistics)


def worst_errors(tensors, expected):
  """Of all weights and of all running statistics of student and connectors."""
  weights, statistics = {}, {}
  for name, value in tensors.items():
    used = name.startswith(('s_net.', 'Connectors.'))
    if used and not name.endswith('num_batches_tracked'):
      group = statistics if '.running_' in name else weights
      group[name] = error(value, expected[name])
  return {
    'weights': max(weights.values()),
    'median': float(np.median(list(weights.values()))),
    'statistics': max(statistics.values()),
    'worst': max(weights, key=weights.get),
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
  results = {}
  for student in options.students.split(','):
    image, _ = make_batch(0)

    def fresh(student=student, teacher=TEACHER):
      theirs = authors.build_distiller(
        reference, student, teacher, num_classes=CLASSES
      )
      return theirs.double() if options.float64 else theirs

    print(f'ResNet-101 -> {student}', flush=True)
    found = compare_eval(fresh(), student, image)
    found |= compare_export(reference, fresh(), student, image)
    for name, value in found.items():
      print(f'  {name:36} {value:.1e}', flush=True)
    gradients = compare_gradients(reference, fresh, student)
    print('  training, worst relative differences after each step')
    rows = trajectory(
      reference,
      functools.partial(fresh, teacher=SMALL_TEACHER),
      student,
      epoch_steps=5,
      num_steps=options.steps,
    )
    results[student] = {
      'eval': found,
      'gradients': gradients,
      'trajectory': rows,
    }
    if options.output:
      logs.write_json(
        options.output,
        {
          'results': results,
          'versions': logs.versions() | {'torch': torch.__version__},
          'device': logs.device_name(),
          'commit': authors.commit(options.reference),
          'float64': options.float64,
          'batch': BATCH,
          'size': SIZE,
        },
      )


if __name__ == '__main__':
  main()
