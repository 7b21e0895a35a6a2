# SPDX-License-Identifier: Apache-2.0
"""Devices and processes: mesh, shardings, memory and diagnosis."""
