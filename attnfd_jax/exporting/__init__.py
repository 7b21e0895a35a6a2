# SPDX-License-Identifier: Apache-2.0
"""Exports students for other programs and verifies the exported files."""
