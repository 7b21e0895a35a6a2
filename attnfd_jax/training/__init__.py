# SPDX-License-Identifier: Apache-2.0
"""Training of any stage: state, step, loop, and the stages of a run."""
