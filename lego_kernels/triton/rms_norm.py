"""RMSNorm on the GPU: one program per row, which stays in registers between its two passes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lego_kernels.triton.rows import row_strides, warps_of_row


# another number of rows may not mean another compilation, in the middle of a capture
@triton.jit(do_not_specialize=["size_1", "size_2"])
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    size_1,
    size_2,
    D,
    eps,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    residual_stride_0,
    residual_stride_1,
    residual_stride_2,
    out_stride_0,
    out_stride_1,
    out_stride_2,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride can pass 2**31
    i, j, k = row // (size_1 * size_2), row // size_2 % size_1, row % size_2
    column = tl.arange(0, BLOCK_D)
    kept = column < D
    x_row = x_ptr + i * x_stride_0 + j * x_stride_1 + k * x_stride_2
    x = tl.load(x_row + column, mask=kept, other=0.0)  # [BLOCK_D]
    weight = tl.load(weight_ptr + column, mask=kept, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_row = (
            residual_ptr + i * residual_stride_0 + j * residual_stride_1 + k * residual_stride_2
        )
        before = tl.load(residual_row + column, mask=kept, other=0.0)
        # rounded before it is normalised, as the sum that later layers will read
        x = (x.to(tl.float32) + before.to(tl.float32)).to(x.dtype)
        tl.store(residual_row + column, x, mask=kept)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / D + eps)
    out_row = out_ptr + i * out_stride_0 + j * out_stride_1 + k * out_stride_2
    tl.store(out_row + column, (wide * scale * weight).to(x.dtype), mask=kept)


def launch_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor
) -> None:
    """x, residual and out [..., D] of at most 4 dimensions, last strides 1."""
    if x.numel() == 0:
        return
    rows = (1,) * (4 - x.dim()) + x.shape[:-1]
    summed = x if residual is None else residual
    D = x.size(-1)
    # Triton launches on the current device, which need not be the tensor's
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(x.numel() // D,)](
            x,
            weight,
            summed,
            out,
            rows[1],
            rows[2],
            D,
            eps,
            *row_strides(x),
            *row_strides(summed),
            *row_strides(out),
            HAS_RESIDUAL=residual is not None,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=warps_of_row(D),
            enable_fp_fusion=True,  # not the default from Triton 3.10 on
        )
