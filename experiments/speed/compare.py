# SPDX-License-Identifier: Apache-2.0
r"""Our training step beside PyTorch's, in turn on one machine.

  python experiments/speed/compare.py [--rounds=3] [--students=resnet18] \
    [--batch=2 --size=257] [--torch_python=PYTHON] [--output=F.json]

Each round starts `benchmark train` and the forms of peer.py as processes of
their own, one after the other; a ratio is theirs over ours in the same round,
the result the median of the rounds with the lowest and the highest. On a GPU
the default is 16 images of 513 x 513 and bfloat16, and the forms are `authors`
and `best`; on a CPU it is float32 and `authors` and `no_teacher_gradients`.

--forms=predict --batch=1 --size=513 compares the student alone instead.
PyTorch may live in another environment: --torch_python names its interpreter.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def last_json(command):
  """What a command prints last; its output is shown if it fails."""
  done = subprocess.run(
    list(map(str, command)), capture_output=True, text=True, cwd=ROOT
  )
  if done.returncode:
    sys.exit(f'{" ".join(map(str, command))}\n{done.stdout}{done.stderr}')
  return json.loads(done.stdout.splitlines()[-1])


def run_ours(student, recipe, options):
  return last_json(
    [
      *(sys.executable, '-m', 'attnfd_jax.benchmark', 'train', '--json'),
      *(f'--student={student}', f'--teacher={options.teacher}'),
      *(f'--batch={options.batch}', f'--height={options.size}'),
      *(f'--width={options.size}', f'--steps={options.steps}'),
      *(f'--dtype={options.dtype}', f'--recipe={recipe}'),
    ]
  )


def run_prediction(student, options):
  return last_json(
    [
      *(sys.executable, '-m', 'attnfd_jax.benchmark', 'predict', '--json'),
      *(f'--student={student}', f'--height={options.size}'),
      *(f'--width={options.size}', f'--steps={options.steps}'),
      f'--dtype={options.dtype}',
    ]
  )


def run_peer(student, form, options):
  return last_json(
    [
      *(options.torch_python, HERE / 'peer.py', f'--form={form}'),
      *(f'--student={student}', f'--teacher={options.teacher}'),
      *(f'--batch={options.batch}', f'--height={options.size}'),
      *(f'--width={options.size}', f'--steps={options.steps}'),
      f'--dtype={options.dtype}',
    ]
  )


def spread(values):
  return {
    'median': statistics.median(values),
    'lowest': min(values),
    'highest': max(values),
  }


def print_round(number, student, measured):
  for recipe, ours in measured['ours'].items():
    line = f'round {number}: {student} {recipe} {ours["step_seconds"]:.4f} s'
    for form, theirs in measured['peers'].items():
      ratio = theirs['step_seconds'] / ours['step_seconds']
      line += f'; {form} {theirs["step_seconds"]:.4f} s, {ratio:.2f} times'
      if theirs['peak_memory_bytes']:
        share = ours['peak_memory_bytes'] / theirs['peak_memory_bytes']
        line += f', {share:.2f} of its memory'
    print(line, flush=True)


def compare(student, forms, options):
  """Yields, after each round, {'rounds': all measured, 'ratios': spreads}."""
  rounds, ratios = [], {}
  for number in range(1, options.rounds + 1):
    if forms == ['predict']:
      ours = {'predict': run_prediction(student, options)}
    else:
      ours = {
        recipe: run_ours(student, recipe, options) for recipe in options.recipes
      }
    peers = {form: run_peer(student, form, options) for form in forms}
    rounds.append({'ours': ours, 'peers': peers})
    print_round(number, student, rounds[-1])
    for recipe, mine in ours.items():
      for form, theirs in peers.items():
        ratio = theirs['step_seconds'] / mine['step_seconds']
        ratios.setdefault(f'{recipe}, {form}', []).append(ratio)
    yield {
      'rounds': rounds,
      'ratios': {key: spread(values) for key, values in ratios.items()},
    }


def parse(gpu):
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--students', default='resnet18,mobilenet_v2')
  parser.add_argument('--teacher', default='resnet101')
  parser.add_argument('--recipes', default='reference,clean')
  parser.add_argument('--forms')
  parser.add_argument('--batch', type=int, default=16 if gpu else 2)
  parser.add_argument('--size', type=int, default=513 if gpu else 257)
  parser.add_argument('--dtype', default='bfloat16' if gpu else 'float32')
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--torch_python', default=sys.executable)
  parser.add_argument('--output')
  options = parser.parse_args()
  options.recipes = options.recipes.split(',')
  return options


def has_gpu():
  # In a process of its own, which gives the memory of the device back.
  code = 'import jax; print(jax.default_backend())'
  command = [sys.executable, '-c', code]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  return done.stdout.strip() == 'gpu'


def main():
  gpu = has_gpu()
  options = parse(gpu)
  forms = ['authors', 'best' if gpu else 'no_teacher_gradients']
  if options.forms:
    forms = options.forms.split(',')
  results = {}
  for student in options.students.split(','):
    for found in compare(student, forms, options):
      results[student] = found
      if options.output:  # After each: a lent machine may be taken back.
        text = json.dumps(results, indent=1, sort_keys=True) + '\n'
        pathlib.Path(options.output).write_text(text)
  for student, found in results.items():
    for key, ratio in found['ratios'].items():
      print(
        f'{student}, {key}: {ratio["median"]:.2f} times as fast '
        f'({ratio["lowest"]:.2f} to {ratio["highest"]:.2f})'
      )


if __name__ == '__main__':
  main()
