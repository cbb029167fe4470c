"""swiglu: the two torch ops, torch.compile of them, and ours."""

from typing import NamedTuple

import pytest
import torch

from lego.ops.swiglu import swiglu as reference
from lego_kernels.ops.swiglu import swiglu
from tests.oracle import DEVICES, FLOORS, assert_error_bounded


class Case(NamedTuple):
    rows: int  # sequences times tokens
    F: int  # hidden width
    dtype: str


CASES = [
    Case(1, 256, "float32"),  # the seed
    Case(1, 1536, "bfloat16"),  # SmolLM2-135M
    Case(1, 8192, "bfloat16"),  # Llama-3.2-1B
]
MORE_CASES = [
    Case(1, 8192, "float32"),
    Case(16, 8192, "bfloat16"),
    Case(512, 8192, "bfloat16"),  # a prompt
]


@pytest.mark.parametrize("device", DEVICES)
def test_swiglu(case, device, compare):
    dtype = getattr(torch, case.dtype)
    gate_up = torch.randn(case.rows, 2 * case.F, device=device, dtype=dtype)
    compiled = torch.compile(reference, dynamic=False)
    exact = reference(gate_up.double())
    floor = FLOORS[dtype] * exact.abs().max().item()
    assert_error_bounded(swiglu(gate_up), reference(gate_up), exact, floor=floor)

    def providers():
        x, out = gate_up.clone(), swiglu(gate_up)
        return {
            "eager": lambda: reference(x),
            "compile": lambda: compiled(x),
            "ours": lambda: swiglu(x, out=out),
        }

    compare(
        providers,
        device=device,
        moved_bytes=gate_up.nbytes * 3 // 2,  # half as much is written as read
    )
