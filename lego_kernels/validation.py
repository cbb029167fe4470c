"""The checks that every public wrapper makes, in one wording: op: what must hold, got value."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError unless x is float32, bfloat16 or float16."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} must be float32, bfloat16 or float16, got {x.dtype}")


def check_tensor(
    op: str,
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    *,
    like: Tensor,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ValueError unless x has the shape, the device of `like`, and a last stride of 1.

    The dtype is that of `like` unless one is given. The last stride is free where no element or
    one alone lies along it.
    """
    wanted = dtype or like.dtype
    if x.shape != shape:
        raise ValueError(f"{op}: {name} must be {tuple(shape)}, got {tuple(x.shape)}")
    if x.dtype != wanted:
        raise ValueError(f"{op}: {name} must be {wanted}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {x.device}")
    # contiguous as a rule, which is the quickest to ask
    if not x.is_contiguous() and x.size(-1) > 1 and x.stride(-1) != 1:
        raise ValueError(f"{op}: {name} must have last stride 1, got {x.stride()}")


def check_rows(
    op: str, name: str, x: float | Tensor, num_rows: int, dtype: torch.dtype, *, like: Tensor
) -> Tensor:
    """Return a number as a [] tensor, and a [] or [B] tensor as it is.

    Raises: ValueError if a tensor has another shape, dtype or device, or if a number is NaN or does
        not fit the dtype.
    """
    if not isinstance(x, Tensor):
        limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        if not limits.min <= x <= limits.max:
            raise ValueError(f"{op}: {name} must be finite and fit {dtype}, got {x}")
        return torch.full((), x, dtype=dtype, device=like.device)
    if x.dim() > 0 and x.shape != (num_rows,):
        raise ValueError(f"{op}: {name} must be a number or ({num_rows},), got {tuple(x.shape)}")
    if x.dtype != dtype or x.device != like.device:
        raise ValueError(
            f"{op}: {name} must be {dtype} on {like.device}, got {x.dtype} on {x.device}"
        )
    return x


def check_threshold(op: str, threshold: float | Tensor, num_rows: int, *, like: Tensor) -> Tensor:
    """check_rows for a threshold of confidences in [0, 1]: any number but NaN is legal."""
    if not isinstance(threshold, Tensor):
        if threshold != threshold:
            raise ValueError(f"{op}: threshold must not be NaN, got nan")
        threshold = min(max(threshold, -1.0), 2.0)
    return check_rows(op, "threshold", threshold, num_rows, torch.float32, like=like)


def check_written(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError if a dimension of x, which is written to, repeats one place in memory."""
    if 0 in x.stride() and any(
        stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)
    ):
        raise ValueError(f"{op}: {name} must have no zero stride, got {x.stride()}")
