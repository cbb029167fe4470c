"""The exit as a layer: final norm, LM head and decision in one pass over the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lego_kernels.layers.inference import require_inference
from lego_kernels.layers.rms_norm import RMSNorm
from lego_kernels.ops.exit_decision import ExitDecision, exit_decision, exit_decision_workspace


class ExitHead(nn.Module):
    """A norm and a bias-free head that yield the decision and never the logits.

    Parameters: `norm.weight` [dim] and `head.weight` [vocab_size, dim].
    """

    def __init__(self, dim: int, vocab_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self._workspace: Tensor | None = None
        self._num_rows = 0  # that the workspace is enough for

    @classmethod
    def from_stock(cls, norm: Any, head: nn.Linear) -> ExitHead:
        """Share the weights of a norm and of a head, such as a model's exit_norm and head.

        Raises: ValueError if the head has a bias.
        """
        if head.bias is not None:
            raise ValueError("ExitHead: head must have no bias, got one")
        with torch.device("meta"):
            exit_head = cls(head.in_features, head.out_features)
        exit_head.norm, exit_head.head = RMSNorm.from_stock(norm), head
        return exit_head.train(norm.training)

    def forward(self, h: Tensor, *, threshold: float | Tensor, **decision: Any) -> ExitDecision:
        """Decide the exit states h [B, dim]; `decision` is passed on to exit_decision.

        The scratch memory of the largest batch so far is kept.
        """
        require_inference(self)
        weight = self.head.weight
        kept = self._workspace
        if kept is None or kept.device != h.device or self._num_rows < h.size(0):
            self._workspace, self._num_rows = exit_decision_workspace(h, weight), h.size(0)
        return exit_decision(
            h,
            weight,
            norm_weight=self.norm.weight,
            eps=self.norm.eps,
            threshold=threshold,
            workspace=self._workspace,
            **decision,
        )
