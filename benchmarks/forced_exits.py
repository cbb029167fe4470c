"""Early exit at a shallow ratio that is asked for, and what it saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode_cases import Engine, Run
from lego.config import ModelConfig
from lego.cost import elements_read, realised_savings, time_efficiency
from lego.timing import ratio_spread
from lego_kernels.decoder.counts import Counts

_TRIES = 12


@dataclass(frozen=True, kw_only=True)
class ForcedExit:
    """A decoder whose threshold lets about the wanted share of a generation exit."""

    engine: Engine
    threshold: float
    run: Run
    counts: Counts  # of the timed tokens

    def shallow_ratio(self, num_layers: int) -> float:
        """Of the tokens that are timed."""
        timed = self.run.exit_layer[1:]
        return sum(depth < num_layers for depth in timed) / len(timed)


def force_exit(engine: Engine, prompt: Tensor, num_tokens: int, ratio: float) -> ForcedExit:
    """Bisect for the threshold: what is generated depends on it, so the ratio comes close at best.

    engine: Made with a threshold; it keeps the one that is found. Ratios of 0 and 1 take infinite
    ones.
    """
    num_layers = engine.decoder.weights.num_layers

    def attempt(threshold: float) -> ForcedExit:
        engine.decoder.set_threshold(threshold)
        run = engine(prompt, num_tokens)
        return ForcedExit(
            engine=engine,
            threshold=between(engine.confidence, threshold),
            run=run,
            counts=engine.counts,
        )

    best = attempt(-math.inf if ratio == 1 else math.inf)
    if ratio in (0, 1):
        return best
    low, high = min(engine.confidence), max(engine.confidence)
    threshold = float(torch.tensor(engine.confidence).quantile(1 - ratio))
    for _ in range(_TRIES):
        tried = attempt(threshold)
        reached = tried.shallow_ratio(num_layers)
        best = min(best, tried, key=lambda x: abs(x.shallow_ratio(num_layers) - ratio))
        if abs(reached - ratio) <= 1 / num_tokens:
            break
        low, high = (threshold, high) if reached > ratio else (low, threshold)
        threshold = (low + high) / 2
    engine.decoder.set_threshold(best.threshold)
    return best


def between(confidence: Sequence[float], threshold: float) -> float:
    """A threshold with the same decisions, midway between the confidences on either side of it,
    where rounding decides nothing."""
    above = min((c for c in confidence if c >= threshold), default=math.inf)
    below = max((c for c in confidence if c < threshold), default=-math.inf)
    return threshold if math.isinf(above) or math.isinf(below) else (above + below) / 2


def savings(
    config: ModelConfig,
    forced: ForcedExit,
    full_counts: Counts,
    full_seconds: Sequence[float],
    exit_seconds: Sequence[float],
) -> dict[str, Any]:
    """Speedup over full depth, measured and as counted bytes allow it, of paired seconds."""
    true_cost = elements_read(config, forced.counts) / elements_read(config, full_counts)
    speedup = ratio_spread(full_seconds, exit_seconds)
    return {
        # JSON knows no infinity
        "threshold": forced.threshold if math.isfinite(forced.threshold) else None,
        "shallow_ratio": forced.shallow_ratio(config.num_layers),
        "true_cost": true_cost,
        "ideal_speedup": 1 / true_cost,
        "speedup": [speedup.median, speedup.low, speedup.high],
        "realised_savings": realised_savings(true_cost, speedup.median, 1.0),
        "time_efficiency": time_efficiency(true_cost, speedup.median, 1.0),
    }
