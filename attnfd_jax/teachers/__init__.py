# SPDX-License-Identifier: Apache-2.0
"""What a teacher can be, and where it comes from."""
