"""Scores of both exits against plain formulas, and routed scores against step by step decoding."""

import math

import numpy as np
import pytest
import torch

from lego.data import TokenSplit, num_windows, window_batch
from lego.evaluation import TokenScores, perplexity, quality, routed, score_tokens, stepwise_nll
from lego.strategies import EarlyExit
from tests.models import (
    CRITERIA,
    POLICIES,
    VARIANTS,
    confidence,
    midway,
    model_for,
    tiny_model,
    token_ids,
)

SEQ_LEN = 15


def make_split(num_ids=100, seed=2):
    ids = token_ids(num_ids, seed=seed).numpy().astype(np.uint16)
    return TokenSplit(ids, num_bytes=4 * num_ids, num_words=num_ids // 2)


def all_windows(split):
    return window_batch(split.ids, SEQ_LEN, torch.arange(num_windows(split.ids, SEQ_LEN)))


def naive_nll(logits, target):
    return -(logits - logits.exp().sum(-1, keepdim=True).log()).gather(-1, target[..., None])[
        ..., 0
    ]


@pytest.mark.parametrize("variant", ["gqa", "all"])
@pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
def test_scores_are_their_definition(upper_kv, variant):
    model, split = tiny_model(upper_kv, **VARIANTS[variant]), make_split()
    scores, windows = score_tokens(model, split, SEQ_LEN), all_windows(split)
    assert len(windows) == 6
    states, target = model(windows[:, :-1]), windows[:, 1:]
    logits = {
        "shallow": model.exit_logits(states.exit_state),
        "deep": model.final_logits(states.final_state),
    }
    top = {name: x.argmax(-1) for name, x in logits.items()}
    for name, x in logits.items():
        got = getattr(scores, f"nll_{name}")
        expected = naive_nll(x, target).flatten().float()
        torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=1e-5)
        correct = getattr(scores, f"correct_{name}")
        assert correct.dtype == torch.bool
        assert torch.equal(correct, (top[name] == target).flatten())
    assert torch.equal(scores.agree, (top["shallow"] == top["deep"]).flatten())
    assert list(scores.confidence) == list(CRITERIA)
    for criterion, got in scores.confidence.items():
        expected = confidence(model, states.exit_state, criterion).flatten()
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_batches_do_not_matter(monkeypatch):
    model, split = tiny_model(), make_split()
    one = score_tokens(model, split, SEQ_LEN)
    monkeypatch.setattr("lego.evaluation._MAX_LOGITS", 1)  # one window at a time
    other = score_tokens(model, split, SEQ_LEN)
    torch.testing.assert_close(one.nll_deep, other.nll_deep, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.confidence["margin"], other.confidence["margin"])


def test_some_windows_alone():
    model, split = tiny_model(), make_split()
    every, some = score_tokens(model, split, SEQ_LEN), torch.tensor([4, 1])
    scores = score_tokens(model, split, SEQ_LEN, some)
    expected = every.nll_deep.view(-1, SEQ_LEN)[some].flatten()
    torch.testing.assert_close(scores.nll_deep, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="index must be in"):
        score_tokens(model, split, SEQ_LEN, torch.tensor([6]))


def test_a_dense_model_has_one_exit():
    model = tiny_model(exit_layer=4)
    scores = score_tokens(model, make_split(), SEQ_LEN)
    assert torch.equal(scores.nll_shallow, scores.nll_deep)
    assert scores.confidence == {}


def test_a_split_below_one_window_is_refused():
    with pytest.raises(ValueError, match="must hold >= 16 ids for seq_len=15, got 15"):
        score_tokens(tiny_model(), make_split(15), SEQ_LEN)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("policy", ["exact", "recompute"])
@pytest.mark.parametrize("variant", ["gqa", "all"])
def test_routed_scores_are_those_of_step_by_step_decoding(variant, policy, criterion):
    model, split = model_for(policy, **VARIANTS[variant]), make_split()
    scores = score_tokens(model, split, SEQ_LEN)
    threshold = midway(scores.confidence[criterion])
    nll, correct = routed(scores, criterion, threshold)
    strategy = EarlyExit(threshold=threshold, criterion=criterion, kv_policy=policy)
    stepwise, depth = stepwise_nll(model, all_windows(split), strategy)
    assert stepwise.shape == depth.shape == (6, SEQ_LEN)
    exits = scores.confidence[criterion] >= threshold
    assert torch.equal(depth.flatten() == model.config.exit_layer, exits)
    assert 0.3 < exits.double().mean() < 0.7
    # both losses are computed in float32 from float64 logits
    torch.testing.assert_close(stepwise.flatten(), nll, rtol=2e-6, atol=2e-6)
    expected = torch.where(exits, scores.correct_shallow, scores.correct_deep)
    assert torch.equal(correct, expected)


@pytest.mark.parametrize("policy", ["hole", "propagate"])
def test_inexact_policies_are_not_what_the_evaluation_saw(policy):
    model, split = model_for(policy), make_split()
    scores = score_tokens(model, split, SEQ_LEN)
    threshold = midway(scores.confidence["max_prob"])
    nll, _ = routed(scores, "max_prob", threshold)
    strategy = EarlyExit(threshold=threshold, kv_policy=policy)
    stepwise, depth = stepwise_nll(model, all_windows(split), strategy)
    exits = depth.flatten() == 2
    torch.testing.assert_close(stepwise.flatten()[exits], nll[exits], rtol=2e-6, atol=2e-6)
    assert (stepwise.flatten() - nll)[~exits].abs().max() > 0.01


@pytest.mark.parametrize("policy", POLICIES)
def test_stepwise_at_the_extremes_is_one_exit(policy):
    model, split = model_for(policy), make_split()
    scores, windows = score_tokens(model, split, SEQ_LEN), all_windows(split)
    for threshold, expected in [(0.0, scores.nll_shallow), (math.inf, scores.nll_deep)]:
        strategy = EarlyExit(threshold=threshold, kv_policy=policy)
        got, depth = stepwise_nll(model, windows, strategy)
        torch.testing.assert_close(got.flatten(), expected, rtol=2e-6, atol=2e-6)
        assert (depth == (2 if threshold == 0 else 4)).all()


def handmade_scores():
    flags = torch.tensor([True, False, True, False])
    return TokenScores(
        nll_shallow=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        nll_deep=torch.tensor([10.0, 20.0, 30.0, 40.0]),
        correct_shallow=flags,
        correct_deep=~flags,
        agree=flags,
        confidence={"max_prob": torch.tensor([0.5, 0.7, 0.2, math.nan])},
    )


def test_routing_by_hand():
    nll, correct = routed(handmade_scores(), "max_prob", 0.5)
    assert nll.tolist() == [1.0, 2.0, 30.0, 40.0]  # at the threshold: shallow; NaN: deep
    assert correct.tolist() == [True, False, False, True]
    assert routed(handmade_scores(), "max_prob", math.inf)[0].tolist() == [10.0, 20.0, 30.0, 40.0]
    assert routed(handmade_scores(), "max_prob", 0.0)[0].tolist() == [1.0, 2.0, 3.0, 40.0]


def test_quality_by_hand():
    split = TokenSplit(np.zeros(101, dtype=np.uint16), num_bytes=400, num_words=50)
    nats = math.log(8)
    got = quality(torch.full((90,), nats), torch.arange(90) < 9, split)
    assert got.ppl == pytest.approx(8) and got.accuracy == pytest.approx(0.1)
    assert got.bits_per_byte == pytest.approx(3 * 100 / 400)  # three bits a token
    assert got.word_ppl == pytest.approx(8**2)  # two tokens a word
    bad = quality(torch.full((5,), 500.0), torch.zeros(5), split)
    assert bad.word_ppl == math.inf and bad.ppl == pytest.approx(math.exp(500))


def test_perplexity():
    assert perplexity(torch.tensor([0.0, math.log(16)])) == pytest.approx(4)
    assert math.isnan(perplexity(torch.zeros(0)))
