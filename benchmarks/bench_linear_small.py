"""linear_small on the CPU, where alone it has a kernel: F.linear, torch.compile of it, and ours."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lego_kernels.ops.linear_small import linear_small
from tests.oracle import assert_error_bounded


class Case(NamedTuple):
    B: int  # rows
    N: int  # output features
    D: int  # input features
    dtype: str


CASES = [
    Case(1, 2304, 768, "bfloat16"),  # GPT-2, QKV
    Case(1, 8192, 2048, "bfloat16"),  # Llama-3.2-1B, up projection
    Case(1, 8192, 2048, "float32"),
]
MORE_CASES = [
    Case(1, 256, 64, "float32"),  # the seed, up projection
    Case(1, 3072, 576, "bfloat16"),  # SmolLM2-135M, gate and up projection
    Case(4, 8192, 2048, "bfloat16"),
    Case(16, 8192, 2048, "bfloat16"),
    Case(16, 8192, 2048, "float32"),
]


def test_linear_small(case, compare):
    dtype = getattr(torch, case.dtype)
    x, w = torch.randn(case.B, case.D, dtype=dtype), torch.randn(case.N, case.D, dtype=dtype)
    compiled = torch.compile(F.linear, dynamic=False)
    exact = x.double() @ w.double().T
    assert_error_bounded(linear_small(x, w), F.linear(x, w), exact, floor=1e-4)
    out = torch.empty(case.B, case.N, dtype=dtype)
    compare(
        lambda: {
            "F.linear": lambda: F.linear(x, w),
            "compile": lambda: compiled(x, w),
            "ours": lambda: linear_small(x, w, out=out),
            # what the wrapper's checks cost: at 64 KiB of weights, more than the product
            "ours, unchecked": lambda: torch.ops.lego_kernels.linear_small(x, w, out),
        },
        device="cpu",
        moved_bytes=x.nbytes + w.nbytes + out.nbytes,
    )
