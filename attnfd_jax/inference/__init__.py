# SPDX-License-Identifier: Apache-2.0
"""Runs trained networks on images: scores, predictions, tiles, video."""
