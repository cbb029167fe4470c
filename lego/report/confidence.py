"""How sure the shallow exit was where it was right, and where it was wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lego.config import Criterion
from lego.evaluation import TokenScores
from lego.report.cells import Table, percent, plain

NUM_BINS = 40


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """Validation tokens by confidence, NUM_BINS bins over [0, 1]; no threshold means no exit."""

    criterion: str
    threshold: float | None
    right: list[int]
    wrong: list[int]
    exit_right: int  # at the threshold or above
    exit_wrong: int

    @property
    def table(self) -> Table:
        """What exits and what stays, by whether the shallow token was right."""
        stay_right = sum(self.right) - self.exit_right
        stay_wrong = sum(self.wrong) - self.exit_wrong
        counts = (("exits", self.exit_right, self.exit_wrong), ("stays", stay_right, stay_wrong))
        rows = [
            (name, plain(yes), plain(no), percent(yes / (yes + no) if yes + no else None))
            for name, yes, no in counts
        ]
        columns = (f"by {self.criterion}", "shallow right", "shallow wrong", "right")
        return Table(caption=f"Validation tokens by {self.criterion}", columns=columns, rows=rows)


def confidence(scores: TokenScores, criterion: Criterion, threshold: float | None) -> Confidence:
    """Count the tokens of TokenScores; each is in one bin."""
    confidence_N, right_N = scores.confidence[criterion], scores.correct_shallow
    exits_N = confidence_N >= (float("inf") if threshold is None else threshold)

    def bins(chosen_N: torch.Tensor) -> list[int]:
        return torch.histc(confidence_N[chosen_N], bins=NUM_BINS, min=0, max=1).int().tolist()

    return Confidence(
        criterion=criterion,
        threshold=threshold,
        right=bins(right_N),
        wrong=bins(~right_N),
        exit_right=int((exits_N & right_N).sum()),
        exit_wrong=int((exits_N & ~right_N).sum()),
    )
