"""Decode steps on a device whose exits are forced: each mode of graph_step against full depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from benchmarks.decode_cases import DeviceEngine, Run, assert_greedy, timed
from benchmarks.forced_exits import ForcedExit, force_exit, savings
from benchmarks.tables import milliseconds
from lego.config import Criterion
from lego.model import LegoModel
from lego.timing import paired_seconds, ratio_spread
from lego_kernels.decoder.graph_step import Mode


def exit_race(
    model: LegoModel,
    prompt: Tensor,
    num_tokens: int,
    *,
    criterion: Criterion,
    ratios: Sequence[float],
    modes: Sequence[Mode],
    num_rounds: int,
) -> dict[str, Any]:
    """Times of full depth and, by shallow ratio and mode, of early exit, after the tokens agreed.

    The first mode finds the thresholds; a row also says how many times as long as that its own mode
    takes.
    """
    num_slots = len(prompt) + num_tokens
    options: dict[str, Any] = {"criterion": criterion, "threshold": float("inf")}
    engines = {mode: DeviceEngine(model, num_slots, mode=mode, **options) for mode in modes}
    full = DeviceEngine(model, num_slots)
    assert_greedy(model, prompt, full(prompt, num_tokens))
    full_counts = full.counts
    forced = {ratio: force_exit(engines[modes[0]], prompt, num_tokens, ratio) for ratio in ratios}
    variants: dict[str, Callable[[], float]] = {"full": timed(full, prompt, num_tokens)}
    for ratio, exits in forced.items():
        assert_greedy(model, prompt, exits.run)
        for mode, engine in engines.items():
            run = _run_at(engine, exits, prompt, num_tokens)
            assert run[:2] == exits.run[:2], (ratio, mode)
            variants[f"{ratio} {mode}"] = lambda engine=engine, exits=exits: (
                _run_at(engine, exits, prompt, num_tokens).seconds
            )
    seconds = paired_seconds(variants, num_rounds=num_rounds)
    rows = []
    for ratio, exits in forced.items():
        first = seconds[f"{ratio} {modes[0]}"]
        for mode in modes:
            taken = seconds[f"{ratio} {mode}"]
            over = ratio_spread(taken, first)
            rows.append(
                {
                    "mode": mode,
                    "ms": milliseconds(taken),
                    **savings(model.config, exits, full_counts, seconds["full"], taken),
                    f"over_{modes[0]}": [over.median, over.low, over.high],
                }
            )
    return {
        "criterion": criterion,
        "num_tokens": num_tokens,
        "full_mode": full.decoder.mode,
        "full_ms": milliseconds(seconds["full"]),
        "rows": rows,
    }


def _run_at(engine: DeviceEngine, exits: ForcedExit, prompt: Tensor, num_tokens: int) -> Run:
    engine.decoder.set_threshold(exits.threshold)
    return engine(prompt, num_tokens)
