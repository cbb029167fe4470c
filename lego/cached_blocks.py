"""Both blocks of a model over preallocated caches: what every decoder with caches is made of."""

# Shape letters: B = rows, R = some adjacent rows, T = tokens, D = model width, V = vocabulary.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lego.config import KV_POLICIES, KVPolicy
from lego.counts import Counts
from lego.model import LegoModel


@dataclass
class Row:
    """How far one sequence has come."""

    position: int = 0  # of the next token
    upper_len: int = 0  # slots filled in the upper caches


class CachedBlocks:
    """Runs the lower block on new tokens and, whenever it is asked to, the upper block on them.

    A token that has not run the upper block owes it its keys and values. They are filled in by the
    next call of upper() for its row, all that are owed at once, by the rule of the KV policy. The
    policy None is the exact one of the model.
    """

    def __init__(
        self, model: LegoModel, num_rows: int, num_slots: int, policy: KVPolicy | None = None
    ) -> None:
        config, like = model.config, model.embedding.weight.detach()
        self.model = model
        # a dense model has nothing to project upper K/V with, whatever its kind
        self.policy = policy or KV_POLICIES[config.upper_kv if model.upper else "own"][0]
        self.counts = Counts()
        self.rows = [Row() for _ in range(num_rows)]
        shape = (num_rows, num_slots, config.num_kv_heads, config.head_dim)
        allocate = model.kv_cache_type.allocate
        self.lower_cache = allocate(config.exit_layer, *shape, like=like)
        self.upper_cache = allocate(config.num_upper_layers, *shape, like=like)
        self._exit_states = like.new_zeros(num_rows, num_slots, config.dim)

    def keep(self, rows: list[int]) -> None:
        """Go on with the given rows alone: the others have finished."""
        row_R = self._tensor(rows)
        self.rows = [self.rows[row] for row in rows]
        self.lower_cache = self.lower_cache.keep(row_R)
        self.upper_cache = self.upper_cache.keep(row_R)
        self._exit_states = self._exit_states[row_R]

    def prefill(self, prompts: Sequence[Tensor]) -> None:
        """Take one prompt a row, int64 [T] with T >= 0, row by row.

        Models with own upper K/V run the prompt at full depth. Exit-state models run the lower
        block alone; their prompt owes its upper K/V like any exited token.
        """
        for index, ids_T in enumerate(prompts):
            if len(ids_T) == 0:
                continue
            rows = slice(index, index + 1)
            self.lower(ids_T[None], rows)
            if self.model.upper and self.model.config.upper_kv == "own":
                self.upper(rows, len(ids_T))

    def lower(self, ids_RT: Tensor, rows: slice) -> Tensor:
        """Run the lower block on the next tokens of some rows; their exit states [R, T, D]."""
        num_layers, num_new = len(self.model.lower), ids_RT.size(1)
        slot_R = self._tensor([row.position for row in self.rows[rows]])
        position_RT = slot_R[:, None] + torch.arange(num_new, device=self.model.device)
        cache = self.lower_cache.rows(rows)
        exit_state_RTD = self.model.run_lower(
            ids_RT, position_RT, lambda layer: cache.attend(layer, slot_R)
        )
        row_R1 = torch.arange(len(slot_R), device=self.model.device)[:, None]
        self._exit_states[rows][row_R1, position_RT] = exit_state_RTD
        for row in self.rows[rows]:
            row.position += num_new
            self.counts.kv_slots += num_layers * row.position
        self.counts.lower_layer_calls += num_layers * ids_RT.numel()
        self.counts.lower_passes += num_layers
        return exit_state_RTD

    def num_owed(self, row: int, num_run: int = 1) -> int:
        """Tokens that upper() has to see; a hole is never filled."""
        if self.policy == "hole":
            return num_run
        return self.rows[row].position - self.rows[row].upper_len

    def upper(self, rows: slice, num_run: int = 1) -> Tensor:
        """Run the upper block on the newest num_run tokens of rows that owe equally many.

        Returns their final states [R, num_run, D]; nothing is owed afterwards.
        """
        num_owed = self.num_owed(rows.start, num_run)
        chunk_RTD, position_RT = self._owed(rows, num_owed)
        if self.policy in ("exact", "propagate"):
            self._fill_upper_kv(chunk_RTD, position_RT, rows, num_run)
            chunk_RTD, position_RT = chunk_RTD[:, -num_run:], position_RT[:, -num_run:]
        num_layers, num_new = len(self.model.upper), position_RT.size(1)
        slot_R, cache = self._upper_slots(rows), self.upper_cache.rows(rows)
        final_RTD = self.model.run_upper(
            chunk_RTD, position_RT, lambda layer: cache.attend(layer, slot_R)
        )
        for row in self.rows[rows]:
            row.upper_len += num_new
            self.counts.kv_slots += num_layers * row.upper_len
        self.counts.upper_layer_calls += num_layers * position_RT.numel()
        self.counts.upper_passes += num_layers
        return final_RTD[:, -num_run:]

    def roll_back(self, row: int, position: int) -> None:
        """Forget the tokens of a row from `position` on: the next one overwrites them."""
        self.rows[row].position = position
        self.rows[row].upper_len = min(self.rows[row].upper_len, position)

    def newest_exit_state(self, row: int) -> Tensor:
        """The exit state [1, D] of the token that a row consumed last."""
        return self._owed(slice(row, row + 1), 1)[0][0]

    def exit_logits(self, exit_state_ND: Tensor) -> Tensor:
        return self._head(self.model.exit_logits, exit_state_ND)

    def final_logits(self, final_state_ND: Tensor) -> Tensor:
        return self._head(self.model.final_logits, final_state_ND)

    def gate_score(self, exit_state_ND: Tensor) -> Tensor:
        self.counts.gate_calls += len(exit_state_ND)
        self.counts.gate_passes += 1
        return self.model.gate_score(exit_state_ND)

    def _head(self, logits: Callable[[Tensor], Tensor], state_ND: Tensor) -> Tensor:
        self.counts.head_calls += len(state_ND)
        self.counts.head_passes += 1
        return logits(state_ND)

    def _owed(self, rows: slice, num_owed: int) -> tuple[Tensor, Tensor]:
        """Exit states [R, T, D] and positions [R, T] of the newest T tokens of each row."""
        first_R = self._tensor([row.position - num_owed for row in self.rows[rows]])
        position_RT = first_R[:, None] + torch.arange(num_owed, device=self.model.device)
        row_R1 = torch.arange(len(first_R), device=self.model.device)[:, None]
        return self._exit_states[rows][row_R1, position_RT], position_RT

    def _fill_upper_kv(
        self, chunk_RTD: Tensor, position_RT: Tensor, rows: slice, num_run: int
    ) -> None:
        """Project the upper K/V of what is owed from its exit states.

        `exact` fills in the tokens that are to run, too, since they may not project their own.
        `propagate` leaves these to the layers.
        """
        num_skipped = position_RT.size(1) - num_run
        num_filled = position_RT.size(1) if self.policy == "exact" else num_skipped
        if num_filled > 0:
            position_RF = position_RT[:, :num_filled]
            per_layer = self._project_upper_kv(chunk_RTD[:, :num_filled], position_RF)
            cache, slot_R = self.upper_cache.rows(rows), self._upper_slots(rows)
            for layer, kv in enumerate(per_layer):
                cache.append(layer, kv, slot_R)
            self.counts.upper_kv_calls += position_RF.numel()
            self.counts.upper_kv_passes += 1
        for row in self.rows[rows]:
            row.upper_len += num_skipped

    def _project_upper_kv(
        self, chunk_RTD: Tensor, position_RT: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        if self.policy == "exact":
            return self.model.upper_kv(chunk_RTD, position_RT)
        angles = self.model.rotary(position_RT)
        return [
            block.attention.project_kv(block.attention_norm(chunk_RTD), angles)
            for block in self.model.upper
        ]

    def _upper_slots(self, rows: slice) -> Tensor:
        return self._tensor([row.upper_len for row in self.rows[rows]])

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)
