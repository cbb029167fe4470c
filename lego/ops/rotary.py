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


def rotary(x_BTHE: Tensor, cos_BTA: Tensor, sin_BTA: Tensor) -> Tensor:
    """Rotate every head of x by the angles of its token.

    Component a of a head's first half pairs with component a of its second half. cos and sin are
    rows of the tables, by absolute position and never by a cache length; [1, T, A] where all rows
    share their positions. The result has the shape and dtype of x, computed in float32 or wider.
    Raises: ValueError if the head width is not 2A.
    """
    if x_BTHE.size(-1) != 2 * cos_BTA.size(-1):
        raise ValueError(
            f"rotary: x must have heads of width {2 * cos_BTA.size(-1)}, got {tuple(x_BTHE.shape)}"
        )
    compute_dtype = torch.promote_types(x_BTHE.dtype, torch.float32)
    cos, sin = cos_BTA.to(compute_dtype).unsqueeze(2), sin_BTA.to(compute_dtype).unsqueeze(2)
    first, second = x_BTHE.to(compute_dtype).chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1).to(x_BTHE.dtype)
