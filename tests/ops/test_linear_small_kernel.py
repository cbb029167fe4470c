"""The kernels of linear_small against lego.ops.linear_small."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lego.ops.linear_small import linear_small as reference
from lego_kernels.library import CPU_ISAS
from lego_kernels.ops.linear_small import linear_small
from tests.oracle import DEVICES, FLOORS, assert_error_bounded, assert_same_bits, random

OP = "linear_small"
DTYPES = pytest.mark.parametrize("dtype", FLOORS, ids=str)
# B, N, D: smallest; odd; no D, whose sums are 0; one over a tile and over a vector; every number of
# rows at a time; rows of half a page, of which several are read at once
SHAPES = [(1, 1, 1), (3, 7, 5), (2, 5, 0), (2, 65, 33), (7, 19, 100), (16, 64, 64), (15, 21, 1091)]


def make(shape, dtype, device) -> tuple[Tensor, Tensor]:
    B, N, D = shape
    return random((B, D), dtype, device), random((N, D), dtype, device, seed=1)


def check(x: Tensor, w: Tensor, out: Tensor | None = None) -> None:
    got, exact = linear_small(x, w, out=out), reference(x.double(), w.double())
    assert out is None or got is out
    assert got.dtype == x.dtype
    largest = exact.abs().max().item() if exact.numel() else 0
    assert_error_bounded(got, reference(x, w), exact, floor=FLOORS[x.dtype] * largest)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    x, w = make(shape, dtype, device)
    check(x, w)
    check(x, w, out=torch.full((len(x), len(w)), float("nan"), dtype=dtype, device=device))


@DTYPES
def test_strided_views(dtype, device):
    packed = random((4, 3, 3 * 40), dtype, device)  # x[:, -1] of a packed projection
    x, w = packed[:, -1, 40:77], random((70, 50), dtype, device, seed=1)[::2, 9:46]
    whole = torch.full((4, 90), float("nan"), dtype=dtype, device=device)
    check(x, w, out=whole[:, 3:38])
    assert whole[:, :3].isnan().all() and whole[:, 38:].isnan().all()
    check(x[:1].expand(5, 37), w)
    # one value a row: the stride along it is free
    out = torch.full((4, 6), float("nan"), dtype=dtype, device=device)
    check(packed[:, 0, ::60][:, :1], w[:, ::20][:, :1])
    check(x, w[:1], out=out[:, ::6])
    assert out[:, 1:].isnan().all()


@DTYPES
def test_unaligned_pointers(dtype, device):
    flat = random((3 * 64 + 1,), dtype, device)[1:].view(3, 64)
    check(flat[:1], flat, out=torch.empty(4, dtype=dtype, device=device)[1:].view(1, 3))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (0, 0, 0)], ids=str)
def test_nothing_to_write(shape, device):
    x, w = make(shape, torch.bfloat16, device)
    out = torch.empty(shape[:2], dtype=torch.bfloat16, device=device)
    assert linear_small(x, w).shape == shape[:2]
    assert linear_small(x, w, out=out) is out


@DTYPES
def test_nan_and_infinity_stay_in_their_row_and_column(dtype, device):
    x, w = make((6, 20, 40), dtype, device)
    expected = reference(x, w)
    x[2, 39], w[17, 3], w[5, 0] = float("nan"), float("nan"), float("inf")
    got = linear_small(x, w)
    expected[2], expected[:, 17] = float("nan"), float("nan")
    expected[:, 5] = torch.where(x[:, 0] > 0, float("inf"), float("-inf"))
    expected[2, 5] = float("nan")
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("D", [1, 64, 1100], ids=str)
def test_a_row_is_the_same_in_every_batch(D, dtype, provider):
    if provider not in CPU_ISAS:
        pytest.skip("torch.mm promises no such thing")
    x, w = make((16, 85, D), dtype, "cpu")
    alone = torch.cat([linear_small(x[b : b + 1], w) for b in range(16)])
    one_w = torch.cat([linear_small(x[:1], w[n : n + 1]) for n in range(85)], dim=1)
    assert_same_bits(alone[:1], one_w)
    for B in range(1, 17):
        assert_same_bits(linear_small(x[:B], w), alone[:B])


def test_offsets_beyond_int32(device):
    # 4 GiB that are reserved, but of which only the pages touched here are ever used
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    far = memory.as_strided((3, 32), (2**30, 1))
    far.copy_(random((3, 32), torch.float16, device))
    check(far, far)
    out = memory.as_strided((3, 3), (2**30, 1), 32)
    check(far.clone(), far, out=out)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_shape_and_stride(provider, device, data):
    B, N, D = (data.draw(st.integers(0, most)) for most in (16, 140, 150))
    dtype = data.draw(st.sampled_from(list(FLOORS)))
    offset, pad = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 9))
    x, w = make((B, N, D + offset + pad), dtype, device)
    columns = slice(offset, offset + D)
    out = torch.full((B, N + pad), float("nan"), dtype=dtype, device=device)
    check(x[:, columns], w[:, columns], out=out[:, :N])
    assert out[:, N:].isnan().all()


def zeros(*shape, **options) -> Tensor:
    return torch.zeros(shape, **options)


BROKEN = {
    r"x and w must have 2 dimensions, got \(3,\), \(4, 3\)": (zeros(3), zeros(4, 3), None),
    r"x and w must have 2 dimensions, got \(2, 3\), \(3,\)": (zeros(2, 3), zeros(3), None),
    r"x must have at most 16 rows, got 17": (zeros(17, 3), zeros(4, 3), None),
    r"x must be float32, bfloat16 or float16, got torch.float64": (
        *(zeros(2, 3).double(), zeros(4, 3).double()),
        None,
    ),
    r"w must be \(4, 3\), got \(4, 2\)": (zeros(2, 3), zeros(4, 2), None),
    r"w must be torch.float32, got torch.float16": (zeros(2, 3), zeros(4, 3).half(), None),
    r"w must be on cpu, got meta": (zeros(2, 3), zeros(4, 3, device="meta"), None),
    r"x must have last stride 1, got \(6, 2\)": (zeros(2, 6)[:, ::2], zeros(4, 3), None),
    r"w must have last stride 1, got \(1, 4\)": (zeros(2, 3), zeros(3, 4).t(), None),
    r"out must be \(2, 4\), got \(2, 5\)": (zeros(2, 3), zeros(4, 3), zeros(2, 5)),
    r"out must be torch.float32, got torch.bfloat16": (
        *(zeros(2, 3), zeros(4, 3)),
        zeros(2, 4).bfloat16(),
    ),
    r"out must have last stride 1, got \(1, 2\)": (zeros(2, 3), zeros(4, 3), zeros(4, 2).t()),
    r"out must have no zero stride, got \(0, 1\)": (
        *(zeros(2, 3), zeros(4, 3)),
        zeros(1, 4).expand(2, 4),
    ),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_refuses(sentence):
    x, w, out = BROKEN[sentence]
    with pytest.raises(ValueError, match=f"^linear_small: {sentence}"):
        linear_small(x, w, out=out)
    assert out is None or not out.any()


def test_inference_only():
    x, w = zeros(2, 3), zeros(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="^linear_small: is inference only"):
        linear_small(x, w)
    with torch.no_grad():
        linear_small(x, w)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, w = make((3, 9, 20), torch.float32, device)
    arguments = (x, w, torch.zeros(3, 12, device=device)[:, :9])
    torch.library.opcheck(torch.ops.lego_kernels.linear_small.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device):
    x, w = make((3, 9, 20), torch.float32, device)
    step = torch.compile(lambda x, w: linear_small(x + 1, w) * 2, fullgraph=True)
    torch.testing.assert_close(step(x, w), reference(x + 1, w) * 2)
