"""The gated activation of the MLP."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, where gate and up are the two halves of the last dimension.

    gate_up is [..., 2F], floating point; the result is [..., F] in the same dtype.
    Raises: ValueError if the last dimension is odd.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: last dimension must be even, got {tuple(gate_up.shape)}")
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
