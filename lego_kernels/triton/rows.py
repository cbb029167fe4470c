"""How launchers describe the rows of a tensor to their kernels."""

from torch import Tensor


def row_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of the three dimensions before the last, 0 for those that x lacks."""
    return (0,) * (4 - x.dim()) + x.stride()[:-1]


def row_stride(x: Tensor | None) -> int:
    """The stride of a [B] tensor, 0 for one value for all rows."""
    return 0 if x is None or x.dim() == 0 else x.stride(0)


def warps_of_row(size: int) -> int:
    """Warps of a program that holds a row of so many values: 64 a thread at most, up to 16,384."""
    return 1 if size <= 512 else 4 if size <= 2048 else 8
