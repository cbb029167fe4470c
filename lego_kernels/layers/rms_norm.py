"""RMSNorm as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lego_kernels.layers.inference import require_inference
from lego_kernels.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Drop-in for torch.nn.RMSNorm over the last dimension, with its parameter: `weight` [dim].

    forward(x, residual=None): with a residual, x is added to it in place and the sum is normed.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    @classmethod
    def from_stock(cls, stock: Any) -> RMSNorm:
        """Share the weight of a torch.nn.RMSNorm, or of any norm with `weight` [dim] and `eps`.

        Raises: ValueError if there is no such weight.
        """
        weight, eps = stock.weight, stock.eps
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
            raise ValueError("RMSNorm: weight must be a parameter [dim], got another or none")
        # torch's own default, of the dtype that it computes in
        eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
        with torch.device("meta"):
            norm = cls(weight.numel(), eps)
        norm.weight = weight
        return norm.train(stock.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        require_inference(self)
        return rms_norm(x, self.weight, eps=self.eps, residual=residual)
