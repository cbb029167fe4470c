"""compact: the reference, torch without waiting for the device, torch.compile of it, and ours."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lego.ops.compact import compact as reference
from lego_kernels.ops.compact import compact
from tests.oracle import DEVICES


class Case(NamedTuple):
    B: int  # rows


CASES = [Case(1), Case(32)]
MORE_CASES = [Case(8), Case(256), Case(4096)]


def in_torch(exit: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """A stable sort, since nonzero makes the host wait for the device."""
    goes_on = alive & ~exit
    count, order = goes_on.sum(), torch.argsort(~goes_on, stable=True)
    row = torch.arange(exit.size(0), device=exit.device)
    return torch.where(row < count, order, -1), count


@pytest.mark.parametrize("device", DEVICES)
def test_compact(case, device, compare):
    generator = torch.Generator().manual_seed(0)
    exit, alive = (torch.rand(2, case.B, generator=generator) < 0.7).to(device).unbind()
    compiled = torch.compile(in_torch, dynamic=False)
    out = compact(exit, alive)
    for other in (reference(exit, alive), in_torch(exit, alive), compiled(exit, alive)):
        for mine, theirs in zip(out, other, strict=True):
            assert torch.equal(mine, theirs)

    def providers():
        own_out, given = [x.clone() for x in out], (exit.clone(), alive.clone())
        return {
            "reference": lambda: reference(*given),
            "torch": lambda: in_torch(*given),
            "compile": lambda: compiled(*given),
            "ours": lambda: compact(*given, out=own_out),
        }

    compare(
        providers,
        device=device,
        moved_bytes=exit.nbytes + alive.nbytes + sum(x.nbytes for x in out),
    )
