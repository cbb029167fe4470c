"""Step by step against the parallel forward, and what every KV policy leaves in the caches."""

import math
from dataclasses import replace

import pytest
import torch

from lego.decoding import CachedDecoder, DrawingDecoder, UncachedDecoder
from lego.kv_cache import KVCache, attend_within
from lego.sampling import Sampling, draw
from lego.strategies import EarlyExit, FullDepth, Uncached
from tests.models import (
    CRITERIA,
    POLICIES,
    VARIANTS,
    confidence,
    early_exit,
    model_for,
    tiny_model,
    token_ids,
)

BOTH = pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
# the policies whose upper K/V are those of full depth on the same tokens
EXACT = pytest.mark.parametrize("policy", ["exact", "recompute"])
# softmax and cached attention sum in another order than whole sequences do
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def run_steps(model, strategy, ids, num_prompt=0):
    """Teacher-forced: (logits [B, T, V], exit layers [B, T], confidence [B, T], the decoder)."""
    decoder = CachedDecoder(model, strategy, *ids.shape)
    decoder.prefill(list(ids[:, :num_prompt]))
    steps = [decoder.step(ids[:, t]) for t in range(num_prompt, ids.size(1))]
    logits = torch.stack([step.logits_BV for step in steps], dim=1)
    depth = torch.tensor([step.exit_layer for step in steps]).T
    scores = torch.tensor([step.confidence for step in steps], dtype=torch.float64).T
    return logits, depth, scores, decoder


def filled(decoder, row=0):
    """Upper K and V [L, T, K, E] of the slots that one row has filled."""
    cache, upper_len = decoder.blocks.upper_cache, decoder.blocks.rows[row].upper_len
    return cache.k[:, row, :upper_len], cache.v[:, row, :upper_len]


def two_stage(model, ids, strategy):
    """The parallel evaluation: both exits on everything, routed by confidence."""
    states = model(ids)
    scores = confidence(model, states.exit_state, strategy.criterion)
    exits = scores >= strategy.threshold
    shallow, deep = model.exit_logits(states.exit_state), model.final_logits(states.final_state)
    return torch.where(exits[..., None], shallow, deep), exits, scores


def assert_mixed(exits):
    assert 0.2 < exits.double().mean() < 0.8


@pytest.mark.parametrize("num_prompt", [0, 1, 7])
@pytest.mark.parametrize("variant", VARIANTS)
@BOTH
def test_full_depth_steps_are_the_parallel_forward(upper_kv, variant, num_prompt):
    model, ids = tiny_model(upper_kv, **VARIANTS[variant]), token_ids(2, 12)
    logits, depth, scores, _ = run_steps(model, FullDepth(), ids, num_prompt)
    expected = model.final_logits(model(ids).final_state)[:, num_prompt:]
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert (depth == model.config.num_layers).all() and scores.isnan().all()


@pytest.mark.parametrize(
    ("criterion", "num_prompt"),
    [("max_prob", 0), ("max_prob", 6), ("margin", 6), ("entropy", 0), ("gate", 6)],
)
@pytest.mark.parametrize("variant", VARIANTS)
@EXACT
def test_steps_are_the_parallel_two_stage_evaluation(policy, criterion, variant, num_prompt):
    model, ids = model_for(policy, **VARIANTS[variant]), token_ids(2, 18)
    strategy = early_exit(model, policy, criterion, ids=ids)
    logits, depth, scores, _ = run_steps(model, strategy, ids, num_prompt)
    expected, exits, exact_scores = two_stage(model, ids, strategy)
    assert_mixed(exits)
    assert (exact_scores - strategy.threshold).abs().min() > 1e-8
    assert torch.equal(depth == model.config.exit_layer, exits[:, num_prompt:])
    assert torch.equal(depth == model.config.num_layers, ~exits[:, num_prompt:])
    torch.testing.assert_close(scores, exact_scores[:, num_prompt:], **CLOSE)
    torch.testing.assert_close(logits, expected[:, num_prompt:], **CLOSE)


@pytest.mark.parametrize("policy", ["hole", "propagate"])
def test_inexact_policies_differ_from_the_parallel_evaluation(policy):
    model, ids = model_for(policy), token_ids(2, 18)
    strategy = early_exit(model, policy, ids=ids)
    logits, depth, scores, _ = run_steps(model, strategy, ids)
    expected, exits, exact_scores = two_stage(model, ids, strategy)
    assert_mixed(exits)
    # the exit state never depends on the upper block: decisions and shallow logits agree
    assert torch.equal(depth == 2, exits)
    torch.testing.assert_close(scores, exact_scores, **CLOSE)
    torch.testing.assert_close(logits[exits], expected[exits], **CLOSE)
    for row in range(2):
        first_exit = int(exits[row].int().argmax())
        difference = (logits[row] - expected[row]).abs().amax(-1)
        after = [t for t in range(18) if t > first_exit and not exits[row, t]]
        assert (difference[:first_exit] < 1e-10).all()
        assert difference[after].min() > 1e-3


def test_inexact_policies_differ_from_each_other():
    model, ids = tiny_model("own"), token_ids(2, 18)
    hole = early_exit(model, "hole", ids=ids)
    one, depth, _, _ = run_steps(model, hole, ids)
    other, _, _, _ = run_steps(model, replace(hole, kv_policy="propagate"), ids)
    assert (one - other).abs().amax(-1)[depth == 4].max() > 1e-3


@pytest.mark.parametrize("num_prompt", [0, 5])
@pytest.mark.parametrize("variant", VARIANTS)
@EXACT
def test_upper_caches_equal_those_of_full_depth(policy, variant, num_prompt):
    model, ids = model_for(policy, **VARIANTS[variant]), token_ids(1, 18)
    strategy = early_exit(model, policy, ids=ids)
    _, depth, _, decoder = run_steps(model, strategy, ids, num_prompt)
    _, _, _, full = run_steps(model, FullDepth(), ids, num_prompt)
    last_deep = num_prompt + int((depth[0] == model.config.num_layers).nonzero().max())
    assert (depth == model.config.exit_layer).sum() >= 3
    assert decoder.blocks.rows[0].upper_len == last_deep + 1 and full.blocks.rows[0].upper_len == 18
    for got, expected in zip(filled(decoder), filled(full), strict=True):
        torch.testing.assert_close(got, expected[:, : last_deep + 1], **CLOSE)
        assert got.abs().amax((0, 2, 3)).min() > 0.01  # no slot was left empty


@EXACT
def test_what_a_row_owes_is_settled_by_its_next_deep_token(policy):
    model, ids = model_for(policy), token_ids(1, 10)
    decoder = CachedDecoder(model, EarlyExit(threshold=0.0, kv_policy=policy), 1, 10)
    for t in range(9):
        decoder.step(ids[:, t])
    assert decoder.blocks.rows[0].upper_len == 0 and not decoder.blocks.upper_cache.k.any()
    decoder.threshold_B[:] = math.inf
    logits = decoder.step(ids[:, 9]).logits_BV
    assert decoder.blocks.rows[0].upper_len == 10
    torch.testing.assert_close(logits, model.final_logits(model(ids).final_state)[:, 9], **CLOSE)
    assert decoder.counts.upper_passes == 2  # all ten tokens, or the newest alone, in one chunk
    assert decoder.counts.upper_layer_calls == (2 * 10 if policy == "recompute" else 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_propagate_projects_the_exit_state_through_every_skipped_layer(variant):
    model, ids = tiny_model("own", **VARIANTS[variant]), token_ids(1, 18)
    strategy = early_exit(model, "propagate", ids=ids)
    _, depth, _, decoder = run_steps(model, strategy, ids, num_prompt=4)
    exits = (depth[0] == model.config.exit_layer).nonzero().flatten() + 4
    keys, values = filled(decoder)
    exits = exits[exits < keys.size(1)]
    assert len(exits) >= 3
    exit_state = model(ids).exit_state
    for layer, block in enumerate(model.upper):
        x = block.attention_norm(exit_state)
        k, v = block.attention.project_kv(x, model.rotary(torch.arange(18)[None]))
        torch.testing.assert_close(keys[layer, exits], k[0, exits], **CLOSE)
        torch.testing.assert_close(values[layer, exits], v[0, exits], **CLOSE)


@pytest.mark.parametrize("num_prompt", [0, 5])
def test_hole_leaves_dense_caches(num_prompt):
    model, ids = tiny_model("own"), token_ids(3, 18)
    strategy = early_exit(model, "hole", ids=ids)
    _, depth, _, decoder = run_steps(model, strategy, ids, num_prompt)
    num_deep = (depth == 4).sum(1)
    assert_mixed(depth == 2)
    assert [row.upper_len for row in decoder.blocks.rows] == (num_prompt + num_deep).tolist()
    for row, count in enumerate((num_prompt + num_deep).tolist()):
        for cache in (decoder.blocks.upper_cache.k, decoder.blocks.upper_cache.v):
            assert cache[:, row, :count].abs().amax((0, 2, 3)).min() > 0.01
            assert not cache[:, row, count:].any()


@pytest.mark.parametrize("num_prompt", [0, 5])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_token_keeps_its_absolute_position(policy, num_prompt):
    """Keys of the first upper layer are turned by where a token stands, not by its slot."""
    model, ids = model_for(policy), token_ids(1, 20)
    strategy = early_exit(model, policy, ids=ids)
    _, depth, _, decoder = run_steps(model, strategy, ids, num_prompt)
    deep = (depth[0] == 4).nonzero().flatten() + num_prompt
    position = torch.arange(int(deep.max()) + 1)
    if policy == "hole":
        position = torch.cat((torch.arange(num_prompt), deep))
    states = model(ids).exit_state[:, position]

    def keys_at(position):
        if policy == "exact":
            return model.upper_kv(states, position[None])[0][0][0]
        block = model.upper[0]
        x = block.attention_norm(states)
        return block.attention.project_kv(x, model.rotary(position[None]))[0][0]

    got = filled(decoder)[0][0]
    torch.testing.assert_close(got, keys_at(position), **CLOSE)
    if policy == "hole":
        slot = torch.arange(len(position))
        moved = slot != position
        assert moved.sum() > 3  # a position taken from the cache length would be seen
        assert (got - keys_at(slot))[moved].abs().amax((1, 2)).min() > 1e-2


def test_hole_attends_to_the_thinned_past_at_true_positions():
    """The deep logits, from the definition: whole-sequence attention with the holes masked out."""
    model, ids = tiny_model("own", num_layers=3), token_ids(1, 18)
    strategy = early_exit(model, "hole", ids=ids)
    logits, depth, _, _ = run_steps(model, strategy, ids)
    deep = (depth[0] == 3).nonzero().flatten()
    state = model(ids).exit_state[:, deep]  # with holes, upper layers see deep tokens alone
    final = model.run_upper(state, deep[None], lambda index: attend_within)
    assert len(deep) > 4 and not torch.equal(deep, torch.arange(len(deep)))
    torch.testing.assert_close(logits[:, deep], model.final_logits(final), **CLOSE)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_different_lengths_owe_different_amounts(policy):
    """Ragged prompts, rows leaving on the way: every row is as if it were alone."""
    model, lengths, ids = model_for(policy), [0, 6, 3, 3, 11], token_ids(5, 24)
    strategy = early_exit(model, policy, ids=ids)
    decoder = CachedDecoder(model, strategy, 5, 24)
    decoder.prefill([row[:n] for row, n in zip(ids, lengths, strict=True)])
    alone = []
    for row, length in zip(ids, lengths, strict=True):
        single = CachedDecoder(model, strategy, 1, 24)
        single.prefill([row[None, :length][0]])
        alone.append(single)
    alive, seen = [0, 1, 2, 3, 4], set()
    for step in range(12):
        if step == 5:
            alive = [0, 2, 3, 4]
            decoder.keep([0, 2, 3, 4])
        if step == 9:
            alive = [3, 4]
            decoder.keep([2, 3])
        token = torch.stack([ids[row, lengths[row] + step] for row in alive])
        together = decoder.step(token)
        for i, row in enumerate(alive):
            single = alone[row].step(token[i : i + 1])
            assert together.exit_layer[i] == single.exit_layer[0]
            seen.add((row, single.exit_layer[0]))
            torch.testing.assert_close(together.confidence[i], single.confidence[0], **CLOSE)
            torch.testing.assert_close(together.logits_BV[i], single.logits_BV[0], **CLOSE)
    assert len(seen) == 10  # every row has exited and has gone deep
    for i, row in enumerate(alive):
        for got, expected in zip(filled(decoder, i), filled(alone[row]), strict=True):
            torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("all_logits", [False, True])
@BOTH
def test_uncached_steps_are_full_depth_steps(upper_kv, all_logits):
    model, ids = tiny_model(upper_kv), token_ids(3, 9)
    uncached = UncachedDecoder(model, Uncached(all_logits=all_logits))
    cached = CachedDecoder(model, FullDepth(), 3, 9)
    prompts = [ids[0, :4], ids[1, :0], ids[2, :2]]
    for decoder in (uncached, cached):
        decoder.prefill(prompts)
    for t in (4, 5):
        one, other = uncached.step(ids[:, t]), cached.step(ids[:, t])
        torch.testing.assert_close(one.logits_BV, other.logits_BV, **CLOSE)
        assert one.exit_layer == other.exit_layer == [4] * 3
        assert all(math.isnan(x) for x in one.confidence + other.confidence)
    for decoder in (uncached, cached):
        decoder.keep([2, 0])
    one, other = uncached.step(ids[:2, 6]), cached.step(ids[:2, 6])
    torch.testing.assert_close(one.logits_BV, other.logits_BV, **CLOSE)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.2, seed=4)], ids=str)
def test_drawing_decoder_keeps_row_numbers(sampling):
    """Rows leave in the middle; the others draw on as themselves, from their own logits."""
    model, lengths = tiny_model(), [3, 1, 6, 2]
    prompts = [token_ids(n, seed=n) for n in lengths]
    decoder = DrawingDecoder(CachedDecoder(model, FullDepth(), 4, 20), sampling)
    decoder.prefill(prompts)
    assert decoder.counts.lower_layer_calls == 2 * (12 - 4)
    texts, alive = [ids.tolist() for ids in prompts], [0, 1, 2, 3]
    for left in ([], [1], [], [0, 3], []):
        decoder.finish(left)
        alive = [row for row in alive if row not in left]
        new = decoder.step()
        assert [x.row for x in new] == alive
        for row, token, depth, score in new:
            logits = model.final_logits(model(torch.tensor([texts[row]])).final_state)[:, -1]
            assert [token] == draw(logits, sampling, [row], [len(texts[row])])
            assert depth == 4 and math.isnan(score)
            texts[row].append(token)
    assert [len(text) - n for text, n in zip(texts, lengths, strict=True)] == [3, 1, 5, 3]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_confidence_at_the_threshold_exits(criterion):
    model, ids = tiny_model(), token_ids(1, 6)
    _, _, scores, _ = run_steps(model, EarlyExit(threshold=0.0, criterion=criterion), ids)
    for t, score in enumerate(scores[0].tolist()):
        for threshold, layers in [(score, 2), (math.nextafter(score, 2), 4)]:
            strategy = EarlyExit(threshold=threshold, criterion=criterion)
            _, depth, _, _ = run_steps(model, strategy, ids)
            assert depth[0, t] == layers


def test_a_nan_confidence_goes_deep():
    model = tiny_model(tie_embeddings=False)
    model.exit_norm.weight.data.fill_(math.nan)
    for criterion in CRITERIA:
        strategy = EarlyExit(threshold=-math.inf, criterion=criterion)
        _, depth, scores, _ = run_steps(model, strategy, token_ids(1, 3))
        assert scores.isnan().all() and (depth == 4).all()


def test_cache_attends_like_whole_sequences():
    q, k, v = torch.randn(3, 2, 9, 4, 8, generator=torch.Generator().manual_seed(0)).double()
    k, v = k[:, :, :2], v[:, :, :2]
    cache = KVCache.allocate(3, 4, 12, 2, 8, like=q)
    assert cache.k.shape == cache.v.shape == (3, 4, 12, 2, 8) and cache.k.dtype == q.dtype
    view, parts = cache.rows(slice(1, 3)), []
    for start, stop in [(0, 1), (1, 4), (4, 9)]:
        chunk = slice(start, stop)
        attend = view.attend(1, torch.tensor([start, start]))
        parts.append(attend(q[:, chunk], (k[:, chunk], v[:, chunk])))
    torch.testing.assert_close(torch.cat(parts, dim=1), attend_within(q, (k, v)), **CLOSE)
    assert torch.equal(cache.k[1, 1:3, :9], k) and torch.equal(cache.v[1, 1:3, :9], v)
    assert not cache.k[[0, 2]].any() and not cache.k[1, [0, 3]].any()
    again = view.attend(1, torch.tensor([8, 8]))(q[:, 8:], None)  # the cache holds them already
    torch.testing.assert_close(again, parts[-1][:, -1:], **CLOSE)
    kept = cache.keep(torch.tensor([2, 0]))
    assert torch.equal(kept.k, cache.k[:, [2, 0]]) and torch.equal(kept.v, cache.v[:, [2, 0]])
    kept.k.zero_()
    assert torch.equal(cache.k[1, 1:3, :9], k)
