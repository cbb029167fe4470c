"""One decode step at a time: the caches, the exit decision, and what an exited token leaves.

This is the readable definition that faster engines are tested against. The lower block runs for
all rows together; the upper block runs only for rows that stay, adjacent rows that owe equally
many tokens together.
"""

# Shape letters: B = rows still decoding, T = tokens, D = model width, V = vocabulary.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lego.config import KVPolicy
from lego.model import LegoModel
from lego.ops.exit_decision import softmax_confidence
from lego.strategies import EarlyExit, FullDepth, Uncached


@dataclass
class Counts:
    """Calls actually made, counted where they are made. A layer call is one layer on one token.

    *_passes count how often a weight was read from memory: once a call, however many tokens share
    it. kv_slots counts cache slots read, over layers.
    """

    lower_layer_calls: int = 0
    upper_layer_calls: int = 0
    upper_kv_calls: int = 0  # tokens whose upper K/V were projected apart from a layer call
    head_calls: int = 0
    gate_calls: int = 0
    lower_passes: int = 0
    upper_passes: int = 0
    upper_kv_passes: int = 0
    head_passes: int = 0
    gate_passes: int = 0
    kv_slots: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


class Step(NamedTuple):
    """What one step yields for each row."""

    logits_BV: Tensor  # of the exit that was taken
    exit_layer: list[int]  # the exit that gave the logits: exit_layer or num_layers
    confidence: list[float]  # the criterion's value; NaN where no decision was made


class Decoder(Protocol):
    """Consumes prompts, then one token a row and step."""

    counts: Counts

    def prefill(self, prompts: Sequence[Tensor]) -> None: ...
    def step(self, token_B: Tensor) -> Step: ...
    def keep(self, rows: list[int]) -> None: ...


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


@dataclass
class _Row:
    """How far one sequence has come."""

    position: int = 0  # of the next token
    upper_len: int = 0  # slots filled in the upper caches


class CachedDecoder:
    """Full-depth and early-exit decoding over preallocated caches.

    A token that exits owes the upper caches its keys and values. They are filled in when the next
    deep token of its row comes, all that are owed in one call, by the rule of the KV policy.
    """

    def __init__(
        self, model: LegoModel, strategy: FullDepth | EarlyExit, num_rows: int, num_slots: int
    ) -> None:
        config, like = model.config, model.embedding.weight.detach()
        self.model, self.strategy = model, strategy
        self.counts = Counts()
        if isinstance(strategy, EarlyExit):
            self._policy: KVPolicy = strategy.policy_for(model)
        else:
            is_exit_state = model.upper and config.upper_kv == "exit_state"
            self._policy = "exact" if is_exit_state else "recompute"
        self._rows = [_Row() for _ in range(num_rows)]
        shape = (num_rows, num_slots, config.num_kv_heads, config.head_dim)
        allocate = model.kv_cache_type.allocate
        self._lower_cache = allocate(config.exit_layer, *shape, like=like)
        self._upper_cache = allocate(config.num_upper_layers, *shape, like=like)
        self._exit_states = like.new_zeros(num_rows, num_slots, config.dim)

    def keep(self, rows: list[int]) -> None:
        """Go on with the given rows alone: the others have finished."""
        row_R = self._tensor(rows)
        self._rows = [self._rows[row] for row in rows]
        self._lower_cache = self._lower_cache.keep(row_R)
        self._upper_cache = self._upper_cache.keep(row_R)
        self._exit_states = self._exit_states[row_R]

    def prefill(self, prompts: Sequence[Tensor]) -> None:
        """Take one prompt a row, int64 [T] with T >= 0, row by row.

        Models with own upper K/V run the prompt at full depth. Exit-state models run the lower
        block alone; their prompt owes its upper K/V like any exited token.
        """
        for index, ids_T in enumerate(prompts):
            if len(ids_T) == 0:
                continue
            rows, row = slice(index, index + 1), self._rows[index]
            self._lower(ids_T[None], rows)
            row.position = len(ids_T)
            if self.model.upper and self.model.config.upper_kv == "own":
                self._upper(*self._owed(rows, len(ids_T)), rows)
                row.upper_len = len(ids_T)

    def step(self, token_B: Tensor) -> Step:
        """Consume one token a row; yield the logits of the next."""
        config = self.model.config
        exit_state_BD = self._lower(token_B[:, None], slice(0, len(self._rows)))[:, 0]
        for row in self._rows:
            row.position += 1
        logits_BV, confidence_B, exits_B = self._decide(exit_state_BD)
        exits = exits_B.tolist()
        for rows, num_owed in self._deep_groups(exits):
            logits_BV[rows] = self._run_deep(rows, num_owed)
        depth = [config.exit_layer if exit_ else config.num_layers for exit_ in exits]
        return Step(logits_BV, depth, confidence_B.tolist())

    def _decide(self, h_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits_BV, confidence_B, exits_B); the logits are set for the rows that exit."""
        model, strategy = self.model, self.strategy
        if not isinstance(strategy, EarlyExit):
            nothing = h_BD.new_full((len(h_BD),), math.nan)
            return h_BD.new_empty(len(h_BD), model.config.vocab_size), nothing, nothing > 0
        if strategy.criterion != "gate":
            logits_BV = self._head(model.exit_logits, h_BD)
            confidence_B = softmax_confidence(logits_BV, strategy.criterion)
            return logits_BV, confidence_B, confidence_B >= strategy.threshold
        confidence_B = model.gate_score(h_BD)
        exits_B = confidence_B >= strategy.threshold
        self.counts.gate_calls += len(h_BD)
        self.counts.gate_passes += 1
        logits_BV = h_BD.new_empty(len(h_BD), model.config.vocab_size)
        if exits_B.any():
            logits_BV[exits_B] = self._head(model.exit_logits, h_BD[exits_B])
        return logits_BV, confidence_B, exits_B

    def _deep_groups(self, exits: list[bool]) -> Iterator[tuple[slice, int]]:
        """Adjacent rows that stay and owe equally many tokens, with that number."""
        start = 0
        while start < len(exits):
            stop = start + 1
            if not exits[start]:
                num_owed = self._num_owed(start)
                while stop < len(exits) and not exits[stop] and self._num_owed(stop) == num_owed:
                    stop += 1
                yield slice(start, stop), num_owed
            start = stop

    def _num_owed(self, row: int) -> int:
        """Tokens without upper K/V, the newest included; a hole is never filled."""
        if self._policy == "hole":
            return 1
        return self._rows[row].position - self._rows[row].upper_len

    def _run_deep(self, rows: slice, num_owed: int) -> Tensor:
        """Final logits [R, V] of the newest token of each row; settles what the rows owe."""
        chunk_BTD, position_BT = self._owed(rows, num_owed)
        if self._policy in ("exact", "propagate"):
            chunk_BTD, position_BT = self._fill_upper_kv(chunk_BTD, position_BT, rows)
        final_BTD = self._upper(chunk_BTD, position_BT, rows)
        for row in self._rows[rows]:
            row.upper_len += chunk_BTD.size(1)
        return self._head(self.model.final_logits, final_BTD[:, -1])

    def _owed(self, rows: slice, num_owed: int) -> tuple[Tensor, Tensor]:
        """Exit states [R, T, D] and positions [R, T] of the newest T tokens of each row."""
        first_B = self._tensor([row.position - num_owed for row in self._rows[rows]])
        position_BT = first_B[:, None] + torch.arange(num_owed, device=self.model.device)
        row_B1 = torch.arange(len(first_B), device=self.model.device)[:, None]
        return self._exit_states[rows][row_B1, position_BT], position_BT

    def _fill_upper_kv(
        self, chunk_BTD: Tensor, position_BT: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Project upper K/V from exit states; return what is still to run, the newest token.

        `exact` fills in the newest token too, since it may not project its own. `propagate` leaves
        it to the layers.
        """
        exact = self._policy == "exact"
        filled = slice(None) if exact else slice(0, -1)
        num_filled = position_BT[:, filled].size(1)
        if num_filled > 0:
            per_layer = self._project_upper_kv(chunk_BTD[:, filled], position_BT[:, filled])
            cache, slot_B = self._upper_cache.rows(rows), self._upper_slots(rows)
            for layer, kv in enumerate(per_layer):
                cache.append(layer, kv, slot_B)
            self.counts.upper_kv_calls += position_BT[:, filled].numel()
            self.counts.upper_kv_passes += 1
        for row in self._rows[rows]:
            row.upper_len += position_BT.size(1) - 1
        return chunk_BTD[:, -1:], position_BT[:, -1:]

    def _project_upper_kv(
        self, chunk_BTD: Tensor, position_BT: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        if self._policy == "exact":
            return self.model.upper_kv(chunk_BTD, position_BT)
        angles = self.model.rotary(position_BT)
        return [
            block.attention.project_kv(block.attention_norm(chunk_BTD), angles)
            for block in self.model.upper
        ]

    def _lower(self, ids_BT: Tensor, rows: slice) -> Tensor:
        """Run the lower block on new tokens and remember their exit states [B, T, D]."""
        num_layers, num_new = len(self.model.lower), ids_BT.size(1)
        slot_B = self._tensor([row.position for row in self._rows[rows]])
        position_BT = slot_B[:, None] + torch.arange(num_new, device=self.model.device)
        cache = self._lower_cache.rows(rows)
        exit_state_BTD = self.model.run_lower(
            ids_BT, position_BT, lambda layer: cache.attend(layer, slot_B)
        )
        row_B1 = torch.arange(len(slot_B), device=self.model.device)[:, None]
        self._exit_states[rows][row_B1, position_BT] = exit_state_BTD
        self.counts.lower_layer_calls += num_layers * ids_BT.numel()
        self.counts.lower_passes += num_layers
        self.counts.kv_slots += num_layers * sum(r.position + num_new for r in self._rows[rows])
        return exit_state_BTD

    def _upper(self, chunk_BTD: Tensor, position_BT: Tensor, rows: slice) -> Tensor:
        """Run the upper block on a chunk whose K/V go to (or lie in) the next upper slots."""
        num_layers, num_new = len(self.model.upper), position_BT.size(1)
        slot_B, cache = self._upper_slots(rows), self._upper_cache.rows(rows)
        final_BTD = self.model.run_upper(
            chunk_BTD, position_BT, lambda layer: cache.attend(layer, slot_B)
        )
        self.counts.upper_layer_calls += num_layers * position_BT.numel()
        self.counts.upper_passes += num_layers
        self.counts.kv_slots += num_layers * sum(r.upper_len + num_new for r in self._rows[rows])
        return final_BTD

    def _head(self, logits: Callable[[Tensor], Tensor], state_BD: Tensor) -> Tensor:
        self.counts.head_calls += len(state_BD)
        self.counts.head_passes += 1
        return logits(state_BD)

    def _upper_slots(self, rows: slice) -> Tensor:
        return self._tensor([row.upper_len for row in self._rows[rows]])

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)
