"""Speculation: the tokens of full depth, chunks as defined, caches as if drafts never were."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

from lego.decoding import CachedDecoder
from lego.generation import generate
from lego.ops.gumbel import gumbel
from lego.sampling import Sampling, kept_logits, row_seed
from lego.speculation import SpeculativeDecoder
from lego.strategies import FullDepth, Speculative
from tests.models import (
    CRITERIA,
    VARIANTS,
    agreeing_model,
    confidence,
    generate_watched,
    midway,
    tiny_model,
    token_ids,
)

BOTH = pytest.mark.parametrize("upper_kv", ["exit_state", "own"])
SAMPLINGS = {"greedy": Sampling(), "sampled": Sampling(temperature=0.9, top_k=30, top_p=0.9)}
ANY_SAMPLING = pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
PROMPTS = [token_ids(n, seed=n).tolist() for n in (1, 7, 3, 3, 12)]
ALWAYS = Speculative(draft_tokens=4, stop_confidence=0.0)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Chunk(NamedTuple):
    """What one step of one row comes to."""

    tokens: list[int]
    confidence: list[float]
    num_inputs: int


def drawn(logits_V, sampling, row, position):
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    noise = gumbel(torch.tensor([row_seed(sampling.seed, row)]), torch.tensor([position]), 50)
    kept = kept_logits(logits_V[None], sampling)
    return int((kept + sampling.temperature * noise).argmax())


def next_chunk(model, text, strategy, sampling, row=0, num_slots=math.inf):
    """The definition, from whole sequences alone: no cache is kept and nothing rolled back."""
    ids, scores = list(text), []
    while True:
        exit_state = model(torch.tensor([ids])).exit_state[0, -1:]
        scores.append(float(confidence(model, exit_state, strategy.criterion)))
        ids.append(drawn(model.exit_logits(exit_state)[0], sampling, row, len(ids)))
        num_inputs = len(ids) - len(text)
        is_last = num_inputs == strategy.draft_tokens or len(ids) > num_slots
        if is_last or not scores[-1] >= strategy.stop_confidence:
            break
    final = model.final_logits(model(torch.tensor([ids[:-1]])).final_state)[0]
    tokens = []
    for position in range(len(text), len(ids)):
        tokens.append(drawn(final[position - 1], sampling, row, position))
        if tokens[-1] != ids[position]:
            break
    return Chunk(tokens, scores[: len(tokens)], num_inputs)


def all_chunks(model, prompt, num_new, strategy, sampling, row=0, num_slots=math.inf):
    text, chunks = list(prompt), []
    while len(text) < len(prompt) + num_new:
        chunks.append(next_chunk(model, text, strategy, sampling, row, num_slots))
        text += chunks[-1].tokens
    return chunks


def middle(model, criterion="max_prob"):
    """A stop_confidence that about half of the tokens reach."""
    return midway(confidence(model, model(token_ids(4, 20, seed=9)).exit_state, criterion))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@ANY_SAMPLING
@BOTH
def test_tokens_are_those_of_full_depth(upper_kv, sampling, share):
    """Drafts are right always, at times and hardly ever; the tokens are the same."""
    num_steps = num_tokens = 0
    for seed, variant in enumerate(("gqa", "all", "shallow")):
        model = agreeing_model(upper_kv, share=share, seed=seed, **VARIANTS[variant])
        options = {"sampling": replace(sampling, seed=seed)}
        full = generate(model, PROMPTS[1:], 10, FullDepth(), **options)
        for criterion, stop, draft_tokens in [
            ("max_prob", 0.0, 4),
            ("gate", 0.2, 3),
            ("margin", 0.1, 9),
        ]:
            strategy = Speculative(
                draft_tokens=draft_tokens, stop_confidence=stop, criterion=criterion
            )
            output = generate(model, PROMPTS[1:], 10, strategy, **options)
            assert output.tokens == full.tokens
            assert output.exit_layer == full.exit_layer
            num_steps += output.stats.decode.upper_passes // len(model.upper)
            num_tokens += 4 * 10
    low, high = {0.0: (2.3, 4), 0.1: (1.8, 2.7), 1.0: (1.05, 1.5)}[share]
    assert low < num_tokens / num_steps < high


@ANY_SAMPLING
@BOTH
def test_many_seeds_and_prompts(upper_kv, sampling):
    """Wherever a chunk begins, and whatever was rejected before it."""
    model = agreeing_model(upper_kv, share=0.2)
    prompts = [token_ids(1 + i % 7, seed=i) for i in range(12)]
    for seed in range(3):
        options = {"sampling": replace(sampling, seed=seed)}
        full = generate(model, prompts, 12, FullDepth(), **options)
        assert generate(model, prompts, 12, ALWAYS, **options).tokens == full.tokens
        assert len(set(map(tuple, full.tokens))) >= 8


@pytest.mark.parametrize("share", [0.1, 1.0])
@pytest.mark.parametrize("criterion", CRITERIA)
@ANY_SAMPLING
@BOTH
def test_chunks_and_calls_are_as_defined(upper_kv, sampling, criterion, share):
    """Counted from outside: every layer on every input of a chunk, and on nothing else."""
    model, num_new = agreeing_model(upper_kv, share=share), 12
    stop = middle(model, criterion)
    strategy = Speculative(draft_tokens=4, stop_confidence=stop, criterion=criterion)
    prompts = PROMPTS[1:4]  # 7, 3 and 3 ids
    output, in_prefill, seen = generate_watched(
        model, prompts, num_new, strategy, sampling=sampling
    )
    num_slots = 7 + num_new - 1
    num_inputs = num_chunks = 0
    sizes = set()
    for row, prompt in enumerate(prompts):
        chunks = all_chunks(model, prompt, num_new, strategy, sampling, row, num_slots)
        assert output.tokens[row] == sum((c.tokens for c in chunks), [])[:num_new]
        scores = sum((c.confidence for c in chunks), [])[:num_new]
        assert output.confidence[row] == pytest.approx(scores, abs=1e-10)
        sizes |= {(c.num_inputs, len(c.tokens)) for c in chunks}
        num_inputs += sum(c.num_inputs for c in chunks)
        num_chunks += len(chunks)
    assert len(sizes) >= 3  # some drafts were right, some were not, some were never made
    num_prompt, exit_state = 6 + 2 + 2, upper_kv == "exit_state"
    assert set(in_prefill.upper) == {0 if exit_state else num_prompt}
    assert set(seen.lower) == {num_prompt + num_inputs}
    assert set(seen.upper) == {num_inputs + (0 if exit_state else num_prompt)}
    assert set(seen.upper_kv) == {num_prompt + num_inputs if exit_state else 0}
    assert output.stats.decode.upper_passes == 2 * num_chunks
    assert output.stats.decode.upper_kv_passes == (num_chunks if exit_state else 0)
    assert (seen.head, seen.head_passes) == (2 * num_inputs, num_inputs + num_chunks)
    assert seen.gate == (num_inputs if criterion == "gate" else 0)


@pytest.mark.parametrize(
    "strategy",
    [Speculative(draft_tokens=1, stop_confidence=0.0), Speculative(stop_confidence=math.inf)],
    ids=["one draft", "never confident"],
)
@ANY_SAMPLING
@BOTH
def test_without_speculation_it_is_full_depth(upper_kv, sampling, strategy):
    """One token a row and step, at the price of the draft's head."""
    model, calls = tiny_model(upper_kv), []
    full = generate(model, PROMPTS, 8, FullDepth(), sampling=sampling).stats
    output, _, _ = generate_watched(model, PROMPTS, 8, strategy, sampling=sampling)
    got = output.stats
    for name in ("lower_layer_calls", "upper_layer_calls", "upper_kv_calls", "kv_slots"):
        assert getattr(got.decode, name) == getattr(full.decode, name), name
    assert got.decode.head_calls == 2 * full.decode.head_calls == 80
    generate(model, PROMPTS, 8, strategy, streamer=lambda new: calls.append(new.row))
    assert calls == [0, 1, 2, 3, 4] * 8


@ANY_SAMPLING
@BOTH
def test_right_drafts_cost_nothing(upper_kv, sampling):
    """An upper block that adds nothing accepts every draft; the caches bound the last chunk."""
    model = agreeing_model(upper_kv, share=0.0, max_seq_len=22)
    prompt, options = token_ids(1, 12).tolist(), {"sampling": sampling}
    full = generate(model, prompt, 10, FullDepth(), **options)
    output, in_prefill, seen = generate_watched(model, prompt, 10, ALWAYS, **options)
    assert output.tokens == full.tokens
    assert set(seen.lower) == {11 + 10}  # never twice, and no further than the caches
    assert output.stats.decode.upper_layer_calls == 2 * 10
    assert output.stats.decode.upper_passes == 2 * 3  # chunks of 4, 4 and 2
    assert seen.head == 2 * 10


@pytest.mark.parametrize("num_slots", [5, 6, 7, 8])
@BOTH
def test_drafts_stay_within_the_caches(upper_kv, num_slots):
    """From position 4 on there are num_slots - 4 slots for inputs, each of which yields a token."""
    model = agreeing_model(upper_kv, share=0.0)
    decoder = SpeculativeDecoder(model, ALWAYS, Sampling(), 1, num_slots)
    decoder.prefill([token_ids(5)])
    new = decoder.step()
    assert len(new) == num_slots - 4
    assert decoder.counts.upper_layer_calls == 2 * (
        num_slots - 4 if upper_kv == "exit_state" else num_slots
    )


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@BOTH
def test_a_stop_token_ends_a_row_inside_a_chunk(upper_kv, place):
    """Row 1 stops at any place of its second chunk; what it drafted beyond is not seen."""
    model, streamed = agreeing_model(upper_kv, share=0.0), []
    sampling = Sampling(temperature=1.0, seed=8)
    free = generate(model, PROMPTS[1:4], 12, FullDepth(), sampling=sampling).tokens
    stop = free[1][4 + place]
    assert stop not in free[1][: 4 + place]
    options = {"sampling": sampling, "stop_tokens": [stop]}
    full = generate(model, PROMPTS[1:4], 12, FullDepth(), **options)
    output = generate(model, PROMPTS[1:4], 12, ALWAYS, streamer=streamed.append, **options)
    assert output.tokens == full.tokens and len(output.tokens[1]) == 5 + place
    for row in range(3):
        assert [new.token for new in streamed if new.row == row] == output.tokens[row]
    order = [new.row for new in streamed]
    first = order.index(1)
    assert order[first : first + 4] == [1] * 4  # one whole chunk came before


def run(decoder, num_steps, row):
    """All that a row yields in so many steps."""
    return [new.token for _ in range(num_steps) for new in decoder.step() if new.row == row]


@pytest.mark.parametrize("row", [0, 1, 2])
@ANY_SAMPLING
@BOTH
def test_rejected_drafts_leave_nothing_behind(upper_kv, sampling, row):
    """Caches are those of full depth on the accepted tokens; slots past them are never read."""
    model = agreeing_model(upper_kv, share=0.3)
    prompts = [token_ids(n, seed=n) for n in (2, 6, 1)]
    decoders = [SpeculativeDecoder(model, ALWAYS, sampling, 3, 60) for _ in range(2)]
    for decoder in decoders:
        decoder.prefill(prompts)
    one, other = (run(decoder, 6, row) for decoder in decoders)
    assert one == other
    assert 6 < len(one) < 6 * 4  # drafts have been accepted, and rejected
    text = torch.cat((prompts[row], torch.tensor(one)))
    full = CachedDecoder(model, FullDepth(), 1, 60)
    full.prefill([prompts[row][:-1]])
    for token in text[len(prompts[row]) - 1 : -1]:
        full.step(token[None])
    blocks, position = decoders[0]._blocks, len(text) - 1
    assert vars(blocks.rows[row]) == vars(full.blocks.rows[0])
    assert vars(blocks.rows[row]) == {"position": position, "upper_len": position}
    for name in ("lower_cache", "upper_cache"):
        for part in ("k", "v"):
            got = getattr(getattr(blocks, name), part)[:, row]
            expected = getattr(getattr(full.blocks, name), part)[:, 0]
            torch.testing.assert_close(got[:, :position], expected[:, :position], **CLOSE)
            got[:, position:] = math.nan
    assert run(decoders[0], 5, row) == run(decoders[1], 5, row)


@ANY_SAMPLING
@BOTH
def test_rows_are_as_if_alone(upper_kv, sampling):
    """Rows of one batch take chunks of other lengths, and leave when they like."""
    model = agreeing_model(upper_kv, share=0.1)
    strategy = Speculative(draft_tokens=5, stop_confidence=middle(model))
    decoder = SpeculativeDecoder(model, strategy, sampling, 5, 60)
    decoder.prefill([torch.tensor(prompt) for prompt in PROMPTS])
    texts, alive, lengths = [list(prompt) for prompt in PROMPTS], [0, 1, 2, 3, 4], set()
    for left in ([], [], [3], [], [0, 4], []):
        decoder.finish(left)
        alive = [row for row in alive if row not in left]
        new = decoder.step()
        assert [x.row for x in new] == sorted(x.row for x in new)
        assert {x.row for x in new} == set(alive)
        for row in alive:
            chunk = next_chunk(model, texts[row], strategy, sampling, row)
            mine = [x for x in new if x.row == row]
            assert [x.token for x in mine] == chunk.tokens
            assert [x.confidence for x in mine] == pytest.approx(chunk.confidence, abs=1e-10)
            assert {x.exit_layer for x in mine} == {4}
            texts[row] += chunk.tokens
            lengths.add(len(mine))
    assert len(lengths) >= 3


def test_a_draft_without_confidence_is_the_last():
    """A NaN is not >= any threshold; the upper block, which sees no NaN, decides."""
    model = agreeing_model(share=0.0)
    full = generate(model, PROMPTS, 5, FullDepth())
    model.gate.bias.fill_(math.nan)
    strategy = Speculative(criterion="gate", stop_confidence=-math.inf)
    output = generate(model, PROMPTS, 5, strategy)
    assert output.tokens == full.tokens
    assert all(math.isnan(x) for row in output.confidence for x in row)
    assert output.stats.decode.lower_layer_calls == 2 * 5 * 5


def test_the_largest_seed_serves_every_row():
    model, sampling = tiny_model(), Sampling(temperature=1.0, seed=2**63 - 1)
    full = generate(model, PROMPTS, 6, FullDepth(), sampling=sampling)
    assert generate(model, PROMPTS, 6, Speculative(), sampling=sampling).tokens == full.tokens
