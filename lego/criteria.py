"""How well does each criterion tell the tokens that may exit from those that may not?

A token may exit if the shallow token is the deep one. For every share of the tokens, the most
confident of them exit: that has a risk and a true cost.
"""

# Shape letters: N = scored tokens, P = N + 1 points of a curve.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lego.config import ModelConfig
from lego.cost import dense_true_cost, expected_true_cost
from lego.evaluation import TokenScores

_NUM_BINS = 15


@dataclass(frozen=True, kw_only=True)
class CriterionScore:
    """One criterion as a predictor of "the shallow token is the deep one".

    Risks are means over all tokens: the share that left with another token than the deep one, and
    the nats lost against full depth, which are negative where the shallow exit is the better. An
    area is the mean risk over true costs from that of the shallow exit alone to full depth's, 1.
    best_f1 is the highest over all thresholds. calibration_error takes the confidence for the
    probability of agreement, which it means to be for the gate alone.
    """

    disagreement_area: float
    lost_nats_area: float
    best_f1: float
    calibration_error: float


def score_criteria(scores: TokenScores, config: ModelConfig) -> dict[str, CriterionScore]:
    """Every criterion of the scores, then `oracle` and `random`, which decide for nothing.

    The oracle (CALM's) lets exactly the agreeing tokens go: no criterion risks less disagreement
    at any cost. That says nothing of lost nats: agreeing tokens may differ in probability. `random`
    is as sure of every token as the share that agrees.
    Raises: ValueError for scores of a dense model, or if a confidence is NaN.
    Source of the oracle: Schuster et al. 2022, arXiv:2207.07061.
    """
    if not scores.confidence:
        raise ValueError("score_criteria: scores must hold confidence, got a dense model's")
    agree_N = scores.agree.double()
    confidence: dict[str, Tensor] = {name: value for name, value in scores.confidence.items()}
    confidence |= {"oracle": agree_N, "random": agree_N.mean().expand(len(agree_N))}
    lost_N = (scores.nll_shallow - scores.nll_deep).double()
    free = 1.0, dense_true_cost(config, config.exit_layer)
    # true cost if no token exits, and if all do; it is affine in the shallow ratio
    ends: dict[str, tuple[float, float]] = {"oracle": free, "random": free}
    for criterion in scores.confidence:
        never, always = (expected_true_cost(config, ratio, criterion) for ratio in (0.0, 1.0))
        ends[criterion] = never, always
    found = {}
    for name, confidence_N in confidence.items():
        if bool(confidence_N.isnan().any()):
            raise ValueError(f"score_criteria: {name} must hold numbers, got nan")
        found[name] = CriterionScore(
            disagreement_area=_area(risk_curve(confidence_N, 1 - agree_N), *ends[name], free[1]),
            lost_nats_area=_area(risk_curve(confidence_N, lost_N), *ends[name], free[1]),
            best_f1=best_f1(confidence_N, scores.agree),
            calibration_error=calibration_error(confidence_N, scores.agree),
        )
    return found


def risk_curve(confidence_N: Tensor, loss_N: Tensor) -> Tensor:
    """Loss of the k most confident tokens over N, float64 [N + 1] for k = 0 to N.

    No threshold parts equal confidences: in between the curve is straight, the mean of all orders.
    """
    _, loss_N = _ranked(confidence_N, loss_N)
    return torch.cat((loss_N.new_zeros(1), loss_N.cumsum(0))) / len(loss_N)


def ratio_at_risk(confidence_N: Tensor, risk_P: Tensor, risk: float) -> float:
    """The largest share of tokens that some threshold lets go at a risk of at most `risk`.

    risk_P is the risk_curve of the confidences; 0 if even the surest risk more.
    """
    descending = confidence_N.sort(descending=True).values
    # k tokens go by a threshold if the next is less sure
    parts = torch.ones(len(risk_P), dtype=torch.bool)
    parts[1:-1] = descending[:-1] > descending[1:]
    allowed = (parts & (risk_P <= risk)).nonzero()
    return allowed[-1].item() / len(confidence_N) if len(allowed) else 0.0


def best_f1(confidence_N: Tensor, agree_N: Tensor) -> float:
    """Highest F1 over thresholds of "confidence >= threshold" for agree_N, bool; 0 if none agrees.

    0 also stands for the threshold that lets nobody go.
    """
    true_P = risk_curve(confidence_N, agree_N) * len(agree_N)
    exits_P = torch.arange(len(true_P))
    # inside a tie F1 runs monotonically from one end to the other: it needs no exclusion
    return (2 * true_P / (exits_P + agree_N.sum()).clamp(min=1)).max().item()


def calibration_error(confidence_N: Tensor, agree_N: Tensor, *, num_bins: int = _NUM_BINS) -> float:
    """Expected calibration error: |mean confidence - share that agrees|, mean over tokens.

    Bins hold equally many tokens, give or take one, by confidence; equal confidences share their
    agreement, so that their order does not matter.
    Source: Nixon et al. 2019, arXiv:1904.01685 (equal mass).
    """
    confidence_N, share_N = _ranked(confidence_N, agree_N)
    gap_N = confidence_N - share_N
    gaps = [gap.sum().abs() for gap in gap_N.tensor_split(num_bins)]
    return (torch.stack(gaps).sum() / len(gap_N)).item()


def _ranked(confidence_N: Tensor, value_N: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 by falling confidence, each value as the mean of its ties."""
    distinct, group_N, size = confidence_N.double().unique(return_inverse=True, return_counts=True)
    total = torch.zeros_like(distinct).index_add_(0, group_N, value_N.double())
    order_N = group_N.argsort(descending=True)
    return confidence_N.double()[order_N], (total / size)[group_N[order_N]]


def _area(risk_P: Tensor, never: float, always: float, cheapest: float) -> float:
    """Mean risk over true costs from `cheapest` to 1, where no exit costs `never`, all `always`.

    A cost below `always` has the risk of letting everybody go.
    """
    ratio_P = torch.linspace(0, 1, len(risk_P), dtype=torch.float64)
    first = (never - 1) / (never - always)  # break even: a lower ratio costs more than full depth
    inside = ratio_P > first
    ratio_P = torch.cat((ratio_P.new_tensor([first]), ratio_P[inside]))
    left = int((~inside).sum()) - 1
    step = first * (len(risk_P) - 1) - left
    at_first = torch.lerp(risk_P[left], risk_P[left + 1], step)
    risk_P = torch.cat((at_first[None], risk_P[inside]))
    area = (never - always) * torch.trapezoid(risk_P, ratio_P).item()
    area += (always - cheapest) * risk_P[-1].item()
    return area / (1 - cheapest)
