"""Sequences over one set of caches: where each is, what it does next, and who is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lego_kernels.decoder.checks import check_prompts, check_sizes
from lego_kernels.decoder.counts import Counts
from lego_kernels.decoder.decode_step import decode_prefill
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.state import DecoderState
from lego_kernels.decoder.weights import DecoderWeights
from lego_kernels.validation import check_threshold


class NewToken(NamedTuple):
    """One new token, the layers it ran, and the criterion's value (NaN without a decision)."""

    row: int
    token: int
    exit_layer: int
    confidence: float


class Rows:
    """What decoders have in common. options: of DecoderState."""

    def __init__(
        self,
        weights: DecoderWeights,
        num_rows: int,
        num_slots: int,
        sampling: Sampling | None,
        **options: Any,
    ) -> None:
        check_sizes(weights, num_rows, num_slots)
        self.weights = weights
        self.state = DecoderState(
            weights, num_rows, num_slots, sampling=sampling or Sampling(), **options
        )
        self.num_slots = num_slots
        self._set_live(range(num_rows))

    @property
    def counts(self) -> Counts:
        """Calls so far."""
        return self.state.counts

    def set_threshold(self, threshold: float | Tensor) -> None:
        """What a row's confidences are compared with from now on: one value, or [B], one a row.

        Raises: ValueError if one is NaN or there are not as many as rows.
        """
        per_row = torch.from_numpy(self.state.threshold)
        checked = check_threshold("Decoder", threshold, len(per_row), like=per_row)
        if bool(checked.isnan().any()):
            raise ValueError("Decoder: threshold must not be NaN, got nan")
        per_row.copy_(checked)

    def finish(self, rows: Sequence[int]) -> None:
        """These rows produce no more; the others are not affected."""
        gone = set(rows)
        self._set_live(row for row in self.live if row not in gone)

    def prefill(self, prompts: Sequence[Tensor]) -> None:
        """Take a prompt for each row, int64 [T] with T >= 1, and run all but its last token.

        Where upper layers make their own K and V, the prompt runs them too. Rows start anew,
        finished ones too.
        Raises: ValueError, before anything runs, if a prompt is empty, does not fit num_slots or
            holds an id out of [0, vocab_size).
        """
        num_rows = len(self.state.position)
        check_prompts(prompts, num_rows, self.num_slots, self.weights.vocab_size)
        self._set_live(range(num_rows))
        for row, prompt in enumerate(prompts):
            decode_prefill(self.state.table, row, prompt.cpu().contiguous())

    def _set_live(self, rows: Iterable[int]) -> None:
        self.live = list(rows)
        self._live_rows = torch.tensor(self.live, dtype=torch.int64)

    def _collect(self, count: int) -> list[NewToken]:
        """The new tokens that a call left.

        Raises: FloatingPointError if it met a NaN instead; no row has gone on then.
        """
        self._refuse_nan(count)
        state = self.state
        ints, floats = state.new_tokens[:count].tolist(), state.new_confidence[:count, 3].tolist()
        return [
            NewToken(row, token, exit_layer, confidence)
            for (row, token, exit_layer, _), confidence in zip(ints, floats, strict=True)
        ]

    @staticmethod
    def _refuse_nan(returned: int) -> None:
        if returned < 0:
            raise FloatingPointError("generate: logits must be numbers, got NaN")
