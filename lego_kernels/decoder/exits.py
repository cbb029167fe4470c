"""Token and confidence from a hidden state: the exit decision, the gate, and the last exit.

Shape letters: N states, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lego_kernels.decoder.sampling import Sampling, draw
from lego_kernels.decoder.weights import DecoderWeights
from lego_kernels.ops.exit_decision import ExitDecision, confidence_of, exit_decision_workspace
from lego_kernels.ops.exit_gate import exit_gate  # noqa: F401  defines the op
from lego_kernels.ops.linear_small import MAX_ROWS
from lego_kernels.ops.rms_norm import rms_norm  # noqa: F401  defines the op
from lego_kernels.validation import check_threshold

# without their wrappers, whose checks cost as much as a small model's layer
_exit_decision = torch.ops.lego_kernels.exit_decision.default
_exit_gate = torch.ops.lego_kernels.exit_gate.default
_linear_small = torch.ops.lego_kernels.linear_small.default
_rms_norm = torch.ops.lego_kernels.rms_norm.default


class Exits:
    """Decides for up to max_rows states at once, into buffers of its own.

    `token`, `confidence` and `exits` are numpy arrays [max_rows] that a call fills from 0.
    """

    def __init__(self, weights: DecoderWeights, sampling: Sampling, max_rows: int) -> None:
        self._weights, self._sampling = weights, sampling
        like = weights.embedding
        self._out = ExitDecision.empty(max_rows, like.device)
        self.token, self.confidence, self._lse, self.exits = (x.numpy() for x in self._out)
        self._workspace = exit_decision_workspace(
            like.new_empty(max_rows, weights.dim), weights.head
        )
        self._made: dict[int, ExitDecision] = {}
        self._threshold = torch.full((), math.inf)
        self._temperature = torch.full((), sampling.noise_scale)
        self._seed, self._offset = (torch.zeros(max_rows, dtype=torch.int64) for _ in range(2))
        self._seeds, self._offsets = self._seed.numpy(), self._offset.numpy()

    def set_threshold(self, threshold: float) -> None:
        """What `exits` compares confidences with from now on."""
        self._threshold.copy_(check_threshold("Decoder", threshold, 1, like=self._threshold))

    def gate(self, h_ND: Tensor) -> None:
        """Fill `confidence` and `exits` by the gate; no head is read."""
        w = self._weights
        assert w.gate is not None
        _, confidence, _, exits = self._views(len(h_ND))
        _exit_gate(
            h_ND, w.gate.weight, w.gate.bias, self._threshold, w.exit_norm, w.eps, confidence, exits
        )

    def decide(
        self,
        h_ND: Tensor,
        norm: Tensor,
        criterion: str,
        rows: Sequence[int],
        positions: Sequence[int],
    ) -> None:
        """Fill all three from states whose token will have the given row and position.

        Raises: FloatingPointError if a logit is NaN.
        """
        N, w = len(h_ND), self._weights
        out = self._views(N)
        noise: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if self._sampling.draws:
            self._seeds[:N] = [self._sampling.row_seed(row) for row in rows]
            self._offsets[:N] = positions
            noise = (self._temperature, self._seed[:N], self._offset[:N])
        if self._sampling.filters:
            self._decide_filtered(h_ND, norm, criterion, out)
        else:
            _exit_decision(
                h_ND, w.head, norm, w.eps, self._threshold, criterion, w.vocab_size, *noise, *out,
                self._workspace,
            )  # fmt: skip
        lse = self._lse[:N]
        if (lse != lse).any():
            raise FloatingPointError("generate: logits must be numbers, got NaN")

    def _decide_filtered(
        self,
        h: Tensor,
        norm: Tensor,
        criterion: str,
        out: ExitDecision,
    ) -> None:
        """With the logits in memory, since top_k and top_p need them all."""
        w = self._weights
        normed, logits = torch.empty_like(h), h.new_empty(len(h), w.vocab_size)
        _rms_norm(h, norm, w.eps, None, normed)
        # kernels under which a row's bits do not depend on the others, unlike those of F.linear
        for start in range(0, len(h), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            _linear_small(normed[rows], w.head[: w.vocab_size], logits[rows])
        logits = logits.float()
        out.lse.copy_(logits.logsumexp(dim=-1))
        out.confidence.copy_(confidence_of(logits, criterion))
        torch.ge(out.confidence, self._threshold, out=out.exit)
        seed, offset = self._seed[: len(h)], self._offset[: len(h)]
        out.token.copy_(draw(logits, self._sampling, seed, offset))

    def _views(self, num_states: int) -> ExitDecision:
        """The first values of the buffers; made once for each number of states."""
        if num_states not in self._made:
            self._made[num_states] = ExitDecision(*(x[:num_states] for x in self._out))
        return self._made[num_states]
