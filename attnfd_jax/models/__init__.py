# SPDX-License-Identifier: Apache-2.0
"""Networks and their layers; only this package and `distill` import Linen."""
