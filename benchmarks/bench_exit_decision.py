"""exit_decision: eager, linear + max + logsumexp, torch.compile of the latter, and ours."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lego.ops.exit_decision import exit_decision as reference
from lego_kernels.ops.exit_decision import ExitDecision, exit_decision, exit_decision_workspace
from tests.exit_decision_cases import check
from tests.oracle import DEVICES


class Case(NamedTuple):
    B: int  # rows
    V: int  # vocabulary
    D: int  # width
    dtype: str
    decide: str = "max_prob"  # or another criterion, or "drawn": max_prob, token at temperature 1


CASES = [
    Case(1, 4096, 64, "float32"),  # the seed
    Case(1, 50_257, 768, "bfloat16"),  # GPT-2
    Case(1, 50_257, 768, "float32"),
    Case(1, 32_000, 2048, "bfloat16"),  # as Llama
]
MORE_CASES = [
    Case(1, 4096, 64, "bfloat16"),
    Case(1, 32_000, 2048, "float32"),
    Case(1, 49_152, 576, "bfloat16"),  # SmolLM2-135M
    Case(1, 128_256, 2048, "bfloat16"),  # Llama-3.2-1B
    Case(4, 50_257, 768, "bfloat16"),
    Case(16, 50_257, 768, "bfloat16"),
    Case(16, 50_257, 768, "float32"),
    Case(1, 151_936, 1024, "bfloat16"),  # Qwen3-0.6B
    Case(16, 151_936, 1024, "bfloat16"),
    Case(16, 128_256, 2048, "bfloat16"),
    Case(1, 50_257, 768, "bfloat16", "margin"),
    Case(1, 50_257, 768, "bfloat16", "entropy"),
    Case(1, 50_257, 768, "bfloat16", "drawn"),
]


def linear_max_logsumexp(h: Tensor, head: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
    """The fewest torch ops for a greedy token and its probability."""
    logits = F.linear(h, head)
    most, token = logits.max(dim=-1)
    lse = logits.logsumexp(dim=-1)
    confidence = torch.exp(most - lse)
    return token, confidence, lse, confidence >= threshold


@pytest.mark.parametrize("device", DEVICES)
def test_exit_decision(case, device, compare):
    options = {"device": device, "dtype": getattr(torch, case.dtype)}
    h = torch.randn(case.B, case.D, **options)
    head = torch.randn(case.V, case.D, **options).mul_(2 * case.D**-0.5)
    threshold = torch.full((case.B,), 0.5, device=device)
    criterion, noise = case.decide, {}
    if case.decide == "drawn":
        criterion, noise["temperature"] = "max_prob", torch.ones(case.B, device=device)
        noise["seed"] = noise["offset"] = torch.arange(case.B, device=device)
    given = {"threshold": threshold, "criterion": criterion}
    check(h, head, criterion, **noise)
    compiled = torch.compile(linear_max_logsumexp, dynamic=False)

    def providers():
        states, weights = h.clone(), head.clone()
        out = ExitDecision.empty(case.B, h.device)
        mine = {"out": out, "workspace": exit_decision_workspace(states, weights)}
        return {
            "eager": lambda: reference(states, weights, **given, **noise),
            "linear + max + logsumexp": lambda: linear_max_logsumexp(states, weights, threshold),
            "compile": lambda: compiled(states, weights, threshold),
            "ours": lambda: exit_decision(states, weights, **given, **noise, **mine),
        }

    compare(
        providers,
        device=device,
        moved_bytes=h.nbytes + head.nbytes + 17 * case.B,
    )
