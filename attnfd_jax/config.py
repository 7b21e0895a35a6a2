# SPDX-License-Identifier: Apache-2.0
"""Every key of a config with its default, and the two recipes.

A file in configs/ starts from `default_config` and changes what differs. Keys
that are None here are filled from the recipe by `resolve`, so that a single
item can be overridden after it: --config.distill.teacher_bn=batch.
"""

import math
import os

from flax.traverse_util import flatten_dict
from ml_collections.config_dict import ConfigDict, placeholder

from attnfd_jax import distill, user_code
from attnfd_jax.errors import InputError, named, one_of, within
from attnfd_jax.models import network as networks

# METHOD section 5: what the authors' code does, and what we would advise.
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
# Least and most of values; what belongs to one room is checked there.
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


def num_cores():
  """That this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def _network(backbone):
  config = ConfigDict()
  # Or a class of your own, 'file.py:Class', with its own options in place of
  # the other keys down to head_dropout; see models/network.py.
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
  # 'imagenet', or a PyTorch file of a backbone or a whole network.
  config.pretrained = ''
  # So many pairs of train have labels for this role, the first of a shuffle by
  # data.labeled_seed; 0 for all.
  config.labeled_limit = 0
  # None: as config.num_epochs, config.optim.lr and config.optim.head_lr_scale.
  config.num_epochs = placeholder(float)
  config.lr = placeholder(float)
  config.head_lr_scale = placeholder(float)
  return config


def default_config():
  """All keys; configs/*.py change them and cannot add any."""
  groups = ('data', 'distill', 'optim', 'loss', 'eval', 'checkpoint', 'mesh')
  config = ConfigDict({name: ConfigDict() for name in groups})
  config.recipe = 'clean'
  config.seed = 0
  config.stages = STAGES
  config.batch_size = 8  # Global, over all devices.
  config.num_epochs = 50.0
  config.log_every_steps = 20
  config.loggers = ()  # Beside metrics.jsonl: 'tensorboard', 'wandb'.

  config.data.name = 'scenes'
  config.data.root = ''
  config.data.prepared = ''  # Folder of prepare_data, in place of root.
  config.data.train_list = 'train'  # For 'pascal_voc': or 'trainaug'.
  config.data.sbd_root = ''  # For 'pascal_voc': SBD's benchmark_RELEASE.
  # For 'folder', see docs/own_data.md. Names in the order of ids; () where the
  # layout has names: its own.
  config.data.class_names = ()
  config.data.layout = 'auto'  # Or 'pairs', 'voc', 'roboflow', 'coco'.
  config.data.palette = ()  # Masks of colours: (r, g, b) of each class.
  config.data.id_map = ()  # Masks of other ids: the id of each class.
  config.data.base_size = 513  # train_kd.py:197.
  config.data.scale_range = (0.5, 2.0)  # Of the short side, times base_size.
  config.data.crop_size = (513, 513)  # Height, width; train_kd.py:199.
  config.data.flip = 0.5
  config.data.blur = 0.5
  config.data.photometric = 0.0
  config.data.rotation = 0.0  # At most, in degrees, either way.
  config.data.cutmix = 0.0  # Probability of a box from another image.
  config.data.balanced = 0.0  # Share drawn by class, then one of its images.
  # Images without masks, from which only the distilled student learns: a
  # folder, zip, glob or text file of paths; 'rest', the pairs beyond
  # student.labeled_limit; 'official', those of VOC, Cityscapes or COCO.
  config.data.unlabeled = ''
  # Of each batch; 0 is in proportion, at most half.
  config.data.unlabeled_share = 0.0
  config.data.labeled_seed = 0
  config.data.limit = 0  # Images of each split, 0 for all.
  config.data.cache = False  # Decoded pairs stay in memory.
  config.data.decoded_cache = ''  # Folder for decoded pixels, 4 bytes each.
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
  config.teacher.checkpoint = ''  # Stage or PyTorch file; empty: train.
  config.teacher.allow_code = False  # Of a checkpoint whose network is a file.
  # 'file.py:make', which returns a torch.nn.Module or a Teacher, see
  # docs/any_teacher.md; the module's maps, {tap: submodule}.
  config.teacher.factory = ''
  config.teacher.taps = ConfigDict()
  config.teacher.class_map = ()  # The teacher's index of each of our classes.
  config.teacher.min_miou = 0.0  # On val; a worse teacher stops the run.
  config.student = _network('resnet18')

  # Names joined by '+', or one class of your own, 'file.py:Class', with its
  # options; see distill/method.py.
  config.distill.method = 'attnfd'
  config.distill.options = ConfigDict()
  # Of the task loss, as weight_schedule of the methods: 'constant',
  # 'linear_to_zero' or 'linear_from_zero'.
  config.distill.task_weight_schedule = 'constant'
  # Whether the gradients of task and distillation agree: one more backward
  # pass, and 'cosine', 'task_norm', 'distill_norm' in the log.
  config.distill.log_gradients = False
  for name, method in distill.METHODS.items():
    shared = {'weight': distill.WEIGHTS[name], 'weight_schedule': 'constant'}
    config.distill[name] = ConfigDict(shared | distill.option_defaults(method))

  config.optim.name = 'sgd'
  config.optim.lr = 0.01
  config.optim.head_lr_scale = 10.0  # ASPP, decoder, gates, connectors.
  config.optim.warmup_epochs = 0.0
  config.optim.power = 0.9  # Of the poly schedule.
  config.optim.momentum = 0.9
  config.optim.nesterov = True
  config.optim.weight_decay = 5e-4
  config.optim.clip_norm = placeholder(float)
  config.optim.accumulate = 1  # Parts of a batch, one after the other.
  config.optim.remat = False  # Recompute blocks in the backward pass.
  config.optim.ema_decay = 0.0  # 0 is off.
  config.optim.dtype = 'float32'  # Of the computation, or 'bfloat16'.

  config.loss.name = 'ce'  # Or 'ohem', 'focal', 'dice', 'ce+dice'.
  # 'none', 'given' by class_weights, or 'auto': median frequency, counted on
  # the training split. Of all but 'dice', in which classes count the same.
  config.loss.weighting = 'none'
  config.loss.class_weights = ()  # In the order of the classes.
  # A pixel is hard if its class has at most this probability; the share of the
  # pixels that is kept in any case.
  config.loss.ohem_threshold = 0.7
  config.loss.ohem_min_kept = 0.0625
  config.loss.focal_gamma = 2.0

  config.eval.every_epochs = 1.0
  config.eval.batch_size = 8
  # Short side of what the network sees, 0 for the image as it is; scores are
  # always resized to the untouched label. For networks trained at base_size.
  config.eval.short_side = 0
  config.eval.size_multiple = 1  # Pad to multiples: fewer compilations.
  config.eval.test_split = ''  # Evaluated once, with the checkpoint of val.
  config.eval.num_pictures = 4

  config.checkpoint.keep_best = 1
  config.checkpoint.every_minutes = 10.0  # Between two, at most; 0 is off.

  config.mesh.data = -1  # Parts of a batch; -1 is all devices / spatial.
  config.mesh.spatial = 1  # Parts of the height of each image.
  config.mesh.fsdp = False  # Weights, average, momentum are split over data.

  empty = {k: placeholder(type(v)) for k, (v, _) in _BY_RECIPE.items()}
  config.update_from_flattened_dict(empty)
  return config.lock()  # A typo in a config file is an error, too.


def reference_config():
  """What the data sets of the paper share in the authors' code."""
  config = default_config()
  config.recipe = 'reference'
  config.batch_size = 6  # train_kd.py:281; global here, per GPU there.
  return config


def debug(config):
  """All code paths in about a minute on a CPU; the numbers mean nothing."""
  config.data.limit = config.data.train_scenes = config.data.val_scenes = 12
  config.student.labeled_limit = min(config.student.labeled_limit, 8)
  config.batch_size = config.eval.batch_size = 4
  config.num_epochs = config.teacher.num_epochs = config.eval.every_epochs = 1.0
  config.optim.warmup_epochs = 0.0
  config.log_every_steps = 1
  for network in (config.teacher, config.student):
    network.backbone = 'resnet18'
    network.width_multiplier = 0.125
    network.pretrained = ''  # Of the full width.
    network.aspp_channels = network.decoder_channels = 16
    network.low_level_channels = 16
  return config


def from_imagenet(network, lr=0.001, head_lr_scale=4.0):
  """Sets a group `teacher` or `student` to start from ImageNet weights, at
  rates for AdamW that were chosen on CamVid (experiments/camvid).
  """
  network.pretrained = 'imagenet'
  network.lr, network.head_lr_scale = lr, head_lr_scale


def with_variant(config, arg, **variants):
  """`config` for arg None, its debug variant for 'debug', or one of others,
  {name: function that changes a config}.
  """
  variants = {'debug': debug, **variants}
  if arg and arg not in variants:
    names = ', '.join(variants)
    raise ValueError(f'Unknown variant {arg!r}; use {names} or nothing.')
  if arg:
    variants[arg](config)
  return config


def resolve(config):
  """A locked copy in which every None of the recipe is filled, and paths that
  start with `~` with the home folder.

  Raises:
    InputError: for a value outside its choices or its range.
  """
  config = config.copy_and_resolve_references()
  defaults = leaves(default_config())
  if absent := defaults.keys() - leaves(config).keys():
    text = f'config.{min(absent)} is absent; set single keys of a group, as in'
    raise InputError(f'{text} --config.data.root=PATH.')
  texts = {k: v for k, v in leaves(config).items() if isinstance(v, str)}
  config.update_from_flattened_dict(
    {k: os.path.expanduser(v) for k, v in texts.items()}
  )
  one_of('config.recipe', config.recipe, RECIPES)
  filled = dict(RECIPES[config.recipe])
  if filled['distill.aspp_dropout'] == 'student':
    # As in the baseline, so that only the loss differs.
    filled['distill.aspp_dropout'] = config.student.aspp_dropout
  for role in ('teacher', 'student'):
    filled[f'{role}.num_epochs'] = config.num_epochs
    filled[f'{role}.lr'] = config.optim.lr
    filled[f'{role}.head_lr_scale'] = config.optim.head_lr_scale
  given = leaves(config)
  missing = {k: v for k, v in filled.items() if given[k] is None}
  config.update_from_flattened_dict(missing)
  if config.data.label_pad == 'dataset':
    # pascal.py:87 and coco.py:100 pad with background, Cityscapes with 255.
    background = config.data.name in ('pascal_voc', 'coco')
    config.data.label_pad = 'background' if background else 'ignore'
  _check(config, defaults)
  return config.lock()


def leaves(config):
  """{'group.key': value} of a config or of its JSON."""
  nested = config.to_dict() if isinstance(config, ConfigDict) else config
  return flatten_dict(nested, sep='.')


def _check(config, defaults):
  """What belongs to no single room; the rest is checked where it is used."""
  values = leaves(config)
  for key, value in values.items():
    if value is None and key != 'optim.clip_norm':
      raise InputError(f'config.{key}=None; leave it out for its default.')
    if isinstance(value, bool) and type(defaults.get(key)) in (int, float):
      raise InputError(f'config.{key}={value} must not be True or False.')
    if isinstance(value, (int, float)):
      # What devices cannot count: JAX's integers have 32 bits.
      most = 2**31 - 1 if isinstance(value, int) else 1e30
      within(f'config.{key}', value, -(2**31 - 1), most)
  for limits, keys in _RANGES.items():
    for key in keys.split():
      within(f'config.{key}', values[key], *limits)
  for key, choices in _CHOICES.items():
    one_of(f'config.{key}', values[key], choices)
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
