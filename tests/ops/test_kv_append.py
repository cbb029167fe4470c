"""kv_append, compiled and plain torch, against the reference in lego.ops: byte for byte."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lego.ops.kv_append import kv_append as reference
from lego_kernels.ops.kv_append import _kv_append_torch, kv_append
from tests.oracle import DEVICES, NEEDS_NVCC, assert_same_bits, random, run_on_host

pytestmark = pytest.mark.threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPS = pytest.mark.parametrize("op", [kv_append, _kv_append_torch], ids=["dispatched", "torch"])
ALL = pytest.mark.parametrize("op", [reference, kv_append], ids=["reference", "dispatched"])

# B, T, S, H, D: smallest, odd, head bytes with every alignment from 2 to 16, prefill, many heads
SHAPES = [(1, 1, 1, 1, 1), (3, 2, 5, 3, 7), (2, 1, 9, 2, 6), (2, 5, 64, 4, 20), (4, 33, 40, 9, 64)]


def make_caches(shape, dtype, device, layout="dense") -> tuple[Tensor, Tensor]:
    B, _, S, H, D = shape
    if layout == "heads_first":
        k_cache, v_cache = random((2, B, H, S, D), dtype, device).transpose(2, 3)
    elif layout == "interleaved":
        k_cache, v_cache = random((B, S, 2, H, D), dtype, device).unbind(2)
    else:
        k_cache, v_cache = random((2, B, S, H, D), dtype, device)
    return k_cache, v_cache


def make_kv(shape, dtype, device, layout="dense") -> tuple[Tensor, Tensor]:
    B, T, _, H, D = shape
    if layout == "packed":  # split from [B, T, (Hq + 2 * Hkv) * D], as a QKV projection leaves it
        qkv = random((B, T, (2 * H + 2 * H) * D), dtype, device, seed=1)
        k, v = qkv.view(B, T, 4 * H, D).split([2 * H, H, H], dim=2)[1:]
    elif layout == "last_tokens":  # the end of a longer sequence
        k, v = random((2, B, T + 3, H, D), dtype, device, seed=1)[:, :, -T:]
    elif layout == "heads_first":
        k, v = random((2, B, H, T, D), dtype, device, seed=1).transpose(2, 3)
    else:
        k, v = random((2, B, T, H, D), dtype, device, seed=1)
    return k, v


def make_position(shape, device) -> Tensor:
    """First slot, last slot, skipped, and in between, in turn."""
    B, T, S = shape[:3]
    return torch.tensor([(0, S - T, -1, (S - T) // 2)[b % 4] for b in range(B)], device=device)


def copies(caches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return caches[0].clone(), caches[1].clone()


def assert_same_caches(got, expected) -> None:
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@OPS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device, op):
    caches, (k, v) = make_caches(shape, dtype, device), make_kv(shape, dtype, device)
    k[0, 0, 0, 0], v[-1, -1, -1, -1] = float("nan"), -0.0
    expected, position = copies(caches), make_position(shape, device)
    reference(*expected, k, v, position)
    op(*caches, k, v, position)
    assert_same_caches(caches, expected)


@OPS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_layout", ["packed", "last_tokens", "heads_first"])
@pytest.mark.parametrize("cache_layout", ["dense", "heads_first", "interleaved"])
def test_strided_views(cache_layout, kv_layout, device, op):
    for shape in SHAPES:
        caches = make_caches(shape, torch.bfloat16, device, cache_layout)
        k, v = make_kv(shape, torch.bfloat16, device, kv_layout)
        expected, position = copies(caches), make_position(shape, device)
        reference(*expected, k, v, position)
        op(*caches, k, v, position)
        assert_same_caches(caches, expected)


@OPS
@pytest.mark.parametrize("device", DEVICES)
def test_unaligned_pointers_and_strided_positions(device, op):
    shape = B, T, S, H, D = 3, 2, 6, 2, 16
    flat = random((2, B * S * H * D + 1), torch.float16, device)
    caches = tuple(flat[:, 1:].unflatten(1, (B, S, H, D)))  # two bytes off any wider boundary
    k, v = make_kv(shape, torch.float16, device)
    position = torch.tensor([4, 99, -7, 99, 1, 99], device=device)[::2]
    expected = copies(caches)
    reference(*expected, k, v, position)
    op(*caches, k, v, position)
    assert_same_caches(caches, expected)


@OPS
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 1, 4, 2, 8), (2, 0, 4, 2, 8), (2, 0, 0, 2, 8)], ids=str)
def test_nothing_to_write(shape, device, op):
    caches = make_caches(shape, torch.float32, device)
    expected, position = copies(caches), torch.zeros(shape[0], dtype=torch.int64, device=device)
    op(*caches, *make_kv(shape, torch.float32, device), position)
    reference(*caches, *make_kv(shape, torch.float32, device), position)
    assert_same_caches(caches, expected)


@pytest.mark.parametrize("op", [reference, kv_append, _kv_append_torch])
@pytest.mark.parametrize("bad", [3, 2**62, 2**63 - 1])
def test_bad_position_leaves_the_caches_alone(bad, op):
    shape = (3, 2, 4, 2, 8)
    caches, (k, v) = make_caches(shape, torch.float32, "cpu"), make_kv(shape, torch.float32, "cpu")
    expected = copies(caches)
    with pytest.raises(ValueError) as caught:
        op(*caches, k, v, torch.tensor([0, bad, 1]))
    sentence = f"kv_append: position must be at most S - T = 2, got {bad} in row 1"
    assert str(caught.value) == sentence
    assert_same_caches(caches, expected)


@pytest.mark.gpu
def test_bad_position_on_the_device_writes_nothing():
    shape = (3, 2, 4, 2, 8)
    caches = make_caches(shape, torch.float32, "cuda")
    k, v = make_kv(shape, torch.float32, "cuda")
    expected = copies(caches)
    reference(*expected, k, v, torch.tensor([0, -1, 1], device="cuda"))
    kv_append(*caches, k, v, torch.tensor([0, 3, 1], device="cuda"))
    assert_same_caches(caches, expected)


@pytest.mark.gpu
def test_cuda_graph_capture():
    shape = (2, 1, 8, 2, 64)
    caches = make_caches(shape, torch.bfloat16, "cuda")
    k, v = make_kv(shape, torch.bfloat16, "cuda")
    expected, position = copies(caches), torch.tensor([0, 3], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kv_append(*caches, k, v, position)
    position += 2
    graph.replay()
    reference(*expected, k, v, position)
    assert_same_caches(caches, expected)


def broken(**changes):
    """Valid arguments, one of them replaced."""
    shape = (2, 1, 4, 2, 8)
    k_cache, v_cache = make_caches(shape, torch.float32, "cpu")
    k, v = make_kv(shape, torch.float32, "cpu")
    given = {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k,
        "v": v,
        "position": torch.zeros(2).long(),
    }
    return given | changes


BROKEN = {
    r"k must have 4 dimensions, got \(2, 1, 2\)": broken(k=torch.zeros(2, 1, 2)),
    r"k_cache must have 4 dimensions, got \(2, 4\)": broken(k_cache=torch.zeros(2, 4)),
    r"v must be \(2, 1, 2, 8\), got \(2, 1, 2, 4\)": broken(v=torch.zeros(2, 1, 2, 4)),
    r"k_cache must be \(2, 4, 2, 8\), got \(3, 4,": broken(k_cache=torch.zeros(3, 4, 2, 8)),
    r"v_cache must be \(2, 4, 2, 8\), got \(2, 5,": broken(v_cache=torch.zeros(2, 5, 2, 8)),
    r"position must be \(2,\), got \(3,\)": broken(position=torch.zeros(3).long()),
    r"position must be \(2,\), got \(\)": broken(position=torch.tensor(0)),
    r"position must be \(2,\), got \(2, 3\)": broken(position=torch.zeros(2, 3).long()),
    r"position must be torch.int64, got torch.int32": broken(position=torch.zeros(2).int()),
    r"v must be torch.float32, got torch.float16": broken(v=torch.zeros(2, 1, 2, 8).half()),
    r"k_cache must be on cpu.*, got meta": broken(k_cache=torch.zeros(2, 4, 2, 8, device="meta")),
    r"v_cache must have no zero stride": broken(v_cache=torch.zeros(4, 2, 8).expand(2, 4, 2, 8)),
    r"k must have at most S = 4 tokens, got 5": broken(
        k=torch.zeros(2, 5, 2, 8), v=torch.zeros(2, 5, 2, 8)
    ),
    r"k must have one of the dtypes .* got torch.int32": {
        name: x if name == "position" else x.int() for name, x in broken().items()
    },
}


@ALL
@pytest.mark.parametrize("sentence", BROKEN)
def test_refuses(sentence, op):
    arguments = BROKEN[sentence]
    before = {name: x.clone() for name, x in arguments.items()}
    with pytest.raises(ValueError, match=f"^kv_append: {sentence}"):
        op(*arguments.values())
    for name, x in arguments.items():
        assert x.is_meta or torch.equal(x, before[name])


def test_wrapper_limits():
    with pytest.raises(ValueError, match=r"k must have last stride 1, got \(32, 32, 16, 2\)"):
        kv_append(**broken(k=torch.zeros(2, 1, 2, 16)[..., ::2]))
    wants_grad = broken(k=torch.zeros(2, 1, 2, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match="^kv_append: is inference only"):
        kv_append(**wants_grad)
    with torch.no_grad():
        kv_append(**wants_grad)


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_int32(device):
    # 4 GiB that are reserved, but of which only the pages touched here are ever used
    B, S, H, D = 2, 2**23 + 3, 1, 64
    cache = torch.empty(B, S, 2, H, D, dtype=torch.float16, device=device)
    assert cache.numel() > 2**31
    k, v = make_kv((B, 2, S, H, D), torch.float16, device)
    position = torch.tensor([S - 2, S - 2], device=device)
    kv_append(cache[:, :, 0], cache[:, :, 1], k, v, position)
    assert_same_bits(cache[:, -2:, 0], k)
    assert_same_bits(cache[:, -2:, 1], v)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_layout_and_position(data):
    B, T, extra, H, D = (data.draw(st.integers(0, most), label=name) for name, most in SIZES)
    shape = (B, T, T + extra, H + 1, D + 1)
    position = torch.tensor(
        data.draw(st.lists(st.integers(-2, extra), min_size=B, max_size=B), label="position"),
        dtype=torch.int64,
    )
    dtype = data.draw(st.sampled_from(DTYPES))
    caches = make_caches(shape, dtype, "cpu", data.draw(st.sampled_from(["dense", "heads_first"])))
    k, v = make_kv(shape, dtype, "cpu", data.draw(st.sampled_from(["packed", "heads_first"])))
    expected, plain = copies(caches), copies(caches)
    reference(*expected, k, v, position)
    kv_append(*caches, k, v, position)
    _kv_append_torch(*plain, k, v, position)
    assert_same_caches(caches, expected)
    assert_same_caches(plain, expected)


SIZES = {"B": 4, "T": 4, "extra": 5, "H": 3, "D": 32}.items()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    shape = (3, 2, 5, 2, 8)
    arguments = (
        *make_caches(shape, torch.float32, device),
        *make_kv(shape, torch.float32, device, "packed"),
        make_position(shape, device),
    )
    torch.library.opcheck(torch.ops.lego_kernels.kv_append.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device):
    shape = (2, 1, 5, 2, 8)

    @torch.compile(fullgraph=True)
    def step(k_cache, v_cache, qkv, position):
        k, v = qkv.unflatten(2, (4, 8)).split(2, dim=2)
        kv_append(k_cache, v_cache, k + 1, v, position)
        return k_cache[:, 0] + 1

    caches, (k, v) = (
        make_caches(shape, torch.float32, device),
        make_kv(shape, torch.float32, device),
    )
    expected, position = copies(caches), make_position(shape, device)
    first_slot = step(*caches, torch.cat((k, v), dim=2).flatten(2), position)
    reference(*expected, k + 1, v, position)
    assert_same_caches(caches, expected)
    assert_same_bits(first_slot, expected[0][:, 0] + 1)


HELPERS = """
#include <cassert>
#include "kv_append.cuh"
int main() {
  assert(lego::kv_first_slot(0, 1, 1) == 0 && lego::kv_first_slot(6, 2, 8) == 6);
  assert(lego::kv_first_slot(7, 2, 8) < 0 && lego::kv_first_slot(-3, 2, 8) < 0);
  assert(lego::kv_first_slot(INT64_MAX, 2, 8) < 0 && lego::kv_first_slot(INT64_MIN, 2, 8) < 0);
  const auto width = [](int64_t address, int64_t stride, int64_t head_bytes) {
    const lego::KvHeads wide{nullptr, 64, 32, 16};
    const lego::KvHeads x{reinterpret_cast<char*>(address), 64, stride, 16};
    return lego::kv_word_bytes({wide, wide, wide, x, nullptr, 1, 1, 1, 1, 1, 0}, head_bytes);
  };
  assert(width(0, 32, 32) == 16 && width(256, 0, 128) == 16 && width(8, 32, 32) == 8);
  assert(width(0, 20, 32) == 4 && width(0, 32, 6) == 2 && width(2, 32, 32) == 2);
}
"""


@NEEDS_NVCC
def test_device_helpers_on_the_host(tmp_path):
    run_on_host(HELPERS, tmp_path)
