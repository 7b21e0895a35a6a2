# SPDX-License-Identifier: Apache-2.0
"""Writes output for people: the report page, figures, contact sheets."""
