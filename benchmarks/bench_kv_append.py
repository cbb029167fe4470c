"""kv_append: the reference, torch's own indexing, and ours."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lego.ops.kv_append import kv_append as reference
from lego_kernels import kv_append
from tests.oracle import DEVICES, assert_same_bits


class Case(NamedTuple):
    B: int  # rows
    T: int  # new tokens
    S: int  # cache slots
    H: int  # key-value heads
    D: int  # head width


CASES = [
    Case(1, 1, 2048, 8, 64),  # Llama-3.2-1B, one token
    Case(32, 1, 2048, 8, 64),  # a batch
]
MORE_CASES = [
    Case(1, 1, 256, 4, 16),  # the seed, one token
    Case(1, 512, 2048, 8, 128),  # a prompt
]


def index_put(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
    """What one writes without an op: no row is skipped and no position is checked."""
    row = torch.arange(k.size(0), device=k.device)[:, None]
    slot = position[:, None] + torch.arange(k.size(1), device=k.device)
    k_cache[row, slot] = k
    v_cache[row, slot] = v


@pytest.mark.parametrize("device", DEVICES)
def test_kv_append(case, device, compare):
    B, T, S, H, D = case
    generator = torch.Generator().manual_seed(0)
    cache = torch.zeros(2, B, S, H, D, dtype=torch.bfloat16, device=device)
    # a view of packed QKV with as many query heads as key-value heads
    qkv = torch.randn(B, T, 3 * H, D, generator=generator).to(device, torch.bfloat16)
    _, k, v = qkv.split(H, dim=2)
    position = torch.arange(B, device=device)
    expected = cache.clone()
    reference(*expected, k, v, position)
    kv_append(*cache, k, v, position)
    assert_same_bits(cache, expected)
    compiled = torch.compile(index_put, dynamic=False)

    def providers():
        arguments = (*cache.clone(), *qkv.clone().split(H, dim=2)[1:], position)
        return {
            "reference": lambda: reference(*arguments),
            "index_put": lambda: index_put(*arguments),
            "compile": lambda: compiled(*arguments),
            "ours": lambda: kv_append(*arguments),
        }

    compare(
        providers,
        device=device,
        moved_bytes=4 * k.nbytes,  # read and write, k and v
    )
