# SPDX-License-Identifier: Apache-2.0
"""State, step, loop and what surrounds them; the same for every stage."""
