# SPDX-License-Identifier: Apache-2.0
"""Images and masks, from files to batches; knows nothing of networks."""
