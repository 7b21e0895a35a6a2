# SPDX-License-Identifier: Apache-2.0
"""docs/any_teacher.md: its files are teachers, and its commands go with them.

Also the networks that were tried with torchax, one by one. Each test skips
where a package is missing, or does not fit this torch.
"""

import ast
import importlib.util
import pathlib
import re
import shlex

from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import pytest

import attnfd_jax
from attnfd_jax.config import resolve
from attnfd_jax.data import classes
from attnfd_jax.devices import sharding
from attnfd_jax.errors import first_line
from attnfd_jax.teachers import sources
from attnfd_jax.training import stage as stages

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'any_teacher.md').read_text()
# torch, torchax and the projects warn about themselves and each other.
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings('ignore')]
# No multiple of 16: maps are rounded up, or images resized.
SIZE = (72, 104)


@pytest.fixture(autouse=True)
def quick_compilation():
  """Programs that run once are not worth optimizing."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def require(*packages):
  """Skips with the reason unless all can be imported."""
  if 'transformers' in packages and importlib.util.find_spec('torchvision'):
    packages = ('torchvision', *packages)  # It imports that where it is.
  for package in ('torch', 'torchax', *packages):
    try:
      importlib.import_module(package)
    except Exception as error:  # Two that do not fit raise what they like.
      pytest.skip(f'{package}: {first_line(error)}')


def require_imports(block):
  require(*re.findall(r'^(?:import|from) (\w+)', block, re.MULTILINE))


def fences(language):
  """[(place, text)] of the fenced blocks of the page in this language."""
  found = re.finditer(r'^```(\w*)\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE)
  return [(match.start(), match[2]) for match in found if match[1] == language]


def python_blocks(*, with_make):
  found = fences('python')
  return [x for x in found if ('def make' in x[1]) == with_make]


def following_command(start):
  """Arguments of the command `main` below a file, None if it has none."""
  end = min([x for x, _ in fences('python') if x > start])
  for place, text in fences(''):
    if start < place < end and 'attnfd_jax.main' in text:
      return shlex.split(text.replace('\\\n', ' '))[3:]
  return None


def page_config(arguments, path):
  """The config of a command of the page whose teacher.py is `path`."""
  values = flags.FlagValues()
  arguments = [
    x.replace('=configs/', f'={ROOT}/configs/').replace(
      '=teacher.py', f'={path}'
    )
    for x in arguments
  ]
  config_flags.DEFINE_config_file(
    'config', None, flag_values=values, sys_argv=['main', *arguments]
  )
  values(['main', *arguments])
  return values['config'].value


def random_images(count, size=SIZE):
  generator = np.random.default_rng(0)
  image = generator.integers(0, 256, (count, *size, 3), np.uint8)
  return np.asarray(attnfd_jax.normalize(image))


# Index of the file: shapes of its maps for images of SIZE.
FILES = {
  0: {'backbone': (5, 7, 160), 'decoder': (18, 26, 256)},
  # Of 80 x 112.
  1: {
    'backbone': (5, 7, 2048),
    'aspp': (5, 7, 256),
    'decoder': (20, 28, 256),
  },
  2: {'backbone': (9, 13, 2048), 'aspp': (9, 13, 256)},
  # Of 84 x 112.
  3: {'backbone': (6, 8, 384)},
}
FILE_IDS = ['segformer', 'smp', 'torchvision', 'dino']


def test_the_page_has_these_files():
  assert len(python_blocks(with_make=True)) == len(FILES)
  assert len(python_blocks(with_make=False)) == 1


@pytest.mark.slow
@pytest.mark.parametrize('index', FILES, ids=FILE_IDS)
def test_files_of_the_page(tmp_path, index):
  start, block = python_blocks(with_make=True)[index]
  require_imports(block)
  path = tmp_path / 'teacher.py'
  path.write_text(block)
  arguments = following_command(start)
  if arguments is None:
    (taps,) = re.findall(r'`--config.teacher.taps="(.*?)"`', PAGE)
    arguments = ['--config=configs/camvid.py', f'--config.teacher.taps={taps}']
    arguments += ['--config.teacher.factory=teacher.py:make']
    arguments += ['--config.distill.attnfd.match_size=to_student']
  config = page_config(arguments, path)
  config.data.crop_size = SIZE
  config = resolve(config)

  # As main does.
  names = tuple(classes.CAMVID)
  mesh = sharding.make_mesh()
  teacher = sources.from_config(config, tmp_path, names, mesh)
  network = stages.make_network('distill', config, len(names))
  stage = stages.Stage('distill', config, None, None, network)
  student, shapes = stages.with_teacher(stage, teacher).output_shapes
  found = {tap: x.shape[1:] for tap, x in shapes['features'].items()}
  assert found == FILES[index]
  assert found.keys() <= student['features'].keys()
  assert shapes['logits'].shape == (2, *SIZE, len(names))

  differences = teacher.compare(random_images(1))
  assert differences.keys() == {'logits', *FILES[index]}
  assert max(differences.values()) < 1e-5, differences


@pytest.mark.slow
def test_use_in_own_code():
  ((_, block),) = python_blocks(with_make=False)
  require_imports(block)
  found = {}
  exec(compile(block, 'any_teacher.md', 'exec'), found)
  assert max(found['differences'].values()) < 1e-5
  assert found['outputs']['logits'].shape == (2, 64, 96, 11)
  (maps,) = re.findall(r'features.* # (\{.*\})\n', block)
  found_maps = {tap: [*x.shape] for tap, x in found['features'].items()}
  assert found_maps == ast.literal_eval(maps)


def segformer():
  from transformers import SegformerConfig, SegformerForSemanticSegmentation

  return SegformerForSemanticSegmentation(SegformerConfig(num_labels=5))


def dinov2():
  from transformers import Dinov2Config, Dinov2Model

  config = Dinov2Config(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=2
  )
  return Dinov2Model(config)


def torchvision_deeplab():
  from torchvision.models import segmentation

  return segmentation.deeplabv3_resnet50(weights_backbone=None, num_classes=5)


def smp(name, encoder):
  def make():
    import segmentation_models_pytorch as smp

    return getattr(smp, name)(encoder, encoder_weights=None, classes=5)

  return make


SMP_TAPS = {
  'backbone': 'encoder.layer4',
  'aspp': 'decoder.aspp',
  'decoder': 'decoder.block2',
}
# Name: package, what makes the module, taps.
NETWORKS = {
  'transformers segformer': (
    'transformers',
    segformer,
    {'backbone': 'segformer.stages.3', 'decoder': 'decode_head.activation'},
  ),
  'transformers dinov2': (
    'transformers',
    dinov2,
    {'backbone': 'layernorm'},
  ),
  'torchvision deeplabv3': (
    'torchvision',
    torchvision_deeplab,
    {'backbone': 'backbone.layer4', 'aspp': 'classifier.0'},
  ),
} | {
  f'smp {name} {encoder}': (
    'segmentation_models_pytorch',
    smp(name, encoder),
    SMP_TAPS if name == 'DeepLabV3Plus' else {},
  )
  for name, encoder in (
    ('DeepLabV3Plus', 'resnet18'),
    ('Unet', 'mit_b0'),
    ('FPN', 'efficientnet-b0'),
    ('Segformer', 'mit_b0'),
    ('DPT', 'tu-vit_tiny_patch16_224'),
    ('UPerNet', 'tu-convnext_atto'),
  )
}
# Of images, if not 64 x 96: for patches of 14 x 14, and the one that it takes.
SIZES = {
  'transformers dinov2': (56, 84),
  'smp DPT tu-vit_tiny_patch16_224': (224, 224),
}


def torch_outputs(module, image, taps):
  """What the module computes without JAX: {'logits' or tap: NHWC array}."""
  import torch

  found = {}

  def keep(tap):
    return lambda module, args, output: found.__setitem__(tap, output)

  hooks = [
    module.get_submodule(name).register_forward_hook(keep(tap))
    for tap, name in taps.items()
  ]
  with torch.no_grad():
    output = module.eval()(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
  for hook in hooks:
    hook.remove()
  if not torch.is_tensor(output):
    output = output.get('logits', output.get('out'))
  if output is not None:
    found['logits'] = torch.nn.functional.interpolate(
      output, image.shape[1:3], mode='bilinear'
    )
  for tap, x in found.items():
    if x.ndim == 3:  # The class token, then 4 x 6 patches of 14 x 14.
      x = x[:, 1:].unflatten(1, (4, 6)).permute(0, 3, 1, 2)
    found[tap] = x.permute(0, 2, 3, 1).numpy()
  return found


def largest_differences(teacher, image, expected, mesh=None):
  """{'logits' or tap: largest difference over the largest expected value}."""
  if mesh is not None:
    image = jax.device_put(jnp.asarray(image), sharding.by_batch(mesh))
  with jax.default_matmul_precision('highest'):
    out = jax.jit(teacher.apply)(teacher.variables, image)
  if mesh is not None:
    assert len(out['logits'].sharding.device_set) == 4
  found = dict(out['features'])
  if 'logits' in out:
    found['logits'] = out['logits']
  assert found.keys() == expected.keys()
  result = {}
  for key, y in expected.items():
    x = np.asarray(found[key], np.float32)
    assert x.shape == y.shape, key
    result[key] = float(np.max(np.abs(x - y)) / np.max(np.abs(y)))
  return result


@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_networks_of_other_projects(name):
  package, make, taps = NETWORKS[name]
  require(package)
  sharded = 'DeepLabV3Plus' in name
  size = SIZES.get(name, (64, 96))
  module, image = make(), random_images(4 if sharded else 1, size)
  expected = torch_outputs(module, image, taps)
  teacher = attnfd_jax.from_torch(module, taps)
  mesh = sharding.make_mesh() if sharded else None
  found = largest_differences(teacher, image, expected, mesh)
  assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_smp_in_bfloat16():
  package, make, taps = NETWORKS['smp DeepLabV3Plus resnet18']
  require(package)
  module, image = make(), random_images(1, (64, 96))
  expected = torch_outputs(module, image, taps)
  teacher = attnfd_jax.from_torch(module, taps, dtype='bfloat16')
  shapes = jax.eval_shape(teacher.apply, teacher.variables, image)
  assert {x.dtype.name for x in shapes['features'].values()} == {'bfloat16'}
  found = largest_differences(teacher, image, expected)
  assert 1e-4 < max(found.values()) < 3e-2, found


@pytest.mark.slow
def test_maps_of_swin():
  """With the channels last, they need what the page says about them."""
  require('torchvision')
  import torch
  import torchvision

  class Segmenter(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.swin = torchvision.models.swin_t(weights=None)
      self.nchw = torchvision.ops.Permute((0, 3, 1, 2))
      self.head = torch.nn.Conv2d(768, 5, 1)

    def forward(self, image):
      return self.head(self.nchw(self.swin.features(image)))

  line = 'self.nchw = torchvision.ops.Permute((0, 3, 1, 2))'
  assert f'`{line}`' in PAGE
  module, image = Segmenter(), random_images(1, (64, 96))
  teacher = attnfd_jax.from_torch(module, {'backbone': 'nchw'})
  with torch.no_grad():
    x = module.swin.features(torch.from_numpy(image.transpose(0, 3, 1, 2)))
  expected = torch_outputs(module, image, {}) | {'backbone': x.numpy()}
  found = largest_differences(teacher, image, expected)
  assert expected['backbone'].shape == (1, 2, 3, 768)
  assert max(found.values()) < 1e-5, found
