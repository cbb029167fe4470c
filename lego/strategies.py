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
        _check_number("EarlyExit.threshold", self.threshold)
        _check_criterion("EarlyExit.criterion", self.criterion)

    def policy_for(self, model: LegoModel) -> KVPolicy:
        """The KV policy to use with this model; ValueError if they do not go together."""
        _check_upper("EarlyExit", model)
        legal = KV_POLICIES[model.config.upper_kv]
        policy = self.kv_policy or legal[0]
        if policy not in legal:
            raise ValueError(
                f"EarlyExit.kv_policy: must be one of {legal} for "
                f"upper_kv={model.config.upper_kv!r}, got {policy!r}"
            )
        return policy


@dataclass(frozen=True, kw_only=True)
class Speculative:
    """The tokens of full depth: the lower block drafts some, the upper block verifies them at once.

    Drafting goes on while the confidence of the newest draft is >= stop_confidence, up to
    draft_tokens drafts (>= 1). A step yields at least one token and at most as many as drafts were
    made. Any stop_confidence but NaN is legal; inf stops after one draft, 0 never stops early.
    """

    draft_tokens: int = 4
    stop_confidence: float = 0.5
    criterion: Criterion = "max_prob"

    def __post_init__(self) -> None:
        if self.draft_tokens < 1:
            raise ValueError(f"Speculative.draft_tokens: must be >= 1, got {self.draft_tokens}")
        _check_number("Speculative.stop_confidence", self.stop_confidence)
        _check_criterion("Speculative.criterion", self.criterion)

    def check(self, model: LegoModel) -> None:
        """Raise ValueError if the model has nothing to verify with."""
        _check_upper("Speculative", model)


Strategy = Uncached | FullDepth | EarlyExit | Speculative


def _check_number(name: str, value: float) -> None:
    if math.isnan(value):
        raise ValueError(f"{name}: must be a number, got nan")


def _check_criterion(name: str, value: str) -> None:
    if value not in get_args(Criterion):
        raise ValueError(f"{name}: must be one of {get_args(Criterion)}, got {value!r}")


def _check_upper(name: str, model: LegoModel) -> None:
    if not model.upper:
        raise ValueError(f"{name}: the model must have an upper block, got a dense model")
