# SPDX-License-Identifier: Apache-2.0
"""Trains one student with many methods and writes a table of the results."""
