"""The kernels of decode_attention against lego.ops.decode_attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lego_kernels.ops.decode_attention as module
from lego.ops.decode_attention import decode_attention as reference
from lego_kernels.library import cpu_isas, use_cpu_isa
from lego_kernels.ops.decode_attention import (
    _decode_attention_torch,
    decode_attention,
    decode_attention_workspace,
)
from tests.oracle import DEVICES, FLOORS, assert_error_bounded, assert_same_bits, random

OP = "decode_attention"
DTYPES = pytest.mark.parametrize("dtype", FLOORS, ids=str)
NAN, INF = float("nan"), float("inf")

# B, T, S, Hq, Hkv, E: smallest, the seed's, three heads a group, odd, one over a vector in S and E,
# three splits, two slots over one, 18 heads a group, as wide as one pass over the columns
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 40, 4, 4, 16),
    (2, 3, 37, 6, 2, 20),
    (2, 3, 7, 4, 1, 7),
    (1, 2, 33, 2, 2, 17),
    (1, 1, 300, 8, 2, 64),
    (2, 1, 130, 8, 1, 80),
    (1, 2, 66, 18, 1, 8),
    (1, 1, 19, 3, 1, 256),
    (1, 1, 150, 36, 2, 8),
    (1, 1, 5, 70, 70, 4),
]


def make_inputs(shape, dtype, device, seed=0):
    B, T, S, Hq, Hkv, E = shape
    q = random((B, T, Hq, E), dtype, device, seed=seed)
    k, v = random((2, B, S, Hkv, E), dtype, device, seed=seed + 1)
    return q, k, v


def make_lengths(shape, device):
    """All slots, just the new tokens, and in between, in turn."""
    B, T, S = shape[:3]
    return torch.tensor([(S, T, (S + T) // 2)[b % 3] for b in range(B)], device=device)


def check(q, k, v, kv_len, scale=0.3) -> None:
    """One call with nothing given, one with all of it, and one with as many as three splits."""
    exact = reference(q.double(), k.double(), v.double(), kv_len, scale=scale)
    eager = reference(q, k, v, kv_len, scale=scale)
    usual = decode_attention_workspace(q, k).fill_(NAN)
    three = q.new_full((usual.size(0), 3, usual.size(2)), NAN, dtype=torch.float32)
    filled = torch.full_like(q, NAN, memory_format=torch.contiguous_format)
    for out, workspace in (None, None), (filled, usual), (filled.clone(), three):
        got = decode_attention(q, k, v, kv_len, scale=scale, out=out, workspace=workspace)
        assert out is None or got is out
        assert got.dtype == q.dtype and got.is_contiguous()
        floor = FLOORS[q.dtype] * max(1, exact.abs().max().item())
        assert_error_bounded(got, eager, exact, floor=floor)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    check(*make_inputs(shape, dtype, device), make_lengths(shape, device))


@pytest.mark.parametrize("E", [257, 600])
def test_wide_heads(E, provider, device):
    shape = (2, 1, 5, 4, 2, E)
    if provider in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"E must be at most 256 on CUDA, got {E}"):
            check(*make_inputs(shape, torch.float16, device), make_lengths(shape, device))
    else:
        check(*make_inputs(shape, torch.float32, device), make_lengths(shape, device), scale=0.05)


@DTYPES
def test_strided_views(dtype, device):
    B, T, S, Hq, Hkv, E = shape = (3, 2, 35, 6, 2, 24)
    qkv = random((B, T, (Hq + 2 * Hkv) * E), dtype, device).unflatten(2, (Hq + 2 * Hkv, E))
    q, kv_len = qkv[:, :, :Hq], make_lengths(shape, device)
    heads_first = random((2, B, Hkv, S, E), dtype, device, seed=1).transpose(2, 3)
    interleaved = random((B, S, 2, Hkv, E), dtype, device, seed=1).unbind(2)
    for k, v in heads_first, interleaved:
        plain = [x.contiguous() for x in (q, k, v)]
        expected = decode_attention(*plain, kv_len, scale=0.3)
        around = torch.full((B, T + 1, Hq + 2, E + 3), NAN, dtype=dtype, device=device)
        out = around[:, 1:, 1:-1, 1:-2]
        decode_attention(q, k, v, kv_len, scale=0.3, out=out)
        assert_error_bounded(out, expected, expected.double(), floor=FLOORS[dtype])
        assert int(around.isnan().sum()) == around.numel() - out.numel()


@pytest.mark.parametrize(
    ("T", "S", "kv_len"), [(1, 4, [0, 2]), (3, 140, [2, 0]), (3, 4, [0, 4]), (1, 0, [0, 0])]
)
@pytest.mark.parametrize("splits", [1, 2])
def test_a_query_that_sees_nothing_gives_zeros(splits, T, S, kv_len, device):
    q, k, v = make_inputs((2, T, S, 4, 2, 8), torch.float32, device)
    kv_len = torch.tensor(kv_len, device=device)
    workspace = torch.full((2 * T * 4, splits, 10), NAN, device=device)
    got = decode_attention(q, k, v, kv_len, scale=0.3, workspace=workspace)
    blind = kv_len[:, None] - T + torch.arange(T, device=device) < 0
    assert torch.equal((got == 0).all(-1).all(-1), blind)
    assert not got.isnan().any()


@DTYPES
@pytest.mark.parametrize("bad", [NAN, INF])
def test_slots_past_the_length_are_never_read(bad, dtype, device):
    shape = (3, 2, 135, 4, 2, 24)
    q, k, v = make_inputs(shape, dtype, device)
    kv_len = torch.tensor([131, 6, 135], device=device)
    workspace = decode_attention_workspace(q, k)
    expected = decode_attention(q, k, v, kv_len, scale=0.3, workspace=workspace).clone()
    for cache in (k, v):
        for b, length in enumerate(kv_len.tolist()):
            cache[b, length:] = bad
    got = decode_attention(q, k, v, kv_len, scale=0.3, workspace=workspace.fill_(NAN))
    assert_same_bits(got, expected)


@DTYPES
def test_a_token_does_not_see_the_ones_after_it(dtype, device):
    q, k, v = make_inputs((2, 3, 9, 4, 2, 8), dtype, device)
    kv_len = torch.tensor([9, 5], device=device)
    expected = decode_attention(q, k, v, kv_len, scale=0.3)
    for b, length in enumerate(kv_len.tolist()):
        k[b, length - 1] += 5
        v[b, length - 1] -= 5
    got = decode_attention(q, k, v, kv_len, scale=0.3)
    assert_same_bits(got[:, :2], expected[:, :2])
    assert (got[:, 2] != expected[:, 2]).all(-1).all()


@DTYPES
def test_a_row_does_not_depend_on_the_others(dtype, device):
    shape = (3, 1, 140, 4, 2, 16)
    (q, k, v), kv_len = make_inputs(shape, dtype, device), make_lengths(shape, device)
    together = decode_attention(
        q, k, v, kv_len, scale=0.3, workspace=decode_attention_workspace(q, k)
    )
    for b in range(3):
        row = slice(b, b + 1)
        workspace = decode_attention_workspace(q[row], k[row])
        alone = decode_attention(
            q[row], k[row], v[row], kv_len[row], scale=0.3, workspace=workspace
        )
        assert_same_bits(alone, together[row])


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16"])
@DTYPES
def test_bits_depend_on_neither_threads_nor_chunk(dtype, isa):
    if isa not in cpu_isas():
        pytest.skip(f"{isa}: not here")
    (q, k, v), kv_len = make_inputs((4, 2, 300, 8, 4, 64), dtype, "cpu"), torch.tensor([300] * 4)
    with use_cpu_isa(isa):
        expected = decode_attention(q, k, v, kv_len, scale=0.1)
        first = decode_attention(q[:, :1], k, v, kv_len - 1, scale=0.1)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(4)
        try:
            got = decode_attention(q, k, v, kv_len, scale=0.1)
        finally:
            torch.set_num_threads(num_threads)
    assert_same_bits(got, expected)
    assert_same_bits(first, expected[:, :1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from Triton's interpreter
@DTYPES
@pytest.mark.parametrize("slot", [0, 129])
def test_not_finite(slot, dtype, provider, device):
    q, k, v = make_inputs((2, 1, 131, 4, 2, 16), dtype, device)
    q = q.abs()
    kv_len = torch.tensor([131, 130], device=device)

    def run():
        workspace = decode_attention_workspace(q, k)
        got = decode_attention(q, k, v, kv_len, scale=0.3, workspace=workspace)
        # PyTorch's 16-bit attention on the CPU gives zeros for a score of inf in the first block
        exact = reference(q.double(), k.double(), v.double(), kv_len, scale=0.3)
        torch.testing.assert_close(got.double(), exact, rtol=0.02, atol=0.02, equal_nan=True)
        return got

    for score in (NAN,) if provider == "torch" else (NAN, INF):
        k[0, slot, 0, 0] = score
        assert run().isnan().all(-1).flatten().tolist() == [True] * 2 + [False] * 6
    k[0, slot, 0, 0] = -INF  # as if the slot were not there
    assert run().isfinite().all()
    v[1, slot, 1, 3] = INF
    assert run().isposinf().sum() == 2
    v[1, slot, 1, 3] = 0
    k[:] = -INF
    assert (run() == 0).all()


def test_huge_scores_do_not_overflow(device):
    q, k, v = make_inputs((2, 1, 140, 2, 2, 8), torch.float32, device)
    kv_len = torch.tensor([140, 133], device=device)
    check(q * 1e4, k, v, kv_len, scale=1.0)


def test_nothing_to_do(device):
    for B, T in [(0, 1), (0, 3), (2, 0)]:
        q, k, v = make_inputs((B, T, 4, 4, 2, 8), torch.float32, device)
        kv_len = torch.full((B,), 2, device=device)
        workspace = decode_attention_workspace(q, k)
        got = decode_attention(q, k, v, kv_len, scale=1.0, workspace=workspace)
        assert got.shape == (B, T, 4, 8)


@pytest.mark.parametrize("far", ["row", "slot"])
def test_offsets_beyond_int32(far, device):
    # 4 GiB that are reserved, but of which only the pages touched here are ever used
    memory = torch.empty(2**31 + 2**12, dtype=torch.float16, device=device)
    apart = 2**30 + 64
    shape, strides = {
        "row": ((3, 3, 2, 16), (apart, 32, 16, 1)),
        "slot": ((1, 3, 2, 16), (0, apart, 16, 1)),
    }[far]
    k = memory.as_strided(shape, strides)
    v = memory.as_strided(shape, strides, 1024)
    for seed, cache in enumerate((k, v)):
        cache.copy_(random(shape, torch.float16, device, seed=seed))
    q = random((shape[0], 1, 4, 16), torch.float16, device, seed=2)
    check(q, k, v, torch.full((shape[0],), 3, device=device))


@pytest.mark.parametrize("bad", [-1, 6, -(2**63), 2**63 - 1])
def test_length_out_of_range(bad, provider, device):
    q, k, v = make_inputs((3, 1, 5, 4, 2, 8), torch.float32, device)
    kv_len = torch.tensor([2, bad, 5], device=device)
    out = torch.full_like(q, NAN)
    if provider in ("triton", "cuda"):
        expected = decode_attention(q, k, v, kv_len.clamp(0, 5), scale=0.3)
        for splits in (1, 2):
            workspace = torch.full((12, splits, 10), NAN, device=device)
            decode_attention(q, k, v, kv_len, scale=0.3, out=out, workspace=workspace)
            torch.testing.assert_close(out, expected)
        return
    with pytest.raises(ValueError) as caught:
        decode_attention(q, k, v, kv_len, scale=0.3, out=out)
    sentence = f"decode_attention: kv_len must be in [0, 5], got {bad} in row 1"
    assert str(caught.value) == sentence
    assert out.isnan().all()


def arguments(**changes):
    """Valid ones, some of them replaced."""
    q, k, v = make_inputs((2, 1, 5, 4, 2, 8), torch.float32, "cpu")
    given = {"q": q, "k_cache": k, "v_cache": v, "kv_len": torch.tensor([5, 3]), "scale": 0.3}
    return given | {"out": torch.full_like(q, NAN)} | changes


CACHE, OUT = (2, 5, 2, 8), (2, 1, 4, 8)
BROKEN = {
    r"q and k_cache must have 4 dimensions, got \(2, 4, 8\)": {"q": torch.zeros(2, 4, 8)},
    r"q must have a multiple of k_cache's 3 heads, got 4": {"k_cache": torch.zeros(2, 5, 3, 8)},
    r"q must have a multiple of k_cache's 0 heads, got 4": {"k_cache": torch.zeros(2, 5, 0, 8)},
    r"q must be float32, bfloat16 or float16, got torch.float64": {"q": torch.zeros(OUT).double()},
    r"q must have last stride 1, got \(64,": {"q": torch.zeros(2, 1, 4, 16)[..., ::2]},
    r"k_cache must be \(2, 5, 2, 8\), got \(3, 5": {"k_cache": torch.zeros(3, 5, 2, 8)},
    r"k_cache must be \(2, 5, 2, 8\), got \(2, 5, 2, 4": {"k_cache": torch.zeros(2, 5, 2, 4)},
    r"k_cache must be torch.float32, got torch.float16": {"k_cache": torch.zeros(CACHE).half()},
    r"k_cache must have last stride 1": {"k_cache": torch.zeros(2, 5, 2, 16)[..., ::2]},
    r"v_cache must be \(2, 5, 2, 8\), got \(2, 6": {"v_cache": torch.zeros(2, 6, 2, 8)},
    r"v_cache must be on cpu, got meta": {"v_cache": torch.zeros(CACHE, device="meta")},
    r"v_cache must have last stride 1": {"v_cache": torch.zeros(2, 5, 2, 16)[..., ::2]},
    r"kv_len must be \(2,\), got \(3,\)": {"kv_len": torch.ones(3).long()},
    r"kv_len must be torch.int64, got torch.int32": {"kv_len": torch.ones(2).int()},
    r"kv_len must have last stride 1": {"kv_len": torch.ones(4).long()[::2]},
    r"out must be \(2, 1, 4, 8\), got \(2, 2": {"out": torch.zeros(2, 2, 4, 8)},
    r"out must be torch.float32, got torch.float16": {"out": torch.zeros(OUT).half()},
    r"out must have last stride 1": {"out": torch.zeros(2, 1, 4, 16)[..., ::2]},
    r"out must have no zero stride": {"out": torch.zeros(8).expand(OUT)},
    r"workspace must be \(8, 1, 10\), got \(80,\)": {"workspace": torch.zeros(80)},
    r"workspace must be \(8, 2, 10\), got \(9, 2": {"workspace": torch.zeros(9, 2, 10)},
    r"workspace must be \(8, 1, 10\), got \(8, 0": {"workspace": torch.zeros(8, 0, 10)},
    r"workspace must be torch.float32": {"workspace": torch.zeros(8, 1, 10).half()},
    r"workspace must be on cpu, got meta": {"workspace": torch.zeros(8, 1, 10, device="meta")},
    r"workspace must be contiguous, got strides \(40,": {
        "workspace": torch.zeros(8, 4, 10)[:, ::2]
    },
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_refuses(sentence):
    given = arguments(**BROKEN[sentence])
    before = given["out"].clone()
    with pytest.raises(ValueError, match=f"^decode_attention: {sentence}"):
        decode_attention(**given)
    assert_same_bits(given["out"], before)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_refuses_grad(name):
    given = arguments()
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match="^decode_attention: is inference only"):
        decode_attention(**given)
    with torch.no_grad():
        decode_attention(**given)


def test_workspace_depends_on_shapes_alone():
    def splits(S):
        caches = torch.empty(2, S, 4, 64, device="meta")
        workspace = decode_attention_workspace(torch.empty(2, 3, 8, 64, device="meta"), caches)
        assert workspace.dtype == torch.float32 and workspace.shape[::2] == (48, 66)
        return workspace.size(1)

    assert [splits(S) for S in (0, 1, 128, 129, 8192, 10**6)] == [1, 1, 1, 2, 64, 64]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_and_length(data):
    B, T, Hkv, group, E, S = (
        data.draw(st.integers(low, high), label=name)
        for name, low, high in [
            ("B", 1, 3),
            ("T", 1, 4),
            ("Hkv", 1, 3),
            ("group", 1, 9),
            ("E", 1, 70),
            ("S", 0, 300),
        ]
    )
    kv_len = torch.tensor(data.draw(st.lists(st.integers(0, S), min_size=B, max_size=B)))
    dtype = data.draw(st.sampled_from(list(FLOORS)))
    inputs = make_inputs(
        (B, T, S, Hkv * group, Hkv, E), dtype, "cpu", data.draw(st.integers(0, 99))
    )
    check(*inputs, kv_len)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_op", _decode_attention_torch)
        check(*inputs, kv_len)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    shape = (3, 2, 140, 4, 2, 8)
    q, k, v = make_inputs(shape, torch.float32, device)
    op = torch.ops.lego_kernels.decode_attention.default
    for workspace in (None, decode_attention_workspace(q, k).zero_()):
        given = (q, k, v, make_lengths(shape, device), 0.3, torch.empty_like(q), workspace)
        torch.library.opcheck(op, given)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device):
    shape = (2, 1, 9, 4, 2, 8)
    (q, k, v), kv_len = make_inputs(shape, torch.float32, device), make_lengths(shape, device)

    @torch.compile(fullgraph=True)
    def step(q, k, v, kv_len):
        return decode_attention(q * 2, k, v, kv_len, scale=0.3) + 1

    expected = reference(q * 2, k, v, kv_len, scale=0.3) + 1
    torch.testing.assert_close(step(q, k, v, kv_len), expected)


@pytest.mark.gpu
def test_cuda_graph_capture():
    shape = (2, 1, 300, 8, 2, 64)
    (q, k, v), kv_len = make_inputs(shape, torch.bfloat16, "cuda"), make_lengths(shape, "cuda")
    out, workspace = torch.empty_like(q), decode_attention_workspace(q, k)
    given = {"scale": 0.1, "out": out, "workspace": workspace}
    decode_attention(q, k, v, kv_len, **given)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention(q, k, v, kv_len, **given)
    kv_len -= 1
    kv_len.clamp_(min=0)
    graph.replay()
    expected = reference(q, k, v, kv_len, scale=0.1)
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
