"""The learned exit gate: a probe of dim + 1 weights that is asked before the LM head."""

# Shape letters: B = rows, D = model width.

import torch
from torch import Tensor

from lego.ops.rms_norm import rms_norm
from lego.ops.threshold import reaches


def exit_gate(
    h_BD: Tensor,
    gate_weight_D: Tensor,
    gate_bias: Tensor,
    *,
    threshold: float | Tensor,
    norm_weight_D: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return (score_B, exit_B): score = sigmoid(norm(h) . gate_weight + gate_bias).

    score is float32 (float64 in float64) in [0, 1]; exit is score >= threshold, False where the
    score is NaN. gate_bias is [] or [1]; without norm_weight_D the norm is left out.
    Raises: ValueError if shapes do not fit or the threshold is NaN.
    """
    if h_BD.dim() != 2 or gate_weight_D.shape != h_BD.shape[1:] or gate_bias.numel() != 1:
        raise ValueError(
            f"exit_gate: h must be [B, D], gate_weight [D] and gate_bias one value, got "
            f"{tuple(h_BD.shape)}, {tuple(gate_weight_D.shape)} and {tuple(gate_bias.shape)}"
        )
    if norm_weight_D is not None:
        h_BD = rms_norm(h_BD, norm_weight_D, eps=eps)
    compute_dtype = torch.promote_types(h_BD.dtype, torch.float32)
    score_B = (
        h_BD.to(compute_dtype) @ gate_weight_D.to(compute_dtype) + gate_bias.view(())
    ).sigmoid()
    return score_B, reaches("exit_gate", score_B, threshold)
