"""Times of the frontier: thresholds that follow the generated text, and pairs with full depth."""

import math

import pytest
import torch

from lego.frontier_timing import FrontierTimes, generation_threshold
from lego.timed_generation import TimedGeneration
from tests.models import tiny_config


def test_generation_threshold_follows_the_generated_text():
    """What is generated is surer than what was calibrated on."""
    draw = torch.Generator().manual_seed(0)
    calibration = torch.rand(1000, generator=draw)
    generated = torch.rand(1000, generator=draw).sqrt()
    tried = []

    def shallow_ratio(threshold):
        tried.append(threshold)
        return (generated >= threshold).double().mean().item()

    for ratio in (0.3, 0.6, 0.9):
        assert shallow_ratio(1 - ratio) > ratio + 0.05
        tried.clear()
        threshold = generation_threshold(shallow_ratio, calibration, ratio)
        assert abs(shallow_ratio(threshold) - ratio) <= 0.01
        assert threshold in calibration.tolist() and len(tried) <= 8


def test_generation_threshold_takes_the_nearest_it_saw():
    calibration = torch.arange(100) / 100
    assert generation_threshold(lambda threshold: 0.5, calibration, 0.6) in calibration.tolist()
    tried, found = [], iter([0.9, 0.65, 0.1, 0.3, 0.5, 0.8, 0.8])

    def shallow_ratio(threshold):
        tried.append(threshold)
        return next(found)

    got = generation_threshold(shallow_ratio, calibration, 0.6)
    assert got == tried[1] and len(set(tried)) == 7
    assert generation_threshold(pytest.fail, calibration, 0.0) == math.inf


def test_times_are_those_of_full_depth_by_the_paired_speedup():
    """The machine was half as fast while the second group was timed."""

    def timed(**seconds):
        return TimedGeneration(config=tiny_config(), num_tokens=10, outputs={}, seconds=seconds)

    first = timed(full=[1.0, 1.0, 4.0], quick=[0.5, 0.5, 2.0])
    second = timed(full=[2.0, 2.0, 2.0], slow=[4.0, 5.0, 4.0])
    where = {"full": first, "quick": first, "slow": second}
    times = FrontierTimes(timed=where, engine="native", threshold={}, models={})
    assert times.relative("slow") == [2.0, 2.5, 2.0]
    # full depth took 2 s for 10 tokens, in the median of all turns
    wanted = {"full": 200.0, "quick": 100.0, "slow": 400.0}
    for name, ms in wanted.items():
        assert times.speed(name) == {"ms_per_token": ms, "tokens_per_second": 1e3 / ms}
