"""exit_decision and softmax_confidence against their formulas, one row at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.ops.exit_decision import exit_decision, softmax_confidence
from tests.oracle import DEVICES, random

CRITERIA = ["max_prob", "margin", "entropy"]
# B, D, V: smallest, odd, many
SHAPES = [(1, 1, 1), (3, 7, 2), (5, 16, 127), (2, 8, 5003)]
# bfloat16: logits of size 5 are rounded to 2**-7, their exponentials are computed in float32
ERROR = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 5e-2}
INF, NAN = math.inf, math.nan


def naive_confidence(logits, criterion):
    """From Python floats; -inf is a masked token."""
    top = max(logits)
    exp = [math.exp(x - top) for x in logits]
    denominator = math.fsum(exp)
    prob = sorted((x / denominator for x in exp), reverse=True)
    if criterion == "max_prob":
        return prob[0]
    if criterion == "margin":
        return prob[0] - (prob[1] if len(prob) > 1 else 0.0)
    if len(prob) == 1:
        return 1.0
    return 1 + math.fsum(p * math.log(p) for p in prob if p > 0) / math.log(len(prob))


def naive_lse(logits):
    top = max(logits)
    return top + math.log(math.fsum(math.exp(x - top) for x in logits))


def naive(h, head, criterion, norm_weight=None, eps=1e-5):
    """(token, confidence, lse), float64."""
    h, head = h.double().cpu(), head.double().cpu()
    if norm_weight is not None:
        h = h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight.double().cpu()
    logits = (h @ head.T).tolist()
    token = [row.index(max(row)) for row in logits]
    lse = [naive_lse(row) for row in logits]
    confidence = [naive_confidence(row, criterion) for row in logits]
    return token, *torch.tensor([confidence, lse], dtype=torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_formula(shape, dtype, norm, criterion, device):
    B, D, V = shape
    h = random((B, D), dtype, device)
    head = (2 * D**-0.5 * random((V, D), torch.float64, device, seed=1)).to(dtype)
    weight = random((D,), dtype, device, seed=2) if norm else None
    token, confidence, lse, exits = exit_decision(
        h, head, threshold=0.2, criterion=criterion, norm_weight_D=weight, eps=1e-2
    )
    exact_token, exact_confidence, exact_lse = naive(h, head, criterion, weight, 1e-2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (token.dtype, exits.dtype) == (torch.int64, torch.bool)
    assert confidence.dtype == lse.dtype == wide
    assert token.shape == confidence.shape == lse.shape == exits.shape == (B,)
    assert (confidence.double().cpu() - exact_confidence).abs().max() <= ERROR[dtype]
    assert (lse.double().cpu() - exact_lse).abs().max() <= 2 * ERROR[dtype]
    if dtype == torch.float64:
        assert token.tolist() == exact_token
    assert exits.tolist() == [c >= 0.2 for c in confidence.tolist()]


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_lowest_id(device):
    h, head = torch.ones(2, 3, device=device), torch.ones(9000, 3, device=device)
    token, confidence, lse, _ = exit_decision(h, head, threshold=0.5)
    assert token.tolist() == [0, 0]
    torch.testing.assert_close(confidence.cpu(), torch.full((2,), 1 / 9000))
    torch.testing.assert_close(lse.cpu(), torch.full((2,), 3 + math.log(9000)))
    head[[4321, 8765]] = 2.0
    assert exit_decision(h, head, threshold=0.5)[0].tolist() == [4321, 4321]
    assert exit_decision(h, head, threshold=0.5, criterion="margin")[1].tolist() == [0, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_nan_never_exits(criterion, device):
    h = torch.ones(1, 1, device=device)
    head = torch.tensor([[1.0], [NAN], [2.0], [NAN]], device=device)
    token, confidence, lse, exits = exit_decision(h, head, threshold=-INF, criterion=criterion)
    assert token.tolist() == [1]  # the first NaN wins over all
    assert confidence.isnan().all() and lse.isnan().all()
    assert exits.tolist() == [False]
    logits = torch.tensor([[1.0, NAN, -INF], [1.0, 2.0, 3.0]], device=device)
    assert softmax_confidence(logits, criterion).isnan().tolist() == [True, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_row_of_minus_infinity(criterion, device):
    h = torch.tensor([[1.0], [0.5]], device=device)
    head = torch.full((4, 1), -INF, device=device)
    token, confidence, lse, exits = exit_decision(h, head, threshold=1e-30, criterion=criterion)
    assert token.tolist() == [0, 0] and confidence.tolist() == [0, 0]
    assert lse.tolist() == [-INF, -INF] and exits.tolist() == [False, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_masked_tokens_have_no_probability(criterion, device):
    logits = torch.tensor([[2.0, -INF, 0.5, 1.0], [-INF, 3.0, -INF, -INF]], device=device)
    expected = [naive_confidence(row, criterion) for row in logits.tolist()]
    torch.testing.assert_close(softmax_confidence(logits, criterion).tolist(), expected)
    assert expected[1] == 1.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_token_and_no_rows(criterion, device):
    assert softmax_confidence(torch.tensor([[-3.0]], device=device), criterion).item() == 1.0
    assert softmax_confidence(torch.zeros(0, 8, device=device), criterion).shape == (0,)
    h, head = torch.zeros(0, 4, device=device), torch.zeros(8, 4, device=device)
    got = exit_decision(h, head, threshold=torch.zeros(0, device=device), criterion=criterion)
    assert [x.shape for x in got] == [(0,)] * 4


@pytest.mark.parametrize("criterion", CRITERIA)
def test_confidence_ranges(criterion):
    logits = torch.tensor([[0.0] * 7, [1e4] + [0.0] * 6, [-1e4] + [-1e4] * 6, [700.0] * 7])
    got = softmax_confidence(logits, criterion)
    uniform = 1 / 7 if criterion == "max_prob" else 0.0
    torch.testing.assert_close(got, torch.tensor([uniform, 1.0, uniform, uniform]))
    assert torch.all((got >= 0) & (got <= 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_confidence_at_the_threshold_exits(dtype):
    h, head = random((40, 8), dtype, "cpu"), random((20, 8), dtype, "cpu", seed=1)
    confidence = exit_decision(h, head, threshold=0.0)[1]
    for row, value in enumerate(confidence.tolist()):
        above = math.nextafter(value, 2) if dtype == torch.float64 else value * (1 + 2**-22)
        assert exit_decision(h, head, threshold=value)[3][row]
        assert not exit_decision(h, head, threshold=above)[3][row]
    assert exit_decision(h, head, threshold=confidence)[3].all()


@pytest.mark.parametrize("device", DEVICES)
def test_thresholds(device):
    h = random((3, 4), torch.float32, device)
    head = random((9, 4), torch.float32, device, seed=1)
    assert exit_decision(h, head, threshold=0)[3].all()
    assert not exit_decision(h, head, threshold=INF)[3].any()
    each = torch.tensor([0.0, 2.0, -INF], device=device)
    assert exit_decision(h, head, threshold=each)[3].tolist() == [True, False, True]


def test_refuses():
    h, head = torch.zeros(2, 4), torch.zeros(9, 4)
    for bad_h, bad_head in [(h[0], head), (h, head[0]), (h[:, :3], head), (h[None], head)]:
        with pytest.raises(ValueError) as caught:
            exit_decision(bad_h, bad_head, threshold=0.5)
        got = f"got {tuple(bad_h.shape)} and {tuple(bad_head.shape)}"
        assert str(caught.value) == f"exit_decision: h must be [B, D] and head [V, D], {got}"
    for threshold in (NAN, torch.tensor([0.5, NAN])):
        with pytest.raises(ValueError, match="^exit_decision: threshold must not be NaN, got nan$"):
            exit_decision(h, head, threshold=threshold)
    with pytest.raises(ValueError, match=r"^rms_norm: weight must be \[4\]"):
        exit_decision(h, head, threshold=0.5, norm_weight_D=torch.ones(3))
    for shape in [(4,), (2, 0), (1, 2, 3)]:
        with pytest.raises(ValueError) as caught:
            softmax_confidence(torch.zeros(shape), "max_prob")
        assert str(caught.value) == f"softmax_confidence: logits must be [B, V], got {shape}"
    with pytest.raises(ValueError, match="criterion must be max_prob, margin or entropy, got 'x'"):
        softmax_confidence(torch.zeros(1, 2), "x")


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 2)], ids=str)
def test_refuses_thresholds_that_are_not_one_a_row(shape):
    with pytest.raises(ValueError, match="^exit_decision: threshold"):
        exit_decision(torch.zeros(2, 4), torch.zeros(9, 4), threshold=torch.zeros(shape))


logit = st.one_of(st.floats(-1e4, 1e4), st.sampled_from([-INF, 0.0, 1.0, -1e300, 1e300]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(logit, min_size=1, max_size=9), st.sampled_from(CRITERIA))
def test_any_logits(row, criterion):
    got = softmax_confidence(torch.tensor([row], dtype=torch.float64), criterion).item()
    expected = 0.0 if max(row) == -INF else naive_confidence(row, criterion)
    assert abs(got - expected) <= 1e-12 and 0 <= got <= 1
