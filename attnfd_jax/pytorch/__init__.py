# SPDX-License-Identifier: Apache-2.0
"""PyTorch files without PyTorch: containers, names, networks."""
