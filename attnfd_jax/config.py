# SPDX-License-Identifier: Apache-2.0
"""Every key of a config with its default, and the two recipes.

A file in configs/ starts from `default_config` and changes what differs. Keys
that are None here are filled from the recipe by `resolve`, so that a single
item can be overridden after it: --config.distill.teacher_bn=batch.
"""

import math
import os

from ml_collections import config_dict
from ml_collections import ConfigDict

from attnfd_jax.errors import InputError

# METHOD section 5: what the authors' code does, and what we would advise.
RECIPES = {
  'reference': {
    'data.label_pad': 'dataset',
    'distill.aspp_dropout': 0.0,
    'distill.ce_batch_division': True,
    'distill.connector_schedule': 'first_epoch',
    'distill.norm_scope': 'batch',
    'distill.reduction': 'batchmean',
    'distill.student_attention': 'mlp_frozen',
    'distill.teacher_attention': 'checkpoint',
    'distill.teacher_bn': 'batch',
    'distill.teacher_dropout': True,
    'distill.update_norms_twice': True,
    'eval.protocol': 'reference',
  },
  'clean': {
    'data.label_pad': 'ignore',
    'distill.aspp_dropout': 'student',
    'distill.ce_batch_division': False,
    'distill.connector_schedule': 'always',
    'distill.norm_scope': 'batch',
    'distill.reduction': 'unitmean',
    'distill.student_attention': 'learnable',
    'distill.teacher_attention': 'in_path',
    'distill.teacher_bn': 'running',
    'distill.teacher_dropout': False,
    'distill.update_norms_twice': False,
    'eval.protocol': 'native',
  },
}
STAGES = ('teacher', 'student', 'distill')
LOGGERS = ('tensorboard', 'wandb')
_MOST = 2**31 - 1  # JAX's integers have 32 bits.
# (least, most) of numbers beside those that must be positive.
_RANGES = {
  'seed': (0, _MOST),
  **{
    key: (0, 10**4)  # A step is a number of 32 bits.
    for key in ('num_epochs', 'teacher.num_epochs', 'student.num_epochs')
  },
  'data.limit': (0, _MOST),
  'data.workers': (0, 1024),
  'data.threads': (1, 1024),
  'data.flip': (0, 1),
  'data.blur': (0, 1),
  'data.photometric': (0, 2),
  'data.balanced': (0, 1),
  'data.rotation': (0, 180),
  'data.train_scenes': (1, 10**6),
  'data.val_scenes': (1, 10**6),
  'data.scenes_seed': (0, _MOST),
  **{
    f'{role}.{key}': limits
    for role in ('teacher', 'student')
    for key, limits in (
      ('width_multiplier', (1e-3, 64)),
      ('aspp_channels', (1, 2**16)),
      ('decoder_channels', (1, 2**16)),
      ('low_level_channels', (1, 2**16)),
      ('aspp_dropout', (0, 1)),
      ('decoder_dropout', (0, 1)),
      ('head_dropout', (0, 1)),
    )
  },
  'teacher.min_miou': (0, 1),
  'distill.attn_lambda': (0, math.inf),
  'distill.kd_weight': (0, math.inf),
  'distill.temperature': (1e-3, 1e6),
  'distill.aspp_dropout': (0, 1),
  'optim.head_lr_scale': (0, math.inf),
  'optim.warmup_epochs': (0, 10**4),
  'optim.power': (0, 100),
  'optim.momentum': (0, 1),
  'optim.weight_decay': (0, math.inf),
  'optim.clip_norm': (0, math.inf),
  'optim.ema_decay': (0, 1),
  'eval.short_side': (0, _MOST),
  'eval.size_multiple': (1, _MOST),
  'eval.num_pictures': (0, _MOST),
}


def num_cores():
  """That this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def _network(backbone):
  config = ConfigDict()
  config.backbone = backbone
  config.output_stride = 16
  config.width_multiplier = 1.0
  config.aspp_channels = 256
  config.decoder_channels = 256
  config.low_level_channels = 48
  config.aspp_dropout = 0.5
  config.decoder_dropout = 0.5
  config.head_dropout = 0.1
  # PyTorch file of first weights, of a backbone or a whole network.
  config.pretrained = ''
  # None: as config.num_epochs and config.optim.lr.
  config.num_epochs = config_dict.placeholder(float)
  config.lr = config_dict.placeholder(float)
  return config


def default_config():
  """All keys; configs/*.py change them and cannot add any."""
  config = ConfigDict()
  config.recipe = 'clean'
  config.seed = 0
  config.stages = STAGES
  config.batch_size = 8  # Global, over all devices.
  config.num_epochs = 50.0
  config.log_every_steps = 20
  config.loggers = ()  # Beside metrics.jsonl: 'tensorboard', 'wandb'.

  config.data = ConfigDict()
  config.data.name = 'scenes'
  config.data.root = ''
  config.data.prepared = ''  # Folder of prepare_data, in place of root.
  config.data.train_list = 'train'  # For 'pascal_voc': or 'trainaug'.
  # For 'pascal_voc': folder benchmark_RELEASE; adds SBD's images to train.
  config.data.sbd_root = ''
  # For 'folder', see docs/own_data.md. Names in the order of ids; () where the
  # layout has names: its own.
  config.data.class_names = ()
  config.data.layout = 'auto'  # Or 'pairs', 'voc', 'roboflow', 'coco'.
  config.data.palette = ()  # Masks of colours: (r, g, b) of each class.
  config.data.id_map = ()  # Masks of other ids: the id of each class.
  config.data.base_size = 513
  config.data.scale_range = (0.5, 2.0)  # Of the short side, times base_size.
  config.data.crop_size = (513, 513)  # Height, width.
  config.data.flip = 0.5
  config.data.blur = 0.5
  config.data.photometric = 0.0
  config.data.rotation = 0.0  # At most, in degrees, either way.
  # Share of records drawn by class: any class alike, then one of its images.
  config.data.balanced = 0.0
  config.data.label_pad = config_dict.placeholder(str)
  config.data.limit = 0  # Images of each split, 0 for all.
  config.data.cache = False  # Decoded pairs stay in memory.
  # Folder for decoded pixels, 4 bytes each, for large images; empty: none.
  config.data.decoded_cache = ''
  # One a core. Python's lock lets no more than about eight work.
  config.data.threads = min(max(num_cores(), 2), 8)
  config.data.workers = 0
  # For 'scenes'.
  config.data.image_size = (96, 128)
  config.data.train_scenes = 512
  config.data.val_scenes = 64
  config.data.scenes_seed = 0

  config.teacher = _network('resnet101')
  config.teacher.in_path_attention = False
  # Folder of a stage or PyTorch file; empty: train one.
  config.teacher.checkpoint = ''
  # From 0 to 1, on val; a worse teacher stops the run before distillation.
  config.teacher.min_miou = 0.0
  config.student = _network('resnet18')

  config.distill = ConfigDict()
  config.distill.method = 'attnfd'
  config.distill.attn_lambda = 2.0
  config.distill.kd_weight = 1.0
  config.distill.temperature = 1.0
  config.distill.match_size = 'none'
  for key, value in RECIPES['reference'].items():
    group, name = key.split('.')
    if group == 'distill':
      config.distill[name] = config_dict.placeholder(type(value))

  config.optim = ConfigDict()
  config.optim.name = 'sgd'
  config.optim.lr = 0.01
  config.optim.head_lr_scale = 10.0  # ASPP, decoder, gates, connectors.
  config.optim.warmup_epochs = 0.0
  config.optim.power = 0.9  # Of the poly schedule.
  config.optim.momentum = 0.9
  config.optim.nesterov = True
  config.optim.weight_decay = 5e-4
  config.optim.clip_norm = config_dict.placeholder(float)
  config.optim.accumulate = 1  # Parts of a batch, one after the other.
  config.optim.remat = False  # Recompute blocks in the backward pass.
  config.optim.ema_decay = 0.0  # 0 is off.
  config.optim.dtype = 'float32'  # Of the computation, or 'bfloat16'.

  config.loss = ConfigDict()
  # 'ce', 'ohem', 'focal', 'dice' or 'ce+dice'; see losses.py.
  config.loss.name = 'ce'
  # 'none', 'given' by class_weights, or 'auto': median frequency, counted on
  # the training split. Of all but 'dice', in which classes count the same.
  config.loss.weighting = 'none'
  config.loss.class_weights = ()  # In the order of the classes.
  # A pixel is hard if its class has at most this probability; the share of the
  # pixels that is kept in any case.
  config.loss.ohem_threshold = 0.7
  config.loss.ohem_min_kept = 0.0625
  config.loss.focal_gamma = 2.0

  config.eval = ConfigDict()
  config.eval.protocol = config_dict.placeholder(str)
  config.eval.every_epochs = 1.0
  config.eval.batch_size = 8
  # Short side of what the network sees, 0 for the image as it is; scores are
  # always resized to the untouched label. For networks trained at base_size.
  config.eval.short_side = 0
  config.eval.size_multiple = 1  # Pad to multiples: fewer compilations.
  config.eval.test_split = ''  # Evaluated once, with the checkpoint of val.
  config.eval.num_pictures = 4

  config.checkpoint = ConfigDict()
  config.checkpoint.keep_best = 1
  # At most so long without a checkpoint, even between evaluations; 0 is off.
  config.checkpoint.every_minutes = 10.0

  config.mesh = ConfigDict()
  config.mesh.data = -1  # Parts of a batch; -1 is all devices / spatial.
  config.mesh.spatial = 1  # Parts of the height of each image.
  # Weights, average and momentum are split over the axis data, too.
  config.mesh.fsdp = False
  return config.lock()  # A typo in a config file is an error, too.


def reference_config():
  """What the data sets of the paper share in the authors' code."""
  config = default_config()
  config.recipe = 'reference'
  config.batch_size = 6  # train_kd.py:281; global here, per GPU there.
  config.data.base_size = 513  # train_kd.py:197.
  config.data.crop_size = (513, 513)  # train_kd.py:199.
  return config


def debug(config):
  """All code paths in about a minute on a CPU; the numbers mean nothing."""
  config.data.limit = 12
  config.batch_size = 4
  config.num_epochs = 1.0
  config.teacher.num_epochs = 1.0
  config.eval.every_epochs = 1.0
  config.eval.batch_size = 4
  config.optim.warmup_epochs = 0.0
  config.log_every_steps = 1
  for network in (config.teacher, config.student):
    network.backbone = 'resnet18'
    network.width_multiplier = 0.125
    network.aspp_channels = network.decoder_channels = 16
    network.low_level_channels = 16
  return config


def with_variant(config, arg):
  """`config` for arg None, its debug variant for 'debug'."""
  if arg not in (None, 'debug'):
    raise ValueError(f'Unknown variant {arg!r}; use debug or nothing.')
  return debug(config) if arg else config


def resolve(config):
  """A locked copy in which every None of the recipe is filled.

  Raises:
    InputError: for a value outside its choices or its range.
  """
  config = config.copy_and_resolve_references()
  if config.recipe not in RECIPES:
    raise InputError(
      f'config.recipe={config.recipe!r} must be one of {", ".join(RECIPES)}.'
    )
  for key, value in RECIPES[config.recipe].items():
    group, name = key.split('.')
    if config[group][name] is None:
      # 'student': as in the baseline, so that only the loss differs. A field
      # keeps the type of its first value.
      same = value == 'student'
      config[group][name] = config.student[name] if same else value
  if config.data.label_pad == 'dataset':
    # pascal.py:87 and coco.py:100 pad with background, Cityscapes with 255.
    background = config.data.name in ('pascal_voc', 'coco')
    config.data.label_pad = 'background' if background else 'ignore'
  distill = config.distill
  if distill.teacher_attention == 'in_path':
    if not config.teacher.in_path_attention:
      # Gates that nobody trained would only add noise.
      distill.teacher_attention = 'parameter_free'
  for role in ('teacher', 'student'):
    for name, default in (
      ('num_epochs', config.num_epochs),
      ('lr', config.optim.lr),
    ):
      if config[role][name] is None:
        config[role][name] = default
  _check(config)
  return config.lock()


def _check_loss(loss):
  given, weighting = tuple(loss.class_weights), loss.weighting
  if weighting == 'given' and not given:
    raise InputError(
      "config.loss.weighting='given' needs a number for each class, such as "
      '--config.loss.class_weights="(1.0, 2.5)".'
    )
  if given and weighting != 'given':
    raise InputError(
      f'config.loss.class_weights={given} needs loss.weighting=given, not '
      f'{weighting!r}.'
    )
  numbers = all(isinstance(x, (int, float)) for x in given)
  if not numbers or not all(0 <= x < math.inf for x in given):
    raise InputError(
      f'config.loss.class_weights={given} must be numbers from 0 on.'
    )
  if weighting == 'given' and not any(given):
    raise InputError('config.loss.class_weights are all 0.')
  if loss.name == 'dice' and weighting != 'none':
    raise InputError(
      f"config.loss.weighting={weighting!r} does not go with name='dice', in "
      "which all classes count the same; use 'none', or 'ce+dice'."
    )
  if not 0 < loss.ohem_threshold <= 1:
    raise InputError(
      f'config.loss.ohem_threshold={loss.ohem_threshold} must be above 0 and '
      'at most 1.'
    )
  if not 0 <= loss.ohem_min_kept <= 1:
    raise InputError(
      f'config.loss.ohem_min_kept={loss.ohem_min_kept} must be from 0 to 1.'
    )
  if not 0 <= loss.focal_gamma < math.inf:
    raise InputError(
      f'config.loss.focal_gamma={loss.focal_gamma} must be 0 or more.'
    )


def _check(config):
  for key, value in leaves(config):
    if value is None and key != 'optim.clip_norm':
      raise InputError(f'config.{key}=None; leave it out for its default.')
  choices = {
    'data.label_pad': ('ignore', 'background'),
    'distill.connector_schedule': ('always', 'warmup', 'first_epoch'),
    'distill.teacher_bn': ('batch', 'running'),
    'eval.protocol': ('native', 'reference'),
    'loss.name': ('ce', 'ohem', 'focal', 'dice', 'ce+dice'),
    'loss.weighting': ('none', 'given', 'auto'),
    'optim.dtype': ('float32', 'bfloat16'),
    'optim.name': ('sgd', 'adamw'),
  }
  for key, allowed in choices.items():
    group, name = key.split('.')
    if config[group][name] not in allowed:
      raise InputError(
        f'config.{key}={config[group][name]!r} must be one of '
        f'{", ".join(allowed)}.'
      )
  _check_loss(config.loss)
  for key, allowed in (('stages', STAGES), ('loggers', LOGGERS)):
    chosen = {*config[key]}
    if not chosen <= {*allowed} or (key == 'stages' and not chosen):
      raise InputError(
        f'config.{key}={tuple(config[key])} must be chosen from '
        f'{", ".join(allowed)}.'
      )
  positive = (
    'batch_size',
    'num_epochs',
    'log_every_steps',
    'optim.accumulate',
    'optim.lr',
    'eval.batch_size',
    'eval.every_epochs',
    'checkpoint.keep_best',
    'data.base_size',
    'data.threads',
    'teacher.num_epochs',
    'student.num_epochs',
  )
  for key in positive:
    value = config
    for part in key.split('.'):
      value = value[part]
    if not value > 0:
      raise InputError(f'config.{key}={value} must be positive.')
  parts = config.optim.accumulate
  if config.batch_size % parts or config.batch_size // parts < 2:
    raise InputError(
      f'config.batch_size={config.batch_size} over optim.accumulate={parts} '
      'must leave at least 2 images a part: the pooled branch of ASPP '
      'normalises over them.'
    )
  if config.eval.short_side and config.eval.size_multiple != 1:
    raise InputError('config.eval.short_side needs size_multiple=1.')
  if not 0 <= config.checkpoint.every_minutes < math.inf:
    raise InputError(
      f'config.checkpoint.every_minutes={config.checkpoint.every_minutes} must '
      'be 0 or more.'
    )
  _check_numbers(config)
  if config.data.cache and config.data.decoded_cache:
    raise InputError(
      'config.data.cache keeps in memory what config.data.decoded_cache keeps '
      'on the disk; use one of them.'
    )
  for key in ('crop_size', 'image_size'):
    size = tuple(config.data[key])
    whole = len(size) == 2 and all(type(n) is int for n in size)
    if not whole or not 32 <= min(size) <= max(size) <= 2**15:
      raise InputError(
        f'config.data.{key}={size} must be (height, width), both at least 32 '
        f'and at most {2**15}.'
      )
  _check_scales(config.data)


def _check_scales(data):
  scales = tuple(data.scale_range)
  numbers = len(scales) == 2 and all(
    isinstance(x, (int, float)) for x in scales
  )
  if (
    not numbers
    or not 0 < scales[0] <= scales[1] <= 100
    or scales[0] * data.base_size < 1
  ):
    raise InputError(
      f'config.data.scale_range={scales} must be (least, most), above 0 and at '
      'most 100, and leave a pixel of base_size.'
    )


def leaves(config, prefix=''):
  """Pairs of 'group.key' and value, of a config or of its JSON."""
  for key, value in config.items():
    if isinstance(value, (dict, ConfigDict)):
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def _check_numbers(config):
  for key, value in leaves(config):
    if not isinstance(value, (int, float)):
      continue
    low, high = _RANGES.get(key, (-math.inf, math.inf))
    if not low <= value <= high:  # Nor is NaN.
      text = f'{low:g} or more'
      if high < _MOST:
        text = f'from {low:g} to {high:g}'
      raise InputError(f'config.{key}={value} must be {text}.')
    # What devices cannot count.
    most = _MOST if isinstance(value, int) else 1e30
    if not abs(value) <= most:
      raise InputError(f'config.{key}={value} must be a number to {most:g}.')
