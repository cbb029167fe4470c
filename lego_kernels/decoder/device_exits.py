"""Tokens and exits of all rows of a decoder at once, decided and kept on the device.

Shape letters: B rows, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lego_kernels.decoder.sampling import Sampling, draw
from lego_kernels.decoder.weights import DecoderWeights
from lego_kernels.ops.exit_decision import (
    ExitDecision,
    confidence_of,
    exit_decision,
    exit_decision_workspace,
)
from lego_kernels.ops.exit_gate import exit_gate
from lego_kernels.ops.rms_norm import rms_norm
from lego_kernels.validation import check_threshold


class StepRecord:
    """What a step says of its rows, in one block of bytes, so that the host gets it by one copy."""

    def __init__(self, num_rows: int, device: torch.device, *, pin_memory: bool = False) -> None:
        B = num_rows
        self.block = torch.zeros(
            B * (8 + 3 * 4 + 2) + 2, dtype=torch.uint8, device=device, pin_memory=pin_memory
        )
        sizes = (8 * B, 4 * B, 4 * B, 4 * B, 2 * B, 2)
        token, confidence, lse, deep_lse, wants, flags = self.block.split(sizes)
        self.token = token.view(torch.int64)  # [B], the input of the next step too
        self.confidence = confidence.view(torch.float32)  # [B]
        self.lse = lse.view(torch.float32)  # [B], where the token, or the exit, was decided
        self.deep_lse = deep_lse.view(torch.float32)  # [B], of rows that stayed with a softmax
        self.wants = wants.view(torch.bool).view(2, B)  # upper K and V of what waits; to stay
        self.flags = flags.view(torch.bool)  # [2]: whether any row does


class DeviceExits:
    """Decides about states h [B, D], row by row, into `record` and `exits`, bool [B].

    criterion: None where every token runs all layers. What is called in a step is early, then deep
    for some row that stays, which record.wants names, then late. length: int64 [B], the position
    that a drawn token will have. Sampling with top_k or top_p allocates.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        num_rows: int,
        sampling: Sampling,
        criterion: str | None,
        threshold: float | None,
    ) -> None:
        like = weights.embedding
        self._weights, self._sampling, self._criterion = weights, sampling, criterion
        self.record = StepRecord(num_rows, like.device)
        # what is not kept, or only for rows that stay
        self._decided = ExitDecision.empty(num_rows, like.device)
        self.exits = self._decided.exit
        never = math.inf if threshold is None else threshold
        self.threshold = check_threshold("DeviceDecoder", never, num_rows, like=like)
        self._temperature = torch.full((), sampling.noise_scale, device=like.device)
        seeds = [sampling.row_seed(row) for row in range(num_rows)]
        self._seed = torch.tensor(seeds, device=like.device)
        # by the gate the head is read once, for what both norms gave
        self._normed, self._deep_normed = (like.new_zeros(num_rows, weights.dim) for _ in range(2))
        self._workspace = exit_decision_workspace(self._normed, weights.head)

    def early(self, h: Tensor, length: Tensor) -> None:
        """Confidence and exits from exit states, and by a softmax criterion their tokens."""
        w, record = self._weights, self.record
        if self._criterion != "gate":
            out = ExitDecision(record.token, record.confidence, record.lse, self.exits)
            self._decide(h, w.exit_norm, length, out)
            return
        assert w.gate is not None
        exit_gate(
            h,
            w.gate.weight,
            w.gate.bias,
            threshold=self.threshold,
            norm_weight=w.exit_norm,
            eps=w.eps,
            out=(record.confidence, self.exits),
        )
        rms_norm(h, w.exit_norm, eps=w.eps, out=self._normed)

    def deep(self, h: Tensor, length: Tensor) -> None:
        """Tokens of rows that stay, from final states."""
        w, record = self._weights, self.record
        stays = record.wants[1]
        if self._criterion == "gate":
            rms_norm(h, w.last_norm, eps=w.eps, out=self._deep_normed)
            torch.where(stays[:, None], self._deep_normed, self._normed, out=self._normed)
            return
        out = self._decided._replace(lse=record.deep_lse)
        self._decide(h, w.last_norm, length, out)
        torch.where(stays, out.token, record.token, out=record.token)

    def late(self, h: Tensor, length: Tensor) -> None:
        """Tokens of all rows where there are none yet: by the gate, or of final states h."""
        out = self._decided._replace(token=self.record.token, lse=self.record.lse)
        if self._criterion is None:
            self._decide(h, self._weights.last_norm, length, out)
        elif self._criterion == "gate":
            self._decide(self._normed, None, length, out)

    def _decide(self, h: Tensor, norm: Tensor | None, length: Tensor, out: ExitDecision) -> None:
        w, sampling = self._weights, self._sampling
        criterion = "max_prob" if self._criterion in (None, "gate") else self._criterion
        if sampling.filters:
            normed = h if norm is None else F.rms_norm(h, norm.shape, norm, w.eps)
            logits = F.linear(normed, w.head[: w.vocab_size]).float()
            out.lse.copy_(logits.logsumexp(dim=-1))
            out.confidence.copy_(confidence_of(logits, criterion))
            torch.ge(out.confidence, self.threshold, out=out.exit)
            out.token.copy_(draw(logits, sampling, self._seed, length))
            return
        exit_decision(
            h,
            w.head,
            threshold=self.threshold,
            criterion=criterion,  # type: ignore[arg-type]
            norm_weight=norm,
            eps=w.eps,
            vocab_size=w.vocab_size,
            temperature=self._temperature if sampling.draws else None,
            seed=self._seed,
            offset=length,
            out=out,
            workspace=self._workspace,
        )
