"""linear_small against its formula in float64."""

import pytest
import torch

from lego.ops.linear_small import linear_small
from tests.oracle import DEVICES, FLOORS, random


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, *FLOORS], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (0, 4, 2), (2, 0, 3), (2, 3, 0)], ids=str)
def test_matches_formula(shape, dtype, device):
    B, N, D = shape
    x, w = random((B, D), dtype, device), random((N, D), dtype, device, seed=1)
    got, exact = linear_small(x, w), (x.double()[:, None] * w.double()).sum(-1)
    assert got.dtype == dtype and got.shape == (B, N)
    assert torch.all(
        (got.double() - exact).abs() <= 4 * FLOORS.get(dtype, 2**-50) * (1 + exact.abs())
    )


@pytest.mark.parametrize("x, w", [((3,), (4, 3)), ((2, 3), (3,)), ((2, 3), (4, 2))], ids=str)
def test_refuses(x, w):
    with pytest.raises(ValueError, match=r"^linear_small: x must be \[B, D\] and w \[N, D\], got "):
        linear_small(torch.zeros(x), torch.zeros(w))
