"""Paired timing: turns, spreads, and generation in turns."""

import statistics

import pytest
import torch

import lego.timed_generation as timed_generation
from lego.config import TimingConfig
from lego.cost import elements_read, layer_cost
from lego.data import TokenSplit
from lego.generation import generate
from lego.strategies import EarlyExit, FullDepth, Speculative, Uncached
from lego.timed_generation import (
    early_exit_results,
    kv_cache_results,
    num_threads,
    prompt_windows,
    time_generation,
)
from lego.timing import Spread, paired_seconds, ratio_spread
from tests.runs import tiny_checkpoint, token_ids

TIMING = TimingConfig(num_prompts=3, prompt_tokens=4, new_tokens=5, rounds=2)


def split(num_ids=300):
    return TokenSplit(token_ids(num_ids), num_ids, num_ids)


@pytest.mark.parametrize("num_rounds", [2, 3, 7])
def test_turns(num_rounds):
    """Each variant once a round, in turn the first, then all backwards; no warm-up counts."""
    calls = []

    def variant(name):
        calls.append(name)
        return float(len(calls))

    variants = {name: lambda name=name: variant(name) for name in "abc"}
    seconds = paired_seconds(variants, num_rounds=num_rounds)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == num_rounds + 1
    wanted_orders = ["abc", "bca", "cab", "cba", "acb", "bac", "abc"]
    assert ["".join(order) for order in rounds[1:]] == wanted_orders[:num_rounds]
    assert sorted(rounds[0]) == ["a", "b", "c"]
    for name in "abc":
        wanted = [3 * i + order.index(name) + 1 for i, order in enumerate(rounds)]
        assert seconds[name] == wanted[1:]


@pytest.mark.parametrize("num_rounds", [1, 0, -1])
def test_too_few_rounds(num_rounds):
    with pytest.raises(ValueError, match=f"num_rounds must be >= 2, got {num_rounds}"):
        paired_seconds({"a": lambda: pytest.fail("must not be run")}, num_rounds=num_rounds)


def test_error_of_a_variant():
    with pytest.raises(ZeroDivisionError):
        paired_seconds({"a": lambda: 1 / 0}, num_rounds=2)


def test_spread():
    spread = Spread.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (spread.low, spread.median, spread.high) == (2, 3, 4)
    assert Spread.of([1.0, 2.0]) == Spread(low=1.25, median=1.5, high=1.75)


def test_ratio_spread_is_of_pairs():
    """The median of ratios, not the ratio of medians."""
    slow, fast = [10.0, 90.0, 40.0], [10.0, 10.0, 20.0]
    assert ratio_spread(slow, fast) == Spread.of([1.0, 2.0, 9.0])
    assert ratio_spread(slow, fast).median == 2 != statistics.median(slow) / statistics.median(fast)
    with pytest.raises(ValueError):
        ratio_spread(slow, fast[:2])


def test_prompts():
    data = split(300)
    prompts = prompt_windows(data, 3, 16)  # 18 windows: every sixth
    assert [p.tolist() for p in prompts] == [
        data.ids[i : i + 16].tolist() for i in (0, 6 * 16, 12 * 16)
    ]
    assert all(p.dtype == torch.int64 for p in prompts)
    with pytest.raises(ValueError, match="must hold 19 prompts of 16 tokens, got 18"):
        prompt_windows(data, 19, 16)


def test_num_threads():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def generated():
    """Strategies on one model; `some` has the median of the confidences seen."""
    model = tiny_checkpoint().model
    prompts = prompt_windows(split(), 3, 4)
    always = [generate(model, [prompt], 5, EarlyExit(threshold=0.0)) for prompt in prompts]
    middle = statistics.median_high(c for output in always for c in output.confidence[0])
    strategies = {
        "uncached": Uncached(),
        "uncached_last": Uncached(all_logits=False),
        "full": FullDepth(),
        "never": EarlyExit(threshold=float("inf")),
        "always": EarlyExit(threshold=0.0),
        "some": EarlyExit(threshold=middle),
        "speculative": Speculative(stop_confidence=middle),
    }
    return model, strategies, time_generation(model, split(), strategies, TIMING)


def test_generation_is_the_strategys(generated):
    model, strategies, timed = generated
    prompts = prompt_windows(split(), 3, 4)
    assert timed.num_tokens == 15
    for name, strategy in strategies.items():
        assert len(timed.seconds[name]) == 2 and min(timed.seconds[name]) > 0
        again = [generate(model, [prompt], 5, strategy) for prompt in prompts]
        assert [o.tokens for o in timed.outputs[name]] == [o.tokens for o in again]
        assert timed.counts(name) == again[0].stats.decode + again[1].stats.decode + (
            again[2].stats.decode
        )


def test_threads_while_timing(monkeypatch):
    seen = []
    model = tiny_checkpoint().model
    monkeypatch.setattr(
        timed_generation,
        "generate",
        lambda *args, **kwargs: (seen.append(torch.get_num_threads()), generate(*args))[1],
    )
    timing = TimingConfig(num_prompts=1, prompt_tokens=2, new_tokens=1, rounds=2, num_threads=2)
    with num_threads(1):
        time_generation(model, split(), {"full": FullDepth()}, timing)
        assert torch.get_num_threads() == 1
    assert seen == [2, 2, 2]


@pytest.mark.parametrize("name", ["never", "some", "always"])
def test_early_exit_results(generated, name):
    model, _, timed = generated
    config, found = model.config, early_exit_results(timed, name)
    shallow, deep = found["shallow_tokens"], found["deep_tokens"]
    wanted = {"never": shallow == 0, "some": 0 < shallow < 15, "always": shallow == 15}
    assert wanted[name] and shallow + deep == 15
    assert found["shallow_ratio"] == shallow / 15
    assert found["layer_cost"] == layer_cost(config, shallow, deep) == (2 * shallow + 4 * deep) / 60
    assert found["layer_savings"] == 1 - found["layer_cost"]
    ratio = elements_read(config, timed.counts(name)) / elements_read(config, timed.counts("full"))
    assert found["true_cost"] == ratio
    ratios = [f / e for f, e in zip(timed.seconds["full"], timed.seconds[name], strict=True)]
    speedup = statistics.median(ratios)
    assert found["speedup"] == pytest.approx(speedup)
    assert found["full_ms_per_token"] == pytest.approx(
        1e3 * statistics.median(timed.seconds["full"]) / 15
    )
    assert found["time_efficiency"] == pytest.approx(ratio * speedup)
    if ratio > 0.9:
        assert found["realised_savings"] is None
    else:
        assert found["realised_savings"] == pytest.approx((1 - 1 / speedup) / (1 - ratio))
    low, high = found["speedup_quartiles"]
    assert low <= found["speedup"] <= high


def test_kv_cache_results(generated):
    _, _, timed = generated
    found = kv_cache_results(timed)
    assert found["cached_ms_per_token"] == timed.ms_per_token("full").median
    for name, speedup in (("uncached", "speedup"), ("uncached_last", "speedup_over_last")):
        assert found[f"{name}_ms_per_token"] == timed.ms_per_token(name).median
        ratios = ratio_spread(timed.seconds[name], timed.seconds["full"])
        assert found[speedup] == ratios.median
        assert found[f"{speedup}_quartiles"] == [ratios.low, ratios.high]
