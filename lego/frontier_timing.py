"""Time of generation at given shallow ratios, on the native engine where it serves the model."""

# Shape letters: N = calibration tokens.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from torch import Tensor

from lego.calibration import upper_quantile
from lego.config import Criterion, TimingConfig
from lego.cost import elements_read
from lego.data import TokenSplit
from lego.frontier_quality import Setting
from lego.generation import Engine, ReferenceEngine, generate
from lego.model import LegoModel
from lego.strategies import FullDepth, Strategy
from lego.timed_generation import (
    TimedGeneration,
    early_exit_results,
    prompt_windows,
    time_generation,
)

# a step's name and how many parts it has; what it returns is called after each part
Watch = Callable[[str, int], Callable[[], None]]

# halvings of the range of thresholds: 2**-7 of the tokens is a token of 128
_SEARCH_STEPS = 7
_CLOSE_ENOUGH = 0.01


@dataclass(frozen=True, kw_only=True)
class FrontierTimes:
    """Generation of every setting and model by its name, full depth under `full`.

    Full depth has a turn beside every few of them: a machine drifts in the minutes that all take.
    So times are those of full depth, its median over all turns, by the paired speedup.
    """

    timed: dict[str, TimedGeneration]  # where each name was timed, with `full`
    engine: str  # native or reference
    threshold: dict[str, float]  # of each setting, moved to its ratio in generation
    models: Mapping[str, LegoModel]

    def setting(self, name: str) -> dict[str, Any]:
        """See early_exit_results; also the threshold of generation."""
        found = early_exit_results(self.timed[name], name)
        del found["full_ms_per_token"], found["exit_ms_per_token"]
        return found | self.speed(name) | {"threshold": self.threshold[name]}

    def model(self, name: str) -> dict[str, Any]:
        """Time and true cost of `full` or of a dense model."""
        timed = self.timed[name]
        full = elements_read(timed.config, timed.counts("full"))
        speedup = timed.speedup(name, "full")
        return self.speed(name) | {
            "true_cost": elements_read(self.models[name].config, timed.counts(name)) / full,
            "speedup": speedup.median,
            "speedup_quartiles": [speedup.low, speedup.high],
        }

    def relative(self, name: str) -> list[float]:
        """Seconds over those of full depth, round by round."""
        seconds = self.timed[name].seconds
        return [s / full for s, full in zip(seconds[name], seconds["full"], strict=True)]

    def speed(self, name: str) -> dict[str, float]:
        """Time of a token, and tokens in a second, at batch 1."""
        groups = {id(timed): timed for timed in self.timed.values()}.values()
        full_ms = median(
            1e3 * s / timed.num_tokens for timed in groups for s in timed.seconds["full"]
        )
        ms = full_ms / self.timed[name].speedup(name, "full").median
        return {"ms_per_token": ms, "tokens_per_second": 1e3 / ms}


def time_frontier(
    model: LegoModel,
    baselines: Mapping[str, LegoModel],
    split: TokenSplit,
    settings: Mapping[Setting, float],
    confidence: Mapping[Criterion, Tensor],
    timing: TimingConfig,
    watch: Watch,
) -> FrontierTimes:
    """Time the baselines and every setting beside full depth, on prompts of the split.

    settings gives the share of the generated tokens that shall exit, confidence that of the
    calibration tokens [N]. Text that a model writes greedily is surer than text that it reads, so
    the calibrated thresholds would let more tokens go than were scored for quality.
    """
    from lego.engine import NativeEngine, why_not

    models = {"full": model, **baselines}
    make: Callable[[LegoModel], Engine] = ReferenceEngine if why_not(model) else NativeEngine
    engines = {name: make(each) for name, each in models.items()}
    prompts = prompt_windows(split, timing.num_prompts, timing.prompt_tokens)
    groups: dict[Any, dict[str, Strategy]] = {"models": {name: FullDepth() for name in models}}
    advance, threshold = watch("thresholds", len(settings)), {}
    for setting, ratio in settings.items():
        share = partial(_shallow_ratio, engines["full"], prompts, timing.new_tokens, setting)
        threshold[setting.name] = generation_threshold(share, confidence[setting.criterion], ratio)
        group = groups.setdefault(setting.group, {"full": FullDepth()})
        group[setting.name] = setting.strategy(threshold[setting.name])
        engines[setting.name] = engines["full"]
        advance()
    advance = watch("timing", (timing.rounds + 1) * sum(map(len, groups.values())))
    timed: dict[str, TimedGeneration] = {}
    for group in groups.values():
        found = time_generation(model, split, group, timing, engines=engines, after_each=advance)
        timed |= {name: found for name in group if name not in timed}
    return FrontierTimes(
        timed=timed,
        engine="reference" if make is ReferenceEngine else "native",
        threshold=threshold,
        models=models,
    )


def _shallow_ratio(
    engine: Engine, prompts: Sequence[Tensor], num_new: int, setting: Setting, threshold: float
) -> float:
    """The share of greedily generated tokens that exit at a threshold."""
    model, strategy, depths = engine.model, setting.strategy(threshold), []
    for prompt in prompts:
        output = generate(model, [prompt], num_new, strategy, engine=engine)
        depths += output.exit_layer[0]
    return sum(depth < model.config.num_layers for depth in depths) / len(depths)


def generation_threshold(
    shallow_ratio: Callable[[float], float], confidence_N: Tensor, ratio: float
) -> float:
    """The threshold, of those tried, at which shallow_ratio(threshold) is nearest to ratio.

    Bisects over shares of the calibration tokens; a ratio of 0 never exits. Every threshold writes
    a text of its own, so the share need not fall steadily with it, and none may be near.
    """
    if ratio == 0:
        return math.inf
    low, high, share = 0.0, 1.0, ratio
    best = math.inf, math.inf
    for _ in range(_SEARCH_STEPS):
        value = upper_quantile(confidence_N, share)
        found = shallow_ratio(value)
        best = min(best, (abs(found - ratio), value))
        if best[0] <= _CLOSE_ENOUGH:
            break
        low, high = (low, share) if found > ratio else (share, high)
        share = (low + high) / 2
    return best[1]
