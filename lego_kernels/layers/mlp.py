"""The SwiGLU MLP as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lego_kernels.layers.inference import require_inference
from lego_kernels.layers.linear import Linear
from lego_kernels.ops.swiglu import swiglu


class MLP(nn.Module):
    """SwiGLU MLP with packed weights: `gate_up_proj` [2 * hidden, dim], gate first, `down_proj`."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(dim, 2 * hidden_dim, bias=False)
        self.down_proj = Linear(hidden_dim, dim, bias=False)

    @classmethod
    def from_stock(cls, stock: Any) -> MLP:
        """Share the weights of an MLP with linear layers of the same names."""
        with torch.device("meta"):
            mlp = cls(stock.gate_up_proj.in_features, stock.down_proj.in_features)
        mlp.gate_up_proj = Linear.from_stock(stock.gate_up_proj)
        mlp.down_proj = Linear.from_stock(stock.down_proj)
        return mlp.train(stock.training)

    def forward(self, x: Tensor) -> Tensor:
        require_inference(self)
        return self.down_proj(swiglu(self.gate_up_proj(x)))
