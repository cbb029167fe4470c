"""decode_attention against a loop over rows, tokens and heads in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.ops.decode_attention import decode_attention
from tests.oracle import DEVICES, random

# relative to values of size 1: PyTorch keeps probabilities in the dtype of the values
ERROR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-6}

# B, T, S, H, K, E: smallest, ragged, chunk, grouped, one key/value head, odd
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 40, 4, 4, 8),
    (3, 1, 9, 4, 2, 6),
    (3, 5, 20, 6, 2, 16),
    (2, 3, 7, 5, 1, 7),
    (4, 2, 33, 3, 3, 64),
]


def make_inputs(shape, dtype, device, seed=0):
    B, T, S, H, K, E = shape
    q = random((B, T, H, E), dtype, device, seed=seed)
    k, v = random((2, B, S, K, E), dtype, device, seed=seed + 1)
    return q, k, v


def make_lengths(shape, device):
    """All slots, just the new tokens, and in between, in turn."""
    B, T, S = shape[:3]
    return torch.tensor([(S, T, (S + T) // 2)[b % 3] for b in range(B)], device=device)


def naive(q, k_cache, v_cache, kv_len, scale):
    B, T, H, E = q.shape
    group = H // k_cache.size(2)
    out = torch.zeros(B, T, H, E, dtype=torch.float64, device=q.device)
    for b in range(B):
        for t in range(T):
            count = max(int(kv_len[b]) - T + t + 1, 0)
            if count == 0:
                continue
            for h in range(H):
                k = k_cache[b, :count, h // group].double()
                weight = ((k @ q[b, t, h].double()) * scale).exp()
                out[b, t, h] = weight / weight.sum() @ v_cache[b, :count, h // group].double()
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_formula(shape, dtype, device):
    q, k, v = make_inputs(shape, dtype, device)
    kv_len = make_lengths(shape, device)
    got = decode_attention(q, k, v, kv_len, scale=0.3)
    assert got.dtype == dtype and got.shape == q.shape
    assert (got.double() - naive(q, k, v, kv_len, 0.3)).abs().max() <= 3 * ERROR[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_head_reads_the_key_value_head_of_its_group(device):
    q, k, v = make_inputs((2, 1, 4, 6, 3, 8), torch.float64, device)
    v[:] = torch.arange(3.0, device=device)[:, None]  # the value tells which head was read
    got = decode_attention(q, k, v, torch.tensor([4, 2], device=device), scale=1.0)
    heads = torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64, device=device)
    torch.testing.assert_close(got, heads[None, None, :, None].expand_as(got))
    k[:, :, 1] = -k[:, :, 1]
    changed = decode_attention(q, k, v + k, torch.tensor([4, 2], device=device), scale=1.0)
    k[:, :, 1] = -k[:, :, 1]
    before = decode_attention(q, k, v + k, torch.tensor([4, 2], device=device), scale=1.0)
    differs = (changed != before).any(-1).any(0)[0]
    assert differs.tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("B", [1, 3])
def test_slots_past_the_length_are_never_read(B, T, bad, dtype, device):
    shape = (B, T, 12, 4, 2, 8)
    q, k, v = make_inputs(shape, dtype, device)
    kv_len = torch.tensor([5, 12, 7][:B], device=device)
    expected = decode_attention(q, k, v, kv_len, scale=0.3)
    for cache in (k, v):
        for b in range(B):
            cache[b, kv_len[b] :] = bad
    got = decode_attention(q, k, v, kv_len, scale=0.3)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_does_not_see_the_ones_after_it(device):
    q, k, v = make_inputs((2, 3, 9, 4, 2, 8), torch.float64, device)
    kv_len = torch.tensor([9, 5], device=device)
    expected = decode_attention(q, k, v, kv_len, scale=0.3)
    for b, newest in enumerate(kv_len.tolist()):
        k[b, newest - 1] += 100.0
        v[b, newest - 1] -= 100.0
    got = decode_attention(q, k, v, kv_len, scale=0.3)
    torch.testing.assert_close(got[:, :2], expected[:, :2])
    assert (got[:, 2] - expected[:, 2]).abs().amax((1, 2)).min() > 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("T", "S", "kv_len", "zero"),
    [
        (1, 4, [0], [[True]]),
        (1, 0, [0], [[True]]),
        (1, 4, [0, 0], [[True], [True]]),
        (1, 4, [0, 2], [[True], [False]]),
        (3, 4, [2], [[True, False, False]]),
        (3, 4, [0, 4], [[True] * 3, [False] * 3]),
    ],
)
def test_a_query_that_sees_nothing_gives_zeros(T, S, kv_len, zero, device):
    q, k, v = make_inputs((len(kv_len), T, S, 4, 2, 8), torch.float64, device)
    got = decode_attention(q, k, v, torch.tensor(kv_len, device=device), scale=0.3)
    assert got.shape == q.shape
    assert (got == 0).all(-1).all(-1).tolist() == zero
    assert not got.isnan().any()


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_do(device):
    for B, T in [(0, 1), (0, 3), (2, 0)]:
        q, k, v = make_inputs((B, T, 4, 4, 2, 8), torch.float32, device)
        kv_len = torch.full((B,), 2, device=device)
        assert decode_attention(q, k, v, kv_len, scale=1.0).shape == (B, T, 4, 8)


def test_huge_scores_do_not_overflow():
    q, k, v = make_inputs((2, 1, 5, 2, 2, 8), torch.float32, "cpu")
    q *= 1e4
    kv_len = torch.tensor([5, 3])
    score = torch.einsum("bthe,bshe->bhs", q.double(), k.double())
    score[1, :, 3:] = -torch.inf
    best = score.argmax(-1)  # [B, H]; the softmax is all but one-hot
    got = decode_attention(q, k, v, kv_len, scale=1.0)[:, 0]
    for b in range(2):
        for h in range(2):
            torch.testing.assert_close(got[b, h], v[b, best[b, h], h])


def test_strided_views_and_inputs_left_alone():
    shape = (3, 2, 9, 4, 2, 6)
    q, k, v = make_inputs(shape, torch.float64, "cpu")
    kv_len = torch.tensor([9, 99, 2, 99, 5, 99])[::2]
    expected = decode_attention(q, k, v, kv_len, scale=0.3)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    before = [x.clone() for x in heads_first]
    got = decode_attention(*heads_first, kv_len, scale=0.3)
    torch.testing.assert_close(got, expected)
    assert all(torch.equal(one, other) for one, other in zip(heads_first, before, strict=True))


FIT = "caches must be [B, S, K, E] for q [B, T, H, E] with H a multiple of K, got"
BROKEN = {
    f"{FIT} q (2, 1, 4, 8), k (3, 5, 2, 8), v (3, 5, 2, 8)": ((3, 5, 2, 8), (3, 5, 2, 8), [1, 1]),
    f"{FIT} q (2, 1, 4, 8), k (2, 5, 2, 4), v (2, 5, 2, 4)": ((2, 5, 2, 4), (2, 5, 2, 4), [1, 1]),
    f"{FIT} q (2, 1, 4, 8), k (2, 5, 2, 8), v (2, 6, 2, 8)": ((2, 5, 2, 8), (2, 6, 2, 8), [1, 1]),
    f"{FIT} q (2, 1, 4, 8), k (2, 5, 3, 8), v (2, 5, 3, 8)": ((2, 5, 3, 8), (2, 5, 3, 8), [1, 1]),
    "kv_len must be [2], got (3,)": ((2, 5, 2, 8), (2, 5, 2, 8), [1, 1, 1]),
    "kv_len must be in [0, 5], got 1 to 6": ((2, 5, 2, 8), (2, 5, 2, 8), [1, 6]),
    "kv_len must be in [0, 5], got -1 to 5": ((2, 5, 2, 8), (2, 5, 2, 8), [-1, 5]),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_refuses(sentence):
    k_shape, v_shape, kv_len = BROKEN[sentence]
    q, k, v = torch.zeros(2, 1, 4, 8), torch.zeros(k_shape), torch.zeros(v_shape)
    with pytest.raises(ValueError) as caught:
        decode_attention(q, k, v, torch.tensor(kv_len), scale=1.0)
    assert str(caught.value) == f"decode_attention: {sentence}"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_length(data):
    B, T, K, group, E = (
        data.draw(st.integers(low, 4), label=name)
        for name, low in [("B", 1), ("T", 1), ("K", 1), ("group", 1), ("E", 1)]
    )
    S = data.draw(st.integers(0, 9), label="S")
    kv_len = torch.tensor(data.draw(st.lists(st.integers(0, S), min_size=B, max_size=B)))
    seed = data.draw(st.integers(0, 99), label="seed")
    q, k, v = make_inputs((B, T, S, K * group, K, E), torch.float64, "cpu", seed)
    got = decode_attention(q, k, v, kv_len, scale=0.7)
    torch.testing.assert_close(got, naive(q, k, v, kv_len, 0.7), rtol=0, atol=1e-12)
