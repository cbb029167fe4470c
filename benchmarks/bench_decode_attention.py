"""decode_attention: the reference, SDPA on the filled slots, SDPA with a mask on all of them, which
alone knows no length on the host, torch.compile of that, and ours."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lego.ops.decode_attention import decode_attention as reference
from lego_kernels.ops.decode_attention import decode_attention, decode_attention_workspace
from tests.oracle import DEVICES, FLOORS, assert_error_bounded


class Case(NamedTuple):
    B: int  # rows
    kv_len: int  # filled slots, of twice as many
    Hq: int  # query heads
    Hkv: int  # key and value heads
    E: int  # head width
    dtype: str


CASES = [
    Case(1, 32, 4, 4, 16, "float32"),  # the seed
    Case(1, 512, 12, 12, 64, "float32"),  # GPT-2
    Case(1, 2048, 32, 8, 64, "bfloat16"),  # Llama-3.2-1B
]
MORE_CASES = [
    Case(1, 128, 4, 4, 16, "float32"),
    Case(1, 128, 4, 4, 16, "bfloat16"),
    Case(1, 512, 9, 3, 64, "bfloat16"),  # SmolLM2-135M
    Case(1, 512, 12, 12, 64, "bfloat16"),
    Case(1, 512, 32, 8, 64, "float32"),
    Case(1, 512, 32, 8, 64, "bfloat16"),
    Case(1, 2048, 32, 8, 64, "float32"),
    Case(8, 512, 32, 8, 64, "bfloat16"),
    Case(1, 65_536, 32, 8, 64, "bfloat16"),
    Case(32, 2048, 32, 8, 128, "bfloat16"),  # Llama-3-8B
]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=q.size(2) != k.size(2))


def masked(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor) -> Tensor:
    slots = torch.arange(k.size(1), device=k.device)
    return sdpa(q, k, v, (slots < kv_len[:, None])[:, None, None])


@pytest.mark.parametrize("device", DEVICES)
def test_decode_attention(case, device, compare):
    B, filled, Hq, Hkv, E, _ = case
    dtype, scale = getattr(torch, case.dtype), E**-0.5
    kv_len = torch.full((B,), filled, device=device)
    compiled = torch.compile(masked, dynamic=False)

    def inputs():
        q = torch.randn(B, 1, Hq, E, device=device, dtype=dtype)
        return q, *torch.randn(2, B, 2 * filled, Hkv, E, device=device, dtype=dtype)

    def providers():
        qkv = q, k, v = inputs()
        out = torch.empty_like(q)
        workspace = decode_attention_workspace(q, k) if device == "cuda" else None
        mine = {"out": out, "workspace": workspace}
        return {
            "eager": lambda: reference(*qkv, kv_len, scale=scale),
            "sdpa": lambda: sdpa(q, k[:, :filled], v[:, :filled]),
            "sdpa, masked": lambda: masked(*qkv, kv_len),
            "compile": lambda: compiled(*qkv, kv_len),
            "ours": lambda: decode_attention(*qkv, kv_len, scale=scale, **mine),
        }

    qkv = q, k, _ = inputs()
    exact = reference(*(x.double() for x in qkv), kv_len, scale=scale)
    eager = reference(*qkv, kv_len, scale=scale)
    got = decode_attention(*qkv, kv_len, scale=scale)
    assert_error_bounded(got, eager, exact, floor=FLOORS[dtype])
    compare(
        providers,
        device=device,
        moved_bytes=k.nbytes + 2 * q.nbytes,  # half of the slots, of k and of v
    )
