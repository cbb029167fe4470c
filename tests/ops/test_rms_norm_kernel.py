"""The kernels of rms_norm against lego.ops.rms_norm."""

import pytest
import torch

from lego.ops.rms_norm import rms_norm as reference
from lego_kernels.ops.rms_norm import rms_norm
from tests.oracle import FLOORS, assert_error_bounded, assert_same_bits, random

OP = "rms_norm"
DTYPES = pytest.mark.parametrize("dtype", FLOORS, ids=str)
# smallest, odd, one over a vector, the seed's, several blocks
SHAPES = [(1, 1), (3, 7), (2, 17), (5, 64), (2, 3, 5, 33), (2, 2050)]


def check(x, weight, residual=None, eps=1e-5) -> None:
    """One call, with `out` and without: the residual to the bit, the norm within eager's error."""
    exact = reference(
        x.double(),
        weight.double(),
        eps=eps,
        residual=None if residual is None else residual.double(),
    )
    eager_sum = None if residual is None else residual.clone()
    eager = reference(x, weight, eps=eps, residual=eager_sum)
    for out in (None, torch.full_like(x, float("nan"))):
        summed = None if residual is None else residual.clone()
        got = rms_norm(x, weight, eps=eps, residual=summed, out=out)
        assert out is None or got is out
        assert got.shape == x.shape and got.dtype == x.dtype
        assert_error_bounded(got, eager, exact, floor=FLOORS[x.dtype] * exact.abs().max().item())
        if residual is not None:
            assert_same_bits(summed, eager_sum)


@DTYPES
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, with_residual, dtype, device):
    residual = random(shape, dtype, device, seed=2) if with_residual else None
    weight = random(shape[-1:], dtype, device, seed=1)
    check(random(shape, dtype, device), weight, residual)
