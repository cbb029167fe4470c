"""Generation: what runs is counted from outside, and every row is as if it were alone."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from lego.generation import ReferenceEngine, generate
from lego.sampling import Sampling
from lego.strategies import EarlyExit, FullDepth, Speculative, Uncached
from tests.models import (
    CRITERIA,
    POLICIES,
    VARIANTS,
    VOCAB,
    early_exit,
    generate_watched,
    midway,
    model_for,
    tiny_model,
    token_ids,
    watch,
)

BOTH = pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
ANY_POLICY = pytest.mark.parametrize("policy", POLICIES)
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=1.3, top_k=20, seed=5)}
PROMPTS = [token_ids(n, seed=n).tolist() for n in (1, 7, 3, 3, 12)]


def shallow(output, model):
    """Exit flags by row."""
    return [[layer == model.config.exit_layer for layer in row] for row in output.exit_layer]


def assert_mixed(output, model):
    flags = [flag for row in shallow(output, model) for flag in row]
    assert 0.1 < sum(flags) / len(flags) < 0.9


def assert_same_rows(got, expected):
    assert got.tokens == expected.tokens and got.exit_layer == expected.exit_layer
    for one, other in zip(got.confidence, expected.confidence, strict=True):
        assert one == pytest.approx(other, abs=1e-10, nan_ok=True)


def spread_stops(rows):
    """Two tokens that end the rows at as many different steps as any two do."""

    def lengths(stop):
        ends = ([t for t, token in enumerate(row, 1) if token in stop] for row in rows)
        return [min(end, default=len(row)) for end, row in zip(ends, rows, strict=True)]

    pairs = combinations(sorted({token for row in rows for token in row}), 2)
    return max(pairs, key=lambda stop: (len(set(lengths(stop))), sum(lengths(stop))))


@pytest.mark.parametrize(
    ("variant", "sampling"), [("gqa", "greedy"), ("all", "sampled"), ("shallow", "greedy")]
)
@pytest.mark.parametrize("criterion", CRITERIA)
@ANY_POLICY
def test_skipped_layers_are_never_called(policy, criterion, variant, sampling):
    model = model_for(policy, **VARIANTS[variant])
    strategy = early_exit(model, policy, criterion)
    prompts, num_new = PROMPTS[1:4], 14
    output, in_prefill, seen = generate_watched(
        model, prompts, num_new, strategy, sampling=SAMPLINGS[sampling]
    )
    assert_mixed(output, model)
    flags = shallow(output, model)
    num_prompt = sum(len(prompt) - 1 for prompt in prompts)
    num_tokens, num_deep = 3 * num_new, sum(not flag for row in flags for flag in row)
    # up to its last deep token a row has settled what it owes
    settled = [max((t + 1 for t in range(num_new) if not row[t]), default=0) for row in flags]
    assert set(seen.lower) == {num_prompt + num_tokens}
    if policy == "exact":
        owed = [len(p) - 1 + n for p, n in zip(prompts, settled, strict=True) if n > 0]
        assert set(in_prefill.upper) == {0} and set(seen.upper) == {num_deep}
        assert set(seen.upper_kv) == {sum(owed)}
    else:
        deep_calls = sum(settled) if policy == "recompute" else num_deep
        assert set(in_prefill.upper) == {num_prompt}
        assert set(seen.upper) == {num_prompt + deep_calls}
        apart = sum(settled) - num_deep if policy == "propagate" else 0
        assert set(seen.upper_kv) == {apart}
    assert in_prefill.head == in_prefill.gate == 0
    if criterion == "gate":  # the head runs once a token, at the exit that is taken
        assert (seen.gate, seen.head) == (num_tokens, num_tokens)
    else:  # and twice for a deep token
        assert (seen.gate, seen.head) == (0, num_tokens + num_deep)


@pytest.mark.parametrize("criterion", CRITERIA)
@ANY_POLICY
def test_at_threshold_zero_the_upper_block_rests(policy, criterion):
    model = model_for(policy)
    strategy = EarlyExit(threshold=0.0, criterion=criterion, kv_policy=policy)
    output, in_prefill, seen = generate_watched(model, PROMPTS, 6, strategy)
    assert output.exit_layer == [[2] * 6] * 5
    assert seen.upper == in_prefill.upper == ([0, 0] if policy == "exact" else [21, 21])
    assert seen.upper_kv == [0, 0] and seen.head == 30


@pytest.mark.parametrize("variant", VARIANTS)
@BOTH
def test_full_depth_and_uncached_calls(upper_kv, variant):
    model = tiny_model(upper_kv, **VARIANTS[variant])
    prompts = PROMPTS[1:3]  # 7 and 3 ids
    output, in_prefill, seen = generate_watched(model, prompts, 5, FullDepth())
    own = upper_kv == "own"
    assert set(seen.lower) == {8 + 10} and set(in_prefill.lower) == {8}
    assert set(in_prefill.upper) == {8 if own else 0}
    assert set(seen.upper) == {8 + 10 if own else 10}
    assert set(seen.upper_kv) == {0 if own else 8 + 10}
    assert seen.head == 10 and seen.gate == 0
    assert all(math.isnan(x) for row in output.confidence for x in row)
    assert output.exit_layer == [[model.config.num_layers] * 5] * 2
    padded = 2 * sum(7 + step for step in range(5))
    for all_logits in (False, True):
        strategy = Uncached(all_logits=all_logits)
        uncached, in_prefill, seen = generate_watched(model, prompts, 5, strategy)
        assert in_prefill.nothing
        assert set(seen.lower) == set(seen.upper) == {padded}
        assert seen.head == (padded if all_logits else 10)
        assert_same_rows(uncached, output)


@BOTH
def test_dense_model(upper_kv):
    model = tiny_model(upper_kv, exit_layer=4)
    with watch(model) as seen:
        output = generate(model, PROMPTS, 6, FullDepth())
    assert set(seen.lower) == {21 + 30} and seen.head == 30
    assert output.stats.decode.upper_layer_calls == output.stats.decode.upper_passes == 0
    assert output.exit_layer == [[4] * 6] * 5
    assert_same_rows(generate(model, PROMPTS, 6, Uncached()), output)


@pytest.mark.parametrize(("variant", "sampling"), [("gqa", "greedy"), ("all", "sampled")])
@ANY_POLICY
def test_threshold_infinity_is_full_depth(policy, variant, sampling):
    model, options = model_for(policy, **VARIANTS[variant]), {"sampling": SAMPLINGS[sampling]}
    full = generate(model, PROMPTS, 10, FullDepth(), **options)
    assert_same_rows(generate(model, PROMPTS, 10, Uncached(), **options), full)
    for criterion in CRITERIA:
        never = EarlyExit(threshold=math.inf, criterion=criterion, kv_policy=policy)
        got = generate(model, PROMPTS, 10, never, **options)
        assert got.tokens == full.tokens and got.exit_layer == full.exit_layer
        assert all(0 <= x <= 1 for row in got.confidence for x in row)
    # greedy text of a tiny model may loop, but not all of it
    assert len({token for row in full.tokens for token in row}) > 10


@ANY_POLICY
def test_default_policy(policy):
    model = model_for(policy)
    strategy = early_exit(model, policy)
    default = generate(model, PROMPTS, 10, replace(strategy, kv_policy=None))
    if policy in ("exact", "recompute"):
        assert_same_rows(default, generate(model, PROMPTS, 10, strategy))


def test_tokens_are_those_of_the_parallel_two_stage_evaluation():
    """Greedy exit-state generation, checked afterwards on the text that it wrote."""
    for criterion in CRITERIA:
        model = tiny_model()
        output = generate(model, PROMPTS, 20, early_exit(model, "exact", criterion))
        assert_mixed(output, model)
        for prompt, tokens, layers in zip(PROMPTS, output.tokens, output.exit_layer, strict=True):
            states = model(torch.tensor([prompt + tokens[:-1]]))
            shallow_logits = model.exit_logits(states.exit_state)[0, len(prompt) - 1 :]
            deep_logits = model.final_logits(states.final_state)[0, len(prompt) - 1 :]
            for t, (token, layer) in enumerate(zip(tokens, layers, strict=True)):
                logits = shallow_logits if layer == 2 else deep_logits
                assert logits[t].argmax() == token


@pytest.mark.parametrize("criterion", CRITERIA)
@ANY_POLICY
def test_every_row_of_a_batch_is_as_if_alone(policy, criterion):
    model = model_for(policy)
    # a threshold between confidences of this very text, so that rounding cannot cross it
    strategy = early_exit(model, policy, criterion)
    observed = generate(model, PROMPTS, 16, strategy).confidence
    strategy = replace(strategy, threshold=midway([x for row in observed for x in row]))
    free = generate(model, PROMPTS, 16, strategy)
    stop = spread_stops(free.tokens)
    together = generate(model, PROMPTS, 16, strategy, stop_tokens=stop)
    assert_mixed(together, model)
    lengths = [len(row) for row in together.tokens]
    assert len(set(lengths)) >= 3
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], 16, strategy, stop_tokens=stop)
        assert alone.tokens[0] == together.tokens[row] == free.tokens[row][: lengths[row]]
        assert alone.exit_layer[0] == together.exit_layer[row]
        assert alone.confidence[0] == pytest.approx(together.confidence[row], abs=1e-10)
        margin = min(abs(x - strategy.threshold) for x in alone.confidence[0])
        assert margin > 1e-7
        assert alone.tokens[0][-1] in stop or lengths[row] == 16
        assert not set(alone.tokens[0][:-1]) & set(stop)


@pytest.mark.parametrize("strategy", [Uncached(), FullDepth()], ids=["uncached", "full"])
@BOTH
def test_rows_at_full_depth_are_as_if_alone(upper_kv, strategy):
    model = tiny_model(upper_kv)
    free = generate(model, PROMPTS, 12, strategy)
    stop = [free.tokens[0][2], free.tokens[2][6]]
    together = generate(model, PROMPTS, 12, strategy, stop_tokens=stop)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], 12, strategy, stop_tokens=stop)
        assert alone.tokens[0] == together.tokens[row]
    assert len({len(row) for row in together.tokens}) >= 2


@ANY_POLICY
def test_streamer_sees_the_output_in_order(policy):
    model, streamed = model_for(policy), []
    strategy = early_exit(model, policy)
    free = generate(model, PROMPTS, 8, strategy)
    stop = [free.tokens[1][2]]
    output = generate(model, PROMPTS, 8, strategy, stop_tokens=stop, streamer=streamed.append)
    expected = [
        (row, output.tokens[row][t], output.exit_layer[row][t], output.confidence[row][t])
        for t in range(8)
        for row in range(5)
        if t < len(output.tokens[row])
    ]
    assert [(x.row, x.token, x.exit_layer, x.confidence) for x in streamed] == expected
    assert output.tokens[1][-1] in stop and len(output.tokens[1]) <= 3


def test_streamer_is_called_while_generating():
    model, calls = tiny_model(), []
    with watch(model) as seen:
        generate(model, PROMPTS[:1], 3, FullDepth(), streamer=lambda new: calls.append(seen.head))
    assert calls == [1, 2, 3]


@ANY_POLICY
def test_no_new_tokens(policy):
    model = model_for(policy)
    early = EarlyExit(threshold=0.5, kv_policy=policy)
    for strategy in (early, FullDepth(), Uncached(), Speculative()):
        output = generate(model, PROMPTS, 0, strategy, streamer=pytest.fail)
        assert output.tokens == output.exit_layer == output.confidence == [[]] * 5
        assert output.stats.decode.lower_layer_calls == output.stats.decode.head_calls == 0


def exact_strategies(model):
    """Those whose tokens do not depend on where the prompt ended."""
    policy = "exact" if model.config.upper_kv == "exit_state" else "recompute"
    return [early_exit(model, policy), FullDepth(), Uncached(), Speculative(stop_confidence=0.1)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@BOTH
def test_goes_on_from_a_longer_prompt(upper_kv, sampling):
    model, options = tiny_model(upper_kv), {"sampling": SAMPLINGS[sampling]}
    for strategy in exact_strategies(model):
        whole = generate(model, PROMPTS, 12, strategy, **options)
        longer = [prompt + row[:5] for prompt, row in zip(PROMPTS, whole.tokens, strict=True)]
        rest = generate(model, longer, 7, strategy, **options)
        assert rest.tokens == [row[5:] for row in whole.tokens]
        assert rest.exit_layer == [row[5:] for row in whole.exit_layer]


@BOTH
def test_a_sampled_row_does_not_notice_the_others(upper_kv):
    model, options = tiny_model(upper_kv), {"sampling": SAMPLINGS["sampled"]}
    others = [token_ids(n, seed=40 + n).tolist() for n in (2, 9, 3)]
    for strategy in exact_strategies(model):
        expected = generate(model, PROMPTS, 12, strategy, **options).tokens
        assert len(set(map(tuple, expected))) == 5
        stop = spread_stops(expected)
        left = generate(model, PROMPTS, 12, strategy, stop_tokens=stop, **options).tokens
        assert left == [row[: len(kept)] for row, kept in zip(expected, left, strict=True)]
        assert len(set(map(len, left))) >= 3
        among = [others[0], PROMPTS[1], others[1], PROMPTS[3], others[2], others[0]]
        among_tokens = generate(model, among, 12, strategy, **options).tokens
        assert [among_tokens[1], among_tokens[3]] == [expected[1], expected[3]]
        again = generate(model, [PROMPTS[1]] * 2, 12, strategy, **options).tokens
        assert again[1] == expected[1] != again[0]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_nan_logits(sampling):
    options = {"sampling": SAMPLINGS[sampling]}
    for strategy in (FullDepth(), Uncached(), Speculative(), EarlyExit(threshold=0.0)):
        model = tiny_model(tie_embeddings=False)
        model.head.weight[7, 3] = math.nan
        with pytest.raises(FloatingPointError, match="^generate: logits must be numbers, got NaN$"):
            generate(model, PROMPTS, 3, strategy, **options)


def test_prompts_as_lists_tensors_or_one_tensor():
    model, ids = tiny_model(), token_ids(3, 5)
    expected = generate(model, ids.tolist(), 4, FullDepth()).tokens
    assert generate(model, ids, 4, FullDepth()).tokens == expected
    assert generate(model, list(ids.int()), 4, FullDepth()).tokens == expected


def test_the_longest_sequence_fits():
    model = tiny_model(max_seq_len=12)
    prompt = token_ids(1, 8).tolist()
    cached = generate(model, prompt, 4, FullDepth())
    assert len(cached.tokens[0]) == 4
    assert_same_rows(generate(model, prompt, 4, Uncached()), cached)


def test_seconds_are_measured_and_no_gradient_is_kept():
    model = tiny_model().requires_grad_(True)
    stats = generate(model, PROMPTS, 3, EarlyExit(threshold=0.5)).stats
    assert stats.prefill_seconds > 0 and stats.decode_seconds > 0
    assert all(parameter.grad is None for parameter in model.parameters())


REFUSED = {
    "generate: prompt_ids must hold at least one prompt, got none": {"prompt_ids": []},
    "generate: prompt 1 must be a non-empty list of ids, got shape (0,)": {"prompt_ids": [[1], []]},
    "generate: prompt 0 must be a non-empty list of ids, got shape (1, 2)": {
        "prompt_ids": [[[1, 2]]]
    },
    "generate: prompt 0 must be a non-empty list of ids, got shape ()": {"prompt_ids": [1, 2]},
    f"generate: prompt 1: token ids must be in [0, {VOCAB}), got {VOCAB}": {
        "prompt_ids": [[1], [2, VOCAB]]
    },
    f"generate: prompt 0: token ids must be in [0, {VOCAB}), got -1": {"prompt_ids": [[3, -1]]},
    "generate: prompt 1 and new tokens must fit max_seq_len=64, got 60 + 5": {
        "prompt_ids": [[1], [2] * 60]
    },
    "generate: max_new_tokens must be >= 0, got -1": {"max_new_tokens": -1},
    "EarlyExit.kv_policy: must be one of ('exact',) for upper_kv='exit_state', got 'hole'": {
        "strategy": EarlyExit(threshold=0.5, kv_policy="hole")
    },
    "EarlyExit.kv_policy: must be one of ('recompute', 'propagate', 'hole') for upper_kv='own', "
    "got 'exact'": {
        "model": tiny_model("own"),
        "strategy": EarlyExit(threshold=0.5, kv_policy="exact"),
    },
    "EarlyExit: the model must have an upper block, got a dense model": {
        "model": tiny_model(exit_layer=4),
        "strategy": EarlyExit(threshold=0.5),
    },
    "Speculative: the model must have an upper block, got a dense model": {
        "model": tiny_model(exit_layer=4),
        "strategy": Speculative(),
    },
    "generate: engine.model must be the model, got another one": {
        "engine": ReferenceEngine(tiny_model())
    },
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refuses_before_anything_runs(sentence):
    valid = {
        "model": tiny_model(),
        "prompt_ids": [[1, 2]],
        "max_new_tokens": 5,
        "strategy": FullDepth(),
    }
    arguments = valid | REFUSED[sentence]
    with watch(arguments["model"]) if arguments["model"].upper else watch(valid["model"]) as seen:
        with pytest.raises(ValueError) as caught:
            generate(**arguments, streamer=pytest.fail)
    assert str(caught.value) == sentence
    assert seen.nothing


def test_strategy_refuses():
    with pytest.raises(ValueError, match="^EarlyExit.threshold: must be a number, got nan$"):
        EarlyExit(threshold=math.nan)
    with pytest.raises(ValueError, match="^EarlyExit.criterion: must be one of .* got 'x'$"):
        EarlyExit(threshold=0.5, criterion="x")
    with pytest.raises(ValueError, match="^Speculative.draft_tokens: must be >= 1, got 0$"):
        Speculative(draft_tokens=0)
    with pytest.raises(ValueError, match="^Speculative.stop_confidence: must be a number, got nan"):
        Speculative(stop_confidence=math.nan)
    with pytest.raises(ValueError, match="^Speculative.criterion: must be one of .* got 'x'$"):
        Speculative(criterion="x")
    with pytest.raises(ValueError, match="^EarlyExit.kv_policy: must be one of .* got 'x'$"):
        EarlyExit(threshold=0.5, kv_policy="x").policy_for(tiny_model())
