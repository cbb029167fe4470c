"""rope_kv_append: the reference, what one writes in torch, torch.compile of that, and ours."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lego.ops.rotary import rotary_tables
from lego_kernels.ops.rope_kv_append import rope_kv_append
from tests.oracle import DEVICES
from tests.rope_kv_append_cases import check, run_reference


class Case(NamedTuple):
    B: int  # rows
    T: int  # new tokens
    Hq: int  # query heads
    Hkv: int  # key-value heads
    E: int  # head width
    norm: bool
    dtype: str


CASES = [
    Case(1, 1, 4, 4, 16, False, "float32"),  # the seed
    Case(1, 1, 9, 3, 64, False, "bfloat16"),  # SmolLM2-135M
    Case(1, 1, 32, 8, 64, False, "bfloat16"),  # Llama-3.2-1B
]
MORE_CASES = [
    Case(1, 1, 12, 12, 64, False, "float32"),  # GPT-2's heads
    Case(1, 1, 32, 8, 64, False, "float32"),
    Case(1, 1, 16, 8, 128, True, "bfloat16"),  # Qwen3-0.6B
    Case(8, 1, 32, 8, 64, False, "bfloat16"),
    Case(1, 256, 32, 8, 64, False, "bfloat16"),  # a prompt
]
S = 2048  # cache slots, and positions in the tables


def in_torch(
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor, Tensor],
    norms: list[Tensor],
) -> None:
    """What one writes without an op, at its best: whole-width tables in qkv's dtype, and the index
    tensors made beforehand. No row is skipped and no place is checked."""
    (B, T, Hq, E), Hkv = q_out.shape, k_cache.size(2)
    (cos, sin), (row, position, slot) = tables, places
    q_and_k, v = qkv.view(B, T, Hq + 2 * Hkv, E).split((Hq + Hkv, Hkv), dim=2)
    if norms:
        heads = zip(q_and_k.split((Hq, Hkv), dim=2), norms, strict=True)
        q_and_k = torch.cat([F.rms_norm(x, (E,), weight, 1e-5) for x, weight in heads], dim=2)
    first, second = q_and_k.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    rotated = q_and_k * cos[position].unsqueeze(2) + swapped * sin[position].unsqueeze(2)
    q, k = rotated.split((Hq, Hkv), dim=2)
    q_out.copy_(q)
    if B == 1:
        k_cache.index_copy_(1, slot[0], k)
        v_cache.index_copy_(1, slot[0], v)
    else:
        k_cache[row, slot] = k
        v_cache[row, slot] = v


@pytest.mark.parametrize("device", DEVICES)
def test_rope_kv_append(case, device, compare):
    B, T, Hq, Hkv, E, norm, _ = case
    options = {"device": device, "dtype": getattr(torch, case.dtype)}
    qkv = torch.randn(B, T, (Hq + 2 * Hkv) * E, **options)
    caches = torch.zeros(2, B, S, Hkv, E, **options).unbind()
    outputs = (torch.empty(B, T, Hq, E, **options), *caches)
    cos, sin = (table.to(device) for table in rotary_tables(E, S, 10_000.0))
    position = torch.arange(B, device=device) + 100
    norms = [torch.ones(E, **options) for _ in range(2 * norm)]
    names = ("q_out", "k_cache", "v_cache", "qkv", "cos", "sin", "position", "slot")
    names += ("q_norm", "k_norm")[: len(norms)]
    tensors = (*outputs, qkv, cos, sin, position, position, *norms)
    arguments = dict(zip(names, tensors, strict=True))
    check(rope_kv_append, arguments)

    place = position[:, None] + torch.arange(T, device=device)
    places = (torch.arange(B, device=device)[:, None], place, place)
    wide = [torch.cat(halves, dim=1).to(qkv.dtype) for halves in ((cos, cos), (-sin, sin))]
    ours = [x.clone() for x in outputs]
    in_torch(*outputs, qkv, tuple(wide), places, norms)
    for x, y in zip(ours, outputs, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=6e-2)
    compiled = torch.compile(in_torch, dynamic=False)

    def providers():
        mine = {name: arguments[name].clone() for name in names[:4]}
        given = (*mine.values(), tuple(wide), places, norms)
        return {
            "reference": lambda: run_reference(**arguments | mine),
            "torch": lambda: in_torch(*given),
            "compile": lambda: compiled(*given),
            "ours": lambda: rope_kv_append(**arguments | mine),
        }

    compare(
        providers,
        device=device,
        moved_bytes=2 * qkv.nbytes,  # all of it is read, and written somewhere
    )
