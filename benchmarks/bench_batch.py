"""Batches whose rows exit one by one: when should the upper block run?

Rows exit at random with a given probability, as independent as rows get; the gate is read all the
same. One thread, greedy, random weights. Tokens are equal where rows decide alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.decode_cases import random_model
from benchmarks.tables import Measure, measured, milliseconds, one_thread
from lego.engine import decoder_weights
from lego.timing import paired_seconds, ratio_spread
from lego_kernels.decoder.decoder import Decoder
from lego_kernels.decoder.deferral import DeferringDecoder
from lego_kernels.decoder.rows import NewToken

__all__ = ["measured", "one_thread"]

ROUNDS = 5
PROMPT_TOKENS = 4
NEW_TOKENS = {"seed": 48, "wide": 24, "smol": 12}


class Case(NamedTuple):
    shape: str
    dtype: str
    exit_rate: float
    num_rows: int


CASES = [Case("seed", "float32", 0.8, 16)]
MORE_CASES = [
    Case(shape, dtype, rate, rows)
    for shape, dtype in (("wide", "float32"), ("smol", "bfloat16"))
    for rate in (0.5, 0.8)
    for rows in (1, 4, 16, 64)
]


class RunWhenAny(Decoder):
    """The upper block runs at once, for the rows that stay. Exits are drawn, not decided."""

    exit_rate = 0.5

    def prefill(self, prompts: Sequence[torch.Tensor]) -> None:
        super().prefill(prompts)
        shape, generator = (len(prompts), self.num_slots), torch.Generator().manual_seed(0)
        self.drawn = (torch.rand(shape, generator=generator) < self.exit_rate).numpy()

    def step(self) -> list[NewToken]:
        exits = np.zeros(len(self.drawn), dtype=bool)
        exits[self.live] = self.drawn[self.live, self.state.position[self.live]]
        # no confidence is as low as that, none as high
        self.state.threshold[:] = np.where(self.decided(exits), -np.inf, np.inf)
        return super().step()

    def decided(self, drawn: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The rows that exit, of those for which that was drawn."""
        return drawn


class RunAll(RunWhenAny):
    """The upper block runs for every row, in every step, and the head once."""

    def decided(self, drawn: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.zeros_like(drawn)


class AllMustAgree(RunWhenAny):
    """No row exits unless all do, as where one decision serves a whole batch."""

    def decided(self, drawn: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.full_like(drawn, drawn[self.live].all())


class Deferral(RunWhenAny, DeferringDecoder):
    """Rows that stay wait until it pays to run the upper block for them together."""


@pytest.mark.usefixtures("one_thread")
def test_batch(case: Case, measured: Measure) -> None:
    model = random_model(case.shape, case.dtype)
    weights, num_new = decoder_weights(model), NEW_TOKENS[case.shape]
    prompts = [
        torch.randint(model.config.vocab_size, (PROMPT_TOKENS,), generator=seeded)
        for seeded in (torch.Generator().manual_seed(row) for row in range(case.num_rows))
    ]
    tokens: dict[str, list[list[int]]] = {}

    def run(kind: type[RunWhenAny]) -> float:
        num_slots = PROMPT_TOKENS + num_new
        decoder = kind(weights, case.num_rows, num_slots, threshold=0.5, criterion="gate")
        decoder.exit_rate = case.exit_rate
        decoder.prefill(prompts)
        tokens[kind.__name__], seconds = generate(decoder, num_new)
        return seconds

    kinds = (RunAll, RunWhenAny, AllMustAgree, Deferral)
    variants: dict[str, Callable[[], float]] = {
        kind.__name__: lambda kind=kind: run(kind) for kind in kinds
    }
    for variant in variants.values():
        variant()
    assert tokens["Deferral"] == tokens["RunWhenAny"]

    def work() -> dict[str, Any]:
        seconds = paired_seconds(variants, num_rounds=ROUNDS)
        return {"rows": [row(name, seconds) for name in variants]}

    def row(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
        taken = milliseconds(seconds[name])
        over = ratio_spread(seconds["RunAll"], seconds[name])
        return {
            "upper block": name,
            "tokens_per_second": 1e3 * case.num_rows * num_new / taken[0],
            "speedup_over_run_all": [over.median, over.low, over.high],
        }

    measured(work)


def generate(decoder: Decoder, num_new: int) -> tuple[list[list[int]], float]:
    """num_new tokens of each row, rows leaving as they are done, and the seconds it took."""
    rows: list[list[int]] = [[] for _ in decoder.live]
    start = perf_counter()
    while decoder.live:
        done = []
        for new in decoder.step():
            rows[new.row].append(new.token)
            if len(rows[new.row]) == num_new:
                done.append(new.row)
        if done:
            decoder.finish(done)
    return rows, perf_counter() - start
