# SPDX-License-Identifier: Apache-2.0
"""Run-time checks of the annotations, of array shapes above all, in tests."""

import beartype
import jaxtyping

PACKAGES = ('losses', 'metrics', 'models', 'distill', 'teachers')

# An int is a float, as for static type checkers.
checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def install():
  """Checks what is imported from now on."""
  names = [f'attnfd_jax.{name}' for name in PACKAGES]
  jaxtyping.install_import_hook(names, f'{__name__}.checked')
