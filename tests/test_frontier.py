"""The frontier: settings scored as they decode, timed at the share scored, against dense models."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lego.engine
from lego.break_even import expected_break_even
from lego.config import KV_POLICIES, ExperimentConfig, TimingConfig
from lego.cost import elements_read
from lego.data import Corpus, TokenSplit
from lego.evaluation import perplexity, quality, score_tokens, stepwise
from lego.frontier import BASELINES, DenseLine, FrontierOptions, break_even_rows, measure_frontier
from lego.frontier_command import break_even_ratio, frontier_verdict
from lego.frontier_quality import Sample, Setting, all_settings, score_setting
from lego.generation import generate
from lego.strategies import EarlyExit, FullDepth
from lego.timed_generation import prompt_windows
from lego.training.phases import new_model
from tests.models import CRITERIA, POLICIES, midway, model_for, tiny_model
from tests.runs import TRAIN, finished_run, tiny_checkpoint, token_ids

SEQ_LEN = 15
TIMING = TimingConfig(num_prompts=2, prompt_tokens=4, new_tokens=6, rounds=2)


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv("LEGO_CACHE", str(finished_run()[2]))


def make_split(num_ids=200, seed=2):
    return TokenSplit(token_ids(num_ids, seed=seed), num_bytes=4 * num_ids, num_words=num_ids)


@pytest.mark.parametrize(
    ("count", "expected"), [(4, [0, 3, 6, 9]), (13, list(range(13))), (99, 13)]
)
def test_sample_is_spread(count, expected):
    sample = Sample.spread(make_split(), SEQ_LEN, count)
    places = sample.place_W.tolist()
    assert places == expected or len(places) == expected
    assert sample.windows.shape == (len(places), SEQ_LEN + 1)
    first = sample.place_W[-1] * SEQ_LEN
    assert sample.windows[-1].tolist() == sample.split.ids[first : first + SEQ_LEN + 1].tolist()
    # the values of all scored tokens, and those of the sample among them
    values = torch.arange(13 * SEQ_LEN)
    assert sample.of(values)[-1, 0] == first


def test_sample_needs_two_windows():
    with pytest.raises(ValueError, match="must hold >= 2 windows of 15 tokens, got 1"):
        Sample.spread(make_split(30), SEQ_LEN, 4)


def test_bits_per_byte_are_those_of_the_evaluation():
    split = make_split()
    sample, scores = Sample.spread(split, SEQ_LEN, 99), score_tokens(tiny_model(), split, SEQ_LEN)
    expected = quality(scores.nll_deep, scores.correct_deep, split).bits_per_byte
    got = sample.bits_per_byte(sample.of(scores.nll_deep))
    assert got.mean == pytest.approx(expected) and got.low < got.mean < got.high


def calibration_scores():
    """Scores of 50 tokens with random confidences; the surer, the likelier both exits agree."""
    scores = score_tokens(tiny_model(), make_split(65), SEQ_LEN - 10)
    confidence = {name: torch.rand(len(scores.agree)) for name in CRITERIA}
    agree = torch.rand(len(scores.agree)) < confidence["gate"]
    return replace(scores, confidence=confidence, agree=agree)


@pytest.mark.parametrize("upper_kv", KV_POLICIES)
def test_settings(upper_kv):
    """Every policy, criterion and ratio once, with the threshold of the ratio."""
    calibration = calibration_scores()
    settings = all_settings(upper_kv, calibration, (0.6, 0.0), ())
    assert len({setting.name for setting in settings}) == 8 * len(KV_POLICIES[upper_kv])
    for setting in settings:
        exits = calibration.confidence[setting.criterion] >= setting.threshold
        assert exits.double().mean() == pytest.approx(setting.ratio, abs=0.02)
        assert setting.strategy().policy_for(tiny_model(upper_kv)) == setting.kv_policy


@pytest.mark.parametrize("upper_kv", KV_POLICIES)
def test_settings_at_a_risk(upper_kv):
    """As many tokens leave as the risk allows, by rising ratio, where the risk is that of use."""
    calibration = calibration_scores()
    settings = all_settings(upper_kv, calibration, (0.5,), (0.0, 0.05, 0.3))
    exact = KV_POLICIES[upper_kv][0]
    at_risk = [setting for setting in settings if setting.risk is not None]
    assert len({setting.name for setting in at_risk}) == 3 * len(CRITERIA)
    for setting in at_risk:
        assert setting.kv_policy == exact
        confidence = calibration.confidence[setting.criterion]
        lost = ~calibration.agree & (confidence >= setting.threshold)
        assert lost.double().mean() <= setting.risk
        surest_left = confidence[confidence < setting.threshold].max()
        lost = ~calibration.agree & (confidence >= surest_left)
        assert lost.double().mean() > setting.risk
    for criterion in CRITERIA:
        ratios = [s.ratio for s in settings if s.group == (exact, criterion)]
        assert len(ratios) == 4 and ratios == sorted(ratios)


@pytest.mark.parametrize("criterion", ["max_prob", "gate"])
@pytest.mark.parametrize("policy", POLICIES)
def test_scores_of_a_setting_are_those_of_decoding(policy, criterion):
    """Parallel where that is exact, step by step where not: the same scores either way."""
    model, split = model_for(policy), make_split()
    scores, sample = score_tokens(model, split, SEQ_LEN), Sample.spread(split, SEQ_LEN, 5)
    threshold = midway(scores.confidence[criterion])
    setting = Setting(criterion=criterion, kv_policy=policy, ratio=0.5, threshold=threshold)
    deep = stepwise(model, sample.windows, EarlyExit(threshold=math.inf)).token
    got = score_setting(model, sample, scores, deep, setting)
    decoded = stepwise(model, sample.windows, setting.strategy())
    torch.testing.assert_close(got.nll, decoded.nll, rtol=2e-6, atol=2e-6)
    assert torch.equal(got.agree, decoded.token == deep)
    assert torch.equal(got.shallow, decoded.exit_layer == model.config.exit_layer)
    assert 0.2 < got.shallow_ratio < 0.8
    exact = policy in ("exact", "recompute")
    assert bool(got.agree[~got.shallow].all()) is exact


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_lost_without_exits(policy):
    model, split = model_for(policy), make_split()
    scores, sample = score_tokens(model, split, SEQ_LEN), Sample.spread(split, SEQ_LEN, 5)
    setting = Setting(criterion="gate", kv_policy=policy, ratio=0.0, threshold=math.inf)
    full = stepwise(model, sample.windows, setting.strategy())
    got = score_setting(model, sample, scores, full.token, setting)
    assert got.agree.all() and not got.shallow.any()
    assert perplexity(got.nll.flatten()) == pytest.approx(perplexity(full.nll.flatten()))


def test_the_dense_line():
    shallow, deep = torch.tensor([4.0, 6.0]), torch.tensor([2.0, 5.0])
    line = DenseLine((0.5, 1.0), (shallow, deep))
    assert line.at(0.75).tolist() == [3.0, 5.5]
    assert line.at(0.5).tolist() == line.at(0.4).tolist() == [4.0, 6.0]
    assert line.at(1.0).tolist() == line.at(1.1).tolist() == [2.0, 5.0]
    # more layers that do not help are not bought
    assert DenseLine((0.5, 1.0), (deep, shallow)).at(1.0).tolist() == [2.0, 5.0]


def untrained_frontier(upper_kv, **options):
    """(model, measure_frontier) of untrained models."""
    checkpoint = tiny_checkpoint(upper_kv=upper_kv)
    model = checkpoint.model
    model.gate.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    config = ExperimentConfig(model=model.config, train=TRAIN, timing=TIMING)
    splits = ("train", "calibration", "validation")
    corpus = Corpus(
        **{"name": "walk", "sha256": "", "description": "", "tokenizer": checkpoint.tokenizer},
        **{name: make_split(seed=seed) for seed, name in enumerate(splits)},
    )
    dense = {
        name: new_model(model.config.dense(depth), 1).eval()
        for name, depth in zip(BASELINES, (2, 4), strict=True)
    }
    chosen = FrontierOptions(ratios=(0.5, 0.0), risks=(0.1, 0.9), num_windows=6)
    return model, measure_frontier(model, dense, corpus, config, chosen, **options)


@pytest.mark.parametrize("upper_kv", KV_POLICIES)
def test_frontier_of_every_policy(upper_kv):
    steps = {}

    def watch(name, total):
        steps[name] = [total, 0]

        def advance():
            steps[name][1] += 1

        return advance

    _, found = untrained_frontier(upper_kv, watch=watch)
    assert all(total == done > 0 for total, done in steps.values()), steps
    policies = KV_POLICIES[upper_kv]
    asked = [setting for setting in found["settings"] if setting["risk"] is None]
    keys = [(s["kv_policy"], s["criterion"], s["ratio"]) for s in asked]
    assert keys == [(p, c, r) for p in policies for c in CRITERIA for r in (0.0, 0.5)]
    full = found["models"]["full"]
    assert full["true_cost"] == full["speedup"] == 1
    for setting in found["settings"]:
        generation = setting["generation"]
        if setting["ratio"] == 0:
            assert setting["agreement"] == 1 and setting["mean_layers"] == 4
            assert setting["bits_per_byte"] == pytest.approx(full["bits_per_byte"])
            assert generation["shallow_ratio"] == 0
            assert setting["minus_full_depth"] == pytest.approx(0, abs=1e-6)
        lost = setting["bits_per_byte"] - full["bits_per_byte"]
        assert setting["minus_full_depth"] == pytest.approx(lost, abs=1e-6)
        for key in ("bits_per_byte", "agreement", "minus_dense_at_equal_cost"):
            low, high = setting[f"{key}_interval"]
            assert low <= setting[key] <= high
        assert setting["mean_layers"] == pytest.approx(4 - 2 * setting["shallow_ratio"])
    at_risk = [s["risk"] for s in found["settings"] if s["risk"] is not None]
    assert sorted(at_risk) == [0.1] * 4 + [0.9] * 4
    rows = found["break_even"]
    pairs = [(row["kv_policy"], row["criterion"]) for row in rows]
    assert pairs == [(policy, criterion) for policy in policies for criterion in CRITERIA]
    for row in rows:
        low, high = row["measured_quartiles"]
        assert low <= row["measured"] <= high


def test_costs_are_counted_in_generation(monkeypatch):
    """The dense baseline against full depth, from counts of our own; by the reference engine."""
    native = untrained_frontier("exit_state")[1]
    monkeypatch.setattr(lego.engine, "why_not", lambda model: "not today")
    model, found = untrained_frontier("exit_state")
    assert (native["engine"], found["engine"]) == ("native", "reference")
    prompts = prompt_windows(make_split(seed=2), 2, 4)
    dense = {depth: new_model(model.config.dense(depth), 1).eval() for depth in (2, 4)}
    read = []
    for each in (*dense.values(), model):
        outputs = [generate(each, [prompt], 6, FullDepth()) for prompt in prompts]
        read.append(sum(elements_read(each.config, output.stats.decode) for output in outputs))
    for results in (native, found):
        for name, depth, elements in zip(BASELINES, dense, read, strict=False):
            assert results["models"][name]["true_cost"] == pytest.approx(elements / read[-1])
            assert results["models"][name]["num_layers"] == depth
    for setting in found["settings"]:
        generation = setting["generation"]
        strategy = EarlyExit(threshold=generation["threshold"], criterion=setting["criterion"])
        outputs = [generate(model, [prompt], 6, strategy) for prompt in prompts]
        exits = [depth == 2 for output in outputs for depth in output.exit_layer[0]]
        assert generation["shallow_ratio"] == sum(exits) / 12


def test_break_even_of_made_up_rounds():
    """Two ratios, two rounds: 1.2 or 1.4 of the time of full depth, then 0.8 or 0.6."""
    config = tiny_model().config
    both = [
        Setting(criterion="gate", kv_policy="exact", ratio=ratio, threshold=1 - ratio)
        for ratio in (0.0, 0.5)
    ]
    seconds = {both[0].name: [1.2, 1.4], both[1].name: [0.8, 0.6]}
    results = [
        {"generation": {"shallow_ratio": 0.0, "true_cost": 1.1}},
        {"generation": {"shallow_ratio": 0.4, "true_cost": 0.9}},
    ]
    times = SimpleNamespace(relative=seconds.get)
    (row,) = break_even_rows(both, results, config, times)
    assert (row["criterion"], row["kv_policy"]) == ("gate", "exact")
    assert row["expected"] == expected_break_even(config, "gate") and row["lowest"] == 0
    assert row["counted"] == pytest.approx(0.2)
    assert row["measured"] == pytest.approx(0.2)  # from 1.3 to 0.7
    # from 1.25 to 0.65, and from 1.35 to 0.75
    assert row["measured_quartiles"] == pytest.approx([0.4 * 0.25 / 0.6, 0.4 * 0.35 / 0.6])


def test_break_even_in_words():
    """What no share of tokens reaches, and what was down at the lowest share measured."""
    shares = (None, 1.2, 1.0, 0.3, 0.25, 0.0)
    texts = [break_even_ratio({"lowest": 0.25}, share) for share in shares]
    assert texts == ["never", "never", "100.0 %", "30.0 %", "<= 25.0 %", "0.0 %"]
    assert break_even_ratio({"lowest": 0.0}, 0.0) == "0.0 %"


def verdict_of(*differences, shallow_ratio=0.5, generated=0.5):
    settings = [
        {
            **{"criterion": "gate", "kv_policy": "exact", "shallow_ratio": shallow_ratio},
            "generation": {"shallow_ratio": generated},
            "minus_dense_at_equal_cost": difference,
            "minus_dense_at_equal_cost_interval": [difference - 0.1, difference + 0.1],
        }
        for difference in differences
    ]
    return frontier_verdict({"settings": settings})


def test_verdict():
    mixed = verdict_of(-0.2, 0.05, 0.3, -0.05)
    assert "4 settings: better in 1, as good in 2, worse in 1." in mixed[0]
    assert "-0.2000 bits per byte against dense (-0.3000 to -0.1000)" in mixed[1]
    assert len(mixed) == 2
    worse = verdict_of(0.2, 0.3)
    assert worse[-1] == "A dense model is better at equal true cost, at every setting."
    assert "no threshold was found" in verdict_of(0.0, generated=0.6)[-1]
    assert verdict_of(0.0, shallow_ratio=0.0)[0].startswith("No token exited")
