# SPDX-License-Identifier: Apache-2.0
"""One stage from its config: networks, methods, optimizer, data, state."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp

from attnfd_jax import distill, metrics
from attnfd_jax.data import cache, pipeline
from attnfd_jax.data.sources import Dataset
from attnfd_jax.devices import sharding
from attnfd_jax.errors import InputError, within
from attnfd_jax.inference import evaluation
from attnfd_jax.models import network as networks
from attnfd_jax.models.network import Network
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.teachers import sources as teachers
from attnfd_jax.teachers.teacher import Scored, Teacher
from attnfd_jax.training import optim, task_loss
from attnfd_jax.training.state import make_state
from attnfd_jax.training.step import make_train_step

# Of XLA on a CPU: half the time to compile hundreds of small programs of
# threefry, for the same bits.
QUICK_CPU = {
  'xla_backend_optimization_level': 1,
  'xla_llvm_disable_expensive_passes': True,
}


def _on_cpu(mesh):
  return mesh.devices.flat[0].platform == 'cpu'


def make_student(config, num_classes, *, distilled):
  """The student's network; the reference distils it without ASPP dropout."""
  changes = {}
  if distilled:
    dropped = config.distill.aspp_dropout
    within('config.distill.aspp_dropout', dropped, 0, 1)
    changes = {
      'aspp_dropout': dropped,
      'update_norms_twice': config.distill.update_norms_twice,
    }
  return networks.make_network(
    config.student, num_classes, dtype=config.optim.dtype, **changes
  )


def abstract_outputs(teacher, image_size):
  """Shapes of a teacher's Outputs for two images."""
  image = jax.ShapeDtypeStruct((2, *image_size, 3), jnp.float32)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), teacher.variables
  )

  def learn(variables, image):
    return teacher.apply(variables, image, rng=jax.random.key(0))

  try:
    out = jax.eval_shape(learn, shapes, image)
  except Exception as error:  # Of a teacher of the user's, anything.
    first = next(iter(str(error).splitlines()), '')
    raise InputError(
      f'{teacher.name}: the teacher fails on images {tuple(image_size)}: '
      f'{type(error).__name__} {first}'
    ) from error
  names = teacher.class_names
  networks.check_shapes(out, teacher.name, len(names), tuple(image_size))
  return out


def make_stage_distiller(config, student, teacher, *, num_steps=1):
  """The distiller for two networks, and the shapes that it will see.

  Args:
    config: resolved.
    student: Network.
    teacher: Teacher.
    num_steps: of the stage.

  Raises:
    InputError: for a method or an option that does not exist, or that does not
      go with these networks.
  """
  options = config.distill
  distiller = distill.make_distiller(
    options.method, options, options=options.options, num_steps=num_steps
  )
  try:
    distiller = distiller.adapted(student, teacher)
  except ValueError as error:
    raise InputError(f'config.distill.method: {error}') from error
  size = tuple(config.data.crop_size)
  shapes = [
    networks.abstract_outputs(student, size),
    abstract_outputs(teacher, size),
  ]
  distill.abstract_variables(distiller, *shapes)
  return distiller, shapes


def init_distiller(distiller, shapes, rng=None):
  """Variables of a distiller for outputs of these shapes."""
  rng = jax.random.key(0) if rng is None else rng
  outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  labels = jnp.full(outputs[0]['logits'].shape[:-1], 255, jnp.uint8)
  rngs = {'params': rng, 'distill': jax.random.fold_in(rng, 1)}
  return distiller.init(rngs, *outputs, labels, train=False, step=0)


def init_key(seed, index):
  """The key of a random start: threefry is the same on every backend."""
  rng = jax.random.key(seed, impl='threefry2x32')
  return jax.random.fold_in(rng, index)


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a stage computes with; built by `make_stage`.

  Attributes:
    name: 'teacher', 'student' or 'distill'.
    config: resolved.
    dataset, mesh: what it trains on.
    network: in training.
    teacher, distiller: None but in 'distill'.
    teacher_miou: on val, once it is known.
    output_shapes: of student and teacher, for the distiller.
    epoch_steps, num_steps, eval_every: in steps.
  """

  name: str
  config: object
  dataset: Dataset
  mesh: jax.sharding.Mesh
  network: Network
  teacher: Teacher | None = None
  distiller: distill.WeightedSum | None = None
  teacher_miou: float | None = None
  output_shapes: list = dataclasses.field(default_factory=list)
  epoch_steps: int = 1
  num_steps: int = 1
  eval_every: int = 1

  @property
  def options(self):
    """The group of the network in training."""
    role = 'teacher' if self.name == 'teacher' else 'student'
    return self.config[role]

  @functools.cached_property
  def schedule(self):
    """step -> learning rate of the backbone."""
    optimizer, options = self.config.optim, self.options
    within('config.optim.lr', options.lr, 1e-30)
    within('config.optim.power', optimizer.power, 0, 100)
    return optim.poly_schedule(
      options.lr,
      num_steps=self.num_steps,
      power=optimizer.power,
      warmup_steps=round(optimizer.warmup_epochs * self.epoch_steps),
    )

  @functools.cached_property
  def tx(self):
    """The optimizer."""
    options, distiller = self.config.optim, self.distiller
    methods = {}
    if distiller is not None:
      methods = {
        'connector_schedule': distiller.connector_schedule,
        'groups': distiller.parameter_groups(),
        'optimizers': distiller.optimizers(),
      }
    return optim.make_optimizer(
      self.schedule,
      name=options.name,
      head_lr_scale=options.head_lr_scale,
      weight_decay=options.weight_decay,
      momentum=options.momentum,
      nesterov=options.nesterov,
      clip_norm=options.clip_norm,
      epoch_steps=self.epoch_steps,
      **methods,
    )

  def init_state(self, *, fresh=True, log=print):
    """A TrainState at step 0 on the mesh, compiled as one program.

    Args:
      fresh: fill in pretrained weights; False if a checkpoint follows.
      log: called with a line about them.

    Raises:
      InputError: if a file of pretrained weights does not fit.
    """
    init = jax.jit(
      self._init,
      out_shardings=sharding.replicated(self.mesh),
      # It runs once: what takes long is to compile it.
      compiler_options=QUICK_CPU if _on_cpu(self.mesh) else None,
    )
    state = init(self._init_key)
    if fresh and self.options.pretrained:
      loaded, line = torch_networks.load_pretrained(
        self.options.pretrained, self.network
      )
      log(line)
      state = self._with_pretrained(state, loaded)
    if self.distiller is not None:
      state = self._with_stored_gates(state)
    if self.state_sharding is not None:
      state = jax.device_put(state, self.state_sharding)
    return state

  def abstract_state(self):
    """Shapes and types of `init_state`, without computing or compiling."""
    return jax.eval_shape(self._init, self._init_key)

  @property
  def _init_key(self):
    # Student and distilled student of one seed start from the same weights.
    index = 0 if self.name == 'teacher' else 1
    return init_key(self.config.seed, index)

  def _init(self, rng):
    image = jnp.zeros((1, 64, 64, 3))
    variables = {'student': self.network.init(rng, image, train=False)}
    if self.distiller is not None:
      variables['distiller'] = init_distiller(
        self.distiller, self.output_shapes, jax.random.fold_in(rng, 1)
      )
    return make_state(variables, self.tx, ema=self.config.optim.ema_decay > 0)

  @functools.cached_property
  def state_sharding(self):
    """TrainState of shardings with config.mesh.fsdp, else None."""
    if not self.config.mesh.fsdp:
      return None
    return sharding.split_state(self.abstract_state(), self.mesh)

  def _placed(self, tree):
    """A copy on all devices: a donated state must own its buffers."""
    place = sharding.replicated(self.mesh)
    copy = jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=place)
    return copy(tree)

  def _with_pretrained(self, state, loaded):
    """`state` with the arrays of `loaded`, None where it has none."""

    def put(old, new):
      return jax.tree.map(
        lambda new, old: old if new is None else new,
        new,
        old,
        is_leaf=lambda x: x is None,
      )

    loaded = self._placed(dict(loaded))
    params = put(state.params['student'], loaded.pop('params'))
    student = state.collections['student']
    student = student | {key: put(student[key], loaded[key]) for key in loaded}
    state = state.replace(
      params=state.params | {'student': params},
      collections=state.collections | {'student': student},
    )
    return state.replace(ema=self._placed(state.params)) if state.ema else state

  def _with_stored_gates(self, state):
    """`state` with what the teacher has stored for the methods."""
    before = state.collections['distiller']
    after = self.distiller.adopt(before, self.teacher)
    if after is before:
      return state
    return state.replace(
      collections=state.collections | {'distiller': self._placed(after)}
    )

  def make_train_step(self):
    """See training/step.py."""
    options, optimizer = self.config.distill, self.config.optim
    return make_train_step(
      self.network,
      self.tx,
      task_loss=task_loss.make_task_loss(self.config.loss),
      plain_cross_entropy=task_loss.is_plain(self.config.loss),
      teacher=self.teacher,
      distiller=self.distiller,
      schedule=self.schedule,
      mesh=self.mesh,
      state_sharding=self.state_sharding,
      ce_batch_division=options.ce_batch_division,
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

  def score_teacher(self):
    """As `evaluate`, of the teacher on val."""
    # Where it has a module, that is scored: programs are shared by it.
    network = getattr(self.teacher, 'network', None) or Scored(self.teacher)
    return self.evaluate(self.teacher.variables, network=network)

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
  config = task_loss.with_class_weights(config, dataset, workdir)
  role = 'teacher' if name == 'teacher' else 'student'
  images = len(dataset.splits['train'])
  epoch = images / config.batch_size
  steps = {
    'epoch_steps': max(math.ceil(epoch), 1),
    'num_steps': max(round(config[role].num_epochs * epoch), 1),
    'eval_every': max(round(config.eval.every_epochs * epoch), 1),
  }
  if name == 'teacher':
    network = networks.make_network(
      config.teacher, dataset.num_classes, dtype=config.optim.dtype
    )
  else:
    network = make_student(
      config, dataset.num_classes, distilled=name == 'distill'
    )
  stage = Stage(name, config, dataset, mesh, network, **steps)
  if name != 'distill':
    return stage
  teacher = teachers.from_config(config, workdir, dataset.class_names, mesh)
  return with_teacher(stage, teacher)


def with_teacher(stage, teacher):
  """`stage` with a teacher and the distiller that its config names."""
  distiller, shapes = make_stage_distiller(
    stage.config, stage.network, teacher, num_steps=stage.num_steps
  )
  return dataclasses.replace(
    stage, teacher=teacher, distiller=distiller, output_shapes=shapes
  )
