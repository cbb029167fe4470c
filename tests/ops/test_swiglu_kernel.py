"""The kernels of swiglu against lego.ops.swiglu."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lego.ops.swiglu import swiglu as reference
from lego_kernels.ops.swiglu import swiglu
from tests.oracle import DEVICES, FLOORS, assert_error_bounded, assert_same_bits, random
from tests.triton_compile import ARCHITECTURES, Spec, compile_specs

pytestmark = [
    pytest.mark.threads,
    # NumPy, on which Triton's interpreter runs, warns of what is tested here
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

OP = "swiglu"
NAN, INF = float("nan"), float("inf")
DTYPES = pytest.mark.parametrize("dtype", FLOORS, ids=str)
# smallest, odd, one over a vector, the seed's, four dimensions, one over a block
SHAPES = [(2,), (3, 14), (2, 34), (5, 512), (2, 3, 4, 30), (2, 2050)]


def check(gate_up) -> None:
    """One call, with `out` and without, within twice eager's error."""
    eager, exact = reference(gate_up), reference(gate_up.double())
    for out in (None, torch.full_like(eager, NAN)):
        got = swiglu(gate_up, out=out)
        assert out is None or got is out
        assert got.dtype == gate_up.dtype and got.is_contiguous()
        floor = FLOORS[gate_up.dtype] * exact.abs().max().item()
        assert_error_bounded(got, eager, exact, floor=floor)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, device):
    check(3 * random(shape, dtype, device))


@DTYPES
def test_is_rounded_once(dtype, device):
    gate_up = 3 * random((4, 512), dtype, device)
    exact = reference(gate_up.double())
    # the best that a result in this dtype can be, and what float32 before it errs
    rounded = exact.to(dtype)
    error = (swiglu(gate_up).double() - exact).abs()
    assert (error <= (rounded.double() - exact).abs() + 2**-20 * exact.abs() + 1e-30).all()


def views(dtype, device, width, fill=None):
    """A projection's slice, the last token, heads first, and a row off any boundary."""

    def buffer(shape, seed):
        if fill is None:
            return random(shape, dtype, device, seed=seed)
        return torch.full(shape, fill, dtype=dtype, device=device)

    return {
        "slice": buffer((2, 3, width + 6), 1)[..., 4 : width + 4],
        "last_token": buffer((2, 3, width), 2)[:, -1],
        "heads_first": buffer((2, 3, 4, width), 3).transpose(1, 2)[:, 1:3],
        "unaligned": buffer((2, width + 1), 4)[:, 1:],
    }


@DTYPES
@pytest.mark.parametrize("name", views(torch.float32, "cpu", 2))
def test_strided_views(name, dtype, device):
    gate_up = views(dtype, device, 36)[name]
    out = views(dtype, device, 18, fill=NAN)[name]
    before = gate_up.clone()
    assert swiglu(gate_up, out=out) is out
    exact = reference(gate_up.double())
    floor = FLOORS[dtype] * exact.abs().max().item()
    assert_error_bounded(out, reference(gate_up), exact, floor=floor)
    assert_same_bits(gate_up, before)
    assert out._base.isnan().sum() == out._base.numel() - out.numel()  # nothing written around it


def test_one_row_for_all(device):
    check(random((1, 24), torch.float32, device).expand(4, 24))


SPECIAL = (0.0, -0.0, 1.0, -1.0, -20.0, -88.0, -90.0, 90.0, 1e4, -1e4, INF, -INF, NAN)


@DTYPES
def test_extremes(dtype, device):
    pairs = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), dtype=dtype, device=device)
    gate_up = pairs.T.reshape(1, -1)  # all gates, then all ups
    gate, up = (x.double() for x in pairs.T)
    got, eager, exact = swiglu(gate_up)[0], reference(gate_up)[0], reference(gate_up.double())[0]
    if dtype == torch.float32:
        assert torch.equal(got.isnan(), eager.isnan())
    else:
        # eager rounds silu(gate) to 0 and then meets 0 * inf, where the exact result is inf
        assert not (got.isnan() & ~eager.isnan()).any()
    known = ~got.isnan() & ~exact.isnan()
    assert torch.equal(got[known].signbit(), exact[known].signbit())
    # exp(88.73) is infinite in float32: silu(-90) is -0, which is off by 1e-37
    tiny = known & (exact.abs() < 1e-30)
    assert (got[tiny].double().abs() < 1e-30).all()
    far = known & ~tiny & (up.abs() != INF)
    torch.testing.assert_close(got[far], exact[far].to(dtype), rtol=4 * FLOORS[dtype], atol=0)
    assert got[(gate == 1) & (up == INF)].item() == INF


def test_large_gates_are_never_not_a_number(device):
    gate = torch.linspace(-1e4, 1e4, 4001, device=device)
    got = swiglu(torch.stack((gate, torch.ones_like(gate))).view(1, -1))[0]
    expected = torch.where(gate > 0, gate, -0.0)
    far = gate.abs() > 90
    assert_same_bits(got[far], expected[far])
    assert got.isfinite().all()


def test_not_a_number_stays_in_its_place(device):
    gate_up = random((3, 38), torch.float32, device)
    clean = swiglu(gate_up)
    gate_up[0, 3], gate_up[1, 19 + 18] = NAN, NAN
    got = swiglu(gate_up)
    assert got.isnan().nonzero().tolist() == [[0, 3], [1, 18]]
    assert_same_bits(got[~got.isnan()], clean[~got.isnan()])


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8)], ids=str)
def test_nothing_to_compute(shape, provider, device, monkeypatch):
    if provider == "triton":  # a launch would fail
        monkeypatch.setattr("lego_kernels.triton.swiglu._swiglu_kernel", None)
    assert swiglu(torch.zeros(shape, device=device)).shape == (*shape[:-1], shape[-1] // 2)


def test_offsets_beyond_int32(device):
    # 4 GiB that are reserved, but of which only the pages touched here are ever used
    far = torch.empty(2**31 + 96, dtype=torch.float16, device=device)
    gate_up = far.as_strided((3, 64), (2**30, 1))
    gate_up.copy_(random((3, 64), torch.float16, device))
    out = far.as_strided((3, 32), (2**30, 1), 64)
    assert_same_bits(swiglu(gate_up, out=out), swiglu(gate_up.clone()))


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_shape_and_scale(device, data):
    shape = (*data.draw(st.lists(st.integers(1, 4), max_size=3)), 2 * data.draw(st.integers(1, 70)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    scale = data.draw(st.floats(1e-3, 100))
    check(scale * random(shape, dtype, device, seed=data.draw(st.integers(0, 99))))


def test_threads_agree():
    gate_up = random((67, 1024), torch.bfloat16, "cpu")
    assert_same_bits(swiglu(gate_up), torch.stack([swiglu(row) for row in gate_up]))


ZEROS = torch.zeros(2, 4)
BROKEN = {
    r"gate_up must be \[..., 2F\] of 1 to 4 dimensions, got \(\)": dict(gate_up=torch.tensor(1.0)),
    r"gate_up must be \[..., 2F\] .* got \(2, 7\)": dict(gate_up=torch.ones(2, 7)),
    r"gate_up must be .* got \(1, 1, 1, 2, 8\)": dict(gate_up=torch.ones(1, 1, 1, 2, 8)),
    r"gate_up must be float32, .* got torch.float64": dict(gate_up=torch.ones(2, 8).double()),
    r"gate_up must have last stride 1, got \(1, 2\)": dict(gate_up=torch.ones(8, 2).T),
    r"out must be \(2, 4\), got \(2, 8\)": dict(out=torch.zeros(2, 8)),
    r"out must be torch.float32, got torch.bfloat16": dict(out=ZEROS.bfloat16()),
    r"out must be on cpu, got meta": dict(out=torch.zeros(2, 4, device="meta")),
    r"out must have last stride 1, got \(1, 2\)": dict(out=torch.zeros(4, 2).T),
    r"out must have no zero stride": dict(out=ZEROS[:1].expand(2, 4)),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_refuses(sentence):
    given = dict(gate_up=torch.ones(2, 8), out=ZEROS) | BROKEN[sentence]
    with pytest.raises(ValueError, match=f"^swiglu: {sentence}"):
        swiglu(**given)
    assert given["out"].is_meta or not given["out"].any()


def test_is_inference_only():
    gate_up = torch.ones(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="^swiglu: is inference only"):
        swiglu(gate_up)
    with torch.no_grad():
        swiglu(gate_up)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    arguments = (torch.randn(2, 3, 8, device=device)[:, -1], torch.empty(2, 4, device=device))
    torch.library.opcheck(torch.ops.lego_kernels.swiglu.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device):
    @torch.compile(fullgraph=True)
    def step(x):
        return swiglu(x[:, -1] + 1) * 2

    x = random((2, 3, 8), torch.float32, device)
    assert_same_bits(step(x), swiglu(x[:, -1] + 1) * 2)


def test_compiles_for_gpus():
    strides = tuple(f"{x}_stride_{i}" for x in ("gate_up", "out") for i in range(3))
    integers = dict.fromkeys(("size_1", "size_2", "F", *strides), "i32")
    specs = [
        Spec(
            kernel="lego_kernels.triton.swiglu:_swiglu_kernel",
            signature={"gate_up_ptr": "*bf16", "out_ptr": "*bf16"} | integers,
            constexprs={"BLOCK_F": 1024},
            divisible=("F", *strides),
            arch=arch,
        )
        for arch in ARCHITECTURES
    ]
    for compiled in compile_specs(specs):
        assert compiled.stack_bytes == 0
        assert compiled.vector_loads == 2  # of gate and of up, 8 values for each of 128 threads
