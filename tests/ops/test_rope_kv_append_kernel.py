"""The kernels of rope_kv_append against lego.ops.rope_kv_append."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego_kernels.ops import rope_kv_append as module
from lego_kernels.ops.rope_kv_append import rope_kv_append
from tests.oracle import DEVICES, FLOORS, assert_same_bits
from tests.rope_kv_append_cases import (
    SHAPES,
    WRITTEN,
    Shape,
    check,
    expected,
    make,
    run_reference,
)

OP = "rope_kv_append"
DTYPES = pytest.mark.parametrize("dtype", FLOORS, ids=str)
NORMS = pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])


def assert_untouched(arguments, before) -> None:
    for name in WRITTEN:
        assert_same_bits(arguments[name], before[name])


@DTYPES
@NORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, norm, dtype, device):
    check(rope_kv_append, make(shape, dtype, device, norm=norm))


@DTYPES
@NORMS
@pytest.mark.parametrize("layout", ["strided", "unaligned"])
def test_views(layout, norm, dtype, device):
    for shape in SHAPES:
        check(rope_kv_append, make(shape, dtype, device, norm=norm, layout=layout))


def test_eps_counts(device):
    arguments = make(dtype=torch.float32, device=device, norm=True) | {"eps": 0.5}
    arguments["qkv"] *= 1e-3  # small beside eps
    check(rope_kv_append, arguments)


@NORMS
def test_nan_and_infinity_stay_in_their_head(norm, device):
    shape = Shape(1, 1, 1, 1, 3, 2, 20)
    arguments = make(shape, torch.bfloat16, device, norm=norm)
    heads = arguments["qkv"].view(7, 20)
    heads[1, 0], heads[3, 19], heads[6, 1], heads[6, 2] = (
        float(x) for x in ("nan", "inf", "nan", "-0")
    )
    true = expected(arguments)
    rope_kv_append(**arguments)
    for name in ("q_out", "k_cache"):
        assert torch.equal(arguments[name].isnan(), true[name].isnan())
        assert torch.equal(arguments[name].isinf(), true[name].isinf())
    assert not arguments["q_out"][0, 0, [0, 2]].isnan().any()
    assert_same_bits(arguments["v_cache"], true["v_cache"])


@pytest.mark.parametrize(
    "shape", [Shape(B=0), Shape(T=0), Shape(T=0, S=0, P=0), Shape(0, 0, 0, 0)], ids=str
)
def test_nothing_to_write(shape, device):
    arguments = make(shape, torch.float32, device)
    before = {name: arguments[name].clone() for name in WRITTEN}
    arguments["position"] *= 0
    arguments["slot"] *= 0
    rope_kv_append(**arguments)
    assert_untouched(arguments, before)


BAD_ROWS = [
    ("position", -1, r"position must be in \[0, P - T = 7\], got -1 in row 1"),
    ("position", 8, r"position must be in \[0, P - T = 7\], got 8 in row 1"),
    (
        "position",
        2**63 - 1,
        r"position must be in \[0, P - T = 7\], got 9223372036854775807 in row",
    ),
    (
        "position",
        -(2**63),
        r"position must be in \[0, P - T = 7\], got -9223372036854775808 in row",
    ),
    ("slot", 5, r"slot must be at most S - T = 4, got 5 in row 1"),
    ("slot", 2**63 - 1, r"slot must be at most S - T = 4, got 9223372036854775807 in row 1"),
]


@pytest.mark.parametrize(("name", "value", "sentence"), BAD_ROWS)
def test_row_out_of_range_writes_nothing(name, value, sentence, device):
    arguments = make(device=device)
    before = {written: arguments[written].clone() for written in WRITTEN}
    arguments["slot"][1] = 1
    good = expected(arguments)
    arguments[name][1] = value
    if device == "cpu":
        with pytest.raises(ValueError, match=f"^rope_kv_append: {sentence}"):
            rope_kv_append(**arguments)
        assert_untouched(arguments, before)
        return
    rope_kv_append(**arguments)  # the other rows are written, of this one nothing is
    for written in WRITTEN:
        assert_same_bits(arguments[written][1], before[written][1])
        torch.testing.assert_close(arguments[written][::2], good[written][::2])


@pytest.mark.parametrize("name", ["position", "slot"])
def test_lowest_and_highest_row(name, device):
    arguments = make(device=device)
    for first, last in ((0, 7), (-(2**63), 4)):
        if (first == 0) == (name == "position"):
            arguments[name][0], arguments[name][1] = first, last
    check(rope_kv_append, arguments)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_shape_layout_and_row(data):
    sizes = {"B": (0, 4), "T": (0, 4), "Hq": (1, 5), "Hkv": (1, 3)}
    B, T, Hq, Hkv = (data.draw(st.integers(*ends), label=name) for name, ends in sizes.items())
    S, P = (T + data.draw(st.integers(1, 4), label=name) for name in ("S - T", "P - T"))
    half = data.draw(st.integers(1, 36), label="E / 2")
    layout = data.draw(st.sampled_from(["dense", "strided", "unaligned"]))
    norm, dtype = data.draw(st.booleans()), data.draw(st.sampled_from(list(FLOORS)))
    arguments = make(Shape(B, T, S, P, Hq, Hkv, 2 * half), dtype, norm=norm, layout=layout)
    for name, first, last in (("position", 0, P - T), ("slot", -2, S - T)):
        rows = data.draw(st.lists(st.integers(first, last), min_size=B, max_size=B), label=name)
        arguments[name] = torch.tensor(rows, dtype=torch.int64)
    check(rope_kv_append, arguments)


def broken(**changes):
    return lambda: make() | {name: change() for name, change in changes.items()}


def zeros(*shape, **options):
    return lambda: torch.zeros(*shape, **options)


BROKEN = {
    r"q_out must have 4 dimensions, got \(2, 4\)": broken(q_out=zeros(2, 4)),
    r"k_cache must have 4 dimensions, got \(2, 4\)": broken(k_cache=zeros(2, 4)),
    r"cos must have 2 dimensions, got \(9,\)": broken(cos=zeros(9)),
    r"q_out must have heads, of an even width, got \(3, 2, 4, 7\)": broken(q_out=zeros(3, 2, 4, 7)),
    r"qkv must be \(3, 2, 32\), got \(3, 2, 64\)": broken(
        k_cache=zeros(3, 6, 0, 8), v_cache=zeros(3, 6, 0, 8)
    ),
    r"k_cache must be \(3, 6, 2, 8\), got \(4, 6, 2, 8\)": broken(k_cache=zeros(4, 6, 2, 8)),
    r"v_cache must be \(3, 6, 2, 8\), got \(3, 5, 2, 8\)": broken(v_cache=zeros(3, 5, 2, 8)),
    r"qkv must be \(3, 2, 64\), got \(3, 2, 72\)": broken(qkv=zeros(3, 2, 72)),
    r"qkv must be \(3, 2, 64\), got \(3, 128\)": broken(qkv=zeros(3, 128)),
    r"cos must be \(9, 4\), got \(9, 8\)": broken(cos=zeros(9, 8)),
    r"sin must be \(9, 4\), got \(8, 4\)": broken(sin=zeros(8, 4)),
    r"cos must be torch.float32, got torch.float16": broken(cos=zeros(9, 4, dtype=torch.float16)),
    r"position must be \(3,\), got \(4,\)": broken(position=zeros(4, dtype=torch.int64)),
    r"slot must be \(3,\), got \(\)": broken(slot=zeros((), dtype=torch.int64)),
    r"slot must be torch.int64, got torch.int32": broken(slot=zeros(3, dtype=torch.int32)),
    r"qkv must be torch.float32, got torch.float16": broken(qkv=zeros(3, 2, 64, dtype=torch.half)),
    r"v_cache must be on cpu, got meta": broken(v_cache=zeros(3, 6, 2, 8, device="meta")),
    r"slot must be on cpu, got meta": broken(slot=zeros(3, device="meta", dtype=torch.int64)),
    r"qkv must have last stride 1": broken(qkv=lambda: torch.zeros(3, 2, 128)[..., ::2]),
    r"cos must have last stride 1": broken(cos=lambda: torch.zeros(4, 9).t()),
    r"k_cache must have last stride 1": broken(k_cache=lambda: torch.zeros(3, 6, 2, 16)[..., ::2]),
    r"q_out must have no zero stride": broken(
        q_out=lambda: torch.zeros(2, 4, 8).expand(3, 2, 4, 8)
    ),
    r"v_cache must have no zero stride": broken(
        v_cache=lambda: torch.zeros(6, 2, 8).expand(3, 6, 2, 8)
    ),
    r"qkv must have at most P = 1 and S = 6 tokens, got 2": broken(
        cos=zeros(1, 4), sin=zeros(1, 4)
    ),
    r"qkv must have at most P = 9 and S = 1 tokens, got 2": broken(
        k_cache=zeros(3, 1, 2, 8), v_cache=zeros(3, 1, 2, 8)
    ),
    r"q_norm and k_norm must both be given or neither, got one": broken(q_norm=zeros(8)),
    r"q_norm must be \(8,\), got \(4,\)": broken(q_norm=zeros(4), k_norm=zeros(8)),
    r"k_norm must be torch.float32": broken(q_norm=zeros(8), k_norm=zeros(8, dtype=torch.half)),
    r"eps must be >= 0, got -1.0": broken(eps=lambda: -1.0),
    r"eps must be >= 0, got nan": broken(eps=lambda: float("nan")),
    r"q_out must be float32, bfloat16 or float16, got torch.float64": lambda: make(
        dtype=torch.float64
    ),
}


@pytest.mark.parametrize("op", [run_reference, rope_kv_append], ids=["reference", "wrapper"])
@pytest.mark.parametrize("sentence", BROKEN)
def test_refuses(sentence, op):
    if op is run_reference and ("last stride" in sentence or "float64" in sentence):
        pytest.skip("a limit of the wrapper alone")
    arguments = BROKEN[sentence]()
    before = {name: arguments[name].clone() for name in WRITTEN}
    with pytest.raises(ValueError, match=f"^rope_kv_append: {sentence}"):
        op(**arguments)
    for name in WRITTEN:
        assert arguments[name].is_meta or torch.equal(
            arguments[name].nan_to_num(7), before[name].nan_to_num(7)
        )


@pytest.mark.parametrize("layout", ["dense", "strided", "unaligned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quick_look_accepts_the_usual_and_the_full_one_agrees(shape, layout):
    tensors = make(shape, layout=layout).values()
    module._validate(*tensors)
    assert module._is_usual(*tensors)


@pytest.mark.parametrize("sentence", BROKEN)
def test_quick_look_accepts_nothing_that_is_refused(sentence):
    arguments = BROKEN[sentence]()
    if "norm" not in sentence and "eps" not in sentence:
        assert not module._is_usual(*list(arguments.values())[:8])


def test_refuses_grad():
    arguments = make(norm=True)
    for name in ("qkv", "k_norm"):
        wants = arguments | {name: arguments[name].clone().requires_grad_()}
        with pytest.raises(RuntimeError, match="^rope_kv_append: is inference only"):
            rope_kv_append(**wants)
        with torch.no_grad():
            rope_kv_append(**wants)


def test_offsets_beyond_int32(device):
    # 4 GiB that are reserved, but of which only the pages touched here are ever used
    shape = Shape(2, 2, 2**23 + 3, 4, 2, 1, 64)
    arguments = make(shape._replace(S=4), torch.float16, device)
    cache = torch.empty(2, shape.S, 2, 1, 64, dtype=torch.float16, device=device)
    assert cache.numel() > 2**31
    arguments["slot"][:] = 2
    true = expected(arguments)
    arguments |= {"k_cache": cache[:, :, 0], "v_cache": cache[:, :, 1]}
    arguments["slot"] += shape.S - 4
    rope_kv_append(**arguments)
    assert_same_bits(cache[:, -2:, 1], true["v_cache"][:, -2:])
    torch.testing.assert_close(cache[:, -2:, 0], true["k_cache"][:, -2:])


@pytest.mark.parametrize("device", DEVICES)
@NORMS
def test_opcheck(norm, device):
    arguments = make(device=device, norm=norm, layout="strided")
    norms = (arguments.pop("q_norm", None), arguments.pop("k_norm", None))
    op = torch.ops.lego_kernels.rope_kv_append.default
    torch.library.opcheck(op, (*arguments.values(), *norms, 1e-5))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device):
    arguments = make(device=device)

    @torch.compile(fullgraph=True)
    def step(qkv, **rest):
        rope_kv_append(qkv=qkv + 1, **rest)
        return rest["q_out"] + 1, rest["k_cache"][:, 0] + 1

    true = expected(arguments | {"qkv": arguments["qkv"] + 1})
    got = step(**arguments)
    torch.testing.assert_close(got[0], true["q_out"] + 1)
    torch.testing.assert_close(got[1], true["k_cache"][:, 0] + 1)


@pytest.mark.gpu
def test_cuda_graph_capture():
    arguments = make(Shape(E=64), torch.bfloat16, "cuda", norm=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rope_kv_append(**arguments)
    arguments["position"].fill_(3)
    arguments["slot"].fill_(1)
    true = expected(arguments)
    graph.replay()
    for name in WRITTEN:
        torch.testing.assert_close(arguments[name], true[name])
