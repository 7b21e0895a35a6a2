# SPDX-License-Identifier: Apache-2.0
"""The fast forms of convolutions against NumPy and lax."""

import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np
from plain import interpolation, normal, plain_convolution
import pytest

from attnfd_jax.models import convolution, cpu_forms

# Sums of at most some hundred products, in another order than NumPy's.
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}

# (kernel size, depthwise), strides, dilation, padding.
FORMS = {
  'point': (1, False, 1, 1, 0),
  'point_stride2': (1, False, 2, 1, 0),
  'point_padded': (1, False, 1, 1, 1),
  'full': (3, False, 1, 1, 1),
  'full_stride2': (3, False, 2, 1, 1),
  'full_dilation3': (3, False, 1, 3, 3),
  'full_dilation9': (3, False, 1, 9, 9),  # Wider than half the map, and higher.
  'full_dilation2_valid': (3, False, 1, 2, 0),
  'even': (2, False, 1, 1, 1),
  'even_dilation2': (2, False, 1, 2, 1),  # Keeps the size.
  'even_dilation2_wider': (2, False, 1, 2, 2),
  'stem': (7, False, 2, 1, 3),
  'depthwise': (3, True, 1, 1, 1),
  'depthwise_stride2': (3, True, 2, 1, 0),
  'depthwise_dilation2': (3, True, 1, 2, 2),
  'depthwise_stride2_dilation2': (3, True, 2, 2, 0),
  'depthwise_even': (2, True, 2, 1, 1),
}


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_convolve_equals_the_plain_form(form):
  k, depthwise, strides, dilation, padding = form
  x = normal(0, 2, 8, 11, 6)
  kernel = normal(1, k, k, 1, 6) if depthwise else normal(1, k, k, 6, 4)

  def plain(x, kernel):
    return lax.conv_general_dilated(
      x,
      kernel,
      (strides, strides),
      [(padding, padding)] * 2,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      feature_group_count=6 if depthwise else 1,
    )

  def ours(x, kernel):
    return convolution.convolve(
      x, kernel, strides=strides, dilation=dilation, padding=padding
    )

  def run(f, x, kernel):
    def weighed(x, kernel):
      y = f(x, kernel)
      # Every output has its own weight: a shifted map would show.
      weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
      return jnp.sum(y * weight), y

    return jax.grad(weighed, (0, 1), has_aux=True)(x, kernel)

  (grads, y), (expected_grads, expected) = jax.jit(
    lambda x, kernel: (run(ours, x, kernel), run(plain, x, kernel))
  )(x, kernel)
  by_hand = plain_convolution(x, kernel, strides, dilation, padding)
  np.testing.assert_allclose(y, by_hand, **CLOSE)
  np.testing.assert_allclose(y, expected, **CLOSE)
  for actual, wanted in zip(grads, expected_grads, strict=True):
    # Kernel gradients sum up to 200 products.
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
  ('kernel', 'padding', 'convolutions'),
  [((1, 1, 6, 4), 0, 0), ((3, 3, 1, 6), 1, 0), ((3, 3, 6, 4), 1, 1)],
  ids=['point', 'depthwise', 'full'],
)
def test_slow_forms_are_not_lowered_on_cpu(kernel, padding, convolutions):
  x = jnp.zeros((1, 5, 5, 6))

  def convolve(x, kernel):
    return convolution.convolve(x, kernel, padding=padding)

  text = jax.jit(convolve).lower(x, jnp.zeros(kernel)).as_text()
  assert text.count('stablehlo.convolution') == convolutions


@pytest.mark.parametrize('dilation', [2, 9])
def test_the_form_for_a_gpu_has_the_plain_gradients(dilation):
  """Its rule for gradients; that it is fast is for experiments/speed."""
  x, kernel = normal(0, 2, 8, 11, 6), normal(1, 3, 3, 6, 4)
  plain, expected = jax.vjp(
    lambda *x: convolution._grouped(*x, 1, dilation, dilation), x, kernel
  )
  found, vjp = jax.vjp(lambda *x: convolution._dilated(*x, dilation), x, kernel)
  np.testing.assert_array_equal(found, plain)
  for ours, wanted in zip(vjp(plain), expected(plain), strict=True):
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)


def test_a_depthwise_convolution_keeps_one_map_for_its_gradient():
  x, kernel = normal(0, 2, 8, 11, 6), normal(1, 3, 3, 1, 6)
  _, vjp = jax.vjp(lambda *x: cpu_forms.shifted(*x, 1, 1), x, kernel)
  kept = sum(leaf.size for leaf in jax.tree.leaves(vjp))
  assert kept == x.size + kernel.size


def test_a_depthwise_kernel_sums_its_gradient_in_float32():
  x = jnp.ones((1, 5, 603, 3), jnp.bfloat16)
  kernel = jnp.ones((3, 3, 1, 3), jnp.bfloat16)
  y, vjp = jax.vjp(lambda *x: cpu_forms.shifted(*x, 1, 1), x, kernel)
  of_x, of_kernel = vjp(jnp.ones_like(y))
  assert of_x.dtype == of_kernel.dtype == jnp.bfloat16
  # Sums of bfloat16 would end at 256, where one more is lost.
  expected = jnp.bfloat16(3 * 601)
  np.testing.assert_array_equal(of_kernel, jnp.full_like(kernel, expected))


# Coarse and fine size, size of the kernel.
JOINED = {
  'four_times': ((3, 4), (12, 16), 3),
  'odd': ((5, 3), (17, 9), 3),
  'one_pixel': ((1, 1), (4, 5), 3),
  'one_row': ((1, 4), (3, 11), 3),
  'to_one_row': ((3, 4), (1, 11), 3),
  'finer': ((5, 6), (3, 4), 3),
  'same': ((5, 6), (5, 6), 3),
  'wide_kernel': ((3, 4), (7, 13), 5),
  'point': ((3, 4), (7, 13), 1),
}


@pytest.mark.parametrize('form', JOINED.values(), ids=JOINED)
def test_convolve_joined_is_that_of_the_resized_map(form):
  small, large, k = form
  coarse, fine = normal(0, 2, *small, 5), normal(1, 2, *large, 3)
  kernel, weight = normal(2, k, k, 8, 4), normal(3, 2, *large, 4)
  rows, columns = map(interpolation, large, small)

  def plain(coarse, fine, kernel):
    x = jnp.einsum('ip,jq,bpqc->bijc', rows, columns, coarse)
    x = jnp.concatenate([x, fine], -1)
    return convolution._grouped(x, kernel, 1, 1, k // 2)

  @jax.jit
  def run(*arrays):
    y, vjp = jax.vjp(convolution.convolve_joined, *arrays)
    expected, plain_vjp = jax.vjp(plain, *arrays)
    return (y, *vjp(weight)), (expected, *plain_vjp(weight))

  for ours, wanted in zip(*run(coarse, fine, kernel), strict=True):
    # Sums of up to some thousand products.
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)
  x = np.einsum('ip,jq,bpqc->bijc', rows, columns, coarse)
  x = np.concatenate([x, fine], -1)
  by_hand = plain_convolution(x, kernel, 1, 1, k // 2)
  y = convolution.convolve_joined(coarse, fine, kernel)
  np.testing.assert_allclose(y, by_hand, rtol=1e-4, atol=2e-5)


def test_convolve_joined_in_bfloat16():
  arrays = normal(0, 1, 3, 4, 5), normal(1, 1, 9, 13, 3), normal(2, 3, 3, 8, 4)
  half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
  y = convolution.convolve_joined(*half)
  assert y.dtype == jnp.bfloat16
  exact = convolution.convolve_joined(*(x.astype(jnp.float32) for x in half))
  # Some roundings to 8 bits of values of the size of the largest.
  error = np.abs(y.astype(jnp.float32) - exact).max()
  assert error < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize(
  ('platform', 'channels'), [('cpu', 2), ('cuda', 5), ('tpu', 5)]
)
def test_only_a_cpu_leaves_the_coarse_map_small(platform, channels):
  shapes = ((1, 2, 2, 3), (1, 5, 5, 2), (3, 3, 5, 4))
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  function = jax.jit(convolution.convolve_joined)
  exported = export.export(function, platforms=[platform])(*arrays)
  lines = exported.mlir_module().splitlines()
  (line,) = (line for line in lines if 'stablehlo.convolution' in line)
  assert f'tensor<1x5x5x{channels}xf32>' in line
