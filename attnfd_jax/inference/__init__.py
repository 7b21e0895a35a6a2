# SPDX-License-Identifier: Apache-2.0
"""Trained networks on images: scores, predictions, tiles, video."""
