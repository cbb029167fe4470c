"""What the tests of the exit_decision kernels share: inputs, and the comparison."""

import torch
from torch import Tensor

from lego.ops.exit_decision import exit_decision as reference
from lego.ops.exit_decision import perturbed
from lego.ops.rms_norm import rms_norm
from lego_kernels.ops.exit_decision import ExitDecision, exit_decision
from tests.oracle import assert_error_bounded, random

FLOOR = 2e-6


def inputs(shape, dtype, device, seed=0) -> tuple[Tensor, Tensor]:
    """Logits with a standard deviation of 2, so that no criterion is near 0 or 1."""
    B, D, V = shape
    h = random((B, D), dtype, device, seed=seed)
    return h, (2 * D**-0.5 * random((V, D), torch.float64, device, seed=seed + 1)).to(dtype)


def logits_of(h, head, norm_weight=None) -> Tensor:
    if norm_weight is not None:
        h = rms_norm(h, norm_weight, eps=1e-5)
    return h @ head.T


def check(h, head, criterion, norm_weight=None, vocab_size=None, **noise) -> ExitDecision:
    """Compare with the reference; tokens may differ where two scores are as close as its error."""
    wide = None if norm_weight is None else norm_weight.double()
    given = {"threshold": 0.3, "criterion": criterion, "vocab_size": vocab_size} | noise
    got = exit_decision(h, head, norm_weight=norm_weight, **given)
    eager = reference(h, head, norm_weight_D=norm_weight, **given)
    exact = reference(h.double(), head.double(), norm_weight_D=wide, **given)
    assert [x.dtype for x in got] == [torch.int64, torch.float32, torch.float32, torch.bool]
    rounded = exact
    if norm_weight is not None:
        # the normed rows are rounded, as eager's are; that eager's logits make up for it is luck
        normed = rms_norm(h, norm_weight, eps=1e-5)
        rounded = reference(normed.double(), head.double(), **given)
    for name, scale in (("confidence", 1), ("lse", 1 + exact.lse.abs().max().item())):
        want = getattr(exact, name)
        moved = (getattr(rounded, name) - want).nan_to_num().abs().max().item()
        floor = FLOOR * scale + moved
        assert_error_bounded(getattr(got, name), getattr(eager, name), want, floor=floor)
    assert torch.equal(got.exit, got.confidence >= 0.3)

    logits = logits_of(h.double(), head[:vocab_size].double(), wide)
    eager_logits = logits_of(h, head[:vocab_size], norm_weight)
    error = (eager_logits.double() - logits).nan_to_num()  # -inf less -inf
    slack = 4 * error.abs().max().item() + 1e-5
    score = perturbed(logits, **noise) if noise else logits
    chosen = score.gather(1, got.token[:, None])[:, 0]
    assert torch.all(chosen >= score.amax(dim=1) - slack)
    return got
