"""A linear layer that is fast for few rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lego_kernels.layers.inference import require_inference
from lego_kernels.library import refuse_grad
from lego_kernels.ops.linear_small import MAX_ROWS, linear_small


class Linear(nn.Linear):
    """Drop-in for torch.nn.Linear, with its parameters `weight` and `bias`.

    Up to 16 rows on the CPU go through linear_small, everything else through F.linear.
    """

    @classmethod
    def from_stock(cls, stock: nn.Linear) -> Linear:
        """Share weight and bias of a torch.nn.Linear."""
        with torch.device("meta"):
            linear = cls(stock.in_features, stock.out_features, bias=False)
        linear.weight, linear.bias = stock.weight, stock.bias
        return linear.train(stock.training)

    def forward(self, x: Tensor) -> Tensor:
        require_inference(self)
        num_rows = x.numel() // max(1, self.in_features)
        if not x.is_cpu or num_rows > MAX_ROWS:
            refuse_grad("Linear", x, self.weight)
            return super().forward(x)
        y = linear_small(x.reshape(num_rows, self.in_features), self.weight)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)
