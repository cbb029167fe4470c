"""y = x @ w^T for at most 16 rows: the weights are read once, at the speed of memory.

Native: csrc/cpu/linear_small.cpp. Shape letters: B rows, N output features, D input features.
"""

import torch
from torch import Tensor

from lego_kernels.library import define_op, refuse_grad
from lego_kernels.validation import DTYPES, check_dtype, check_tensor, check_written

MAX_ROWS = 16


# 1. Kernel: plain torch, for any device without a native one
def _linear_small_torch(x: Tensor, w: Tensor, y: Tensor) -> None:
    torch.mm(x, w.t(), out=y)


# 2. Launcher: in C++, since there is nothing to allocate


# 3. Registration: schema, plain torch; the native library adds its own
_op = define_op("linear_small(Tensor x, Tensor w, Tensor(a!) y) -> ()", _linear_small_torch)


# 4. Public wrapper: validate, then dispatch
def linear_small(x: Tensor, w: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Contract of lego.ops.linear_small for float32, bfloat16 and float16, with B <= 16.

    `out` [B, N], of x's dtype, takes the result and nothing is allocated; it must not overlap x
    or w. Raises: ValueError also if a last stride is not 1. RuntimeError if an input requires
    grad in grad mode.
    """
    if not _is_usual(x, w, out):
        _validate(x, w, out)
    if out is None:
        out = x.new_empty(x.size(0), w.size(0))
    refuse_grad("linear_small", x, w)
    _op(x, w, out)
    return out


def _is_usual(x: Tensor, w: Tensor, out: Tensor | None) -> bool:
    """Whether _validate would surely pass: it takes 4 us, as much as F.linear of a small layer."""
    y = x if out is None else out
    return (
        x.dim() == w.dim() == 2
        and x.size(1) == w.size(1)
        and x.size(0) <= MAX_ROWS
        and x.dtype in DTYPES
        and w.dtype == y.dtype == x.dtype
        and w.device == y.device == x.device
        and (out is None or out.shape == (x.size(0), w.size(0)))
        and x.is_contiguous()
        and w.is_contiguous()
        and y.is_contiguous()
    )


def _validate(x: Tensor, w: Tensor, out: Tensor | None) -> None:
    if x.dim() != 2 or w.dim() != 2:
        raise ValueError(
            f"linear_small: x and w must have 2 dimensions, got {tuple(x.shape)}, {tuple(w.shape)}"
        )
    B, D = x.shape
    if B > MAX_ROWS:
        raise ValueError(f"linear_small: x must have at most {MAX_ROWS} rows, got {B}")
    check_dtype("linear_small", "x", x)
    check_tensor("linear_small", "x", x, (B, D), like=x)
    check_tensor("linear_small", "w", w, (w.size(0), D), like=x)
    if out is not None:
        check_tensor("linear_small", "out", out, (B, w.size(0)), like=x)
        check_written("linear_small", "out", out)
