"""Quality of early-exit settings on windows of a split, as they decode."""

# Shape letters: W = windows, T = tokens of a window, N = all scored tokens of the split.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lego.bootstrap import Interval, mean_interval
from lego.calibration import calibrate_by_quantile
from lego.config import KV_POLICIES, Criterion, KVPolicy, UpperKV
from lego.criteria import ratio_at_risk, risk_curve
from lego.data import TokenSplit, num_windows, window_batch
from lego.evaluation import TokenScores, routed, score_tokens, stepwise
from lego.model import LegoModel
from lego.strategies import EarlyExit

# policies under which the upper block sees what the parallel evaluation saw
_PARALLEL: tuple[KVPolicy, ...] = ("exact", "recompute")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Early exit at a threshold that lets `ratio` of the calibration tokens go.

    With a risk, the ratio is the largest at which at most that share of the calibration tokens
    leaves with another token than full depth's.
    """

    criterion: Criterion
    kv_policy: KVPolicy
    ratio: float
    threshold: float
    risk: float | None = None

    @property
    def name(self) -> str:
        chosen = self.ratio if self.risk is None else f"risk {self.risk}"
        return f"{self.criterion} {self.kv_policy} {chosen}"

    @property
    def group(self) -> tuple[KVPolicy, Criterion]:
        """What settings of other ratios share."""
        return self.kv_policy, self.criterion

    def strategy(self, threshold: float | None = None) -> EarlyExit:
        """The strategy; another threshold may be given."""
        return EarlyExit(
            threshold=self.threshold if threshold is None else threshold,
            criterion=self.criterion,
            kv_policy=self.kv_policy,
        )


def all_settings(
    upper_kv: UpperKV, calibration: TokenScores, ratios: Sequence[float], risks: Sequence[float]
) -> list[Setting]:
    """Every KV policy and criterion at every ratio, by rising ratio.

    And at every risk, under the policies that change no later token, since that is how the risk
    of the calibration tokens was found.
    """
    settings = []
    for policy in KV_POLICIES[upper_kv]:
        for criterion, confidence_N in calibration.confidence.items():
            wanted: list[tuple[float, float | None]] = [(ratio, None) for ratio in ratios]
            if policy in _PARALLEL:
                curve_P = risk_curve(confidence_N, 1 - calibration.agree.double())
                wanted += [(ratio_at_risk(confidence_N, curve_P, risk), risk) for risk in risks]
            for ratio, risk in sorted(wanted, key=lambda pair: pair[0]):
                threshold = calibrate_by_quantile({criterion: confidence_N}, ratio).threshold
                settings.append(
                    Setting(
                        criterion=criterion,
                        kv_policy=policy,
                        ratio=ratio,
                        threshold=threshold[criterion],
                        risk=risk,
                    )
                )
    return settings


@dataclass(frozen=True)
class Sample:
    """Windows of a split, spread evenly over it."""

    split: TokenSplit
    seq_len: int
    place_W: Tensor  # which windows, int64

    @classmethod
    def spread(cls, split: TokenSplit, seq_len: int, count: int) -> Sample:
        """At most `count` windows; ValueError if the split holds less than two."""
        total = num_windows(split.ids, seq_len)
        if total < 2:
            raise ValueError(
                f"Sample: the split must hold >= 2 windows of {seq_len} tokens, got {total}"
            )
        count = min(count, total)
        return cls(split, seq_len, torch.arange(count) * total // count)

    @property
    def windows(self) -> Tensor:
        """Ids int64 [W, T + 1]."""
        return window_batch(self.split.ids, self.seq_len, self.place_W)

    def of(self, value_N: Tensor) -> Tensor:
        """Those of the values of all scored tokens that belong to the windows, [W, T]."""
        return value_N.view(-1, self.seq_len)[self.place_W]

    def dense_nll(self, model: LegoModel) -> Tensor:
        """Nats [W, T] of a dense model."""
        scores = score_tokens(model, self.split, self.seq_len, self.place_W)
        return scores.nll_deep.view(-1, self.seq_len)

    def bits_per_byte(self, nll_WT: Tensor) -> Interval:
        """Bits per UTF-8 byte of nats, or of differences of nats, with a bootstrap interval."""
        tokens_per_byte = (len(self.split.ids) - 1) / self.split.num_bytes
        return mean_interval(nll_WT.double().mean(dim=1) * tokens_per_byte / math.log(2))


class SettingScores(NamedTuple):
    """What a setting makes of the windows, each [W, T]."""

    nll: Tensor  # nats
    agree: Tensor  # bool: the most likely token is that of full depth
    shallow: Tensor  # bool: the token left early

    @property
    def shallow_ratio(self) -> float:
        return self.shallow.double().mean().item()


def score_setting(
    model: LegoModel,
    sample: Sample,
    scores: TokenScores,
    deep_token_WT: Tensor,
    setting: Setting,
) -> SettingScores:
    """Score one setting; scores are of the whole split, deep_token_WT is full depth's choice.

    Exits that leave exact keys and values behind are routed between the two exits' scores. What
    others leave is seen by later tokens, so those settings decode, step by step.
    """
    if setting.kv_policy in _PARALLEL or setting.threshold == math.inf:
        shallow_WT = sample.of(scores.confidence[setting.criterion] >= setting.threshold)
        nll_N, _ = routed(scores, setting.criterion, setting.threshold)
        return SettingScores(sample.of(nll_N), ~shallow_WT | sample.of(scores.agree), shallow_WT)
    found = stepwise(model, sample.windows, setting.strategy())
    shallow_WT = found.exit_layer < model.config.num_layers
    return SettingScores(found.nll, found.token == deep_token_WT, shallow_WT)
