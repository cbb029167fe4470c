"""The exit rule that both ways to decide share: confidence >= threshold."""

# Shape letters: B = rows.

import torch
from torch import Tensor


def reaches(op: str, confidence_B: Tensor, threshold: float | Tensor) -> Tensor:
    """confidence_B >= threshold, bool [B]: False where the confidence is NaN.

    threshold is a number or a [] or [B] tensor, compared in the dtype of the confidence.
    Raises: ValueError, in the name of `op`, if its shape is another or it holds a NaN.
    """
    threshold = torch.as_tensor(threshold, dtype=confidence_B.dtype, device=confidence_B.device)
    if threshold.shape not in ((), confidence_B.shape):
        raise ValueError(
            f"{op}: threshold must be a number or {tuple(confidence_B.shape)}, "
            f"got {tuple(threshold.shape)}"
        )
    if bool(threshold.isnan().any()):
        raise ValueError(f"{op}: threshold must not be NaN, got nan")
    return confidence_B >= threshold
