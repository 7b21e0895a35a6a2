# SPDX-License-Identifier: Apache-2.0
"""One student under many methods: the plan, its runs, the table."""
