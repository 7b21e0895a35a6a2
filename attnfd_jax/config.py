# SPDX-License-Identifier: Apache-2.0
"""All config keys with their defaults, and the two recipes.

A file in configs/ starts from `default_config` and changes some values. Keys
that are None here are set by the recipe in `resolve`, so that each can be
overridden: --config.distill.teacher_bn=batch.
"""

from collections.abc import Callable, Mapping
import math
import os
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections.config_dict import ConfigDict, placeholder

from attnfd_jax import distill, user_code
from attnfd_jax.errors import check_choice, check_range, InputError, named
from attnfd_jax.models import network as networks
from attnfd_jax.types import Config

# METHOD section 5: the behavior of the authors' code, and what we recommend.
_BY_RECIPE = {
  'data.label_pad': ('dataset', 'ignore'),
  'distill.aspp_dropout': (0.0, 'student'),
  'distill.ce_batch_division': (True, False),
  'distill.teacher_bn': ('batch', 'running'),
  'distill.teacher_dropout': (True, False),
  'distill.update_norms_twice': (True, False),
  'distill.aicsd.reduction': ('batchmean', 'mean'),
  'distill.attnfd.connector_schedule': ('first_epoch', 'always'),
  'distill.attnfd.norm_scope': ('batch', 'batch'),
  'distill.attnfd.reduction': ('batchmean', 'unitmean'),
  'distill.attnfd.student_attention': ('mlp_frozen', 'learnable'),
  'distill.attnfd.teacher_attention': ('checkpoint', 'in_path'),
  'distill.attnfd.teacher_bn': ('batch', 'running'),
  'distill.lad.reduction': ('batchmean', 'unitmean'),
  'eval.protocol': ('reference', 'native'),
}
RECIPES = {
  recipe: {key: values[i] for key, values in _BY_RECIPE.items()}
  for i, recipe in enumerate(('reference', 'clean'))
}
STAGES = ('teacher', 'student', 'distill')
LOGGERS = ('tensorboard', 'wandb')
_CHOICES = {
  'data.label_pad': ('ignore', 'background'),
  'distill.teacher_bn': ('batch', 'running'),
  'eval.protocol': ('native', 'reference'),
  'optim.dtype': ('float32', 'bfloat16'),
}
# Ranges of values. Values that only one package uses are checked there.
_RANGES = {
  (0, 1): (
    'data.balanced data.blur data.cutmix data.flip data.unlabeled_share '
    'optim.ema_decay teacher.min_miou'
  ),
  (0, 2): 'data.photometric',
  (0, 180): 'data.rotation',
  (0, 1024): 'data.workers',
  (0, 100): 'optim.power',
  (0, 1e4): 'optim.warmup_epochs',
  (0, math.inf): (
    'seed checkpoint.every_minutes data.labeled_seed data.limit '
    'data.scenes_seed eval.num_pictures eval.short_side '
    'student.head_lr_scale student.labeled_limit '
    'teacher.head_lr_scale teacher.labeled_limit'
  ),
  (1, 1024): 'data.threads',
  (1, 1e6): 'data.train_scenes data.val_scenes',
  (1, math.inf): (
    'batch_size log_every_steps checkpoint.keep_best data.base_size '
    'eval.batch_size eval.size_multiple optim.accumulate'
  ),
  # A step is a number of 32 bits.
  (1e-9, 1e4): 'num_epochs student.num_epochs teacher.num_epochs',
  (1e-9, math.inf): 'eval.every_epochs',
  (1e-30, math.inf): 'optim.lr student.lr teacher.lr',
}


def num_cores() -> int:
  """Number of CPU cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _network(backbone: str) -> Config:
  config: Config = ConfigDict()
  # Or your own class, 'file.py:Class': its fields are `options`, and the other
  # keys down to head_dropout do not apply. See models/network.py.
  config.network = 'deeplabv3plus'
  config.options = ConfigDict()
  config.backbone = backbone
  config.output_stride = 16
  config.width_multiplier = 1.0
  config.aspp_channels = 256
  config.decoder_channels = 256
  config.low_level_channels = 48
  config.aspp_dropout = 0.5
  config.decoder_dropout = 0.5
  config.head_dropout = 0.1
  # 'imagenet', or a PyTorch file with a backbone or a complete network.
  config.pretrained = ''
  # Number of labeled training images, the first of a shuffle by
  # data.labeled_seed; 0 is all.
  config.labeled_limit = 0
  # None: the values of config.num_epochs, optim.lr and optim.head_lr_scale.
  config.num_epochs = placeholder(float)
  config.lr = placeholder(float)
  config.head_lr_scale = placeholder(float)
  return config


def default_config() -> Config:
  """All keys; configs/*.py change values and cannot add keys."""
  groups = ('data', 'distill', 'optim', 'loss', 'eval', 'checkpoint', 'mesh')
  config: Config = ConfigDict({name: ConfigDict() for name in groups})
  config.recipe = 'clean'
  config.seed = 0
  config.stages = STAGES
  config.batch_size = 8  # Global, over all devices.
  config.num_epochs = 50.0
  config.log_every_steps = 20
  config.loggers = ()  # Besides metrics.jsonl: 'tensorboard', 'wandb'.

  config.data.name = 'scenes'
  config.data.root = ''
  config.data.prepared = ''  # Folder written by prepare_data; replaces root.
  config.data.train_list = 'train'  # For 'pascal_voc': or 'trainaug'.
  config.data.sbd_root = ''  # For 'pascal_voc': SBD's benchmark_RELEASE.
  # For 'folder', see docs/own_data.md. Names in the order of ids; () uses the
  # names of the layout, if it has any.
  config.data.class_names = ()
  config.data.layout = 'auto'  # Or 'pairs', 'voc', 'roboflow', 'coco'.
  config.data.palette = ()  # For color masks: (r, g, b) of each class.
  config.data.id_map = ()  # For masks with other ids: the id of each class.
  config.data.base_size = 513  # train_kd.py:197.
  config.data.scale_range = (0.5, 2.0)  # Short side relative to base_size.
  config.data.crop_size = (513, 513)  # Height, width; train_kd.py:199.
  config.data.flip = 0.5
  config.data.blur = 0.5
  config.data.photometric = 0.0
  config.data.rotation = 0.0  # Largest angle in degrees, in both directions.
  config.data.cutmix = 0.0  # Probability per image (arXiv 1905.04899).
  # Fraction of images drawn by class first, then among the images of the class.
  config.data.balanced = 0.0
  # Images without masks, used only for distillation: a folder, zip, glob or
  # text file of paths; 'rest': the images beyond student.labeled_limit;
  # 'official': the unlabeled images of VOC, Cityscapes or COCO.
  config.data.unlabeled = ''
  # Fraction of each batch; 0: in proportion to their number, at most half.
  config.data.unlabeled_share = 0.0
  config.data.labeled_seed = 0
  config.data.limit = 0  # Number of images of each split; 0 is all.
  config.data.cache = False  # Keep decoded images in memory.
  config.data.decoded_cache = ''  # Folder for decoded images, 4 bytes a pixel.
  # One per core; more than about eight wait for Python's global lock.
  config.data.threads = min(max(num_cores(), 2), 8)
  config.data.workers = 0
  # For 'scenes'.
  config.data.image_size = (96, 128)
  config.data.train_scenes = 512
  config.data.val_scenes = 64
  config.data.scenes_seed = 0

  config.teacher = _network('resnet101')
  config.teacher.in_path_attention = False
  config.teacher.checkpoint = ''  # Stage folder or PyTorch file; '': train.
  config.teacher.allow_code = False  # Run the Python files of a checkpoint.
  # 'file.py:make', a function that returns a torch.nn.Module or a Teacher, see
  # docs/any_teacher.md, and the module's feature maps, {tap: submodule}.
  config.teacher.factory = ''
  config.teacher.taps = ConfigDict()
  config.teacher.class_map = ()  # The teacher's index of each class.
  config.teacher.min_miou = 0.0  # On val; a worse teacher is an error.
  config.student = _network('resnet18')

  # Names joined by '+', or your own class, 'file.py:Class', whose fields are
  # `options`; see distill/method.py.
  config.distill.method = 'attnfd'
  config.distill.options = ConfigDict()
  # Schedule of the task loss, like weight_schedule of the methods: 'constant',
  # 'linear_to_zero' or 'linear_from_zero'.
  config.distill.task_weight_schedule = 'constant'
  # Log the norms of the gradients of task and distillation and their cosine
  # similarity, at the cost of another backward pass.
  config.distill.log_gradients = False
  for name, method in distill.METHODS.items():
    shared = {'weight': distill.WEIGHTS[name], 'weight_schedule': 'constant'}
    config.distill[name] = ConfigDict(shared | distill.option_defaults(method))

  config.optim.name = 'sgd'
  config.optim.lr = 0.01
  config.optim.head_lr_scale = 10.0  # ASPP, decoder, gates, connectors.
  config.optim.warmup_epochs = 0.0
  config.optim.power = 0.9  # Exponent of the poly schedule.
  config.optim.momentum = 0.9
  config.optim.nesterov = True
  config.optim.weight_decay = 5e-4
  config.optim.clip_norm = placeholder(float)
  config.optim.accumulate = 1  # Gradient accumulation steps within a batch.
  config.optim.remat = False  # Recompute activations in the backward pass.
  config.optim.ema_decay = 0.0  # Averages the weights; 0 is off.
  config.optim.dtype = 'float32'  # Compute dtype; or 'bfloat16'.

  config.loss.name = 'ce'  # Or 'ohem', 'focal', 'dice', 'ce+dice'.
  # 'none', 'given' (class_weights) or 'auto': median frequency balancing,
  # counted on the training split. For all losses but 'dice'.
  config.loss.weighting = 'none'
  config.loss.class_weights = ()  # In the order of the classes.
  # A pixel is hard if its label has at most this probability; the fraction of
  # the pixels that is always kept.
  config.loss.ohem_threshold = 0.7
  config.loss.ohem_min_kept = 0.0625
  config.loss.focal_gamma = 2.0

  config.eval.every_epochs = 1.0
  config.eval.batch_size = 8
  # Short side of the network's input, 0 for the size of the image. Logits are
  # always resized to the original label. For networks trained at base_size.
  config.eval.short_side = 0
  config.eval.size_multiple = 1  # Pad to a multiple: fewer compilations.
  config.eval.test_split = ''  # Evaluated once, at the best checkpoint on val.
  config.eval.num_pictures = 4

  config.checkpoint.keep_best = 1
  config.checkpoint.every_minutes = 10.0  # Longest time between two; 0 is off.

  config.mesh.data = -1  # Shards of a batch; -1: number of devices / spatial.
  config.mesh.spatial = 1  # Shards of the image height.
  config.mesh.fsdp = False  # Shard weights, average, optimizer state.

  empty = {k: placeholder(type(v)) for k, (v, _) in _BY_RECIPE.items()}
  config.update_from_flattened_dict(empty)
  return config.lock()  # So that a typo in a config file is an error.


def reference_config() -> Config:
  """The settings that all data sets share in the authors' code."""
  config = default_config()
  config.recipe = 'reference'
  config.batch_size = 6  # train_kd.py:281, there per GPU, here global.
  return config


def debug(config: Config) -> Config:
  """Runs all code in about a minute on a CPU; the scores are meaningless."""
  config.data.limit = config.data.train_scenes = config.data.val_scenes = 12
  config.student.labeled_limit = min(config.student.labeled_limit, 8)
  config.batch_size = config.eval.batch_size = 4
  config.num_epochs = config.teacher.num_epochs = config.eval.every_epochs = 1.0
  config.optim.warmup_epochs = 0.0
  config.log_every_steps = 1
  for network in (config.teacher, config.student):
    network.backbone = 'resnet18'
    network.width_multiplier = 0.125
    network.pretrained = ''  # Weights exist for the full width only.
    network.aspp_channels = network.decoder_channels = 16
    network.low_level_channels = 16
  return config


def from_imagenet(
  network: Config, lr: float = 0.001, head_lr_scale: float = 4.0
) -> None:
  """Makes the group `teacher` or `student` start from ImageNet weights.

  The default learning rates are for AdamW, from experiments/camvid.
  """
  network.pretrained = 'imagenet'
  network.lr, network.head_lr_scale = lr, head_lr_scale


def with_variant(
  config: Config, arg: str | None, **variants: Callable[[Config], Any]
) -> Config:
  """Applies the variant of --config=FILE:VARIANT.

  Args:
    config: changed in place.
    arg: name of a variant: 'debug', one of `variants`, or None for none.
    **variants: functions that change a config.
  """
  variants = {'debug': debug, **variants}
  if arg and arg not in variants:
    names = ', '.join(variants)
    raise ValueError(f'Unknown variant {arg!r}; use {names} or nothing.')
  if arg:
    variants[arg](config)
  return config


def resolve(config: Config) -> Config:
  """A locked copy with the values of the recipe and `~` in paths expanded.

  Raises:
    InputError: for a value outside its choices or its range.
  """
  config = config.copy_and_resolve_references()
  defaults = leaves(default_config())
  if missing := defaults.keys() - leaves(config).keys():
    text = (
      f'config.{min(missing)} is missing; set single keys of a group, as in'
    )
    raise InputError(f'{text} --config.data.root=PATH.')
  texts = {k: v for k, v in leaves(config).items() if isinstance(v, str)}
  config.update_from_flattened_dict(
    {k: os.path.expanduser(v) for k, v in texts.items()}
  )
  check_choice('config.recipe', config.recipe, RECIPES)
  filled = dict(RECIPES[config.recipe])
  if filled['distill.aspp_dropout'] == 'student':
    # As in the baseline, so that only the loss differs.
    filled['distill.aspp_dropout'] = config.student.aspp_dropout
  for role in ('teacher', 'student'):
    filled[f'{role}.num_epochs'] = config.num_epochs
    filled[f'{role}.lr'] = config.optim.lr
    filled[f'{role}.head_lr_scale'] = config.optim.head_lr_scale
  values = leaves(config)
  unset = {k: v for k, v in filled.items() if values[k] is None}
  config.update_from_flattened_dict(unset)
  if config.data.label_pad == 'dataset':
    # pascal.py:87 and coco.py:100 pad with background, Cityscapes with 255.
    background = config.data.name in ('pascal_voc', 'coco')
    config.data.label_pad = 'background' if background else 'ignore'
  _check(config, defaults)
  return config.lock()


def leaves(config: Config) -> dict[str, Any]:
  """{'group.key': value} of a config or of its JSON."""
  nested = config.to_dict() if isinstance(config, ConfigDict) else config
  return flatten_dict(nested, sep='.')


def _check(config: Config, defaults: Mapping[str, Any]) -> None:
  """Checks values that several packages use."""
  values = leaves(config)
  for key, value in values.items():
    if value is None and key != 'optim.clip_norm':
      raise InputError(f'config.{key}=None; leave it out for its default.')
    if isinstance(value, bool) and type(defaults.get(key)) in (int, float):
      raise InputError(f'config.{key}={value} must not be True or False.')
    if isinstance(value, (int, float)):
      # JAX's integers have 32 bits.
      most = 2**31 - 1 if isinstance(value, int) else 1e30
      check_range(f'config.{key}', value, -(2**31 - 1), most)
  for limits, keys in _RANGES.items():
    for key in keys.split():
      check_range(f'config.{key}', values[key], *limits)
  for key, choices in _CHOICES.items():
    check_choice(f'config.{key}', values[key], choices)
  for role in ('teacher', 'student'):
    if not user_code.is_code(config[role].network):
      with named(f'config.{role}'):
        networks.make_network(config[role], 2)
  for key, allowed in (('stages', STAGES), ('loggers', LOGGERS)):
    chosen, names = tuple(config[key]), ', '.join(allowed)
    if not {*chosen} <= {*allowed} or (key == 'stages' and not chosen):
      raise InputError(f'config.{key}={chosen} must be chosen from {names}.')
  parts = config.optim.accumulate
  if config.batch_size % parts or config.batch_size // parts < 2:
    given = f'{config.batch_size} over optim.accumulate={parts}'
    need = 'at least 2 images a part: the pooled branch of ASPP normalizes them'
    raise InputError(f'config.batch_size={given} must leave {need}.')
  if config.eval.short_side and config.eval.size_multiple != 1:
    raise InputError('config.eval.short_side needs size_multiple=1.')
  data = config.data
  if data.cache and data.decoded_cache:
    text = 'keeps in memory what config.data.decoded_cache keeps on the disk'
    raise InputError(f'config.data.cache {text}; use one of them.')
  for key in ('crop_size', 'image_size'):
    size = tuple(data[key])
    whole = len(size) == 2 and all(type(n) is int for n in size)
    if not whole or not 32 <= min(size) <= max(size) <= 2**15:
      limits = f'(height, width), both from 32 to {2**15}'
      raise InputError(f'config.data.{key}={size} must be {limits}.')
  scales = tuple(data.scale_range)
  pair = len(scales) == 2 and all(isinstance(x, (int, float)) for x in scales)
  if not pair or not 1 / data.base_size <= scales[0] <= scales[1] <= 100:
    limits = '(least, most), at most 100, and leave a pixel of base_size'
    raise InputError(f'config.data.scale_range={scales} must be {limits}.')
