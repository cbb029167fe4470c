"""A target held while generating: each row's threshold moves a little after each of its tokens."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from lego.decoding import GeneratedToken, ThresholdDecoder

Held = Literal["shallow_ratio", "disagreement"]


@dataclass(frozen=True, kw_only=True)
class Controller:
    """What to hold, and how.

    held: shallow_ratio is the share of tokens that exit. disagreement is the share of tokens that
    exit and are not the token of full depth after the same text. It is estimated: of the tokens
    that would exit, a random probe_share runs the upper block too, and keeps its token.
    The rule: threshold += step * (loss - target), within [-step, 1 + step]. The loss of a token is
    1 if it exits, else 0; for disagreement 1 / probe_share if it was probed and the exit was wrong.
    So after T tokens the mean loss is within (1 + step) / (step * T) of the target, on any text
    (for disagreement 1 + step / probe_share), or below it where even exiting always loses less.
    start: the first threshold, in [0, 1]; target in [0, 1]; step and probe_share in (0, 1].
    Source: Gibbs and Candes 2021, arXiv:2106.00170. Raises: ValueError for a value out of range.
    """

    target: float
    held: Held = "shallow_ratio"
    step: float = 0.03
    probe_share: float = 0.1
    start: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.held not in get_args(Held):
            raise ValueError(f"Controller.held: must be one of {get_args(Held)}, got {self.held!r}")
        for name in ("target", "start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Controller.{name}: must be in [0, 1], got {getattr(self, name)}")
        for name in ("step", "probe_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Controller.{name}: must be in (0, 1], got {getattr(self, name)}")


@dataclass(kw_only=True)
class Control:
    """What a Controller did in one row.

    shallow_ratio counts the tokens that would have exited but for a probe. loss is the mean that
    was held: the shallow ratio, or the estimate of the disagreement.
    """

    threshold: float  # of the next token
    tokens: int = 0
    shallow: int = 0
    probes: int = 0  # of tokens that would have exited
    disagreements: int = 0  # among the probes
    loss_sum: float = 0.0
    probing: bool = False  # whether the next token is probed
    lowest: float = field(init=False)  # thresholds so far
    highest: float = field(init=False)

    def __post_init__(self) -> None:
        self.lowest = self.highest = self.threshold

    @property
    def shallow_ratio(self) -> float:
        return self.shallow / self.tokens if self.tokens else math.nan

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens if self.tokens else math.nan


class ControlledRows:
    """The rows of one generation under a Controller. A row alone does what it does in a batch."""

    def __init__(self, controller: Controller, decoder: ThresholdDecoder, num_rows: int) -> None:
        self.controller, self._decoder = controller, decoder
        self._random = [random.Random(f"{controller.seed} {row}") for row in range(num_rows)]
        self.rows = [Control(threshold=_float32(controller.start)) for _ in range(num_rows)]
        for row in range(num_rows):
            self._set(row)

    def update(self, new: GeneratedToken) -> None:
        """Take note of a row's new token, and set the threshold of its next one."""
        controller, control = self.controller, self.rows[new.row]
        exits = new.confidence >= control.threshold
        loss = float(exits)
        if controller.held == "disagreement":
            loss = 0.0
            if exits and control.probing:
                wrong = self._decoder.shallow_token(new.row) != new.token
                control.probes += 1
                control.disagreements += wrong
                loss = wrong / controller.probe_share
        control.tokens += 1
        control.shallow += exits
        control.loss_sum += loss
        moved = control.threshold + controller.step * (loss - controller.target)
        control.threshold = _float32(min(max(moved, -controller.step), 1 + controller.step))
        control.lowest = min(control.lowest, control.threshold)
        control.highest = max(control.highest, control.threshold)
        self._set(new.row)

    def _set(self, row: int) -> None:
        controller, control = self.controller, self.rows[row]
        if controller.held == "disagreement":
            control.probing = self._random[row].random() < controller.probe_share
        self._decoder.set_threshold(row, math.inf if control.probing else control.threshold)


def _float32(value: float) -> float:
    """As decoders compare confidences with it."""
    return float(torch.tensor(value, dtype=torch.float32))
