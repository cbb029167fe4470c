"""Thresholds from the calibration split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lego.config import Criterion


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold for each criterion at which shallow_ratio of the calibration tokens exit."""

    shallow_ratio: float
    num_tokens: int
    threshold: dict[Criterion, float]


def calibrate_by_quantile(
    confidence: Mapping[Criterion, Tensor], shallow_ratio: float
) -> Calibration:
    """The threshold of each criterion whose confidence [N] is given, N >= 1.

    A quantile fixes the share of tokens that exit on text like the calibration split; it promises
    nothing about quality. shallow_ratio is in [0, 1].
    Raises: ValueError if the ratio is out of range, there are no tokens or one has no confidence.
    """
    if not 0 <= shallow_ratio <= 1:
        raise ValueError(
            f"calibrate_by_quantile: shallow_ratio must be in [0, 1], got {shallow_ratio}"
        )
    num_tokens = min((len(values) for values in confidence.values()), default=0)
    if num_tokens == 0:
        raise ValueError("calibrate_by_quantile: confidence must hold at least one token, got none")
    for criterion, values in confidence.items():
        if bool(values.isnan().any()):
            raise ValueError(f"calibrate_by_quantile: {criterion} must hold numbers, got nan")
    threshold = {
        criterion: upper_quantile(values, shallow_ratio) for criterion, values in confidence.items()
    }
    return Calibration(shallow_ratio=shallow_ratio, num_tokens=num_tokens, threshold=threshold)


def upper_quantile(confidence_N: Tensor, share: float) -> float:
    """The largest observed value that at least `share` of the tokens reach; inf for share 0."""
    descending = confidence_N.sort(descending=True).values
    # share * N may miss a whole number by a rounding error, which is not a token
    count = math.ceil(share * len(descending) - 1e-9)
    return float(descending[count - 1]) if count else float("inf")
