"""rms_norm: F.rms_norm after an addition in place, torch.compile of it, and ours."""

from typing import NamedTuple

import pytest
import torch

from lego.ops.rms_norm import rms_norm as reference
from lego_kernels.ops.rms_norm import rms_norm
from tests.oracle import DEVICES, FLOORS, assert_error_bounded


class Case(NamedTuple):
    rows: int  # sequences times tokens
    D: int  # model width
    residual: bool
    dtype: str


CASES = [
    Case(1, 64, False, "float32"),  # the seed
    Case(1, 768, True, "bfloat16"),  # GPT-2's width
    Case(1, 2048, True, "bfloat16"),  # Llama-3.2-1B
]
MORE_CASES = [
    Case(1, 576, True, "bfloat16"),  # SmolLM2-135M
    Case(1, 2048, False, "bfloat16"),
    Case(1, 2048, True, "float32"),
    Case(16, 2048, True, "bfloat16"),
    Case(512, 2048, True, "bfloat16"),  # a prompt
]


@pytest.mark.parametrize("device", DEVICES)
def test_rms_norm(case, device, compare):
    dtype, eps = getattr(torch, case.dtype), 1e-5
    x = torch.randn(case.rows, case.D, device=device, dtype=dtype)
    weight = torch.randn(case.D, device=device, dtype=dtype)

    def residual():
        # zeros, so that adding x over and over changes it as little as may be
        return torch.zeros_like(x) if case.residual else None

    compiled = torch.compile(reference, dynamic=False)
    out = torch.empty_like(x)
    exact = reference(x.double(), weight.double(), eps=eps)
    eager = reference(x, weight, eps=eps, residual=residual())
    floor = FLOORS[dtype] * exact.abs().max().item()
    rms_norm(x, weight, eps=eps, residual=residual(), out=out)
    assert_error_bounded(out, eager, exact, floor=floor)

    def providers():
        own_x, own_out, sums = x.clone(), out.clone(), [residual() for _ in range(3)]
        return {
            "F.rms_norm": lambda: reference(own_x, weight, eps=eps, residual=sums[0]),
            "compile": lambda: compiled(own_x, weight, eps=eps, residual=sums[1]),
            "ours": lambda: rms_norm(own_x, weight, eps=eps, residual=sums[2], out=own_out),
        }

    compare(
        providers,
        device=device,
        # a residual is read and written
        moved_bytes=(4 if case.residual else 2) * x.nbytes + weight.nbytes,
    )
