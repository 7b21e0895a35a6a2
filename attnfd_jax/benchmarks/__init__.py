# SPDX-License-Identifier: Apache-2.0
"""The measurements of `python -m attnfd_jax.benchmark`, one module each."""
