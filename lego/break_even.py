"""The shallow ratio above which early exit saves anything: in theory, and between measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lego.config import Criterion, ModelConfig
from lego.cost import expected_true_cost


def expected_break_even(config: ModelConfig, criterion: Criterion) -> float:
    """The shallow ratio at which expected_true_cost is 1.

    With H elements of the head and U of the upper block it is H / (H + U) for a softmax criterion,
    whose deep tokens read the head once more than full depth does, while shallow ones spare the
    upper block. It is G / U for a gate of G elements, which every token reads.
    """
    never, always = (expected_true_cost(config, ratio, criterion) for ratio in (0.0, 1.0))
    return (never - 1) / (never - always)


def crossing(ratios: Sequence[float], relative: Sequence[float]) -> float:
    """The lowest ratio at which a cost or time relative to full depth comes down to 1.

    relative[i] belongs to ratios[i], in any order; in between it is interpolated. The lowest ratio
    given if it is down there already; inf if no measurement is.
    Raises: ValueError if there are no measurements or lengths differ.
    """
    points = sorted(zip(ratios, relative, strict=True))
    if not points:
        raise ValueError("crossing: ratios must hold at least one measurement, got none")
    before = points[0]
    for ratio, value in points:
        if value <= 1:
            above = before[1] - 1
            # the first point is its own predecessor
            share = above / (before[1] - value) if above > 0 else 1.0
            return before[0] + share * (ratio - before[0])
        before = (ratio, value)
    return math.inf
