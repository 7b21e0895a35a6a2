# SPDX-License-Identifier: Apache-2.0
"""Makes torch_files/: the same checkpoint in both containers of torch.save.

Run once, with torch: `python tests/golden/make_torch_files.py`. The tests read
the files without it.
"""

import collections
import json
import pathlib

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent / 'torch_files'


def make_tensors():
  """The tensors of the checkpoint, with what goes wrong most easily."""
  torch.manual_seed(0)
  weight = torch.randn(4, 3, 2, 2)
  base = torch.arange(12, dtype=torch.float32)
  return collections.OrderedDict(
    [
      ('conv.weight', torch.nn.Parameter(weight)),
      ('bn.running_var', torch.rand(4, dtype=torch.float64)),
      ('bn.num_batches_tracked', torch.tensor(7)),
      ('view', base.reshape(3, 4).t()[1:, :2]),  # Strided, with an offset.
      ('shared', base),
      ('expanded', torch.tensor([2.5]).expand(3, 2)),
      ('channels_last', weight.to(memory_format=torch.channels_last)),
      ('bfloat16', torch.randn(5).bfloat16()),
      ('half', torch.randn(3).half()),
      ('int32', torch.tensor([-(2**31), 1], dtype=torch.int32)),
      ('uint8', torch.tensor([0, 255], dtype=torch.uint8)),
      ('bool', torch.tensor([True, False, True])),
      ('empty', torch.zeros(0, 3)),
    ]
  )


def to_numpy(tensor):
  """The array of a tensor; uint16 bits for bfloat16, which .npz lacks."""
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(np.uint16)
  return tensor.detach().numpy()


def main():
  FOLDER.mkdir(exist_ok=True)
  tensors = make_tensors()
  checkpoint = {
    'epoch': 3,
    'state_dict': tensors,
    'best_pred': np.float64(0.7123),
    'optimizer': {
      'state': {0: {'momentum_buffer': tensors['conv.weight'].detach()}},
      'param_groups': [{'lr': 0.007, 'nesterov': True, 'params': [0]}],
    },
    'shape': torch.Size([4, 3]),
  }
  torch.save(checkpoint, FOLDER / 'zip.pth')
  torch.save(
    checkpoint, FOLDER / 'legacy.pth', _use_new_zipfile_serialization=False
  )
  arrays = {k: to_numpy(v) for k, v in tensors.items()}
  np.savez_compressed(FOLDER / 'expected.npz', **arrays)
  versions = {'torch': torch.__version__, 'numpy': np.__version__}
  text = json.dumps(versions, indent=2) + '\n'
  (FOLDER / 'versions.json').write_text(text)


if __name__ == '__main__':
  main()
