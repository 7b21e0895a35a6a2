# SPDX-License-Identifier: Apache-2.0
"""One stage from its config: networks, optimiser, data, step, evaluation."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp

from attnfd_jax import metrics
from attnfd_jax.data import cache
from attnfd_jax.data import pipeline
from attnfd_jax.data.sources import Dataset
from attnfd_jax.devices import sharding
from attnfd_jax.distill import make_distiller
from attnfd_jax.distill import WeightedSum
from attnfd_jax.errors import InputError
from attnfd_jax.inference import evaluation
from attnfd_jax.models import network as networks
from attnfd_jax.models.deeplab import DeepLabV3Plus
from attnfd_jax.pytorch import files as torch_files
from attnfd_jax.pytorch import networks as torch_models
from attnfd_jax.runs import loading
from attnfd_jax.training import optim
from attnfd_jax.training.state import make_state
from attnfd_jax.training.step import make_train_step
from attnfd_jax.training.task_loss import make_task_loss
from attnfd_jax.training.task_loss import with_class_weights


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen network with its variables."""

  network: DeepLabV3Plus
  variables: dict
  name: str
  miou: float | None  # On val, if known.
  # Frozen CBAMs of its checkpoint, as of loading.load_attention.
  attention: dict | None = None


def load_teacher(config, workdir, dataset, mesh):
  """The network of config.teacher.checkpoint, or of this run's stage.

  Raises:
    InputError: if it is absent, damaged or knows other classes.
  """
  directory = config.teacher.checkpoint or pathlib.Path(workdir) / 'teacher'
  everywhere = sharding.replicated(mesh)
  if pathlib.Path(directory).is_file():
    return _load_torch_teacher(config, directory, dataset, everywhere)
  network, variables, info = loading.load_network(
    directory, sharding=everywhere
  )
  if list(info['class_names']) != list(dataset.class_names):
    raise InputError(
      f'{directory}: the teacher knows {len(info["class_names"])} classes '
      f'{info["class_names"]}, the data set {list(dataset.class_names)}.'
    )
  result = pathlib.Path(directory) / 'result.json'
  score = json.loads(result.read_text())['miou'] if result.exists() else None
  dtype = networks.compute_dtype(config.optim.dtype)
  return Teacher(
    # Whatever drops in a teacher, ASPP does not (aspp.py:104-111).
    network.clone(dtype=dtype, aspp_dropout=0.0),
    variables,
    name=networks.describe(info[loading.role_of(info)]),
    miou=score,
    attention=loading.load_attention(directory, network, info),
  )


def make_teacher_network(config, num_classes):
  """The network of config.teacher; what drops in it, ASPP does not."""
  return networks.make_network(
    config.teacher, num_classes, dtype=config.optim.dtype, aspp_dropout=0.0
  )


def _load_torch_teacher(config, path, dataset, everywhere):
  network = make_teacher_network(config, dataset.num_classes)
  variables, attention, report = torch_models.import_network(
    torch_models.reference_names(torch_files.read_state_dict(path)), network
  )
  name = networks.describe(config.teacher)
  if not report.complete:
    raise InputError(
      f'{path}: not a whole {name} with {dataset.num_classes} classes: '
      f'{report}. A part of a network can be config.teacher.pretrained.'
    )
  return Teacher(
    network,
    sharding.place(variables, everywhere),
    name=name,
    miou=None,
    attention=attention,
  )


def make_student(config, num_classes, *, distilled):
  """The student's network; the reference distils it without ASPP dropout."""
  changes = {}
  if distilled:
    changes = {
      'aspp_dropout': config.distill.aspp_dropout,
      'update_norms_twice': config.distill.update_norms_twice,
    }
  return networks.make_network(
    config.student, num_classes, dtype=config.optim.dtype, **changes
  )


def make_stage_distiller(config, student, teacher, *, has_gates=False):
  """The distiller for two networks, and the shapes that it will see.

  Args:
    config: resolved.
    student, teacher: networks.
    has_gates: the teacher's checkpoint brings frozen gates.

  Raises:
    InputError: for a method or a switch that does not exist.
  """
  image = jax.ShapeDtypeStruct((2, *config.data.crop_size, 3), jnp.float32)
  shapes = [
    jax.eval_shape(
      functools.partial(network.apply, train=False),
      networks.abstract_variables(network),
      image,
    )
    for network in (student, teacher)
  ]
  options = config.distill.to_dict()
  if teacher.in_path_attention:
    if options['teacher_attention'] not in ('in_path', 'checkpoint'):
      raise InputError(
        f'distill.teacher_attention={options["teacher_attention"]!r}, but the '
        'maps of this teacher are refined in its forward path; use in_path.'
      )
    options['teacher_attention'] = 'in_path'
  elif options['teacher_attention'] == 'in_path':
    options['teacher_attention'] = 'parameter_free'
  elif options['teacher_attention'] == 'checkpoint' and not has_gates:
    # A teacher of ours without gates: as the authors' own training leaves
    # them, at their random start.
    options['teacher_attention'] = 'random'
  backbones = (student.backbone, teacher.backbone)
  if all(name.startswith('resnet') for name in backbones):
    options['fan_out_taps'] = ('backbone',)
  try:
    return make_distiller(options, *shapes), shapes
  except ValueError as error:
    raise InputError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a stage computes with; built by `make_stage`.

  Attributes:
    name: 'teacher', 'student' or 'distill'.
    config: resolved.
    dataset, mesh: what it trains on.
    network: in training.
    teacher, distiller: None but in 'distill'.
    output_shapes: of student and teacher, for the distiller.
    epoch_steps, num_steps, eval_every: in steps.
  """

  name: str
  config: object
  dataset: Dataset
  mesh: jax.sharding.Mesh
  network: DeepLabV3Plus
  teacher: Teacher | None
  distiller: WeightedSum | None
  output_shapes: list
  epoch_steps: int
  num_steps: int
  eval_every: int

  @property
  def options(self):
    """The group of the network in training."""
    role = 'teacher' if self.name == 'teacher' else 'student'
    return self.config[role]

  @functools.cached_property
  def schedule(self):
    optimizer = self.config.optim
    return optim.poly_schedule(
      self.options.lr,
      num_steps=self.num_steps,
      power=optimizer.power,
      warmup_steps=round(optimizer.warmup_epochs * self.epoch_steps),
    )

  @functools.cached_property
  def tx(self):
    distill, options = self.config.distill, self.config.optim
    always = self.distiller is None
    return optim.make_optimizer(
      self.schedule,
      name=options.name,
      head_lr_scale=options.head_lr_scale,
      weight_decay=options.weight_decay,
      momentum=options.momentum,
      nesterov=options.nesterov,
      clip_norm=options.clip_norm,
      connector_schedule='always' if always else distill.connector_schedule,
      epoch_steps=self.epoch_steps,
      mlp_frozen=distill.student_attention == 'mlp_frozen',
    )

  def init_state(self, *, fresh=True, log=print):
    """A TrainState at step 0 on the mesh, compiled as one program.

    Args:
      fresh: fill in pretrained weights; False if a checkpoint follows.
      log: called with a line about them.

    Raises:
      InputError: if a file of pretrained weights does not fit.
    """

    # Whole at first: numbers of rbg keys depend on how they are split.
    everywhere = sharding.replicated(self.mesh)
    state = jax.jit(self._init, out_shardings=everywhere)(self._init_key)
    if fresh and self.options.pretrained:
      path = self.options.pretrained
      loaded, line = torch_models.load_pretrained(path, self.network)
      log(line)
      state = self._fill(state, 'student', loaded)
    if self._keeps_gates:
      frozen = {'teacher': {'methods_attnfd': self.teacher.attention}}
      state = self._fill(state, 'distiller', frozen)
    if self.state_sharding is not None:
      state = jax.device_put(state, self.state_sharding)
    return state

  @property
  def _init_key(self):
    # Student and distilled student of one seed start from the same weights.
    index = 0 if self.name == 'teacher' else 1
    return networks.init_key(self.config.seed, index)

  def _init(self, rng):
    image = jnp.zeros((1, 64, 64, 3))
    variables = {'student': self.network.init(rng, image, train=False)}
    if self.distiller is not None:
      outputs = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), self.output_shapes
      )
      variables['distiller'] = self.distiller.init(
        jax.random.fold_in(rng, 1), *outputs, None, train=False
      )
    return make_state(variables, self.tx, ema=self.config.optim.ema_decay > 0)

  @functools.cached_property
  def state_sharding(self):
    """TrainState of shardings with config.mesh.fsdp, else None."""
    if not self.config.mesh.fsdp:
      return None
    shapes = jax.eval_shape(self._init, self._init_key)
    return sharding.split_state(shapes, self.mesh)

  @property
  def _keeps_gates(self):
    if self.teacher is None or self.teacher.attention is None:
      return False
    method = self.distiller.methods.get('attnfd')
    return method is not None and method.teacher_attention == 'checkpoint'

  def _fill(self, state, name, loaded):
    """`state` with the arrays of `loaded` in place of those of `name`."""

    @functools.partial(jax.jit, out_shardings=sharding.replicated(self.mesh))
    def copy(tree):
      # A donated state must own its buffers, and hold none twice.
      return jax.tree.map(jnp.copy, tree)

    def put(old, new):
      return jax.tree.map(
        lambda new, old: old if new is None else new,
        copy(new),
        old,
        is_leaf=lambda x: x is None,
      )

    loaded = dict(loaded)
    changes = {}
    if state.ema and name == 'student':
      changes['ema'] = put(state.ema, loaded)
    if 'params' in loaded:
      params = put(state.params[name], loaded.pop('params'))
      changes['params'] = state.params | {name: params}
    collections = state.collections[name]
    collections = collections | put(
      {key: collections[key] for key in loaded}, loaded
    )
    changes['collections'] = state.collections | {name: collections}
    return state.replace(**changes)

  def make_train_step(self):
    distill, optimizer = self.config.distill, self.config.optim
    return make_train_step(
      self.network,
      self.tx,
      teacher=self.teacher.network if self.teacher else None,
      distiller=self.distiller,
      schedule=self.schedule,
      mesh=self.mesh,
      state_sharding=self.state_sharding,
      task_loss=make_task_loss(self.config.loss),
      teacher_bn=distill.teacher_bn,
      teacher_dropout=distill.teacher_dropout,
      ce_batch_division=distill.ce_batch_division,
      accumulate=optimizer.accumulate,
      remat=optimizer.remat,
      ema_decay=optimizer.ema_decay,
    )

  def make_batches(self, step):
    """Batches on the mesh, from global step `step` on."""
    batches = pipeline.configured_batches(self.config, self.dataset, step=step)
    return pipeline.to_device(batches, sharding.by_batch(self.mesh))

  def evaluate(self, variables, split='val', *, network=None):
    """Entries of result.json for one split; of the student by default."""
    options = self.config.eval
    counts = evaluation.evaluate(
      network or self.network,
      variables,
      self.dataset.splits[split],
      num_classes=self.dataset.num_classes,
      mesh=self.mesh,
      protocol=options.protocol,
      batch_size=options.batch_size,
      short_side=options.short_side,
      size_multiple=options.size_multiple,
      threads=self.config.data.threads,
    )
    return metrics.summarise(counts, self.dataset.class_names)

  def description(self):
    """The stage's config.json: enough to rebuild the network without data."""
    return json.loads(self.config.to_json_best_effort()) | {
      'stage': self.name,
      'class_names': list(self.dataset.class_names),
      'palette': self.dataset.palette.tolist(),
    }


def make_stage(name, config, dataset, mesh, workdir):
  """Builds stage `name`; loads the teacher when there is one to learn from."""
  if config.data.decoded_cache:
    dataset = cache.with_decoded(
      dataset, config.data.decoded_cache, threads=config.data.threads
    )
  config = with_class_weights(config, dataset, workdir)
  num_classes = dataset.num_classes
  teacher = distiller = None
  shapes = []
  if name == 'teacher':
    network = networks.make_network(
      config.teacher, num_classes, dtype=config.optim.dtype
    )
  else:
    distilled = name == 'distill'
    network = make_student(config, num_classes, distilled=distilled)
  if name == 'distill':
    teacher = load_teacher(config, workdir, dataset, mesh)
    distiller, shapes = make_stage_distiller(
      config,
      network,
      teacher.network,
      has_gates=teacher.attention is not None,
    )
  role = 'teacher' if name == 'teacher' else 'student'
  epoch = len(dataset.splits['train']) / config.batch_size
  return Stage(
    name=name,
    config=config,
    dataset=dataset,
    mesh=mesh,
    network=network,
    teacher=teacher,
    distiller=distiller,
    output_shapes=shapes,
    epoch_steps=max(-(-len(dataset.splits['train']) // config.batch_size), 1),
    num_steps=max(round(config[role].num_epochs * epoch), 1),
    eval_every=max(round(config.eval.every_epochs * epoch), 1),
  )
