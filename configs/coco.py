# SPDX-License-Identifier: Apache-2.0
r"""COCO 2017 with the 21 VOC classes, defaults of the AttnFD reference.

  python -m attnfd_jax.main --config=configs/coco.py[:debug] \
    --config.data.root=PATH

PATH holds train2017/, val2017/ and annotations/instances_{train,val}2017.json;
needs pip install 'attnfd_jax[data]'. The first start draws the masks of all
images into the user's cache folder, about ten minutes and 0.3 GB.

The paper has no table for it. Not run by us on the real images.
"""

from attnfd_jax.config import reference_config, with_variant


def get_config(arg=None):
  config = reference_config()
  config.data.name = 'coco'
  config.data.root = 'data/coco'
  config.num_epochs = 30.0  # train_kd.py:274.
  config.optim.lr = 0.1  # train_kd.py:288, for a batch of 6.
  # Padding is not the authors': 1 is exact, with a compilation for every size.
  config.eval.size_multiple = 64
  return with_variant(config, arg)
