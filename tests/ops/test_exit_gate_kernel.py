"""The kernels of exit_gate against lego.ops.exit_gate."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lego.ops.exit_gate import exit_gate as reference
from lego_kernels.library import backend_of
from lego_kernels.ops.exit_gate import exit_gate
from tests.oracle import DEVICES, FLOORS, assert_error_bounded, assert_same_bits, random
from tests.triton_compile import ARCHITECTURES, Spec, compile_specs

pytestmark = [
    pytest.mark.threads,
    # NumPy, on which Triton's interpreter runs, warns of what is tested here
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

OP = "exit_gate"
NAN, INF = math.nan, math.inf
DTYPES = pytest.mark.parametrize("dtype", FLOORS, ids=str)
NORM = pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
# smallest, odd, one over a vector, the seed's, GPT-2's, one over four vectors and over a block
SHAPES = [(1, 1), (3, 7), (2, 17), (8, 64), (4, 768), (2, 1089)]


def make(B, D, dtype, device, *, norm=True, seed=0):
    """(h, gate_weight, gate_bias, norm_weight) with scores all over [0, 1]."""
    weight = (2 * D**-0.5 * random((D,), torch.float64, device, seed=seed + 1)).to(dtype)
    bias = random((1,), dtype, device, seed=seed + 2)
    norm_weight = random((D,), dtype, device, seed=seed + 3) if norm else None
    return 3 * random((B, D), dtype, device, seed=seed), weight, bias, norm_weight


def outputs(B, device):
    return torch.full((B,), NAN, device=device), torch.ones(B, dtype=torch.bool, device=device)


def check(h, weight, bias, norm_weight, threshold=0.5, eps=1e-5) -> None:
    """One call, with `out` and without: scores within eager's error, decisions that fit them."""
    eager, _ = reference(h, weight, bias, threshold=threshold, norm_weight_D=norm_weight, eps=eps)
    wide = [None if x is None else x.double() for x in (h, weight, bias, norm_weight)]
    exact, _ = reference(*wide[:3], threshold=0.5, norm_weight_D=wide[3], eps=eps)
    for out in (None, outputs(h.size(0), h.device)):
        got = exit_gate(
            h, weight, bias, threshold=threshold, norm_weight=norm_weight, eps=eps, out=out
        )
        assert out is None or all(x is y for x, y in zip(got, out, strict=True))
        score, exits = got
        assert score.dtype == torch.float32 and exits.dtype == torch.bool
        assert_error_bounded(score, eager, exact, floor=FLOORS[torch.float32])
        assert torch.equal(exits, score >= torch.as_tensor(threshold, dtype=torch.float32))


@DTYPES
@NORM
@pytest.mark.parametrize(("B", "D"), SHAPES)
def test_matches_reference(B, D, norm, dtype, device):
    check(*make(B, D, dtype, device, norm=norm))


@DTYPES
@NORM
def test_strided_rows(norm, dtype, device):
    h, *rest = make(12, 65, dtype, device, norm=norm)
    check(h.view(4, 3, 65)[:, -1], *rest)
    weight, bias, norm_weight = rest
    check(h[:, 1:], weight[1:], bias, norm_weight if norm_weight is None else norm_weight[1:])
    check(h[:1].expand(5, 65), *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_form_of_bias(dtype, device):
    h, weight, _, norm_weight = make(3, 40, dtype, device)
    value = torch.tensor([9.0, 0.37, 9.0], device=device)
    expected, _ = exit_gate(h, weight, value.to(dtype)[1:2], threshold=0.5)
    for bias in (value.to(dtype)[1], value.to(dtype)[1:2:3], value.to(dtype).float()[1]):
        assert_same_bits(exit_gate(h, weight, bias, threshold=0.5)[0], expected)
        check(h, weight, bias, norm_weight)


def test_every_form_of_threshold(device):
    h, weight, bias, _ = make(6, 40, torch.float32, device)
    score, _ = exit_gate(h, weight, bias, threshold=0.5)
    middle = score.median()
    for threshold in (middle.item(), middle, middle.expand(6).clone()):
        exits = exit_gate(h, weight, bias, threshold=threshold)[1]
        assert torch.equal(exits, score >= middle)
    each = torch.tensor([0.0, 2.0, 0.0, -INF, INF, 1.5], device=device)
    assert exit_gate(h, weight, bias, threshold=each)[1].tolist() == [
        wanted <= 0 for wanted in each.tolist()
    ]
    for threshold, exits in ((-INF, True), (-1e300, True), (0, True), (1e300, False), (INF, False)):
        assert exit_gate(h, weight, bias, threshold=threshold)[1].tolist() == [exits] * 6


def test_a_score_at_the_threshold_exits(device):
    h, weight, bias, _ = make(8, 24, torch.float32, device)
    score, _ = exit_gate(h, weight, bias, threshold=0.5)
    above = torch.nextafter(score, torch.ones_like(score))
    assert exit_gate(h, weight, bias, threshold=score)[1].all()
    assert not exit_gate(h, weight, bias, threshold=above)[1].any()


@NORM
def test_values_that_are_not_finite(norm, device):
    h, weight, bias, norm_weight = make(6, 40, torch.float32, device, norm=norm)
    clean = exit_gate(h, weight, bias, threshold=-INF, norm_weight=norm_weight)[0]
    h[1, 39], h[3, 0] = NAN, INF
    # a square beyond float32: the norm takes the row to 0, as eager's does
    h[4] = 1e38
    weight[0] = 1.0
    eager = reference(h, weight, bias, threshold=-INF, norm_weight_D=norm_weight)[0]
    weight[0] = make(1, 40, torch.float32, device)[1][0]
    score, exits = exit_gate(h, weight, bias, threshold=-INF, norm_weight=norm_weight)
    assert_same_bits(score[::5], clean[::5])
    assert_same_bits(score[2], clean[2])
    assert torch.equal(score.isnan(), eager.isnan())
    assert torch.equal(exits, ~score.isnan())
    assert score[1].isnan() and score[3].isnan() == norm and not score[4].isnan()


def test_scores_of_zero_and_one(device):
    h = torch.tensor([[-1e4], [-1e30], [-INF], [1e4], [1e30], [INF], [0.0]], device=device)
    one, zero = torch.ones(1, device=device), torch.zeros(1, device=device)
    score, _ = exit_gate(h, one, zero, threshold=0.5)
    assert score.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5]


@NORM
@DTYPES
def test_a_row_does_not_depend_on_the_others(norm, dtype, provider, device):
    if provider == "torch":
        pytest.skip(
            "torch's sigmoid rounds whole vectors of rows and what is left over differently"
        )
    h, weight, bias, norm_weight = make(33, 1089, dtype, device, norm=norm)
    every, _ = exit_gate(h, weight, bias, threshold=0.5, norm_weight=norm_weight)
    for first, last in ((0, 1), (32, 33), (3, 5), (7, 23)):
        some, _ = exit_gate(h[first:last], weight, bias, threshold=0.5, norm_weight=norm_weight)
        assert_same_bits(some, every[first:last])


def test_no_rows(provider, device, monkeypatch):
    if provider == "triton":  # a launch would fail
        monkeypatch.setattr("lego_kernels.triton.exit_gate._exit_gate_kernel", None)
    h, weight, bias, norm_weight = make(0, 8, torch.float32, device)
    for threshold in (0.5, torch.tensor(0.5, device=device), torch.zeros(0, device=device)):
        score, exits = exit_gate(h, weight, bias, threshold=threshold, norm_weight=norm_weight)
        assert score.shape == exits.shape == (0,)


def test_offsets_beyond_int32(device):
    # 4 GiB that are reserved, but of which only the pages touched here are ever used
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    h = far.as_strided((3, 64), (2**30, 1))
    rows, weight, bias, _ = make(3, 64, torch.float16, device)
    h.copy_(rows)
    assert_same_bits(
        exit_gate(h, weight, bias, threshold=0.5)[0],
        exit_gate(rows, weight, bias, threshold=0.5)[0],
    )


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_shape_and_threshold(device, data):
    B, D = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 140))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    norm, seed = data.draw(st.booleans()), data.draw(st.integers(0, 99))
    arguments = make(B, D, dtype, device, norm=norm, seed=seed)
    check(*arguments, data.draw(st.floats(-0.5, 1.5)), data.draw(st.floats(1e-6, 1)))


@pytest.mark.skipif(backend_of(OP, "cpu") == "reference", reason="needs the CPU kernels")
def test_threads_agree():
    h, weight, bias, norm_weight = make(67, 2048, torch.bfloat16, "cpu")
    score, _ = exit_gate(h, weight, bias, threshold=0.5, norm_weight=norm_weight)
    for row, value in zip(h, score, strict=True):
        alone, _ = exit_gate(row[None], weight, bias, threshold=0.5, norm_weight=norm_weight)
        assert_same_bits(alone[0], value)


def test_threshold_that_is_not_a_number(provider, device):
    h, weight, bias, _ = make(2, 8, torch.float32, device)
    threshold, out = torch.tensor([0.0, NAN], device=device), outputs(2, device)
    if provider in ("triton", "cuda"):  # a GPU does not report it: that row stays
        assert exit_gate(h, weight, bias, threshold=threshold)[1].tolist() == [True, False]
        return
    with pytest.raises(ValueError, match="^exit_gate: threshold must not be NaN, got nan$"):
        exit_gate(h, weight, bias, threshold=threshold, out=out)
    assert out[0].isnan().all() and out[1].all()


W, ONES = torch.ones(8), torch.ones(2)


def test_thresholds_of_any_stride(device):
    h, weight = random((4, 9), torch.float32, device), random((9,), torch.float32, device, seed=1)
    bias = torch.zeros(1, device=device)
    score = exit_gate(h, weight, bias, threshold=0.5)[0]
    each = torch.stack((score, score + 1), dim=1)
    for threshold, exits in (
        (each[:, 0], True),
        (each[:, 1], False),
        (score.min().expand(4), True),
    ):
        assert exit_gate(h, weight, bias, threshold=threshold)[1].tolist() == [exits] * 4


BROKEN = {
    r"h must be \[B, D\] with D >= 1, got \(8,\)": dict(h=W),
    r"h must be \[B, D\] with D >= 1, got \(2, 0\)": dict(h=torch.ones(2, 0)),
    r"h must be float32, bfloat16 or float16, got torch.float64": dict(h=torch.ones(2, 8).double()),
    r"h must have last stride 1, got \(1, 2\)": dict(h=torch.ones(8, 2).T),
    r"gate_weight must be \(8,\), got \(7,\)": dict(gate_weight=torch.ones(7)),
    r"gate_weight must be torch.float32, got torch.float16": dict(gate_weight=W.half()),
    r"gate_weight must have last stride 1, got \(2,\)": dict(gate_weight=torch.ones(16)[::2]),
    r"norm_weight must be \(8,\), got \(1, 8\)": dict(norm_weight=W[None]),
    r"norm_weight must be torch.float32, got torch.bfloat16": dict(norm_weight=W.bfloat16()),
    r"gate_bias must be \[\] or \[1\], got \(2,\)": dict(gate_bias=ONES),
    r"gate_bias must be torch.float32, got torch.int64": dict(gate_bias=torch.tensor(1)),
    r"gate_bias must be on cpu, got meta": dict(gate_bias=torch.ones(1, device="meta")),
    r"threshold must not be NaN, got nan": dict(threshold=NAN),
    r"threshold must be a number or \(2,\), got \(1,\)": dict(threshold=torch.ones(1)),
    r"threshold must be torch.float32 on cpu, got torch.float64 on cpu": dict(
        threshold=ONES.double()
    ),
    r"threshold must be torch.float32 on cpu, got .* on meta": dict(
        threshold=torch.ones(2, device="meta")
    ),
    r"eps must be >= 0, got -1.0": dict(eps=-1.0),
    r"eps must be >= 0, got nan": dict(eps=NAN),
    r"score must be \(2,\), got \(1,\)": dict(out=(torch.ones(1), ONES.bool())),
    r"score must be torch.float32, got torch.float16": dict(out=(ONES.half(), ONES.bool())),
    r"exit must be \(2,\), got \(3,\)": dict(out=(ONES, torch.ones(3, dtype=torch.bool))),
    r"exit must be torch.bool, got torch.float32": dict(out=(ONES, ONES)),
    r"exit must have last stride 1, got \(0,\)": dict(out=(ONES, ONES.bool()[:1].expand(2))),
}


def valid():
    return dict(
        h=torch.zeros(2, 8), gate_weight=W, gate_bias=torch.zeros(1), threshold=0.5, norm_weight=W
    )


@pytest.mark.parametrize("sentence", BROKEN)
def test_refuses(sentence):
    given = valid() | dict(out=(torch.ones(2), ONES.bool())) | BROKEN[sentence]
    with pytest.raises(ValueError, match=f"^exit_gate: {sentence}$"):
        exit_gate(**given)
    assert all(x.all() for x in given["out"])


@pytest.mark.parametrize("name", ["h", "gate_weight", "gate_bias", "norm_weight"])
def test_is_inference_only(name):
    given = valid()
    given[name] = given[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="^exit_gate: is inference only"):
        exit_gate(**given)
    with torch.no_grad():
        exit_gate(**given)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    h, weight, bias, norm_weight = make(4, 8, torch.float32, device)
    for threshold in (torch.tensor(0.5, device=device), torch.rand(4, device=device)):
        for norm in (None, norm_weight):
            torch.library.opcheck(
                torch.ops.lego_kernels.exit_gate.default,
                (h, weight, bias, threshold, norm, 1e-5, *outputs(4, device)),
                test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
            )


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device):
    @torch.compile(fullgraph=True)
    def step(x, threshold):
        score, exits = exit_gate(
            x[:, -1] + 1, weight, bias, threshold=threshold, norm_weight=norm_weight
        )
        return score * 2, ~exits, exit_gate(x[:, 0], weight, bias, threshold=0.5)[1]

    h, weight, bias, norm_weight = make(6, 8, torch.float32, device)
    x, threshold = h.view(2, 3, 8), torch.tensor([0.2, 0.8], device=device)
    score, exits = exit_gate(
        x[:, -1] + 1, weight, bias, threshold=threshold, norm_weight=norm_weight
    )
    got = step(x, threshold)
    assert_same_bits(got[0], score * 2)
    assert torch.equal(got[1], ~exits)
    assert torch.equal(got[2], exit_gate(x[:, 0], weight, bias, threshold=0.5)[1])


def test_compiles_for_gpus():
    pointers = ("h_ptr", "gate_weight_ptr", "gate_bias_ptr", "norm_weight_ptr")
    signature = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(("D", "h_stride"), "i32")
    signature |= {"threshold_ptr": "*fp32", "score_ptr": "*fp32", "exit_ptr": "*i1"}
    signature |= {"eps": "fp32", "threshold_stride": "i32"}
    specs = [
        Spec(
            kernel="lego_kernels.triton.exit_gate:_exit_gate_kernel",
            signature=signature,
            constexprs={"HAS_NORM": has_norm, "BLOCK_D": 2048},
            divisible=("D", "h_stride"),
            arch=arch,
        )
        for arch in ARCHITECTURES
        for has_norm in (False, True)
    ]
    for spec, compiled in zip(specs, compile_specs(specs), strict=True):
        assert compiled.stack_bytes == 0
        # 2,048 values of h, of the gate and perhaps of the norm, 8 a load, for 128 threads
        assert compiled.vector_loads == (6 if spec.constexprs["HAS_NORM"] else 4)
