"""Rotary position embedding with explicit positions, half-rotation layout (as in Llama)."""

# Shape letters: B = rows, T = tokens, P = positions in the tables, H = heads, E = head width,
# A = E / 2 angles.

import torch
from torch import Tensor


def rotary_tables(head_dim: int, num_positions: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return (cos_PA, sin_PA), float32, for positions [0, num_positions).

    The angles are computed in float64: in float32 they are off by 1e-3 at position 10,000.
    Raises: ValueError if head_dim is odd or theta not positive.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    if head_dim % 2 or theta <= 0:
        raise ValueError(
            f"rotary_tables: head_dim must be even and theta positive, got {head_dim}, {theta}"
        )
    exponent_A = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle_PA = torch.outer(torch.arange(num_positions, dtype=torch.float64), theta**-exponent_A)
    return angle_PA.cos().float(), angle_PA.sin().float()


def rotary(x_BTHE: Tensor, position_BT: Tensor, cos_PA: Tensor, sin_PA: Tensor) -> Tensor:
    """Rotate every head of x by the angle of its token's absolute position.

    Component a of a head's first half pairs with component a of its second half. position_BT is
    int64 in [0, P), [1, T] where all rows share theirs, and never inferred from a cache's length.
    The result has x's shape and dtype and is computed in float32 or wider.
    Raises: IndexError, from indexing, if a position is not in the tables.
    """
    compute_dtype = torch.promote_types(x_BTHE.dtype, torch.float32)
    cos_BT1A = cos_PA[position_BT].to(compute_dtype).unsqueeze(2)
    sin_BT1A = sin_PA[position_BT].to(compute_dtype).unsqueeze(2)
    first, second = x_BTHE.to(compute_dtype).chunk(2, dim=-1)
    rotated = (first * cos_BT1A - second * sin_BT1A, second * cos_BT1A + first * sin_BT1A)
    return torch.cat(rotated, dim=-1).to(x_BTHE.dtype)
