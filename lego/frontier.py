"""Quality against cost and time: criteria and KV policies over shallow ratios, and dense models."""

# Shape letters: W = windows, T = tokens of a window.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lego.bootstrap import Interval, mean_interval
from lego.break_even import crossing, expected_break_even
from lego.config import Criterion, ExperimentConfig, KVPolicy, ModelConfig
from lego.cost import expected_true_cost
from lego.criteria import score_criteria
from lego.data import Corpus
from lego.evaluation import TokenScores, score_tokens, stepwise
from lego.frontier_quality import Sample, Setting, SettingScores, all_settings, score_setting
from lego.frontier_timing import FrontierTimes, Watch, time_frontier
from lego.model import LegoModel
from lego.strategies import EarlyExit
from lego.timing import Spread

BASELINES = ("dense_shallow", "dense_deep")
_NEVER = EarlyExit(threshold=float("inf"))


@dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """What to measure: shares of the calibration tokens that exit, and windows for the quality.

    risks are shares that may leave with another token than full depth's.
    """

    ratios: tuple[float, ...] = (0.0, 0.3, 0.6, 0.9)
    risks: tuple[float, ...] = (0.01, 0.03, 0.1)
    num_windows: int = 64

    def __post_init__(self) -> None:
        if not self.ratios:
            raise ValueError("frontier: ratios must hold at least one share, got none")
        for name, shares in (("ratios", self.ratios), ("risks", self.risks)):
            got = ", ".join(map(str, shares))
            if not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"frontier: {name} must be shares in [0, 1], got {got}")
            if len(set(shares)) < len(shares):
                raise ValueError(f"frontier: {name} must differ, got {got}")
        if self.num_windows < 2:
            raise ValueError(f"frontier: windows must be >= 2, got {self.num_windows}")


@dataclass(frozen=True)
class DenseLine:
    """The best of dense models at a true cost: what early exit has to beat.

    Between the two, costs and nats are interpolated, as if a model of any depth had been trained.
    A deep one that is no better than the shallow one helps at no cost. Nats are means of windows.
    """

    costs: tuple[float, float]  # of dense_shallow and dense_deep
    nll_W: tuple[Tensor, Tensor]

    def at(self, true_cost: float) -> Tensor:
        """Nats of each window, [W]."""
        shallow_W, deep_W = self.nll_W
        if deep_W.mean() >= shallow_W.mean():
            return shallow_W
        share = (true_cost - self.costs[0]) / (self.costs[1] - self.costs[0])
        return torch.lerp(shallow_W, deep_W, min(max(share, 0.0), 1.0))


def measure_frontier(
    model: LegoModel,
    baselines: Mapping[str, LegoModel],
    corpus: Corpus,
    config: ExperimentConfig,
    options: FrontierOptions,
    watch: Watch = lambda name, total: lambda: None,
) -> dict[str, Any]:
    """Quality, cost and time of every setting, as written to frontier.json.

    baselines holds the dense models `dense_shallow` and `dense_deep`. Quality is that of windows
    spread evenly over the validation split, with 95 % bootstrap intervals over windows. Thresholds
    come from the calibration split; in what is timed each is moved until as many tokens exit.
    Raises: ValueError if the model is dense, a baseline is missing or there is only one window.
    """
    _check(model, baselines)
    validation, seq_len = corpus.validation, config.train.seq_len
    sample = Sample.spread(validation, seq_len, options.num_windows)
    advance = watch("scores", 2)
    scores = score_tokens(model, validation, seq_len)
    advance()
    calibration = score_tokens(model, corpus.calibration, seq_len)
    advance()
    settings = all_settings(model.config.upper_kv, calibration, options.ratios, options.risks)
    full_nll_WT, quality = _score(model, sample, scores, settings, watch)
    nll_WT = {"full": full_nll_WT}
    nll_WT |= {name: sample.dense_nll(baselines[name]) for name in BASELINES}
    ratios = {setting: found.shallow_ratio for setting, found in quality.items()}
    times = time_frontier(
        model, baselines, validation, ratios, calibration.confidence, config.timing, watch
    )
    return {
        "num_layers": model.config.num_layers,
        "exit_layer": model.config.exit_layer,
        "upper_kv": model.config.upper_kv,
        "num_windows": len(sample.place_W),
        "seq_len": seq_len,
        "engine": times.engine,
        "timing": asdict(config.timing),
        "agreement_of_exits": scores.agree.double().mean().item(),
        "criteria": {k: asdict(v) for k, v in score_criteria(scores, model.config).items()},
        **_results(sample, nll_WT, quality, times),
    }


def _check(model: LegoModel, baselines: Mapping[str, LegoModel]) -> None:
    if not model.upper:
        raise ValueError(
            "frontier: the model must have an upper block, got a dense model; "
            "train one with exit_layer < num_layers"
        )
    for name in BASELINES:
        if name not in baselines:
            raise ValueError(f"frontier: baselines must hold {name}, got {sorted(baselines)}")


def _score(
    model: LegoModel,
    sample: Sample,
    scores: TokenScores,
    settings: Sequence[Setting],
    watch: Watch,
) -> tuple[Tensor, dict[Setting, SettingScores]]:
    """Nats [W, T] of full depth, and what each setting makes of the windows."""
    advance = watch("quality", len(settings))
    full, quality = stepwise(model, sample.windows, _NEVER), {}
    for setting in settings:
        quality[setting] = score_setting(model, sample, scores, full.token, setting)
        advance()
    return full.nll, quality


def _results(
    sample: Sample,
    nll_WT: Mapping[str, Tensor],
    quality: Mapping[Setting, SettingScores],
    times: FrontierTimes,
) -> dict[str, Any]:
    """The models, the settings with their distance to the dense ones, and where time breaks even.

    nll_WT is that of full depth and of the baselines.
    """
    models = {
        name: {
            "num_layers": times.models[name].config.num_layers,
            **_interval("bits_per_byte", sample.bits_per_byte(nll_WT[name])),
            **times.model(name),
        }
        for name in nll_WT
    }
    shallow, deep = BASELINES
    line = DenseLine(
        (models[shallow]["true_cost"], models[deep]["true_cost"]),
        (nll_WT[shallow].double().mean(dim=1), nll_WT[deep].double().mean(dim=1)),
    )
    config = times.models["full"].config
    settings = [
        {
            **_setting_results(setting, found, config, sample),
            **_differences(found.nll, nll_WT["full"], line.at(generation["true_cost"]), sample),
            "generation": generation,
        }
        for setting, found in quality.items()
        for generation in [times.setting(setting.name)]
    ]
    return {
        "models": models,
        "settings": settings,
        "break_even": break_even_rows(list(quality), settings, config, times),
    }


def _setting_results(
    setting: Setting, found: SettingScores, config: ModelConfig, sample: Sample
) -> dict[str, Any]:
    """What the windows say of a setting."""
    ratio = found.shallow_ratio
    return {
        "criterion": setting.criterion,
        "kv_policy": setting.kv_policy,
        "ratio": setting.ratio,
        "risk": setting.risk,
        "threshold": setting.threshold,
        "shallow_ratio": ratio,
        **_interval("bits_per_byte", sample.bits_per_byte(found.nll)),
        **_interval("agreement", mean_interval(found.agree.double().mean(dim=1))),
        "mean_layers": ratio * config.exit_layer + (1 - ratio) * config.num_layers,
        "expected_true_cost": expected_true_cost(config, ratio, setting.criterion),
    }


def _differences(
    nll_WT: Tensor, full_WT: Tensor, dense_W: Tensor, sample: Sample
) -> dict[str, Any]:
    """Bits per byte above full depth, and above the dense models at equal true cost: paired."""
    lost = sample.bits_per_byte(nll_WT.double() - full_WT)
    behind = sample.bits_per_byte(nll_WT.double() - dense_W[:, None])
    return _interval("minus_full_depth", lost) | _interval("minus_dense_at_equal_cost", behind)


def break_even_rows(
    settings: Sequence[Setting],
    results: Sequence[Mapping[str, Any]],
    config: ModelConfig,
    times: FrontierTimes,
) -> list[dict[str, Any]]:
    """For each KV policy and criterion, the shallow ratio from which exits pay.

    `expected` follows from the weights alone, `counted` from the bytes and `measured` from the
    seconds of generation over those of full depth: medians and quartiles of paired rounds. Where
    exits pay at the lowest ratio measured already, it is that one, `lowest`.
    """
    groups: dict[tuple[KVPolicy, Criterion], list[int]] = {}
    for index, setting in enumerate(settings):
        groups.setdefault(setting.group, []).append(index)
    found = []
    for (policy, criterion), members in groups.items():
        generated = [results[index]["generation"] for index in members]
        ratios = [generation["shallow_ratio"] for generation in generated]
        spreads = [Spread.of(times.relative(settings[index].name)) for index in members]
        found.append(
            {
                "criterion": criterion,
                "kv_policy": policy,
                "expected": expected_break_even(config, criterion),
                "lowest": min(ratios),
                "counted": crossing(ratios, [each["true_cost"] for each in generated]),
                "measured": crossing(ratios, [spread.median for spread in spreads]),
                "measured_quartiles": [
                    crossing(ratios, [spread.low for spread in spreads]),
                    crossing(ratios, [spread.high for spread in spreads]),
                ],
            }
        )
    return found


def _interval(name: str, interval: Interval) -> dict[str, Any]:
    return {name: interval.mean, f"{name}_interval": [interval.low, interval.high]}
