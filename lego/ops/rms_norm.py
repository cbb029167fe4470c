"""Root-mean-square normalisation, as every norm of the model computes it."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x is [..., D] and weight [D], floating point; the result has x's shape and dtype, computed in
    float32 or wider. eps is positive and added to the mean square. With a residual, of x's shape
    and dtype, x is added to it in place, and the sum is what is normalised.
    Raises: ValueError, before anything is written, if a shape is another.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight must be {list(x.shape[-1:])} for x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"rms_norm: residual must be {tuple(x.shape)}, got {tuple(residual.shape)}"
            )
        x = residual.add_(x)
    return F.rms_norm(x, weight.shape, weight, eps)
