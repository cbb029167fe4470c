"""Risks of sequences against their definitions, token by token."""

import math

import numpy as np
import pytest
import torch

from lego import sequence_risk
from lego.engine import engine_for
from lego.evaluation import stepwise_nll
from lego.generation import generate
from lego.sequence_risk import default_grid, disagreement, draw_sequences, excess_loss
from lego.strategies import EarlyExit, Uncached
from tests.models import (
    CRITERIA,
    POLICIES,
    VOCAB,
    confidence,
    midway,
    model_for,
    tiny_model,
    token_ids,
)

PROMPTS, PROMPT_TOKENS, NEW = 5, 4, 7
END = 0


def documents(*lengths, seed=0):
    """Ids as in a split: each document after an end-of-text id, and no other such ids."""
    draw = np.random.default_rng(seed)
    parts = [part for n in lengths for part in ([END], draw.integers(1, VOCAB, n))]
    return np.concatenate(parts).astype(np.uint16)


def strategy_for(model, policy, criterion="max_prob"):
    """Half of some random tokens exit by it."""
    values = confidence(model, model(token_ids(4, 20, seed=9)).exit_state, criterion)
    return EarlyExit(threshold=midway(values), criterion=criterion, kv_policy=policy)


def naive_disagreement(model, prompt, strategy, stop_tokens):
    """The context again and again through all layers, without any cache."""
    prompt = prompt.tolist()
    output = generate(model, [prompt], NEW, strategy, stop_tokens=stop_tokens)
    tokens = output.tokens[0]
    others = [
        generate(model, [prompt + tokens[:t]], 1, Uncached()).tokens[0][0] != token
        for t, token in enumerate(tokens)
    ]
    return np.mean(others), others, output.exit_layer[0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_disagreement_is_its_definition(policy, criterion):
    model, prompts = model_for(policy), token_ids(PROMPTS, PROMPT_TOKENS)
    strategy = strategy_for(model, policy, criterion)
    # the token most often generated, so that some sequences stop at it
    free = generate(model, prompts, NEW, strategy).tokens
    stop = [int(np.bincount(np.concatenate(free)).argmax())]
    found = disagreement(
        model, prompts, NEW, strategy, [math.inf, strategy.threshold, 0.0], stop_tokens=stop
    )
    naive = [naive_disagreement(model, prompt, strategy, stop) for prompt in prompts]
    assert found.risk.shape == (3, PROMPTS) and found.risk.dtype == np.float64
    assert found.risk[1].tolist() == [share for share, *_ in naive]
    assert 0 < found.risk[1].mean() < 1
    lengths = [len(depths) for *_, depths in naive]
    assert min(lengths) < NEW == max(lengths)
    shallow = [depth == 2 for *_, depths in naive for depth in depths]
    assert found.shallow_ratio.tolist() == [0, np.mean(shallow), 1]
    assert not found.risk[0].any()  # full depth agrees with itself


@pytest.mark.parametrize("policy", POLICIES)
def test_deep_tokens_disagree_only_after_inexact_kv(policy):
    model, prompts = model_for(policy), token_ids(10, PROMPT_TOKENS)
    strategy = strategy_for(model, policy)
    deep_and_other = sum(
        other and depth == 4
        for prompt in prompts
        for other, depth in zip(*naive_disagreement(model, prompt, strategy, [])[1:], strict=True)
    )
    assert (deep_and_other > 0) == (policy in ("hole", "propagate"))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_loss_is_its_definition(policy, criterion):
    """With a prompt of one token, every token of a window is a step, and scored."""
    model, ids = model_for(policy), token_ids(PROMPTS, 12)
    strategy = strategy_for(model, policy, criterion)
    found = excess_loss(model, ids, 1, strategy, [math.inf, strategy.threshold], bound=1.5)
    nll, depth = stepwise_nll(model, ids, strategy)
    full, _ = stepwise_nll(model, ids, EarlyExit(threshold=math.inf))
    excess = (nll - full).double().mean(dim=1) / 1.5
    assert excess.min() < 0 < excess.max()
    expected = excess.clamp(0, 1).numpy()
    np.testing.assert_allclose(found.risk, [np.zeros(PROMPTS), expected], rtol=1e-4, atol=1e-6)
    assert found.shallow_ratio.tolist() == [0, (depth == 2).double().mean()]


@pytest.mark.parametrize("policy", POLICIES)
def test_loss_decodes_as_generation_does(policy):
    """On text that generation made: the same tokens exit, and no last token is likelier."""
    model, prompts = model_for(policy), token_ids(20, PROMPT_TOKENS)
    strategy = strategy_for(model, policy)
    output = generate(model, prompts, NEW, strategy)
    ids = torch.cat([prompts, torch.tensor(output.tokens)], dim=1)
    found = excess_loss(model, ids, PROMPT_TOKENS, strategy, [strategy.threshold], bound=1)
    assert found.shallow_ratio[0] == np.mean(np.array(output.exit_layer) == 2)
    assert 0 < found.shallow_ratio[0] < 1
    others = ids.repeat_interleave(VOCAB, dim=0)
    others[:, -1] = torch.arange(VOCAB).repeat(len(ids))
    nll, _ = sequence_risk._stepwise(model, others, PROMPT_TOKENS, strategy)
    assert torch.equal(nll[:, -1].view(-1, VOCAB).argmin(dim=1), ids[:, -1])


@pytest.mark.parametrize("policy", ["exact", "recompute"])
def test_one_pass_is_step_by_step(policy):
    """The shortcut of the exact policies, after a prompt of several tokens."""
    model, ids = model_for(policy), token_ids(PROMPTS, PROMPT_TOKENS + NEW)
    strategy = strategy_for(model, policy)
    nll, shallow = sequence_risk._stepwise(model, ids, PROMPT_TOKENS, strategy)
    exits = sequence_risk._both_exits(model, ids, PROMPT_TOKENS, strategy.criterion)
    assert torch.equal(shallow, exits.confidence >= strategy.threshold)
    routed = torch.where(shallow, exits.nll_shallow, exits.nll_deep)
    torch.testing.assert_close(nll, routed, rtol=1e-9, atol=1e-9)


def test_the_worst_loss_is_one():
    """A head that is sure of another token costs far more than log V."""
    model = tiny_model()
    model.exit_norm.weight *= 1000
    found = excess_loss(
        model, token_ids(PROMPTS, 12), 4, EarlyExit(threshold=0), [0.0], bound=math.log(VOCAB)
    )
    assert found.risk.tolist() == [[1.0] * PROMPTS]


@pytest.mark.parametrize("policy", ["exact", "hole"])
def test_batches_change_nothing(policy, monkeypatch):
    model, ids = model_for(policy), token_ids(PROMPTS, PROMPT_TOKENS + NEW)
    strategy, seen = strategy_for(model, policy), []
    grid = [strategy.threshold, 0.0]

    def found():
        risks = disagreement(model, ids[:, :4], NEW, strategy, grid, advance=seen.append)
        losses = excess_loss(
            model, ids, PROMPT_TOKENS, strategy, grid, bound=1, advance=seen.append
        )
        return [risks.risk, risks.shallow_ratio, losses.risk, losses.shallow_ratio]

    together = found()
    assert seen == [PROMPTS] * 4
    for name, value in (("_MAX_ROWS", 2), ("_MAX_LOGITS", 2 * NEW * VOCAB)):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sequence_risk, name, value)
            for one, two in zip(found(), together, strict=True):
                np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12)
        assert seen.count(2) == 8 and seen.count(1) == 4


@pytest.mark.parametrize("policy", POLICIES)
def test_engines_agree(policy):
    model, prompts = model_for(policy, dtype=torch.float32), token_ids(PROMPTS, PROMPT_TOKENS)
    strategy = strategy_for(model, policy)
    native, reference = (
        disagreement(
            model,
            prompts,
            NEW,
            strategy,
            [strategy.threshold],
            engine=engine_for(model, strategy, name),
        )
        for name in ("native", "reference")
    )
    assert native.risk.tolist() == reference.risk.tolist()
    assert native.shallow_ratio.tolist() == reference.shallow_ratio.tolist()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("seq_len", [8, 500])
def test_default_grid(criterion, seq_len):
    model, ids = tiny_model(max_seq_len=512), documents(1060)
    grid = default_grid(model, ids, seq_len, criterion)
    assert len(grid) == 22 and list(grid) == sorted(grid, reverse=True)
    windows = ids[: (len(ids) - 1) // seq_len * seq_len].reshape(-1, seq_len)
    state = model(torch.from_numpy(windows.astype(np.int64))).exit_state
    values = confidence(model, state, criterion).flatten()
    for threshold, share in zip(grid, (0.01, 0.02, 0.05, 0.1), strict=False):
        assert (values >= threshold - 1e-9).double().mean() == pytest.approx(share, abs=0.004)
    assert grid[-1] == pytest.approx(float(values.min()), abs=1e-6)


def test_default_grid_takes_windows_from_everywhere(monkeypatch):
    """Of more text than it needs, it does not take the beginning alone."""
    model, first, last = tiny_model(), documents(200), documents(200, seed=1)
    monkeypatch.setattr(sequence_risk, "_GRID_TOKENS", 200)
    both = default_grid(model, np.concatenate([first, last]), 10, "max_prob")
    assert both != default_grid(model, first, 10, "max_prob")
    assert both != default_grid(model, last, 10, "max_prob")


def places(ids, drawn):
    """(document, offset in it) of each drawn run, by looking for it."""
    parts = np.split(ids, np.flatnonzero(ids == END))[1:]
    texts = ["," + ",".join(map(str, part[1:])) + "," for part in parts]
    found = []
    for run in drawn.ids.tolist():
        key = "," + ",".join(map(str, run)) + ","
        (document,) = (i for i, text in enumerate(texts) if key in text)
        found.append((document, texts[document].index(key)))
    return found


@pytest.mark.parametrize("count", [6, 7, 24])
def test_drawn_runs_lie_inside_documents(count):
    ids = documents(40, 3, 5, 11, 30, 4, 10, 10, 0)
    # seven documents have 8 + 1 + 2 + 6 + 2 + 2 = 21 runs of five
    if count > 21:
        with pytest.raises(
            ValueError, match="must hold 24 sequences of 5 tokens, got 21; take few"
        ):
            draw_sequences(ids, END, count, 5)
        return
    drawn = draw_sequences(ids, END, count, 5)
    assert drawn.ids.shape == (count, 5) and drawn.ids.dtype == torch.int64
    assert END not in drawn.ids
    where = places(ids, drawn)
    assert len(set(where)) == count
    assert drawn.num_documents == len({document for document, _ in where})
    assert torch.equal(drawn.ids, draw_sequences(ids, END, count, 5).ids)


def test_one_run_a_document_if_there_are_enough():
    """Each as likely as another, however long: of 30 long and 30 short ones about half are long."""
    ids = documents(*[500, 6] * 30)
    drawn = draw_sequences(ids, END, 30, 5)
    assert drawn.num_documents == 30
    where = places(ids, drawn)
    assert 8 <= sum(document % 2 for document, _ in where) <= 22
    # and any run of a long one
    offsets = [offset for document, offset in where if document % 2 == 0]
    assert len(set(offsets)) == len(offsets) and max(offsets) > 200


def test_every_run_is_drawn_if_all_are_wanted():
    ids = documents(20, 7, 10)
    drawn = draw_sequences(ids, END, 7, 5)
    assert drawn.num_documents == 3
    expected = [ids[i : i + 5].tolist() for i in (1, 6, 11, 16, 22, 30, 35)]
    assert sorted(drawn.ids.tolist()) == sorted(expected)
