# SPDX-License-Identifier: Apache-2.0
"""Networks. Linen lives here and in `distill`."""
