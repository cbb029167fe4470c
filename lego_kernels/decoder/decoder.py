"""Decoding a token at a time: the lower block, the exit decision, the upper block for what stays.

A token that exits owes the upper caches its keys and values. They are filled in when the next deep
token of its row comes, all that are owed in one pass over the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lego_kernels.decoder.checks import Criterion, KVPolicy, check_room, policy_for
from lego_kernels.decoder.rows import Chunk, NewToken, Rows
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.weights import DecoderWeights


class Decoder(Rows):
    """Full-depth decoding, or with a threshold early exit: exit iff confidence >= threshold.

    criterion: max_prob, margin or entropy of the exit's softmax, or gate, which needs no head.
    kv_policy: what an exited token leaves in the upper caches. `exact` where their K and V come
    from the exit state, else `recompute` (default), `propagate` or `hole`.
    num_slots: the longest prompt and its new tokens together.
    Raises: ValueError if these do not go together or a value is out of its range.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        num_rows: int,
        num_slots: int,
        *,
        threshold: float | None = None,
        criterion: Criterion = "max_prob",
        kv_policy: KVPolicy | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.policy = policy_for(weights, threshold, criterion, kv_policy)
        super().__init__(weights, sampling or Sampling(), num_rows, num_slots)
        self.exits_early = threshold is not None
        self.criterion = criterion
        if threshold is not None:
            self.exits.set_threshold(threshold)

    def step(self) -> list[NewToken]:
        """Feed every live row its last token; return one new token a row, rows ascending.

        Raises: ValueError, before anything runs, if a row is full.
        """
        check_room(self.live, self.position, self.num_slots)
        if not self.live:
            return []
        new, staying = self.run_to_exit(self.live)
        if staying:
            new += self.run_deep(staying)
            new.sort()
        return self.advance(new)

    def advance(self, new: list[NewToken]) -> list[NewToken]:
        """Make these tokens the next inputs of their rows."""
        for row, token, _, _ in new:
            self.last[row] = token
            self.position[row] += 1
        return new

    def run_to_exit(self, rows: Sequence[int]) -> tuple[list[NewToken], dict[int, float]]:
        """Run the lower block: tokens of the rows that exit, confidence of those that stay."""
        position, exits, N = self.position, self.exits, len(rows)
        self.run_lower([(self.last[r], r, position[r], position[r]) for r in rows])
        if not self.exits_early:
            return [], dict.fromkeys(rows, math.nan)
        if self.criterion == "gate":
            self.gate(N)
        else:
            self._decide(self.weights.exit_norm, rows)
        leaves, confidence = exits.exits[:N].tolist(), exits.confidence[:N].tolist()
        shallow = [i for i in range(N) if leaves[i]]
        staying = {rows[i]: confidence[i] for i in range(N) if not leaves[i]}
        return self._shallow(rows, shallow, confidence) if shallow else [], staying

    def _shallow(
        self, rows: Sequence[int], which: Sequence[int], confidence: Sequence[float]
    ) -> list[NewToken]:
        """The tokens of the states that exit, numbered in the chunk."""
        exit_layer = len(self.weights.lower)
        if self.criterion == "gate":
            if len(which) < len(rows):
                h = self.layers.h
                h[: len(which)] = h[list(which)]
            self._decide(self.weights.exit_norm, [rows[i] for i in which])
            token = self.exits.token[: len(which)].tolist()
        else:
            token = self.exits.token[list(which)].tolist()
        return [NewToken(rows[i], token[n], exit_layer, confidence[i]) for n, i in enumerate(which)]

    def run_deep(self, staying: dict[int, float]) -> list[NewToken]:
        """Run the upper block for the newest token of these rows, and settle what they owe."""
        rows = list(staying)
        filled = self._run_newest(rows) if self.weights.upper else []
        self._decide(self.weights.last_norm, rows)
        for row, length in zip(rows, filled, strict=False):
            self.upper_len[row] = length  # not before: a NaN leaves the row as it was
        tokens, num_layers = self.exits.token[: len(rows)].tolist(), self.weights.num_layers
        return [
            NewToken(row, token, num_layers, staying[row])
            for row, token in zip(rows, tokens, strict=True)
        ]

    def _run_newest(self, rows: Sequence[int]) -> list[int]:
        """The final state of each row's newest token, to the first rows of the chunk.

        Returns the slots that are then filled in the upper caches.
        """
        S, position, upper_len = self.num_slots, self.position, self.upper_len
        at = upper_len if self.policy == "hole" else position
        newest: Chunk = [(r * S + position[r], r, position[r], at[r]) for r in rows]
        owing = any(upper_len[r] < at[r] for r in rows)
        if self.policy == "exact":
            stops = [position[r] + 1 for r in rows]
            self.fill_upper_kv(self.owed(rows, stops) if owing else newest)
        elif self.policy == "propagate" and owing:
            self.fill_upper_kv(self.owed(rows, [position[r] for r in rows]))
        if self.policy == "recompute" and owing:
            # the newest first, where their states are looked for; what is older, and does not fit
            # beside them, before them
            older = self.owed(rows, [position[r] for r in rows])
            while len(older) > self.max_chunk - len(rows):
                part = min(self.max_chunk, len(older) - (self.max_chunk - len(rows)))
                self.run_upper(older[:part])
                older = older[part:]
            self.run_upper(np.concatenate((np.array(newest), older)))
        else:
            self.run_upper(newest)
        return [at[r] + 1 for r in rows]

    def _decide(self, norm: Tensor, rows: Sequence[int]) -> None:
        criterion = "max_prob" if self.criterion == "gate" else self.criterion
        self.decide(len(rows), norm, criterion, rows, [self.position[r] + 1 for r in rows])
