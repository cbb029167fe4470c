"""The kernels of rms_norm against lego.ops.rms_norm."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lego.ops.rms_norm import rms_norm as reference
from lego_kernels.ops.rms_norm import rms_norm
from tests.oracle import DEVICES, FLOORS, assert_error_bounded, assert_same_bits, random
from tests.triton_compile import ARCHITECTURES, Spec, compile_specs

pytestmark = [
    pytest.mark.threads,
    # NumPy, on which Triton's interpreter runs, warns of what is tested here
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]

OP = "rms_norm"
NAN, INF = float("nan"), float("inf")
DTYPES = pytest.mark.parametrize("dtype", FLOORS, ids=str)
RESIDUAL = pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
# smallest, odd, one over a vector, the seed's, several blocks
SHAPES = [(1, 1), (3, 7), (2, 17), (5, 64), (2, 3, 5, 33), (2, 2050)]


def check(x, weight, residual=None, eps=1e-5) -> None:
    """One call, with `out` and without: the residual to the bit, the norm within eager's error."""
    exact = reference(
        x.double(),
        weight.double(),
        eps=eps,
        residual=None if residual is None else residual.double(),
    )
    eager_sum = None if residual is None else residual.clone()
    eager = reference(x, weight, eps=eps, residual=eager_sum)
    for out in (None, torch.full_like(x, NAN)):
        summed = None if residual is None else residual.clone()
        got = rms_norm(x, weight, eps=eps, residual=summed, out=out)
        assert out is None or got is out
        assert got.shape == x.shape and got.dtype == x.dtype
        assert_error_bounded(got, eager, exact, floor=FLOORS[x.dtype] * exact.abs().max().item())
        if residual is not None:
            assert_same_bits(summed, eager_sum)


@DTYPES
@RESIDUAL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, with_residual, dtype, device):
    residual = random(shape, dtype, device, seed=2) if with_residual else None
    weight = random(shape[-1:], dtype, device, seed=1)
    check(random(shape, dtype, device), weight, residual)


def views(dtype, device, fill=None):
    """What is normalised in a decode step: packed heads, the last token, one row for all."""

    def buffer(shape, seed):
        if fill is None:
            return random(shape, dtype, device, seed=seed)
        return torch.full(shape, fill, dtype=dtype, device=device)

    B, T, Hq, Hkv, E = 2, 3, 5, 2, 18
    heads = buffer((B, T, (Hq + 2 * Hkv) * E), 3).view(B, T, -1, E)
    return {
        "q": heads[:, :, :Hq],
        "k": heads[:, :, Hq : Hq + Hkv],
        "heads_first": heads.transpose(1, 2)[:, 1:4],
        "last_token": buffer((B, T, 40), 4)[:, -1],
        "unaligned": buffer((B, 41), 5)[:, 1:],
    }


@DTYPES
@pytest.mark.parametrize("name", views(torch.float32, "cpu"))
def test_strided_views(name, dtype, device):
    x = views(dtype, device)[name]
    residual, out = views(dtype, device, fill=0.5)[name], views(dtype, device, fill=NAN)[name]
    weight = random(x.shape[-1:], dtype, device, seed=1)
    eager_sum = torch.full_like(x, 0.5)
    eager = reference(x, weight, eps=1e-5, residual=eager_sum)
    exact = reference(
        x.double(), weight.double(), eps=1e-5, residual=torch.full_like(x, 0.5).double()
    )
    before = x.clone()
    assert rms_norm(x, weight, eps=1e-5, residual=residual, out=out) is out
    assert_error_bounded(out, eager, exact, floor=FLOORS[dtype] * exact.abs().max().item())
    assert_same_bits(residual, eager_sum)
    assert_same_bits(x, before)
    # around the views, nothing was written
    assert out._base.isnan().sum() == out._base.numel() - out.numel()
    assert (residual._base != 0.5).sum() == (residual != 0.5).sum()


def test_one_row_for_all(device):
    x = random((1, 24), torch.float32, device).expand(4, 24)
    check(x, random((24,), torch.float32, device, seed=1), random((4, 24), torch.float32, device))


@RESIDUAL
def test_not_a_number_stays_in_its_row(with_residual, device):
    x, weight = random((5, 37), torch.float32, device), random((37,), torch.float32, device, seed=1)
    clean = rms_norm(x, weight, eps=1e-5)
    bad = torch.zeros_like(x)
    bad[1, 36], bad[3, 0] = NAN, INF
    if with_residual:
        got = rms_norm(x, weight, eps=1e-5, residual=bad)
        assert torch.equal(bad.isnan().nonzero().cpu(), torch.tensor([[1, 36]]))
    else:
        got = rms_norm(x + bad, weight, eps=1e-5)
    assert_same_bits(got[::2], clean[::2])
    assert got[1].isnan().all()
    # infinity over its own root is NaN, and all else in the row is 0
    assert got[3, 0].isnan() and not got[3, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_sum_is_rounded_before_it_is_normalised(dtype, device):
    # a sum whose lower half is lost: what is normalised is what the next layer reads
    x = random((3, 64), dtype, device)
    residual = random((3, 64), dtype, device, seed=1) * 4096
    weight = torch.ones(64, dtype=dtype, device=device)
    got = rms_norm(x, weight, eps=0.0, residual=residual)
    assert_same_bits(got, rms_norm(residual, weight, eps=0.0))


def test_overflow_of_a_sum_is_infinity(device):
    residual = torch.full((1, 4), 60000.0, dtype=torch.float16, device=device)
    x, weight = residual.clone(), torch.ones(4, dtype=torch.float16, device=device)
    assert rms_norm(x, weight, eps=1e-5, residual=residual).isnan().all()
    assert (residual == INF).all()


@RESIDUAL
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 3, 2, 4)], ids=str)
def test_nothing_to_normalise(shape, with_residual, provider, device, monkeypatch):
    if provider == "triton":  # a launch would fail
        monkeypatch.setattr("lego_kernels.triton.rms_norm._rms_norm_kernel", None)
    x, weight = torch.zeros(shape, device=device), torch.ones(shape[-1], device=device)
    got = rms_norm(x, weight, eps=1e-5, residual=x.clone() if with_residual else None)
    assert got.shape == shape


def test_offsets_beyond_int32(device):
    # 4 GiB that are reserved, but of which only the pages touched here are ever used
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    x = far.as_strided((3, 32), (2**30, 1))
    x.copy_(random((3, 32), torch.float16, device))
    residual = far.as_strided((3, 32), (2**30, 1), 32)
    residual.copy_(x)
    weight = torch.ones(32, dtype=torch.float16, device=device)
    got = rms_norm(x, weight, eps=1e-5, residual=residual)
    assert_same_bits(residual, x + x)
    assert_same_bits(rms_norm(residual, weight, eps=1e-5, out=x), got)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_shape_and_scale(device, data):
    sizes = st.lists(st.integers(1, 4), max_size=3)
    shape = (*data.draw(sizes), data.draw(st.integers(1, 70)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    scale = data.draw(st.sampled_from([1e-3, 1.0, 100.0]))
    x = scale * random(shape, dtype, device, seed=data.draw(st.integers(0, 99)))
    residual = data.draw(st.sampled_from([None, random(shape, dtype, device, seed=100)]))
    check(x, random(shape[-1:], dtype, device, seed=1), residual, data.draw(st.floats(1e-7, 1)))


def test_threads_agree():
    x, weight = random((67, 2048), torch.bfloat16, "cpu"), random((2048,), torch.bfloat16, "cpu")
    residual, sums = (random((67, 2048), torch.bfloat16, "cpu", seed=2) for _ in range(2))
    every = rms_norm(x, weight, eps=1e-5, residual=residual)
    each = [rms_norm(row, weight, eps=1e-5, residual=sums[i]) for i, row in enumerate(x)]
    assert_same_bits(every, torch.stack(each))
    assert_same_bits(residual, sums)


ZEROS = torch.zeros(2, 8)
BROKEN = {
    r"x must be \[..., D\] of 1 to 4 dimensions, got \(\)": dict(x=torch.tensor(1.0)),
    r"x must be \[..., D\] .* got \(1, 1, 1, 2, 8\)": dict(x=ZEROS[None, None, None]),
    r"x must be \[..., D\] .* got \(2, 0\)": dict(x=ZEROS[:, :0]),
    r"x must be float32, bfloat16 or float16, got torch.float64": dict(x=ZEROS.double()),
    r"x must have last stride 1, got \(1, 2\)": dict(x=torch.zeros(8, 2).T),
    r"weight must be \(8,\), got \(1,\)": dict(weight=torch.ones(1)),
    r"weight must be torch.float32, got torch.bfloat16": dict(weight=torch.ones(8).bfloat16()),
    r"weight must be on cpu, got meta": dict(weight=torch.ones(8, device="meta")),
    r"weight must have last stride 1, got \(2,\)": dict(weight=torch.ones(16)[::2]),
    r"eps must be >= 0, got -1e-05": dict(eps=-1e-5),
    r"eps must be >= 0, got nan": dict(eps=NAN),
    r"residual must be \(2, 8\), got \(8,\)": dict(residual=ZEROS[0]),
    r"residual must be torch.float32, got torch.float16": dict(residual=ZEROS.half()),
    r"residual must have no zero stride": dict(residual=ZEROS[:1].expand(2, 8)),
    r"out must be \(2, 8\), got \(1, 8\)": dict(out=ZEROS[:1]),
    r"out must be torch.float32, got torch.float16": dict(out=ZEROS.half()),
    r"out must have no zero stride": dict(out=ZEROS[:1].expand(2, 8)),
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_refuses(sentence):
    valid = dict(x=torch.ones(2, 8), weight=torch.ones(8), eps=1e-5)
    valid |= dict(residual=torch.ones(2, 8), out=torch.ones(2, 8))
    given = valid | BROKEN[sentence]
    with pytest.raises(ValueError, match=f"^rms_norm: {sentence}"):
        rms_norm(given.pop("x"), given.pop("weight"), **given)
    for name in ("residual", "out"):
        assert given[name] is not valid[name] or torch.equal(given[name], torch.ones(2, 8))
    assert not ZEROS.any()


@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_is_inference_only(name):
    given = dict(x=torch.ones(2, 8), weight=torch.ones(8), residual=torch.ones(2, 8))
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match="^rms_norm: is inference only"):
        rms_norm(**given, eps=1e-5)
    with torch.no_grad():
        rms_norm(**given, eps=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, weight = torch.randn(2, 3, 8, device=device), torch.ones(8, device=device)
    for residual in (None, x[:, 0].clone()):
        arguments = (x[:, -1], weight, 1e-5, residual, torch.empty_like(x[:, 0]))
        torch.library.opcheck(torch.ops.lego_kernels.rms_norm.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_as_one_graph(device):
    @torch.compile(fullgraph=True)
    def step(x, weight, residual):
        return rms_norm(x[:, -1] + 1, weight, eps=1e-5, residual=residual) * 2

    x, weight = random((2, 3, 8), torch.float32, device), random((8,), torch.float32, device)
    residual, expected_sum = (torch.ones(2, 8, device=device) for _ in range(2))
    expected = rms_norm(x[:, -1] + 1, weight, eps=1e-5, residual=expected_sum) * 2
    assert_same_bits(step(x, weight, residual), expected)
    assert_same_bits(residual, expected_sum)


def test_compiles_for_gpus():
    signature = dict.fromkeys(("x_ptr", "weight_ptr", "residual_ptr", "out_ptr"), "*bf16")
    strides = tuple(f"{x}_stride_{i}" for x in ("x", "residual", "out") for i in range(3))
    signature |= dict.fromkeys(("size_1", "size_2", "D", *strides), "i32") | {"eps": "fp32"}
    specs = [
        Spec(
            kernel="lego_kernels.triton.rms_norm:_rms_norm_kernel",
            signature=signature,
            constexprs={"HAS_RESIDUAL": has_residual, "BLOCK_D": 2048},
            divisible=("D", *strides),
            arch=arch,
        )
        for arch in ARCHITECTURES
        for has_residual in (False, True)
    ]
    for spec, compiled in zip(specs, compile_specs(specs), strict=True):
        assert compiled.stack_bytes == 0
        # 2,048 values of x, of weight and perhaps of residual, 8 a load, for 128 threads
        assert compiled.vector_loads == (6 if spec.constexprs["HAS_RESIDUAL"] else 4)
