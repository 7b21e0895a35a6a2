# SPDX-License-Identifier: Apache-2.0
"""Students for other programs, with proof that they agree."""
