"""RMSNorm, with the addition of the residual before it fused in.

Native: csrc/cpu/rms_norm.cpp; lego_kernels/triton/rms_norm.py on CUDA. Shape letter: D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lego_kernels.library import LIB, TRITON_PROBLEM, define_op, refuse_grad
from lego_kernels.validation import check_dtype, check_tensor, check_written


# 1. Kernel: plain torch, for any device without one of its own
def _rms_norm_torch(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor
) -> None:
    if residual is not None:
        residual.add_(x)
        x = residual
    out.copy_(F.rms_norm(x, weight.shape, weight, eps))


# 2. Launcher: in C++, or in lego_kernels/triton/rms_norm.py


# 3. Registration: schema, plain torch, Triton; the native library adds its own
_op = define_op(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!)? residual, Tensor(b!) out) -> ()",
    _rms_norm_torch,
)
if not TRITON_PROBLEM:
    from lego_kernels.triton.rms_norm import launch_rms_norm

    LIB.impl("rms_norm", launch_rms_norm, "CUDA")


# 4. Public wrapper: validate, then dispatch
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Contract of lego.ops.rms_norm for float32, bfloat16 and float16, x of 1 to 4 dimensions.

    `out`, of x's shape and dtype, takes the result and nothing is allocated; it must not overlap
    an input. Raises: ValueError also if a last stride is not 1. RuntimeError if an input requires
    grad in grad mode.
    """
    if not 1 <= x.dim() <= 4 or x.size(-1) == 0:
        raise ValueError(f"rms_norm: x must be [..., D] of 1 to 4 dimensions, got {tuple(x.shape)}")
    if not eps >= 0:
        raise ValueError(f"rms_norm: eps must be >= 0, got {eps}")
    check_dtype("rms_norm", "x", x)
    check_tensor("rms_norm", "x", x, x.shape, like=x)
    check_tensor("rms_norm", "weight", weight, x.shape[-1:], like=x)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        check_tensor("rms_norm", "out", out, x.shape, like=x)
        check_written("rms_norm", "out", out)
    if residual is not None:
        check_tensor("rms_norm", "residual", residual, x.shape, like=x)
        check_written("rms_norm", "residual", residual)
    refuse_grad("rms_norm", x, weight, *(() if residual is None else (residual,)))
    _op(x, weight, eps, residual, out)
    return out
