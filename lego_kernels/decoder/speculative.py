"""Self-speculation: the lower block drafts, the upper block verifies the draft in one chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lego_kernels.decoder.checks import Criterion, check_criterion, check_room
from lego_kernels.decoder.rows import NewToken, Rows
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.weights import DecoderWeights

# the drafts of one row: token and confidence
Draft = list[tuple[int, float]]


class SpeculativeDecoder(Rows):
    """Decoding whose tokens are those of full depth, greedy or sampled.

    A row drafts with the lower block until a draft's confidence is below stop_confidence or it has
    draft_tokens drafts. The upper block then runs on all their exit states at once. A draft stands
    if it equals the draw from the final logits under the same noise (Daliri et al. 2024,
    arXiv:2408.07978); the first that does not is replaced by that draw.
    Raises: ValueError if a value is out of its range or the model has no upper block.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        num_rows: int,
        num_slots: int,
        *,
        draft_tokens: int = 4,
        stop_confidence: float = 0.5,
        criterion: Criterion = "max_prob",
        sampling: Sampling | None = None,
    ) -> None:
        if draft_tokens < 1:
            raise ValueError(f"Decoder: draft_tokens must be >= 1, got {draft_tokens}")
        if math.isnan(stop_confidence):
            raise ValueError("Decoder: stop_confidence must be a number, got nan")
        check_criterion(weights, criterion)
        super().__init__(weights, sampling or Sampling(), num_rows, num_slots)
        self.draft_tokens, self.criterion = draft_tokens, criterion
        self.exits.set_threshold(stop_confidence)

    def step(self) -> list[NewToken]:
        """Draft and verify once in every live row; return 1 to draft_tokens tokens of each.

        Raises: ValueError, before anything runs, if a row is full.
        """
        check_room(self.live, self.position, self.num_slots)
        if not self.live:
            return []
        drafts = self._draft()
        if self.weights.upper_kv is not None:
            stops = [self.position[row] + len(drafts[row]) for row in self.live]
            self.fill_upper_kv(self.owed(self.live, stops))  # and, after a prompt, what it owes
        verified = self._verify(
            [(row, self.position[row] + i) for row in self.live for i in range(len(drafts[row]))]
        )
        return [new for row in self.live for new in self._accept(row, drafts[row], verified)]

    def _accept(
        self, row: int, drafts: Draft, verified: dict[tuple[int, int], int]
    ) -> list[NewToken]:
        """Go on to the first draft that full depth replaces, or past the last."""
        new = []
        for draft, confidence in drafts:
            token = verified[row, self.position[row]]
            new.append(NewToken(row, token, self.weights.num_layers, confidence))
            self.position[row] += 1
            if token != draft:
                break
        self.last[row], self.upper_len[row] = token, self.position[row]
        return new

    def _draft(self) -> dict[int, Draft]:
        """What each live row drafts; its exit states are kept."""
        drafts: dict[int, Draft] = {row: [] for row in self.live}
        drafting = self.live
        for i in range(self.draft_tokens):
            drafting = [row for row in drafting if self.position[row] + i < self.num_slots]
            if not drafting:
                break
            inputs = [drafts[row][-1][0] if i else self.last[row] for row in drafting]
            at = [self.position[row] + i for row in drafting]
            chunk = zip(inputs, drafting, at, at, strict=True)
            self.run_lower(list(chunk))
            sure = self._decide_drafts(drafting, at, drafts)
            drafting = [row for row, go_on in zip(drafting, sure, strict=True) if go_on]
        return drafts

    def _decide_drafts(
        self, rows: Sequence[int], positions: Sequence[int], drafts: dict[int, Draft]
    ) -> list[bool]:
        """Add a draft to each row; return whether the criterion is sure of it."""
        N, exits = len(rows), self.exits
        gated = self.criterion == "gate"
        if gated:
            self.gate(N)
            sure, confidence = exits.exits[:N].tolist(), exits.confidence[:N].tolist()
        criterion = "max_prob" if gated else self.criterion
        self.decide(N, self.weights.exit_norm, criterion, rows, [p + 1 for p in positions])
        if not gated:
            sure, confidence = exits.exits[:N].tolist(), exits.confidence[:N].tolist()
        tokens = exits.token[:N].tolist()
        for row, token, value in zip(rows, tokens, confidence, strict=True):
            drafts[row].append((token, value))
        return sure

    def _verify(self, states: Sequence[tuple[int, int]]) -> dict[tuple[int, int], int]:
        """The token that full depth gives after each state (row, position)."""
        S = self.num_slots
        verified: dict[tuple[int, int], int] = {}
        for start in range(0, len(states), self.max_chunk):
            part = states[start : start + self.max_chunk]
            self.run_upper([(row * S + p, row, p, p) for row, p in part])
            rows, after = [row for row, _ in part], [p + 1 for _, p in part]
            self.decide(len(part), self.weights.last_norm, "max_prob", rows, after)
            verified.update(zip(part, self.exits.token[: len(part)].tolist(), strict=True))
        return verified
