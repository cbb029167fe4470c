"""rms_norm against its formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.ops.rms_norm import rms_norm
from tests.oracle import DEVICES, assert_error_bounded, assert_same_bits, random

# rounding to the result's dtype, and a few operations in float32 or wider
ERROR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}
SHAPES = [(1,), (3, 1), (2, 5, 7), (4, 2048), (0, 8)]


def naive(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x / (x.pow(2).sum(-1, keepdim=True) / x.size(-1) + eps).sqrt() * weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_formula(shape, dtype, device):
    x = 3 * random(shape, dtype, device)
    weight = random(shape[-1:], dtype, device, seed=1)
    got, exact = rms_norm(x, weight, eps=1e-3), naive(x, weight, 1e-3)
    assert got.dtype == dtype and got.shape == x.shape
    assert torch.all((got.double() - exact).abs() <= ERROR[dtype] * (exact.abs() + 1e-30))


@pytest.mark.parametrize("device", DEVICES)
def test_computes_wider_than_bfloat16(device):
    x, weight = random((8, 4096), torch.bfloat16, device), torch.ones(4096, device=device)
    got = rms_norm(x, weight.bfloat16(), eps=1e-6)
    rounded = naive(x, weight, 1e-6).bfloat16()  # the best that a bfloat16 result can be
    assert_error_bounded(got, rounded, naive(x, weight, 1e-6), floor=1e-6)


def test_eps_is_added_to_the_mean_square():
    x = torch.full((1, 4), 1e-3, dtype=torch.float64)
    got = rms_norm(x, torch.ones(4, dtype=torch.float64), eps=1e-6)
    torch.testing.assert_close(got, x / (2e-6) ** 0.5, rtol=1e-12, atol=0)
    assert torch.equal(rms_norm(torch.zeros(1, 4), torch.ones(4), eps=1e-5), torch.zeros(1, 4))


def test_input_is_left_alone_and_rows_are_independent():
    x, weight = random((3, 8), torch.float64, "cpu"), random((8,), torch.float64, "cpu", seed=1)
    x[1, 2] = float("nan")
    before = x.clone()
    got = rms_norm(x, weight, eps=1e-5)
    assert torch.equal(x.isnan(), before.isnan())
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()
    strided = torch.stack((x, x), dim=-1)[..., 0]
    torch.testing.assert_close(rms_norm(strided, weight, eps=1e-5), got, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_residual_is_added_in_place_before_the_norm(dtype, device):
    x, residual = random((3, 40), dtype, device), random((3, 80), dtype, device, seed=2)[:, 20:60]
    weight = random((40,), dtype, device, seed=1)
    x_before, around, expected = x.clone(), residual._base.clone(), residual + x
    got = rms_norm(x, weight, eps=1e-3, residual=residual)
    assert_same_bits(x, x_before)
    assert_same_bits(residual, expected)
    assert_same_bits(residual._base[:, :20], around[:, :20])
    assert_same_bits(residual._base[:, 60:], around[:, 60:])
    # the sum as it was rounded to the dtype is what is normalised
    assert_same_bits(got, rms_norm(expected, weight, eps=1e-3))


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 1), (2, 5)], ids=str)
def test_refuses_a_residual_of_another_shape(shape):
    residual = torch.zeros(shape)
    with pytest.raises(ValueError) as caught:
        rms_norm(torch.ones(2, 4), torch.ones(4), eps=1e-5, residual=residual)
    assert str(caught.value) == f"rms_norm: residual must be (2, 4), got {shape}"
    residual = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"^rms_norm: weight must be \[4\]"):
        rms_norm(torch.ones(2, 4), torch.ones(3), eps=1e-5, residual=residual)
    assert not residual.any()


def test_refuses():
    for shape in [(3,), (1,), (4, 1), (2, 4)]:
        with pytest.raises(ValueError) as caught:
            rms_norm(torch.zeros(2, 4), torch.ones(shape), eps=1e-5)
        assert str(caught.value) == f"rms_norm: weight must be [4] for x (2, 4), got {shape}"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_scale_does_not_matter(D, scale, seed):
    x = random((2, D), torch.float64, "cpu", seed=seed)
    weight = random((D,), torch.float64, "cpu", seed=seed + 1)
    got = rms_norm(x * scale, weight, eps=1e-5 * scale**2)
    torch.testing.assert_close(got, naive(x, weight, 1e-5), rtol=1e-9, atol=1e-12)
