"""One decode step at a time: logits from given tokens, and tokens from those logits.

This is the readable definition that faster engines are tested against. The lower block runs for
all rows together; the upper block runs only for rows that stay, adjacent rows that owe equally
many tokens together.
"""

# Shape letters: B = rows still decoding, T = tokens, D = model width, V = vocabulary.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lego.cached_blocks import CachedBlocks
from lego.counts import Counts
from lego.model import LegoModel
from lego.ops.exit_decision import softmax_confidence
from lego.sampling import Sampling, draw
from lego.strategies import EarlyExit, FullDepth, Uncached


class GeneratedToken(NamedTuple):
    """One new token, as a streamer sees it."""

    row: int
    token: int
    exit_layer: int  # layers it ran
    confidence: float  # the criterion's value at the exit; NaN where no decision was made


class TokenDecoder(Protocol):
    """Continues prompts by tokens of its own choice. A row keeps its number to the end."""

    @property
    def counts(self) -> Counts:
        """All calls made up to now."""

    def prefill(self, prompts: Sequence[Tensor]) -> None:
        """Take one prompt a row, int64 [T] with T >= 1; the last id waits for the first step."""

    def step(self) -> list[GeneratedToken]:
        """One step of all rows that go on, in ascending order; a row may yield several tokens."""

    def finish(self, rows: Sequence[int]) -> None:
        """These rows yield no more; the others do not notice."""


class ThresholdDecoder(TokenDecoder, Protocol):
    """A TokenDecoder of EarlyExit: its thresholds may change between steps, row by row."""

    def set_threshold(self, row: int, threshold: float) -> None:
        """What the next confidences of a row are compared with; not NaN."""

    def shallow_token(self, row: int) -> int:
        """The token that an exit would have given in place of the row's newest one."""


class Step(NamedTuple):
    """What one step yields for each row."""

    logits_BV: Tensor  # of the exit that was taken
    exit_layer: list[int]  # the exit that gave the logits: exit_layer or num_layers
    confidence: list[float]  # the criterion's value; NaN where no decision was made


class LogitsDecoder(Protocol):
    """Consumes prompts, then one given token a row and step."""

    @property
    def counts(self) -> Counts: ...
    def prefill(self, prompts: Sequence[Tensor]) -> None: ...
    def step(self, token_B: Tensor) -> Step: ...
    def keep(self, rows: list[int]) -> None: ...


class DrawingDecoder:
    """A TokenDecoder that draws one token a row from the logits of every step."""

    def __init__(self, decoder: LogitsDecoder, sampling: Sampling) -> None:
        self._decoder, self._sampling = decoder, sampling
        self._rows: list[int] = []  # those that go on
        self._positions: list[int] = []  # of the token that each will draw next
        self._token_B = torch.empty(0, dtype=torch.int64)  # the input of the next step

    @property
    def counts(self) -> Counts:
        return self._decoder.counts

    def prefill(self, prompts: Sequence[Tensor]) -> None:
        self._decoder.prefill([ids_T[:-1] for ids_T in prompts])
        self._rows = list(range(len(prompts)))
        self._positions = [len(ids_T) for ids_T in prompts]
        self._token_B = torch.stack([ids_T[-1] for ids_T in prompts])

    def step(self) -> list[GeneratedToken]:
        step = self._decoder.step(self._token_B)
        tokens = draw(step.logits_BV, self._sampling, self._rows, self._positions)
        self._token_B = self._token_B.new_tensor(tokens)
        self._positions = [position + 1 for position in self._positions]
        new = zip(self._rows, tokens, step.exit_layer, step.confidence, strict=True)
        return [GeneratedToken(*values) for values in new]

    def finish(self, rows: Sequence[int]) -> None:
        kept = [i for i, row in enumerate(self._rows) if row not in rows]
        self._decoder.keep(kept)
        self._rows = [self._rows[i] for i in kept]
        self._positions = [self._positions[i] for i in kept]
        self._token_B = self._token_B[kept]


class ExitingDecoder(DrawingDecoder):
    """The ThresholdDecoder of EarlyExit."""

    _decoder: CachedDecoder

    def set_threshold(self, row: int, threshold: float) -> None:
        self._decoder.threshold_B[self._rows.index(row)] = threshold

    def shallow_token(self, row: int) -> int:
        index = self._rows.index(row)
        logits_1V = self._decoder.newest_exit_logits(index)
        # the newest token is at the position before that of the next
        (token,) = draw(logits_1V, self._sampling, [row], [self._positions[index] - 1])
        return token


class UncachedDecoder:
    """Keeps the ids and runs them all again at every step."""

    def __init__(self, model: LegoModel, strategy: Uncached) -> None:
        self.model, self.strategy = model, strategy
        self.counts = Counts()
        self._ids: list[Tensor] = []

    def prefill(self, prompts: Sequence[Tensor]) -> None:
        self._ids = list(prompts)

    def step(self, token_B: Tensor) -> Step:
        model, counts = self.model, self.counts
        self._ids = [torch.cat((ids, t[None])) for ids, t in zip(self._ids, token_B, strict=True)]
        # padding on the right is never seen: attention is causal
        ids_BT = torch.nn.utils.rnn.pad_sequence(self._ids, batch_first=True)
        last_B = torch.tensor([len(ids) - 1 for ids in self._ids], device=ids_BT.device)
        final_BTD = model(ids_BT).final_state
        counts.lower_layer_calls += len(model.lower) * ids_BT.numel()
        counts.upper_layer_calls += len(model.upper) * ids_BT.numel()
        counts.lower_passes += len(model.lower)
        counts.upper_passes += len(model.upper)
        if model.upper and model.config.upper_kv == "exit_state":
            counts.upper_kv_calls += ids_BT.numel()
            counts.upper_kv_passes += 1
        num_rows = len(self._ids)
        row_B = torch.arange(num_rows, device=ids_BT.device)
        if self.strategy.all_logits:
            logits_BV = model.final_logits(final_BTD)[row_B, last_B]
            counts.head_calls += ids_BT.numel()
        else:
            logits_BV = model.final_logits(final_BTD[row_B, last_B])
            counts.head_calls += num_rows
        counts.head_passes += 1
        return Step(logits_BV, [model.config.num_layers] * num_rows, [math.nan] * num_rows)

    def keep(self, rows: list[int]) -> None:
        self._ids = [self._ids[row] for row in rows]


class CachedDecoder:
    """Full-depth and early-exit decoding over preallocated caches."""

    def __init__(
        self, model: LegoModel, strategy: FullDepth | EarlyExit, num_rows: int, num_slots: int
    ) -> None:
        policy = strategy.policy_for(model) if isinstance(strategy, EarlyExit) else None
        self.model, self.strategy = model, strategy
        self.blocks = CachedBlocks(model, num_rows, num_slots, policy)
        threshold = strategy.threshold if isinstance(strategy, EarlyExit) else math.inf
        self.threshold_B = torch.full(
            (num_rows,), threshold, dtype=torch.float64, device=model.device
        )

    @property
    def counts(self) -> Counts:
        return self.blocks.counts

    def prefill(self, prompts: Sequence[Tensor]) -> None:
        """Take one prompt a row, int64 [T] with T >= 0; see CachedBlocks.prefill."""
        self.blocks.prefill(prompts)

    def keep(self, rows: list[int]) -> None:
        """Go on with the given rows alone: the others have finished."""
        self.blocks.keep(rows)
        self.threshold_B = self.threshold_B[rows]

    def step(self, token_B: Tensor) -> Step:
        """Consume one token a row; yield the logits of the next."""
        blocks, config = self.blocks, self.model.config
        exit_state_BD = blocks.lower(token_B[:, None], slice(0, len(blocks.rows)))[:, 0]
        logits_BV, confidence_B, exits_B = self._decide(exit_state_BD)
        exits = exits_B.tolist()
        for rows in self._deep_groups(exits):
            logits_BV[rows] = blocks.final_logits(blocks.upper(rows)[:, 0])
        depth = [config.exit_layer if exit_ else config.num_layers for exit_ in exits]
        return Step(logits_BV, depth, confidence_B.tolist())

    def _decide(self, h_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits_BV, confidence_B, exits_B); the logits are set for the rows that exit."""
        blocks, strategy = self.blocks, self.strategy
        if not isinstance(strategy, EarlyExit):
            nothing = h_BD.new_full((len(h_BD),), math.nan)
            return h_BD.new_empty(len(h_BD), self.model.config.vocab_size), nothing, nothing > 0
        if strategy.criterion != "gate":
            logits_BV = blocks.exit_logits(h_BD)
            confidence_B = softmax_confidence(logits_BV, strategy.criterion)
            return logits_BV, confidence_B, self._exits(confidence_B)
        confidence_B = blocks.gate_score(h_BD)
        exits_B = self._exits(confidence_B)
        logits_BV = h_BD.new_empty(len(h_BD), self.model.config.vocab_size)
        if exits_B.any():
            logits_BV[exits_B] = blocks.exit_logits(h_BD[exits_B])
        return logits_BV, confidence_B, exits_B

    def _exits(self, confidence_B: Tensor) -> Tensor:
        return confidence_B >= self.threshold_B.to(confidence_B.dtype)

    def newest_exit_logits(self, row: int) -> Tensor:
        """Logits [1, V] of the exit after the token that a row consumed last."""
        return self.blocks.exit_logits(self.blocks.newest_exit_state(row))

    def _deep_groups(self, exits: list[bool]) -> Iterator[slice]:
        """Adjacent rows that stay and owe equally many tokens."""
        owed, start = self.blocks.num_owed, 0
        while start < len(exits):
            stop = start + 1
            if not exits[start]:
                num_owed = owed(start)
                while stop < len(exits) and not exits[stop] and owed(stop) == num_owed:
                    stop += 1
                yield slice(start, stop)
            start = stop
