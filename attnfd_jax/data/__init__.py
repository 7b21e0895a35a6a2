# SPDX-License-Identifier: Apache-2.0
"""Reads images and masks from files into batches; independent of networks."""
