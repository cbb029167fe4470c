"""Deferral: what a row generates does not depend on when the upper block runs, and waiting pays."""

import pytest
import torch

from lego.engine import NativeEngine, decoder_weights
from lego.generation import generate
from lego.strategies import FullDepth
from lego_kernels.decoder.decoder import Decoder
from lego_kernels.decoder.deferral import DeferringDecoder, PassSeconds
from tests.models import POLICIES, early_exit, model_for, tiny_model, token_ids

NUM_NEW = 12


def drain(decoder, prompts, num_new=NUM_NEW):
    """Tokens of each row as (token, exit layer, confidence), rows leaving one after the other."""
    decoder.prefill(prompts)
    rows = [[] for _ in prompts]
    while decoder.live:
        for new in decoder.step():
            rows[new.row].append(new[1:])
        decoder.finish([row for row in decoder.live if len(rows[row]) >= num_new + row % 3])
    return rows


@pytest.mark.parametrize("criterion", ["max_prob", "gate"])
@pytest.mark.parametrize("policy", POLICIES)
def test_same_tokens(policy, criterion):
    strategy = early_exit(model_for(policy), policy, criterion)
    weights = decoder_weights(model_for(policy, dtype=torch.float32))
    prompts = [token_ids(1 + row % 5, seed=row) for row in range(9)]
    options = {"threshold": strategy.threshold, "criterion": criterion, "kv_policy": policy}
    at_once = drain(Decoder(weights, 9, 30, **options), prompts)
    deferring = DeferringDecoder(weights, 9, 30, **options)
    assert drain(deferring, prompts) == at_once
    depths = {depth for row in at_once for _, depth, _ in row}
    assert depths == {2, 4}


def waiting_decoder(lower, upper):
    """Eight rows under passes whose seconds are given, not measured; half of the rows exit."""
    model = tiny_model(dtype=torch.float32)
    strategy = early_exit(tiny_model(), "exact", "gate", share=0.85)
    weights = decoder_weights(model)
    decoder = DeferringDecoder(weights, 8, 40, threshold=strategy.threshold, criterion="gate")
    for timed, seconds in ((decoder._lower_time, lower), (decoder._upper_time, upper)):
        timed.of = seconds
        timed.add = lambda rows, seconds: None
    return decoder


def upper_calls_per_pass(decoder):
    drain(decoder, [token_ids(2, seed=row) for row in range(8)], num_new=20)
    return decoder.counts.upper_layer_calls / decoder.counts.upper_passes


def test_waits_where_the_upper_pass_is_dear():
    dear = upper_calls_per_pass(waiting_decoder(lambda rows: 1e-9, lambda rows: 1.0))
    cheap = upper_calls_per_pass(waiting_decoder(lambda rows: 1.0, lambda rows: 1e-9))
    assert dear >= 1.15 * cheap


def test_a_row_that_leaves_waits_no_more():
    decoder = waiting_decoder(lambda rows: 1e-9, lambda rows: 1.0)
    decoder.prefill([token_ids(2, seed=row) for row in range(8)])
    while not decoder.waiting:
        decoder.step()
    gone = next(iter(decoder.waiting))
    decoder.finish([gone])
    for _ in range(30):
        assert all(new.row != gone for new in decoder.step())


def test_a_new_prompt_starts_anew():
    """Rows that waited, and rows that had finished."""
    prompts = [[token_ids(3, seed=row + shift) for row in range(8)] for shift in (0, 50)]
    decoder = waiting_decoder(lambda rows: 1e-9, lambda rows: 1.0)
    decoder.prefill(prompts[0])
    while not decoder.waiting:
        decoder.step()
    decoder.finish([1, 2])
    fresh = waiting_decoder(lambda rows: 1e-9, lambda rows: 1.0)
    assert drain(decoder, prompts[1]) == drain(fresh, prompts[1])


def test_full_depth_has_nothing_to_defer():
    model = tiny_model(dtype=torch.float32)
    engine = NativeEngine(model, deferral=True)
    with pytest.raises(ValueError, match="^NativeEngine: deferral must come with EarlyExit"):
        generate(model, [[1, 2]], 3, FullDepth(), engine=engine)


@pytest.mark.parametrize("rows", [1, 7])
def test_through_the_engine(rows):
    model, prompts = tiny_model(dtype=torch.float32), [[row + 1, 2] for row in range(rows)]
    strategy = early_exit(tiny_model(), "exact", "gate")
    outputs = [
        generate(model, prompts, 9, strategy, engine=NativeEngine(model, deferral=deferral))
        for deferral in (True, False)
    ]
    assert outputs[0].tokens == outputs[1].tokens
    assert outputs[0].exit_layer == outputs[1].exit_layer


def test_pass_time_is_a_line():
    timed = PassSeconds()
    assert timed.of(5) == 0
    timed.add(4, 3.0)
    assert timed.of(4) == timed.of(40) == 3.0
    for rows in (1, 2, 8, 16):
        timed.add(rows, 1.0 + 0.5 * rows)
    timed.add(4, 3.0)
    assert timed.of(10) == pytest.approx(6.0)
    for rows in (1, 2, 8, 16) * 60:
        timed.add(rows, 2.0 + 0.25 * rows)
    assert timed.of(10) == pytest.approx(4.5, rel=1e-3)  # the old line has faded
    shrinking = PassSeconds()
    shrinking.add(1, 2.0)
    shrinking.add(3, 1.0)
    assert shrinking.of(100) == pytest.approx(1.5, rel=0.05)  # more rows never cost less
