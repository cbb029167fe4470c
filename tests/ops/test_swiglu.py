"""swiglu against its formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.ops.swiglu import swiglu
from tests.oracle import DEVICES, random

# silu(gate) is rounded to the dtype before it is multiplied: two roundings
ERROR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}


def naive(gate_up):
    half = gate_up.size(-1) // 2
    gate, up = gate_up[..., :half].double(), gate_up[..., half:].double()
    return gate / (1 + (-gate).exp()) * up


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", [(2,), (3, 14), (2, 5, 704), (0, 8), (4, 0)], ids=str)
def test_matches_formula(shape, dtype, device):
    gate_up = 3 * random(shape, dtype, device)
    got, exact = swiglu(gate_up), naive(gate_up)
    assert got.dtype == dtype and got.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.all((got.double() - exact).abs() <= ERROR[dtype] * (exact.abs() + 1e-30))


def test_gate_comes_first():
    got = swiglu(torch.tensor([0.0, 40.0, -40.0, 7.0, 8.0, 9.0], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([0.0, 320.0, 0.0]).double(), rtol=0, atol=1e-13)


def test_extremes():
    far = torch.tensor([[-1e30, 2.0], [1e30, 2.0], [float("nan"), 2.0]])
    got = swiglu(far)
    assert got[0] == 0 and got[1] == 2e30 and got[2].isnan()


def test_strided_input():
    gate_up = random((6, 2, 3), torch.float64, "cpu").transpose(0, 2)
    torch.testing.assert_close(swiglu(gate_up), naive(gate_up))


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)], ids=str)
def test_refuses(shape):
    with pytest.raises(ValueError) as caught:
        swiglu(torch.zeros(shape))
    assert str(caught.value) == f"swiglu: last dimension must be even, got {shape}"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=12).filter(lambda x: len(x) % 2 == 0))
def test_any_values(values):
    gate_up = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(swiglu(gate_up), naive(gate_up), rtol=1e-12, atol=1e-20)
