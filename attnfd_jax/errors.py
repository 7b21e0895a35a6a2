# SPDX-License-Identifier: Apache-2.0
"""The one error that a user can mend."""


class InputError(ValueError):
  """Bad input: one line that says what is wrong and what to do."""
