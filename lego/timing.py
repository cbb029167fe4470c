"""Paired timing: variants take turns in one process, so that a noisy machine hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float  # 25 %
    high: float  # 75 %

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)


def paired_seconds(
    variants: Mapping[str, Callable[[], float]], *, num_rounds: int
) -> dict[str, list[float]]:
    """Seconds of each variant, num_rounds each, after one round that warms up and does not count.

    A variant runs once and returns the seconds of the part that matters. Every variant runs once a
    round, in an order that turns by one each round, and goes backwards once each was first: what
    ran before leaves its weights in the caches.
    Raises: ValueError if num_rounds < 2.
    """
    if num_rounds < 2:
        raise ValueError(f"paired_seconds: num_rounds must be >= 2, got {num_rounds}")
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_index in range(-1, num_rounds):
        backwards, turn = divmod(round_index, len(names))
        order = names[turn:] + names[:turn]
        for name in reversed(order) if backwards % 2 else order:
            taken = variants[name]()
            if round_index >= 0:
                seconds[name].append(taken)
    return seconds


def ratio_spread(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios of paired measurements."""
    return Spread.of([n / d for n, d in zip(numerator, denominator, strict=True)])
