"""Decoding a token at a time: the lower block, the exit decision, the upper block for what stays.

A token that exits owes the upper caches its keys and values. They are filled in when the next deep
token of its row comes, all that are owed in one pass over the weights.
"""

from __future__ import annotations

from lego_kernels.decoder.checks import Criterion, KVPolicy, policy_for
from lego_kernels.decoder.decode_step import decode_shallow, decode_step
from lego_kernels.decoder.rows import NewToken, Rows
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
        policy = policy_for(weights, threshold, criterion, kv_policy)
        decides_by = None if threshold is None else criterion
        super().__init__(
            weights, num_rows, num_slots, sampling, criterion=decides_by, policy=policy
        )
        if threshold is not None:
            self.set_threshold(threshold)

    def step(self) -> list[NewToken]:
        """Feed every live row its last token; return one new token a row, rows ascending.

        Raises: ValueError, before anything runs, if a row is full. FloatingPointError if a logit
            is NaN; no row has gone on then.
        """
        if not self.live:
            return []
        return self._collect(decode_step(self.state.table, self._live_rows, True, True))

    def shallow_token(self, row: int) -> int:
        """The token that an exit would have given in place of the row's newest one.

        Raises: FloatingPointError if a logit is NaN.
        """
        token: int = decode_shallow(self.state.table, row)
        self._refuse_nan(token)
        return token
