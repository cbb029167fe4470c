"""What generate() asks of an engine, whatever it decodes with."""

import pytest

from lego.counts import Counts
from lego.decoding import GeneratedToken
from lego.generation import ReferenceEngine, generate
from lego.sampling import Sampling
from lego.strategies import EarlyExit, FullDepth, Speculative, Uncached
from tests.models import tiny_model, token_ids


class Scripted:
    """An engine and its decoder: yields what it was given, step by step."""

    def __init__(self, model, steps):
        self.model, self.steps, self.calls, self.counts = model, iter(steps), [], Counts()

    def decoder(self, *args):
        self.calls.append(args)
        return self

    def prefill(self, prompts):
        self.calls.append([ids.tolist() for ids in prompts])
        self.counts.lower_passes += 3

    def step(self):
        self.counts.head_calls += 1
        return [GeneratedToken(row, token, 4, 0.5) for row, token in next(self.steps)]

    def finish(self, rows):
        self.calls.append(list(rows))


def test_drives_any_engine():
    """Steps of several tokens or none; what comes after the end of a row is dropped."""
    steps = [
        [(0, 5), (0, 6), (2, 9)],
        [(1, 7), (2, 8), (2, 5), (2, 6)],  # row 2 stops at 8
        [],
        [(0, 4), (0, 3), (0, 2), (1, 8)],  # row 0 has four tokens, row 1 stops
    ]
    model, streamed, strategy = tiny_model(), [], FullDepth()
    engine, sampling = Scripted(model, steps), Sampling(temperature=0.5)
    output = generate(
        model, [[1], [2, 3], [4]], 4, strategy,
        sampling=sampling, stop_tokens=[8], streamer=streamed.append, engine=engine,
    )  # fmt: skip
    assert output.tokens == [[5, 6, 4, 3], [7, 8], [9, 8]]
    assert output.exit_layer == [[4] * 4, [4] * 2, [4] * 2]
    assert [(new.row, new.token) for new in streamed] == [
        (0, 5), (0, 6), (2, 9), (1, 7), (2, 8), (0, 4), (0, 3), (1, 8),
    ]  # fmt: skip
    prompts = [[1], [2, 3], [4]]
    assert engine.calls == [(strategy, sampling, 3, 2 + 4 - 1), prompts, [2], [0, 1]]
    assert output.stats.prefill == Counts(lower_passes=3)
    assert output.stats.decode == Counts(head_calls=4)


def test_no_new_tokens_of_any_engine():
    engine = Scripted(tiny_model(), [])
    output = generate(engine.model, [[1], [2]], 0, FullDepth(), engine=engine)
    assert output.tokens == [[], []]
    assert engine.calls == [(FullDepth(), Sampling(), 2, 1), [[1], [2]]]


class Cancelled(Exception):
    pass


def test_an_exception_in_the_streamer_leaves_all_usable():
    model, prompts = tiny_model(), token_ids(3, 5)
    engine = ReferenceEngine(model)
    for strategy in (FullDepth(), Uncached(), EarlyExit(threshold=0.5), Speculative()):
        expected = generate(model, prompts, 6, strategy)
        streamed = []

        def cancel(new, streamed=streamed):
            streamed.append(new)
            if len(streamed) == 7:
                raise Cancelled

        with pytest.raises(Cancelled):
            generate(model, prompts, 6, strategy, engine=engine, streamer=cancel)
        assert len(streamed) == 7
        assert generate(model, prompts, 6, strategy, engine=engine).tokens == expected.tokens
