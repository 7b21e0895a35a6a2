# SPDX-License-Identifier: Apache-2.0
"""What people look at: the report page, figures, contact sheets."""
