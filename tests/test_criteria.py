"""Criteria as predictors, by worked examples; break-even ratios; bootstrap intervals."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lego.bootstrap import mean_interval
from lego.break_even import crossing, expected_break_even
from lego.config import PRESETS
from lego.cost import dense_true_cost, expected_true_cost, weights
from lego.criteria import (
    best_f1,
    calibration_error,
    ratio_at_risk,
    risk_curve,
    score_criteria,
)
from lego.evaluation import TokenScores
from tests.models import CRITERIA, tiny_config

CONFIG = tiny_config()


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def scores(agree, confidence, *, lost=None):
    agree_N = torch.as_tensor(agree, dtype=torch.bool)
    deep = torch.ones(len(agree_N))
    return TokenScores(
        nll_shallow=deep + (torch.zeros(len(agree_N)) if lost is None else torch.tensor(lost)),
        nll_deep=deep,
        correct_shallow=agree_N,
        correct_deep=agree_N,
        agree=agree_N,
        confidence={name: torch.as_tensor(value) for name, value in confidence.items()},
    )


def test_risk_curve_by_hand():
    """Tokens leave in the order 2, 0, 1, 3."""
    got = risk_curve(torch.tensor([0.6, 0.5, 0.9, 0.1]), torch.tensor([1.0, -4.0, 0.0, 2.0]))
    assert got.dtype == torch.float64
    assert got.tolist() == [0.0, 0.0, 0.25, -0.75, -0.25]


def test_ties_leave_together():
    """Whatever the order in which they come, the curve is straight between the ends of a tie."""
    confidence, loss = torch.tensor([0.5, 0.9, 0.5, 0.5]), torch.tensor([3.0, 0.0, 0.0, 0.0])
    for order in ([0, 1, 2, 3], [2, 1, 3, 0]):
        got = risk_curve(confidence[order], loss[order])
        assert got.tolist() == pytest.approx([0, 0, 0.25, 0.5, 0.75])


def test_best_f1_by_hand():
    confidence, agree = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), flags(1, 0, 1, 1, 0)
    assert best_f1(confidence, agree) == pytest.approx(6 / 7)  # four leave, three of them rightly
    assert best_f1(agree.float(), agree) == 1
    assert best_f1(torch.zeros(5), agree) == pytest.approx(6 / 8)  # everybody or nobody
    assert best_f1(confidence, flags(0, 0, 0, 0, 0)) == 0
    assert best_f1(torch.ones(1), flags(1)) == 1


def test_calibration_error_by_hand():
    agree = flags(1, 0, 1, 0)
    assert calibration_error(agree.float(), agree) == 0
    assert calibration_error(torch.full((4,), 0.8), agree) == pytest.approx(0.3)
    assert calibration_error(torch.tensor([0.7]), flags(1)) == pytest.approx(0.3)
    # two bins: 0.9 and 0.7 against 1/2, 0.2 and 0.0 against 1/2
    confidence = torch.tensor([0.0, 0.9, 0.2, 0.7])
    got = calibration_error(confidence, flags(0, 0, 1, 1), num_bins=2)
    assert got == pytest.approx((0.3 + 0.4) / 2)
    # in one bin over- and underconfidence cancel
    got = calibration_error(confidence, flags(0, 0, 1, 1), num_bins=1)
    assert got == pytest.approx(0.05)


def test_bins_hold_equally_many():
    """A hundred tokens near 0.9 and five near 0: equal widths would see two bins alone."""
    confidence = torch.cat((torch.linspace(0.85, 0.95, 100), torch.zeros(5)))
    agree = torch.arange(105) % 2 == 0
    order = confidence.argsort(stable=True)
    expected = sum(
        len(part) / 105 * abs(part.mean() - right.mean())
        for part, right in zip(
            np.array_split(confidence[order].double().numpy()[::-1], 7),
            np.array_split(agree[order].double().numpy()[::-1], 7),
            strict=True,
        )
    )
    # the five ties are in one bin of fifteen: sharing their agreement changes nothing there
    assert calibration_error(confidence, agree, num_bins=7) == pytest.approx(expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12))
def test_best_f1_is_that_of_the_best_threshold(tokens):
    confidence = torch.tensor([value / 5 for value, _ in tokens])
    agree = flags(*(right for _, right in tokens))
    best = 0.0
    for threshold in confidence.unique():
        exits = confidence >= threshold
        right = (exits & agree).sum().item()
        best = max(best, 2 * right / (exits.sum() + agree.sum()).item())
    assert best_f1(confidence, agree) == pytest.approx(best)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
)
def test_ratio_at_risk_is_that_of_the_lowest_allowed_threshold(tokens, risk):
    confidence = torch.tensor([value / 5 for value, _ in tokens])
    lost = ~flags(*(agrees for _, agrees in tokens))
    allowed = [0.0]
    for threshold in confidence.unique():
        exits = confidence >= threshold
        if (lost & exits).double().mean() <= risk:
            allowed.append(exits.double().mean().item())
    curve = risk_curve(confidence, lost.double())
    assert ratio_at_risk(confidence, curve, risk) == pytest.approx(max(allowed))


def test_areas_by_hand():
    """Three of four tokens agree; a constant confidence risks a quarter of the share that exits."""
    agree, constant = [True, True, False, True], torch.full((4,), 0.5)
    found = score_criteria(
        scores(agree, {"max_prob": constant, "gate": constant}, lost=[0.0, 4.0, 0.0, 0.0]), CONFIG
    )
    # nobody disagrees up to a share of 3/4, then everybody: 1/4 * 1/4 / 2
    assert found["oracle"].disagreement_area == pytest.approx(1 / 32)
    assert found["random"].disagreement_area == pytest.approx(1 / 8)
    # the nats are lost among the tokens that agree: by a share of 3/4, and stay so
    assert found["oracle"].lost_nats_area == pytest.approx(3 / 8 + 1 / 4)
    assert found["random"].lost_nats_area == pytest.approx(1 / 2)
    # what a cost buys begins with a share b: the mean of q / 4 over q in [b, 1]
    b = expected_break_even(CONFIG, "max_prob")
    assert found["max_prob"].disagreement_area == pytest.approx((1 + b) / 8)
    assert found["max_prob"].calibration_error == pytest.approx(0.25)
    assert found["random"].calibration_error == pytest.approx(0)
    assert found["random"].best_f1 == pytest.approx(6 / 7)
    assert list(found) == ["max_prob", "gate", "oracle", "random"]


def curve_by_integration(confidence, loss, criterion):
    """The mean risk over costs, a cost at a time."""
    never, always = (expected_true_cost(CONFIG, q, criterion) for q in (0.0, 1.0))
    costs = np.linspace(dense_true_cost(CONFIG, CONFIG.exit_layer), 1, 200_001)
    share = ((never - costs) / (never - always)).clip(0, 1)
    order = np.argsort(-confidence)
    risk = np.concatenate(([0], loss[order].cumsum())) / len(loss)
    return np.interp(share, np.linspace(0, 1, len(risk)), risk).mean()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_areas_by_integration(criterion):
    draw = np.random.default_rng(3)
    confidence, lost = draw.random(37), draw.normal(size=37).astype(np.float32)
    agree = draw.random(37) < 0.6
    found = score_criteria(scores(agree, {criterion: confidence}, lost=lost.tolist()), CONFIG)
    expected = curve_by_integration(confidence, ~agree, criterion)
    assert found[criterion].disagreement_area == pytest.approx(expected, rel=1e-4)
    expected = curve_by_integration(confidence, lost, criterion)
    assert found[criterion].lost_nats_area == pytest.approx(expected, rel=1e-4, abs=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=20))
def test_nothing_is_better_than_the_oracle(tokens):
    confidence = torch.tensor([value / 9 for value, _ in tokens])
    agree = flags(*(right for _, right in tokens))
    found = score_criteria(scores(agree, dict.fromkeys(CRITERIA, confidence)), CONFIG)
    oracle = found["oracle"]
    assert oracle.calibration_error == 0
    for other in found.values():
        assert oracle.disagreement_area <= other.disagreement_area + 1e-12
        assert oracle.best_f1 >= other.best_f1


def test_a_perfect_criterion_is_the_oracle_but_for_its_cost():
    agree = [True, False, True, False, True]
    found = score_criteria(scores(agree, {"gate": [0.9, 0.1, 0.8, 0.2, 0.7]}), CONFIG)
    gate, oracle = found["gate"], found["oracle"]
    assert gate.best_f1 == oracle.best_f1 == 1
    # a gate that costs nothing would have the oracle's area
    assert oracle.disagreement_area < gate.disagreement_area < 1.1 * oracle.disagreement_area


def test_refused_scores():
    with pytest.raises(ValueError, match="must hold confidence, got a dense model's"):
        score_criteria(scores([True], {}), CONFIG)
    with pytest.raises(ValueError, match="score_criteria: gate must hold numbers, got nan"):
        score_criteria(scores([True], {"gate": [math.nan]}), CONFIG)


@pytest.mark.parametrize("preset", PRESETS)
def test_break_even_of_the_weights(preset):
    config = PRESETS[preset].model
    part = weights(config)
    upper = config.num_upper_layers * part.upper_layer
    upper += part.upper_kv if config.upper_kv == "exit_state" else 0
    for criterion in CRITERIA:
        extra = part.gate if criterion == "gate" else part.head
        expected = extra / upper if criterion == "gate" else extra / (upper + part.head)
        got = expected_break_even(config, criterion)
        assert got == pytest.approx(expected)
        assert expected_true_cost(config, got, criterion) == pytest.approx(1)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({0.6: 0.7, 0.0: 1.1, 0.3: 0.9}, 0.15),
        ({0.0: 1.2, 0.3: 1.1, 0.6: 0.8}, 0.4),
        ({0.1: 0.99, 0.5: 1.01}, 0.1),  # it pays from the lowest measured ratio on
        ({0.0: 1.2, 0.5: 1.0}, 0.5),
        ({0.0: 1.2, 0.5: 1.01}, math.inf),
        ({0.4: 1.0}, 0.4),
    ],
)
def test_crossing(points, expected):
    assert crossing(list(points), list(points.values())) == pytest.approx(expected)


def test_crossing_is_refused_without_measurements():
    with pytest.raises(ValueError, match="at least one measurement, got none"):
        crossing([], [])


def test_interval_against_scipy():
    values = torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    got = mean_interval(values, level=0.9)
    assert got.mean == pytest.approx(values.mean().item())
    expected = scipy.stats.bootstrap(
        (values.numpy(),), np.mean, confidence_level=0.9, method="percentile", rng=1
    ).confidence_interval
    # both are random: a fiftieth of the width is well above what 2,000 resamples leave open
    width = expected.high - expected.low
    assert got.low == pytest.approx(expected.low, abs=0.06 * width)
    assert got.high == pytest.approx(expected.high, abs=0.06 * width)
    assert mean_interval(values) == mean_interval(values)


def test_interval_covers():
    """95 % intervals of 40 windows hold the true mean in about 95 % of 300 draws."""
    draws = 2 + torch.randn(300, 40, generator=torch.Generator().manual_seed(1))
    found = [mean_interval(draw, seed=seed) for seed, draw in enumerate(draws)]
    covered = sum(interval.low <= 2 <= interval.high for interval in found)
    # below 0.9 or above 0.98 in less than one of a thousand such tests
    assert 0.9 <= covered / 300 <= 0.98


def test_interval_of_equal_values_is_a_point():
    got = mean_interval(torch.full((5,), 0.25))
    assert (got.low, got.mean, got.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("values", [torch.zeros(1), torch.zeros(0), torch.zeros(2, 2)])
def test_interval_refuses(values):
    with pytest.raises(ValueError, match=r"must be \[W\] with W >= 2, got"):
        mean_interval(values)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 1"):
        mean_interval(torch.zeros(3), level=1)
