"""Decoders on one prompt: the same tokens first, then times in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.decode_cases import Run, Runner, assert_greedy, assert_varied, timed
from benchmarks.tables import milliseconds
from lego.model import LegoModel
from lego.timing import paired_seconds, ratio_spread

ROUNDS = 9
MANY_ROUNDS = 3 * ROUNDS  # where a difference of some percent is what counts


def race_seconds(
    runners: Mapping[str, Runner],
    prompt: torch.Tensor,
    num_tokens: int,
    num_rounds: int = ROUNDS,
) -> dict[str, list[float]]:
    """Seconds a token of each, by rounds."""
    variants = {name: timed(runner, prompt, num_tokens) for name, runner in runners.items()}
    return paired_seconds(variants, num_rounds=num_rounds)


def race(
    runners: Mapping[str, Runner],
    prompt: torch.Tensor,
    num_tokens: int,
    num_rounds: int = ROUNDS,
    over: str = "engine",
) -> list[dict[str, Any]]:
    """Milliseconds a token of each, and how many times as long as one of them it takes."""
    seconds = race_seconds(runners, prompt, num_tokens, num_rounds)
    rows = []
    for name, taken in seconds.items():
        ratio = ratio_spread(taken, seconds[over])
        rows.append(
            {
                "variant": name,
                "ms": milliseconds(taken),
                f"over_{over}": [ratio.median, ratio.low, ratio.high],
            }
        )
    return rows


def check_tokens(model: LegoModel, prompt: torch.Tensor, runs: Mapping[str, Run]) -> None:
    """All tokens alike, as check_alike has it, in runs that do not repeat themselves."""
    assert_varied(next(iter(runs.values())).tokens)
    check_alike(model, prompt, runs)


def check_alike(model: LegoModel, prompt: torch.Tensor, runs: Mapping[str, Run]) -> None:
    """All tokens alike in float32; in 16 bits each the best but for rounding."""
    first = next(iter(runs.values()))
    for name, run in runs.items():
        if model.embedding.weight.dtype == torch.float32:
            assert run == first._replace(seconds=run.seconds), name
        assert_greedy(model, prompt, run)
