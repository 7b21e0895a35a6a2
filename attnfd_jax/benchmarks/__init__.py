# SPDX-License-Identifier: Apache-2.0
"""What `python -m attnfd_jax.benchmark` measures, one module each."""
