"""exit_gate against its formula in Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.ops.exit_gate import exit_gate
from tests.oracle import DEVICES, random

ERROR = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}
INF, NAN = math.inf, math.nan


def naive(h, weight, bias, norm_weight=None, eps=1e-5):
    scores = []
    for row in h.double().tolist():
        if norm_weight is not None:
            root = math.sqrt(math.fsum(x * x for x in row) / len(row) + eps)
            row = [x / root * w for x, w in zip(row, norm_weight.tolist(), strict=True)]
        z = math.fsum(x * w for x, w in zip(row, weight.double().tolist(), strict=True))
        scores.append(1 / (1 + math.exp(-z - float(bias))))
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize(("B", "D"), [(1, 1), (3, 7), (8, 512)])
def test_matches_formula(B, D, dtype, norm, device):
    h, weight = random((B, D), dtype, device), random((D,), dtype, device, seed=1)
    weight = (weight.double() * D**-0.5).to(dtype)
    bias = random((1,), dtype, device, seed=2)
    norm_weight = random((D,), dtype, device, seed=3) if norm else None
    score, exits = exit_gate(h, weight, bias, threshold=0.5, norm_weight_D=norm_weight, eps=1e-2)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert score.shape == exits.shape == (B,) and exits.dtype == torch.bool
    exact = naive(h, weight, bias, norm_weight, 1e-2)
    assert (score.double().cpu() - exact).abs().max() <= ERROR[dtype]
    assert exits.tolist() == [s >= 0.5 for s in score.tolist()]


def test_bias_is_a_scalar_or_one_value():
    h, weight = random((3, 4), torch.float64, "cpu"), random((4,), torch.float64, "cpu", seed=1)
    one, _ = exit_gate(h, weight, torch.tensor([0.3]).double(), threshold=0.5)
    scalar, _ = exit_gate(h, weight, torch.tensor(0.3).double(), threshold=0.5)
    assert torch.equal(one, scalar)


@pytest.mark.parametrize("device", DEVICES)
def test_edges(device):
    zero = torch.zeros(1, device=device)
    h = torch.tensor([[NAN, 0.0], [INF, 0.0], [-1e30, 0.0], [0.0, 0.0]], device=device)
    weight = torch.tensor([1.0, 1.0], device=device)
    score, exits = exit_gate(h, weight, zero, threshold=-INF)
    assert score[0].isnan() and score[1:].tolist() == [1.0, 0.0, 0.5]
    assert exits.tolist() == [False, True, True, True]
    assert not exit_gate(h, weight, zero, threshold=INF)[1].any()
    each = torch.tensor([0.0, 1.0, 0.0, 0.6], device=device)
    assert exit_gate(h, weight, zero, threshold=each)[1].tolist() == [False, True, True, False]
    assert [x.shape for x in exit_gate(h[:0], weight, zero, threshold=0.5)] == [(0,), (0,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_score_at_the_threshold_exits(dtype):
    h, weight = random((40, 8), dtype, "cpu"), random((8,), dtype, "cpu", seed=1)
    bias = torch.zeros(1, dtype=dtype)
    score, _ = exit_gate(h, weight, bias, threshold=0.5)
    for row, value in enumerate(score.tolist()):
        above = math.nextafter(value, 2) if dtype == torch.float64 else value * (1 + 2**-22)
        assert exit_gate(h, weight, bias, threshold=value)[1][row]
        assert not exit_gate(h, weight, bias, threshold=above)[1][row]


def test_refuses():
    h, weight, bias = torch.zeros(2, 4), torch.zeros(4), torch.zeros(1)
    for bad in [(h[0], weight, bias), (h, weight[:3], bias), (h, weight, torch.zeros(2))]:
        with pytest.raises(ValueError) as caught:
            exit_gate(*bad, threshold=0.5)
        shapes = [str(tuple(x.shape)) for x in bad]
        assert str(caught.value) == (
            "exit_gate: h must be [B, D], gate_weight [D] and gate_bias one value, got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    for threshold in (NAN, torch.tensor([NAN, 0.5])):
        with pytest.raises(ValueError, match="^exit_gate: threshold must not be NaN, got nan$"):
            exit_gate(h, weight, bias, threshold=threshold)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 2)], ids=str)
def test_refuses_thresholds_that_are_not_one_a_row(shape):
    with pytest.raises(ValueError, match="^exit_gate: threshold"):
        exit_gate(torch.zeros(2, 4), torch.zeros(4), torch.zeros(1), threshold=torch.zeros(shape))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.floats(-50, 50), min_size=1, max_size=6), st.floats(-50, 50), st.floats(0, 1))
def test_any_score(row, bias, threshold):
    h = torch.tensor([row], dtype=torch.float64)
    weight, bias = torch.linspace(-1, 1, len(row)).double(), torch.tensor(bias, dtype=torch.float64)
    score, exits = exit_gate(
        h, weight, bias, threshold=torch.tensor([threshold], dtype=torch.float64)
    )
    torch.testing.assert_close(score, naive(h, weight, bias), rtol=1e-10, atol=1e-15)
    assert exits.item() == (score.item() >= threshold)
