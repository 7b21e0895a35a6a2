# SPDX-License-Identifier: Apache-2.0
r"""Writes drawn street scenes as a folder of one's own images and masks.

  python experiments/draw_folder.py data/drawn
  python -m attnfd_jax.check_data --config=configs/folder.py \
    --config.data.root=data/drawn --config.data.class_names="('sky', ...)"

For trying configs/folder.py, and the notebook, without images at hand.
"""

import argparse
import pathlib

from PIL import Image

from attnfd_jax.data.synthetic import StreetScenes


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('target', type=pathlib.Path)
  parser.add_argument('--train', type=int, default=256, help='scenes')
  parser.add_argument('--val', type=int, default=32, help='scenes')
  parser.add_argument('--height', type=int, default=96)
  parser.add_argument('--width', type=int, default=128)
  options = parser.parse_args()
  for seed, split in enumerate(('train', 'val')):
    scenes = StreetScenes(
      getattr(options, split),
      height=options.height,
      width=options.width,
      seed=seed,
    )
    places = {'image': 'images', 'label': 'masks'}
    for key, name in places.items():
      places[key] = options.target / name / split
      places[key].mkdir(parents=True, exist_ok=True)
    for i in range(len(scenes)):
      scene = scenes[i]
      for key, place in places.items():
        Image.fromarray(scene[key]).save(place / f'{i:04}.png')


if __name__ == '__main__':
  main()
