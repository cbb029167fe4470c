"""Self-speculation: the lower block drafts, the upper block verifies the draft in one chunk."""

from __future__ import annotations

import math

from lego_kernels.decoder.checks import Criterion, check_criterion, policy_for
from lego_kernels.decoder.decode_step import decode_speculate
from lego_kernels.decoder.rows import NewToken, Rows
from lego_kernels.decoder.sampling import Sampling
from lego_kernels.decoder.weights import DecoderWeights


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
        super().__init__(
            weights,
            num_rows,
            num_slots,
            sampling,
            criterion=criterion,
            policy=policy_for(weights, None, criterion, None),
            draft_tokens=min(draft_tokens, num_slots),
        )
        self.set_threshold(stop_confidence)

    def step(self) -> list[NewToken]:
        """Draft and verify once in every live row; return 1 to draft_tokens tokens of each.

        Raises: ValueError, before anything runs, if a row is full. FloatingPointError if a logit
            is NaN; no row has gone on then.
        """
        if not self.live:
            return []
        return self._collect(decode_speculate(self.state.table, self._live_rows))
