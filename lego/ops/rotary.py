"""Rotary position embedding with explicit positions, half-rotation layout (as in Llama)."""

# Shape letters: B = rows, T = tokens, P = positions in the tables, H = heads, E = head width,
# A = E / 2 angles.

import math

import torch
from torch import Tensor


def rotary_tables(
    head_dim: int,
    num_positions: int,
    theta: float,
    *,
    factor: float = 1.0,
    band: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (cos_PA, sin_PA), float32, for positions [0, num_positions).

    factor, at least 1, divides the frequencies (`linear` scaling). With a band (low, high) in turns
    per position it divides those up to `low` alone and keeps those from `high` on; in between, the
    kept share grows linearly from 0 to 1 (`llama3` scaling).

    The angles are computed in float64: in float32 they are off by 1e-3 at position 10,000.
    Raises: ValueError if head_dim is odd, theta not positive, factor below 1, or not
        0 < low < high.
    Source: Su et al. 2021, arXiv:2104.09864; `linear`: Chen et al. 2023, arXiv:2306.15595;
        `llama3`: apply_scaling in meta-llama/llama-models, models/llama3/model.py.
    """
    if head_dim % 2 or not theta > 0:
        raise ValueError(
            f"rotary_tables: head_dim must be even and theta positive, got {head_dim}, {theta}"
        )
    if not factor >= 1 or (band is not None and not 0 < band[0] < band[1]):
        raise ValueError(
            f"rotary_tables: factor must be >= 1 and band rise from above 0, got {factor}, {band}"
        )
    exponent_A = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequency_A = theta**-exponent_A
    scaled_A = frequency_A / factor
    if band is not None:
        low, high = band
        kept_A = ((frequency_A / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        scaled_A = scaled_A.lerp(frequency_A, kept_A)
    angle_PA = torch.outer(torch.arange(num_positions, dtype=torch.float64), scaled_A)
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
