"""exit_gate: the reference, the same without its checks, torch.compile of that, and ours."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lego.ops.exit_gate import exit_gate as reference
from lego_kernels.ops.exit_gate import exit_gate
from tests.oracle import DEVICES, FLOORS, assert_error_bounded


class Case(NamedTuple):
    B: int  # rows
    D: int  # model width
    dtype: str


CASES = [
    Case(1, 64, "float32"),  # the seed
    Case(1, 768, "bfloat16"),  # GPT-2's width
    Case(1, 2048, "bfloat16"),  # Llama-3.2-1B
]
MORE_CASES = [
    Case(1, 2048, "float32"),
    Case(16, 2048, "bfloat16"),
    Case(256, 2048, "bfloat16"),
]


def unchecked(
    h: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference without its look at the threshold, which would break the compiled graph."""
    normed = F.rms_norm(h, norm_weight.shape, norm_weight, 1e-5)
    score = (normed.float() @ weight.float() + bias).sigmoid()
    return score, score >= threshold


@pytest.mark.parametrize("device", DEVICES)
def test_exit_gate(case, device, compare):
    dtype = getattr(torch, case.dtype)
    h = torch.randn(case.B, case.D, device=device, dtype=dtype)
    weight = torch.randn(case.D, device=device, dtype=dtype) * case.D**-0.5
    norm_weight, bias = torch.ones_like(weight), torch.zeros(1, device=device, dtype=dtype)
    threshold = torch.full((case.B,), 0.9, device=device)
    compiled = torch.compile(unchecked, dynamic=False)
    given = (h, weight, bias)
    exact, _ = reference(
        *(x.double() for x in given), threshold=0.9, norm_weight_D=norm_weight.double()
    )
    eager, _ = reference(*given, threshold=0.9, norm_weight_D=norm_weight)
    out = torch.empty_like(threshold), torch.empty_like(threshold, dtype=torch.bool)
    exit_gate(*given, threshold=threshold, norm_weight=norm_weight, out=out)
    assert_error_bounded(out[0], eager, exact, floor=FLOORS[torch.float32])

    def providers():
        mine = [x.clone() for x in given]
        own_out = tuple(torch.empty_like(x) for x in out)
        return {
            "eager": lambda: reference(*mine, threshold=threshold, norm_weight_D=norm_weight),
            "unchecked": lambda: unchecked(*mine, threshold, norm_weight),
            "compile": lambda: compiled(*mine, threshold, norm_weight),
            "ours": lambda: exit_gate(
                *mine, threshold=threshold, norm_weight=norm_weight, out=own_out
            ),
        }

    compare(
        providers,
        device=device,
        moved_bytes=h.nbytes + weight.nbytes + norm_weight.nbytes + 9 * case.B,
    )
