# SPDX-License-Identifier: Apache-2.0
"""What is transferred from teacher to student, one file per method.

A method is a Linen module with

  from_outputs(student, teacher, labels, *, train) -> (loss, terms)

where student and teacher are outputs of networks ('logits', 'coarse_logits',
'features'), labels are integers [b, h, w], loss is a float32 scalar before its
weight and terms are named scalars for the log. Its parameters, statistics and
memories are ordinary collections. To add one: a file, and a row in METHODS.
"""

from collections.abc import Mapping
import difflib

import flax.linen as nn

from attnfd_jax.distill.attnfd import AttnFD
from attnfd_jax.distill.kd import LogitKD


def _attnfd(student, teacher, options):
  channels = [
    {tap: x.shape[-1] for tap, x in outputs['features'].items()}
    for outputs in (student, teacher)
  ]
  return AttnFD(*channels, **options)


def _kd(student, teacher, options):
  del student, teacher
  return LogitKD(**options)


# Name -> (builder, key of its weight in config.distill, keys of its options).
METHODS = {
  'attnfd': (
    _attnfd,
    'attn_lambda',
    (
      'teacher_attention',
      'student_attention',
      'norm_scope',
      'reduction',
      'teacher_bn',
      'match_size',
      'fan_out_taps',
    ),
  ),
  'kd': (_kd, 'kd_weight', ('temperature',)),
}


class WeightedSum(nn.Module):
  """Sum of methods, each times its weight."""

  methods: Mapping[str, nn.Module]
  weights: Mapping[str, float]

  def __call__(self, student, teacher, labels, *, train):
    """Returns the weighted sum and each method's loss before its weight."""
    total, terms = 0.0, {}
    for name in sorted(self.methods):
      loss, parts = self.methods[name].from_outputs(
        student, teacher, labels, train=train
      )
      total += self.weights[name] * loss
      terms[name] = loss
      terms |= {f'{name}_{part}': value for part, value in parts.items()}
    return total, terms

  def refined_maps(self, student_features, teacher_features, *, train):
    """AttnFD's maps after attention, for pictures."""
    return self.methods['attnfd'].refined_maps(
      student_features, teacher_features, train=train
    )


def make_distiller(config, student_shapes, teacher_shapes):
  """Builds `config.method`, e.g. 'attnfd' or 'attnfd+kd', for two networks.

  Args:
    config: the group `distill`: method, weights and options of the methods.
    student_shapes: outputs of the student, arrays or their shapes.
    teacher_shapes: likewise.

  Raises:
    ValueError: for an unknown method, with the nearest name.
  """
  names = config['method'].split('+')
  methods, weights = {}, {}
  for name in names:
    if name not in METHODS:
      near = difflib.get_close_matches(name, METHODS, 1)
      hint = f' Did you mean {near[0]!r}?' if near else ''
      raise ValueError(
        f'Unknown method {name!r} in distill.method={config["method"]!r}.{hint}'
        f' Have: {", ".join(METHODS)}, joined by "+".'
      )
    build, weight, keys = METHODS[name]
    options = {key: config[key] for key in keys if key in config}
    methods[name] = build(student_shapes, teacher_shapes, options)
    weights[name] = config[weight]
  return WeightedSum(methods, weights)
