# SPDX-License-Identifier: Apache-2.0
"""Reads and writes PyTorch checkpoints without PyTorch."""
