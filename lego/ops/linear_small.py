"""A linear layer for few rows, as every projection of a decode step is."""

# Shape letters: B = rows, N = output features, D = input features.

import torch.nn.functional as F
from torch import Tensor


def linear_small(x_BD: Tensor, w_ND: Tensor) -> Tensor:
    """Return x @ w^T, [B, N], in x's dtype; sums are in float32 or wider.

    Raises: ValueError if x is not [B, D] or w not [N, D].
    """
    if x_BD.dim() != 2 or w_ND.dim() != 2 or x_BD.size(1) != w_ND.size(1):
        raise ValueError(
            f"linear_small: x must be [B, D] and w [N, D], "
            f"got {tuple(x_BD.shape)} and {tuple(w_ND.shape)}"
        )
    return F.linear(x_BD, w_ND)
