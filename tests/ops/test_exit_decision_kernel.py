"""The kernels of exit_decision against lego.ops.exit_decision in float64."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lego_kernels.ops.exit_decision import (
    CRITERIA,
    TILE,
    ExitDecision,
    exit_decision,
    exit_decision_workspace,
)
from tests.exit_decision_cases import check, inputs
from tests.oracle import assert_same_bits, random

OP = "exit_decision"
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)
EACH_CRITERION = pytest.mark.parametrize("criterion", CRITERIA)
# B, D, V: smallest, odd, one over a tile, rows of every block size, the seed's width, many tiles
SHAPES = [(1, 1, 1), (3, 7, 2), (2, 16, TILE + 1), (17, 33, 300), (1, 64, 900), (5, 24, 1003)]
INF, NAN = math.inf, math.nan


@DTYPES
@EACH_CRITERION
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, norm, criterion, dtype, device):
    h, head = inputs(shape, dtype, device)
    check(h, head, criterion, random(h.shape[1:], dtype, device, seed=2) if norm else None)


@EACH_CRITERION
def test_strided_rows_and_padded_heads(criterion, device):
    B, D, V, padded = 3, 20, 150, 261
    x, head = inputs((B * 4, D + 5, padded), torch.float32, device)
    h, head = x.view(B, 4, D + 5)[:, -1, 3 : D + 3], head[:, 2 : D + 2]
    head[V:] = NAN  # rows that pad a head hold anything
    check(h, head, criterion, random((D,), torch.float32, device, seed=2), vocab_size=V)


@DTYPES
def test_a_row_does_not_depend_on_the_others(dtype, device, provider):
    if provider == "torch":
        pytest.skip("plain torch makes no such promise")
    h, head = inputs((19, 40, 2 * TILE + 3), dtype, device)
    weight = random((40,), dtype, device, seed=2)
    noise = {"temperature": 1.0, "seed": 5, "offset": 6}
    every = exit_decision(h, head, threshold=0.3, norm_weight=weight, **noise)
    for rows in (slice(0, 1), slice(3, 5), slice(2, 6), slice(7, 19), slice(18, 19)):
        some = exit_decision(h[rows], head, threshold=0.3, norm_weight=weight, **noise)
        for one, other in zip(some, every, strict=True):
            if one.dtype == torch.float32:
                assert_same_bits(one, other[rows])
            assert torch.equal(one, other[rows])


def test_ties_go_to_the_lowest_id(device):
    h, head = torch.ones(2, 3, device=device), torch.ones(1000, 3, device=device)
    got = exit_decision(h, head, threshold=0.5)
    assert got.token.tolist() == [0, 0]
    torch.testing.assert_close(got.confidence.cpu(), torch.full((2,), 1e-3))
    torch.testing.assert_close(got.lse.cpu(), torch.full((2,), 3 + math.log(1000)))
    # in a tile, in two, and where the lower id is in a higher lane
    for low, high in [(5, 6), (TILE - 1, TILE), (300, 999), (1, 17), (7, 16)]:
        tied = head.clone()
        tied[[low, high]] = 2.0
        got = exit_decision(h, tied, threshold=0.5, criterion="margin")
        assert got.token.tolist() == [low, low]
        assert got.confidence.tolist() == [0, 0]


@EACH_CRITERION
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_nan_never_exits(sampled, criterion, device):
    for nans in ([7], [140, 260], [3, 4, 299], [TILE], [0]):
        head = torch.ones(300, 1, device=device)
        head[nans] = NAN
        head[290] = 5.0
        h = torch.ones(2, 1, device=device)
        noise = {"temperature": 1.0, "seed": 0, "offset": 0} if sampled else {}
        got = exit_decision(h, head, threshold=-INF, criterion=criterion, **noise)
        assert got.token.tolist() == [nans[0]] * 2  # the first NaN wins over all
        assert got.confidence.isnan().all() and got.lse.isnan().all()
        assert got.exit.tolist() == [False, False]


@EACH_CRITERION
def test_a_nan_stays_in_its_row(criterion, device):
    h, head = inputs((5, 16, 200), torch.float32, device)
    alone = exit_decision(h, head, threshold=0.3, criterion=criterion)
    h[2, 3] = NAN
    got = exit_decision(h, head, threshold=0.3, criterion=criterion)
    kept = [0, 1, 3, 4]
    assert_same_bits(got.confidence[kept], alone.confidence[kept])
    assert got.token[2] == 0 and got.confidence[2].isnan() and not got.exit[2]


@EACH_CRITERION
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_minus_infinity(sampled, criterion, device):
    noise = {"temperature": 1.0, "seed": 0, "offset": 0} if sampled else {}
    h = torch.tensor([[1.0], [0.5]], device=device)
    head = torch.full((300, 1), -INF, device=device)
    got = exit_decision(h, head, threshold=1e-30, criterion=criterion, **noise)
    assert got.token.tolist() == [0, 0] and got.confidence.tolist() == [0, 0]
    assert got.lse.tolist() == [-INF, -INF] and got.exit.tolist() == [False, False]
    head[201] = 2.0  # one token is left, in a tile of its own
    got = exit_decision(h, head, threshold=1.0, criterion=criterion, **noise)
    assert got.token.tolist() == [201, 201] and got.confidence.tolist() == [1, 1]
    assert got.lse.tolist() == [2, 1] and got.exit.tolist() == [True, True]
    head[7] = 1.0
    check(h, head, criterion, **noise)


@EACH_CRITERION
def test_plus_infinity(criterion, device):
    head = torch.ones(300, 1, device=device)
    head[250] = INF
    got = exit_decision(torch.ones(1, 1, device=device), head, threshold=0.0, criterion=criterion)
    assert got.token.item() == 250 and got.confidence.isnan() and not got.exit.item()
    assert got.lse.item() == INF


@EACH_CRITERION
def test_far_apart_logits(criterion, device):
    head = torch.tensor([[-3e38], [1e4], [9e3], [0.0]], device=device)
    h = torch.tensor([[1.0], [1e-4], [0.0]], device=device)
    check(h, head, criterion)


def test_thresholds(device):
    h, head = inputs((40, 8, 20), torch.float32, device)
    confidence = exit_decision(h, head, threshold=0.0).confidence
    above = torch.nextafter(confidence, torch.tensor(2.0, device=device))
    assert exit_decision(h, head, threshold=confidence).exit.all()
    assert not exit_decision(h, head, threshold=above).exit.any()
    assert not exit_decision(h, head, threshold=INF).exit.any()
    assert exit_decision(h, head, threshold=confidence.min()).exit.all()  # a [] tensor
    every_second = torch.stack((confidence, above), dim=1).flatten()[::2]
    assert exit_decision(h, head, threshold=every_second).exit.all()


@DTYPES
def test_no_rows_and_given_outputs(dtype, device):
    h, head = inputs((3, 16, 300), dtype, device)
    none = exit_decision(h[:0], head, threshold=torch.zeros(0, device=device))
    assert [x.shape for x in none] == [(0,)] * 4
    expected = exit_decision(h, head, threshold=0.1)
    out = ExitDecision.empty(3, h.device)
    for x in out[1:3]:
        x.fill_(NAN)
    workspace = torch.full_like(exit_decision_workspace(h.expand(3, 16), head), NAN)
    got = exit_decision(h, head, threshold=0.1, out=out, workspace=workspace)
    assert got is out
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_offsets_beyond_int32(device):
    # 8 GiB that are reserved, but of which only the pages touched here are ever used
    far = torch.empty(3, 2**30 + 5, device=device, dtype=torch.bfloat16)
    head, h = far[:, :16], far[:, 16:32]
    small_h, small_head = inputs((3, 16, 3), torch.bfloat16, device)
    h.copy_(small_h), head.copy_(small_head)
    assert h.stride(0) * 2 > 2**31
    for far_away, near in zip(
        exit_decision(h, head, threshold=0.3),
        exit_decision(small_h, small_head, threshold=0.3),
        strict=True,
    ):
        assert torch.equal(far_away, near)


def test_threads_do_not_matter(device, provider):
    if provider == "triton":
        pytest.skip("the interpreter has one thread, and takes 10 s for these tiles")
    h, head = inputs((3, 256, 9000), torch.float32, device)
    alone = exit_decision(h, head, threshold=0.3)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        together = exit_decision(h, head, threshold=0.3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shape(data, provider, device):
    B, D, V = (data.draw(st.integers(1, most)) for most in (6, 70, 2 * TILE + 9))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    h, head = inputs((B, D, V), dtype, device, seed=data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(0, 3))):
        # exact copies: ties wherever the highest logit is among them
        source, target = (data.draw(st.integers(0, V - 1)) for _ in range(2))
        head[target] = head[source]
    weight = random((D,), dtype, device, seed=2) if data.draw(st.booleans()) else None
    criterion = data.draw(st.sampled_from(CRITERIA))
    got = check(h, head, criterion, weight, vocab_size=data.draw(st.integers(1, V)))
    if provider == "torch":
        return  # whose product may sum equal rows of the head in different orders
    for row, token in enumerate(got.token.tolist()):
        same = (head == head[token]).all(dim=1).nonzero()[0].item()
        assert same == token, f"row {row}: a copy has a lower id"


BROKEN = {
    r"h must be \[B, D\] and head \[V, D\], got \(4,\) and \(9, 4\)": {"h": torch.zeros(4)},
    r"h must be \[B, D\] and head \[V, D\], got \(2, 4\) and \(0, 4\)": {"head": torch.zeros(0, 4)},
    r"h must be \[B, D\] and head \[V, D\], got \(2, 0\)": {"h": torch.zeros(2, 0)},
    r"head must be \(9, 4\), got \(9, 3\)": {"head": torch.zeros(9, 3)},
    r"head must be torch.float32, got torch.float16": {"head": torch.zeros(9, 4).half()},
    r"head must be on cpu, got meta": {"head": torch.zeros(9, 4, device="meta")},
    r"head must have last stride 1, got \(1, 9\)": {"head": torch.zeros(4, 9).t()},
    r"h must have last stride 1, got \(8, 2\)": {"h": torch.zeros(2, 8)[:, ::2]},
    r"h must be float32, bfloat16 or float16, got torch.float64": {"h": torch.zeros(2, 4).double()},
    r"norm_weight must be \(4,\), got \(3,\)": {"norm_weight": torch.ones(3)},
    r"eps must be >= 0, got -1": {"eps": -1.0},
    r"eps must be >= 0, got nan": {"eps": NAN},
    r"criterion must be one of max_prob, margin, entropy, got 'gate'": {"criterion": "gate"},
    r"vocab_size must be in \[1, 9\], got 10": {"vocab_size": 10},
    r"vocab_size must be in \[1, 9\], got 0": {"vocab_size": 0},
    r"threshold must not be NaN": {"threshold": NAN},
    r"threshold must be a number or \(2,\), got \(3,\)": {"threshold": torch.zeros(3)},
    r"threshold must be torch.float32 on cpu, got torch.int64": {"threshold": torch.tensor(1)},
    r"temperature must be finite and >= 0": {"temperature": -1.0},
    r"temperature must be finite and >= 0, got \[?inf": {"temperature": INF},
    r"temperature must be finite and >= 0, got nan": {"temperature": NAN},
    r"temperature must be finite and fit torch.float32, got 1e\+39": {"temperature": 1e39},
    r"seed must be finite and fit torch.int64, got 9223372036854775808": {
        "temperature": 1.0,
        "seed": 2**63,
    },
    r"seed must be torch.int64 on cpu, got torch.int32": {
        "temperature": 1.0,
        "seed": torch.zeros(2).int(),
    },
    r"offset must be a number or \(2,\), got \(1, 2\)": {
        "temperature": 1.0,
        "offset": torch.zeros(1, 2).long(),
    },
    r"out.token must be \(2,\), got \(3,\)": {"out": ExitDecision.empty(3, torch.device("cpu"))},
    r"out.exit must be torch.bool, got torch.int64": {
        "out": ExitDecision.empty(2, torch.device("cpu"))._replace(exit=torch.zeros(2).long())
    },
    r"workspace must have at least 22 elements, got 21": {"workspace": torch.zeros(21)},
}


@pytest.mark.parametrize("sentence", BROKEN)
def test_refuses(sentence):
    out = ExitDecision.empty(2, torch.device("cpu"))
    given = {"h": torch.zeros(2, 4), "head": torch.zeros(9, 4), "threshold": 0.5, "out": out}
    for x in out:
        x.fill_(1)
    with pytest.raises(ValueError, match=f"^exit_decision: {sentence}"):
        exit_decision(**given | BROKEN[sentence])
    assert all(torch.all(x == 1) for x in out)  # nothing was written


@pytest.mark.parametrize("name", ["h", "head", "norm_weight", "threshold", "temperature"])
def test_is_inference_only(name):
    given = {"h": torch.zeros(2, 4), "head": torch.zeros(9, 4), "norm_weight": torch.ones(4)}
    given |= {"threshold": torch.ones(2), "temperature": torch.ones(2)}
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match="^exit_decision: is inference only"):
        exit_decision(**given)
    with torch.no_grad():
        exit_decision(**given)


def test_any_number_is_a_threshold(provider, device):
    h, head = inputs((2, 8, 20), torch.float32, device)
    for threshold, exits in ((-1e300, True), (0, True), (1e39, False), (INF, False)):
        assert exit_decision(h, head, threshold=threshold).exit.tolist() == [exits] * 2


def test_opcheck(provider, device):
    if provider in ("torch", "triton"):
        pytest.skip("opcheck takes what is registered")
    h, head = inputs((3, 16, 300), torch.float32, device)
    rows = torch.zeros(3, device=device)
    integers = torch.zeros(3, dtype=torch.int64, device=device)
    outputs = ExitDecision.empty(3, h.device)
    for x in outputs:
        x.zero_()
    workspace = torch.zeros_like(exit_decision_workspace(h, head))
    torch.library.opcheck(
        torch.ops.lego_kernels.exit_decision.default,
        (h, head, None, 0.0, rows, "max_prob", 300, rows, integers, integers, *outputs, workspace),
    )


def test_compiles_as_one_graph(provider, device):
    if provider in ("torch", "triton"):
        pytest.skip("what is registered is what compiles")

    @torch.compile(fullgraph=True)
    def step(h, head, threshold):
        got = exit_decision(h * 2, head, threshold=threshold)
        return got.token + 1, got.confidence, got.exit

    h, head = inputs((3, 16, 300), torch.float32, device)
    threshold = torch.tensor(0.3, device=device)
    token, confidence, exits = step(h, head, threshold)
    expected = exit_decision(h * 2, head, threshold=threshold)
    assert torch.equal(token, expected.token + 1) and torch.equal(exits, expected.exit)
    assert_same_bits(confidence, expected.confidence)
