"""The reference of rope_kv_append against loops over scalars in float64."""

import cmath

import pytest
import torch

from tests.oracle import random
from tests.rope_kv_append_cases import SHAPES, WRITTEN, make, run_reference


def turned(head, cos, sin, norm, eps):
    """Component a of the first half and a of the second are one complex number."""
    if norm is not None:
        head = head / (head.square().mean() + eps).sqrt() * norm
    half = head.numel() // 2
    pairs = zip(head[:half].tolist(), head[half:].tolist(), cos.tolist(), sin.tolist(), strict=True)
    numbers = [complex(a, b) * complex(c, s) for a, b, c, s in pairs]
    return torch.tensor([z.real for z in numbers] + [z.imag for z in numbers], dtype=torch.float64)


def naive(given, eps):
    q_out, k_cache, v_cache, qkv, cos, sin, position, slot = (
        given[name] for name in list(given)[:8]
    )
    B, T, Hq, E = q_out.shape
    Hkv = k_cache.size(2)
    for b in range(B):
        for t in range(T):
            heads = qkv[b, t].view(Hq + 2 * Hkv, E)
            angle = cos[position[b] + t], sin[position[b] + t]
            for h in range(Hq):
                q_out[b, t, h] = turned(heads[h], *angle, given.get("q_norm"), eps)
            for h in range(Hkv if slot[b] >= 0 else 0):
                place = slot[b] + t
                k_cache[b, place, h] = turned(heads[Hq + h], *angle, given.get("k_norm"), eps)
                v_cache[b, place, h] = heads[Hq + Hkv + h]


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_loops(shape, norm):
    given = make(shape, torch.float64, norm=norm)
    true = {name: x.clone() for name, x in given.items()}
    run_reference(**given, eps=1e-3)
    naive(true, eps=1e-3)
    for name in WRITTEN:
        torch.testing.assert_close(given[name], true[name], rtol=1e-12, atol=1e-12)


def test_position_turns_and_slot_places():
    """One token at slot 2 of a cache with a hole: its angle is that of position 5."""
    given = make(SHAPES[0]._replace(S=4, P=8, E=2), torch.float64)
    given["position"][:], given["slot"][:] = 5, 2
    run_reference(**given)
    q, k, v = given["qkv"].view(3, 2)
    for got, x in ((given["q_out"][0, 0, 0], q), (given["k_cache"][0, 2, 0], k)):
        true = complex(*x.tolist()) * cmath.exp(5j)
        assert abs(complex(*got.tolist()) - true) < 1e-6  # the tables are float32
    assert torch.equal(given["v_cache"][0, 2, 0], v)
    untouched = random((8,), torch.float64, "cpu").view(4, 2)[[0, 1, 3]]
    assert torch.equal(given["k_cache"][0, [0, 1, 3], 0], untouched)
