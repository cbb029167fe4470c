"""Thresholds by quantile: the share that was asked for exits on the split itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.calibration import Calibration, calibrate_by_quantile
from lego.strategies import EarlyExit


def distinct(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(count, generator=generator) + 0.5) / count


def threshold_for(values, ratio):
    return calibrate_by_quantile({"max_prob": values}, ratio).threshold["max_prob"]


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_ratio_is_reached_exactly_without_ties(ratio, dtype):
    values = distinct(100).to(dtype)
    threshold = threshold_for(values, ratio)
    assert type(threshold) is float and threshold in values.tolist()
    assert (values >= threshold).sum() == round(100 * ratio)


def test_ratio_zero_never_exits_and_one_always_does():
    values = distinct(37)
    assert threshold_for(values, 0) == math.inf
    assert threshold_for(values, 1) == values.min()
    EarlyExit(threshold=threshold_for(values, 0))  # inf is a legal threshold


def test_ties_exit_together():
    values = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1])
    for ratio, exits in [(0.2, 1), (0.4, 4), (0.6, 4), (0.8, 4), (1.0, 5)]:
        assert (values >= threshold_for(values, ratio)).sum() == exits


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=15), st.floats(0, 1))
def test_at_least_the_share_and_no_more_than_needed(values, ratio):
    """The contract: the largest observed value that at least the share of the tokens reach."""
    confidence = torch.tensor(values)
    threshold = threshold_for(confidence, ratio)
    if threshold == math.inf:
        assert ratio * len(values) < 1e-9
        return
    assert (confidence >= threshold).sum() >= ratio * len(values) - 1e-9
    assert (confidence > threshold).sum() < ratio * len(values) + 1e-9


def test_every_criterion_has_a_threshold_of_its_own():
    given_values = {"max_prob": distinct(10), "margin": distinct(10, seed=1) / 2}
    got = calibrate_by_quantile(given_values, 0.3)
    assert isinstance(got, Calibration) and got.shallow_ratio == 0.3 and got.num_tokens == 10
    assert list(got.threshold) == ["max_prob", "margin"]
    for criterion, values in given_values.items():
        assert (values >= got.threshold[criterion]).sum() == 3


def test_order_does_not_matter_and_input_is_left_alone():
    values = distinct(20)
    before = values.clone()
    assert threshold_for(values, 0.4) == threshold_for(values.flip(0), 0.4)
    assert torch.equal(values, before)


@pytest.mark.parametrize("ratio", [-0.01, 1.01, math.nan, math.inf])
def test_refuses_ratios(ratio):
    with pytest.raises(ValueError) as caught:
        threshold_for(distinct(3), ratio)
    sentence = f"calibrate_by_quantile: shallow_ratio must be in [0, 1], got {ratio}"
    assert str(caught.value) == sentence


def test_refuses_no_tokens():
    for given_values in (
        {"max_prob": torch.zeros(0)},
        {"gate": distinct(3), "margin": distinct(0)},
    ):
        with pytest.raises(ValueError) as caught:
            calibrate_by_quantile(given_values, 0.5)
        sentence = "confidence must hold at least one token, got none"
        assert str(caught.value) == f"calibrate_by_quantile: {sentence}"


def test_refuses_no_criteria():
    with pytest.raises(ValueError, match="^calibrate_by_quantile: confidence must"):
        calibrate_by_quantile({}, 0.5)
