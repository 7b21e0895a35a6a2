# SPDX-License-Identifier: Apache-2.0
"""Builds a stage from its config: networks, methods, optimizer, data, state."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
import json
import math
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import optax

from attnfd_jax import distill, metrics
from attnfd_jax.data import cache, pipeline, subsets
from attnfd_jax.data.pairs import UNLABELED
from attnfd_jax.data.sources import Dataset
from attnfd_jax.devices import memory, sharding
from attnfd_jax.errors import check_range, convert_errors, named
from attnfd_jax.inference import evaluation
from attnfd_jax.models import network as networks
from attnfd_jax.models.network import Network
from attnfd_jax.pytorch import networks as torch_networks
from attnfd_jax.teachers import sources as teachers
from attnfd_jax.teachers.teacher import Teacher, with_taps
from attnfd_jax.training import optim, task_loss
from attnfd_jax.training.step import make_state, make_train_step, TrainState
from attnfd_jax.types import Config, PyTree, Variables


def init_key(seed: int, index: int) -> jax.Array:
  """Random key for initial weights; threefry is the same on every backend."""
  rng = jax.random.key(seed, impl='threefry2x32')
  return jax.random.fold_in(rng, index)


def _copied(tree: PyTree) -> PyTree:
  """Copies arrays, since a state is donated and must own its buffers."""
  return jax.tree.map(jnp.copy, tree)


def role_of(name: str) -> str:
  """The group of the config that describes the network of stage `name`."""
  return 'teacher' if name == 'teacher' else 'student'


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of a run, ready to train; built by `make_stage`.

  Attributes:
    name: 'teacher', 'student' or 'distill'.
    config: a resolved config.
    dataset: with the images for this stage.
    mesh: device mesh.
    network: the network in training.
    epoch_steps: steps per epoch.
    num_steps: steps of the stage.
    eval_every: steps between evaluations.
    teacher: in 'distill' only, see `with_teacher`.
    distiller: in 'distill' only.
    output_shapes: in 'distill' only, abstract Outputs of student and teacher.
    teacher_miou: mIoU of the teacher on val, once it is known.
  """

  name: str
  config: Config
  dataset: Dataset
  mesh: jax.sharding.Mesh
  network: Network
  epoch_steps: int = 1
  num_steps: int = 1
  eval_every: int = 1
  teacher: Teacher | None = None
  distiller: distill.WeightedSum | None = None
  output_shapes: tuple = ()
  teacher_miou: float | None = None

  @property
  def options(self) -> Config:
    """The group of the config that describes the network in training."""
    return self.config[role_of(self.name)]

  @property
  def rng(self) -> jax.Array:
    """The random key of all steps, on the mesh."""
    key = jax.random.key(self.config.seed)
    return sharding.place(key, sharding.replicated(self.mesh))

  @property
  def run_facts(self) -> dict[str, Any]:
    """What a resumed stage must find unchanged, as plain values.

    The order of the images depends on it. A teacher that is built anew at each
    start adds a fingerprint of its weights.
    """
    facts = {key: self.config[key] for key in ('seed', 'batch_size')}
    facts['records'] = len(self.dataset.splits['train'])
    if rows := pipeline.count_unlabeled_rows(self.config, self.dataset):
      count = len(self.dataset.splits[UNLABELED])
      facts |= {'unlabeled_records': count, 'unlabeled_rows': rows}
    if fingerprint := getattr(self.teacher, 'fingerprint', ''):
      facts['teacher'] = fingerprint
    return facts

  def make_schedule(self) -> optax.Schedule:
    """Learning rate of the backbone at each step."""
    lr, options = self.options.lr, self.config.optim
    return optim.poly_schedule(
      lr,
      num_steps=self.num_steps,
      power=options.power,
      warmup_steps=self.warmup_steps,
    )

  @property
  def warmup_steps(self) -> int:
    """Steps over which the learning rate rises."""
    return round(self.config.optim.warmup_epochs * self.epoch_steps)

  def make_optimizer(self) -> optax.GradientTransformation:
    """The optimizer of the network and the distiller.

    Raises:
      InputError: for a value that is out of range.
    """
    keys = ('name', 'weight_decay', 'momentum', 'nesterov', 'clip_norm')
    options = {key: self.config.optim[key] for key in keys}
    options['head_lr_scale'] = self.options.head_lr_scale
    if self.distiller is not None:
      options |= {
        'connector_schedule': self.distiller.connector_schedule,
        'groups': self.distiller.parameter_groups(),
        'optimizers': self.distiller.optimizers(),
      }
    return optim.make_optimizer(
      self.make_schedule(), epoch_steps=self.epoch_steps, **options
    )

  def init_state(
    self, *, fresh: bool = True, log: Callable[[str], Any] = print
  ) -> TrainState:
    """Initializes a TrainState at step 0 on the mesh, in one program.

    Args:
      fresh: whether to load pretrained weights; not needed if a checkpoint is
        going to be restored.
      log: gets lines for the user, such as a warning about a long warm-up.
    """
    loaded = {}
    if self.warmup_steps >= max(self.num_steps, 2):
      epochs = self.config.optim.warmup_epochs
      log(
        f'the warm-up of config.optim.warmup_epochs={epochs:g} is not shorter '
        f'than this stage of {self.options.num_epochs:g} epochs: the learning '
        f'rate {self.options.lr:g} is never reached; shorten the warm-up, or '
        'turn it off with --config.optim.warmup_epochs=0'
      )
    if fresh and (path := self.options.pretrained):
      loaded, line = torch_networks.load_pretrained(path, self.network)
      log(line)
    everywhere, quick = sharding.replicated(self.mesh), None
    if self.mesh.devices.flat[0].platform == 'cpu':
      # Halves the time to compile hundreds of small threefry programs, each of
      # which runs once; the random bits are the same.
      quick = {
        'xla_backend_optimization_level': 1,
        'xla_llvm_disable_expensive_passes': True,
      }
    init = jax.jit(self._init, out_shardings=everywhere, compiler_options=quick)
    # With the same seed, student and distilled student start from the same
    # weights.
    key = init_key(self.config.seed, 0 if self.name == 'teacher' else 1)
    state = init(key, dict(loaded))
    if self.distiller is not None:
      before = state.collections['distiller']
      after = self.distiller.adopt(before, self.teacher)
      if after is not before:
        after = jax.jit(_copied, out_shardings=everywhere)(after)
        collections = {**state.collections, 'distiller': after}
        state = state.replace(collections=collections)
    if self.state_sharding is not None:
      state = jax.device_put(state, self.state_sharding)
    return state

  def abstract_state(self) -> TrainState:
    """Shapes and dtypes of `init_state`, without computing or compiling."""
    return jax.eval_shape(self._init, init_key(0, 0), {})

  def _init(self, rng: jax.Array, loaded: Mapping[str, PyTree]) -> TrainState:
    """The state; `loaded` has pretrained variables, None where missing."""
    student = self.network.init(rng, jnp.zeros((1, 64, 64, 3)), train=False)
    filled = jax.tree.map(
      lambda new, old: old if new is None else new,
      _copied(loaded),
      {name: student[name] for name in loaded},
      is_leaf=lambda x: x is None,
    )
    variables: dict[str, Variables] = {'student': {**student, **filled}}
    if self.distiller is not None:
      variables['distiller'] = distill.init_distiller(
        self.distiller, self.output_shapes, jax.random.fold_in(rng, 1)
      )
    keep_average = self.config.optim.ema_decay > 0
    return make_state(variables, self.make_optimizer(), ema=keep_average)

  @functools.cached_property
  def state_sharding(self) -> TrainState | None:
    """Shardings of the state if config.mesh.fsdp is set, else None."""
    if not self.config.mesh.fsdp:
      return None
    return sharding.split_state(self.abstract_state(), self.mesh)

  def make_train_step(self) -> jax.stages.Wrapped:
    """The jitted training step, see training/step.py."""
    options = self.config.optim
    return make_train_step(
      self.network,
      self.make_optimizer(),
      task_loss=task_loss.make_task_loss(self.config.loss),
      plain_cross_entropy=task_loss.is_plain(self.config.loss),
      teacher=self.teacher,
      distiller=self.distiller,
      schedule=self.make_schedule(),
      mesh=self.mesh,
      state_sharding=self.state_sharding,
      ce_batch_division=self.config.distill.ce_batch_division,
      log_gradients=self.config.distill.log_gradients,
      cutmix=self.config.data.cutmix,
      **{key: options[key] for key in ('accumulate', 'remat', 'ema_decay')},
    )

  def make_batches(self, step: int) -> Iterable[dict[str, jax.Array]]:
    """Batches on the mesh, starting with the one after `step` steps."""
    batches = pipeline.configured_batches(self.config, self.dataset, step=step)
    return pipeline.to_device(batches, sharding.by_batch(self.mesh))

  def batch_names(self, step: int) -> list[str]:
    """Names of the images in the batch after `step` steps."""
    return pipeline.batch_names(self.config, self.dataset, step=step)

  def evaluate(
    self, variables: Variables, split: str = 'val', *, network: Any = None
  ) -> dict[str, Any]:
    """Scores a network on one split; returns the entries for result.json.

    Args:
      variables: of the network.
      split: name of the split.
      network: the network in training by default.
    """
    keys = ('protocol', 'batch_size', 'short_side', 'size_multiple')
    options = {key: self.config.eval[key] for key in keys}
    options |= {'mesh': self.mesh, 'threads': self.config.data.threads}
    options['num_classes'] = self.dataset.num_classes
    network, source = network or self.network, self.dataset.splits[split]
    devices = self.mesh.shape['data']
    with memory.explain_exhaustion(options['batch_size'], devices=devices):
      counts = evaluation.evaluate(network, variables, source, **options)
    return metrics.summarize(counts, self.dataset.class_names)

  def description(self) -> dict[str, Any]:
    """Content of config.json, enough to rebuild the network without data."""
    return json.loads(self.config.to_json_best_effort()) | {
      'stage': self.name,
      'class_names': list(self.dataset.class_names),
      'palette': self.dataset.palette.tolist(),
    }


def make_network(name: str, config: Config, num_classes: int) -> Network:
  """The network that stage `name` trains."""
  role, options, changes = role_of(name), config.distill, {}
  if name == 'distill':
    # The reference distills without ASPP dropout.
    check_range('config.distill.aspp_dropout', options.aspp_dropout, 0, 1)
    keys = ('aspp_dropout', 'update_norms_twice')
    changes = {key: options[key] for key in keys}
  with named(f'config.{role}'):
    return networks.make_network(
      config[role], num_classes, dtype=config.optim.dtype, **changes
    )


def plan(
  name: str, config: Config, dataset: Dataset, mesh: jax.sharding.Mesh
) -> Stage:
  """Stage `name` without a teacher, before any file is read.

  Args:
    name: 'teacher', 'student' or 'distill'.
    config: a resolved config.
    dataset: all images; the stage has those that it trains with.
    mesh: device mesh.
  """
  role = role_of(name)
  # By the full split: the number of steps does not depend on labeled_limit.
  epoch = len(dataset.splits['train']) / config.batch_size
  dataset = subsets.for_stage(
    dataset,
    config.data,
    labeled_limit=config[role].labeled_limit,
    distills=name == 'distill',
  )
  num_epochs = config[role].num_epochs
  return Stage(
    name,
    config,
    dataset,
    mesh,
    make_network(name, config, dataset.num_classes),
    epoch_steps=max(math.ceil(epoch), 1),
    num_steps=max(round(num_epochs * epoch), 1),
    eval_every=max(round(config.eval.every_epochs * epoch), 1),
  )


def make_stage(
  name: str,
  config: Config,
  dataset: Dataset,
  mesh: jax.sharding.Mesh,
  workdir: epath.Path,
) -> Stage:
  """Builds stage `name`, with its teacher if it distills.

  Args:
    name: 'teacher', 'student' or 'distill'.
    config: a resolved config.
    dataset: all images.
    mesh: device mesh.
    workdir: folder of the run.
  """
  stage = plan(name, config, dataset, mesh)
  dataset = stage.dataset
  if folder := config.data.decoded_cache:
    dataset = cache.with_decoded(dataset, folder, threads=config.data.threads)
  limit = config[role_of(name)].labeled_limit
  config = task_loss.with_class_weights(config, dataset, workdir, limit)
  stage = dataclasses.replace(stage, config=config, dataset=dataset)
  if name != 'distill':
    return stage
  teacher = teachers.from_config(config, workdir, dataset.class_names, mesh)
  return with_teacher(stage, teacher)


def with_teacher(stage: Stage, teacher: Teacher) -> Stage:
  """Adds a teacher, and the distiller that the config names, to a stage.

  Raises:
    InputError: if the method does not work with these networks.
  """
  options = stage.config.distill
  distiller = distill.make_distiller(
    options.method,
    options,
    options=options.options,
    num_steps=stage.num_steps,
    task_schedule=options.task_weight_schedule,
  )
  with convert_errors('config.distill.method'):
    distiller = distiller.adapted(stage.network, teacher)
    network = networks.with_taps(stage.network, distiller.extra_taps)
    teacher = with_taps(teacher, distiller.extra_taps)
  size = tuple(stage.config.data.crop_size)
  inputs = {'variables': teacher.variables, 'rng': jax.random.key(0)}
  classes = len(teacher.class_names)
  shapes = (
    networks.abstract_outputs(network, size),
    networks.checked_outputs(teacher, classes, size, **inputs),
  )
  distill.abstract_variables(distiller, *shapes)
  return dataclasses.replace(
    stage,
    network=network,
    teacher=teacher,
    distiller=distiller,
    output_shapes=shapes,
  )
