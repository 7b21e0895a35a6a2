# SPDX-License-Identifier: Apache-2.0
"""Teachers: what the training step needs of one, and how to load one."""
