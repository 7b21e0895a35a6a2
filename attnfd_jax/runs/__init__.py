# SPDX-License-Identifier: Apache-2.0
"""A run's folder: checkpoints, logs, and loading a stage back."""
