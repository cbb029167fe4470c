"""The decoding strategies: how much of the model a generated token runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from lego.config import KV_POLICIES, Criterion, KVPolicy
from lego.model import LegoModel


@dataclass(frozen=True, kw_only=True)
class Uncached:
    """Full depth, the whole sequence again for every token.

    all_logits: run the head on every position, as a plain call of a model does and as the source
    did; False runs it on the last one alone, the least that can be done without a cache.
    """

    all_logits: bool = True


@dataclass(frozen=True, kw_only=True)
class FullDepth:
    """Full depth with caches."""


@dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """A token exits after the lower block iff its confidence >= threshold.

    kv_policy says what an exited token leaves in the upper caches: `exact` for exit-state models
    (their only policy), `hole`, `propagate` or `recompute` for upper_kv="own". None takes `exact`
    or `recompute`. Any threshold but NaN is legal; inf never exits, 0 always does.
    """

    threshold: float
    criterion: Criterion = "max_prob"
    kv_policy: KVPolicy | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ValueError("EarlyExit.threshold: must be a number, got nan")
        if self.criterion not in get_args(Criterion):
            raise ValueError(
                f"EarlyExit.criterion: must be one of {get_args(Criterion)}, got {self.criterion!r}"
            )

    def policy_for(self, model: LegoModel) -> KVPolicy:
        """The KV policy to use with this model; ValueError if they do not go together."""
        if not model.upper:
            raise ValueError("EarlyExit: the model must have an upper block, got a dense model")
        legal = KV_POLICIES[model.config.upper_kv]
        policy = self.kv_policy or legal[0]
        if policy not in legal:
            raise ValueError(
                f"EarlyExit.kv_policy: must be one of {legal} for "
                f"upper_kv={model.config.upper_kv!r}, got {policy!r}"
            )
        return policy


Strategy = Uncached | FullDepth | EarlyExit
