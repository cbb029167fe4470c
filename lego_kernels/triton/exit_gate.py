"""The exit gate on the GPU: one program per row, which stays in registers until it is a score."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lego_kernels.triton.rows import row_stride, warps_of_row


# another number of rows, or a slice, may not mean another compilation in the middle of a capture
@triton.jit(do_not_specialize=["threshold_ptr", "score_ptr", "exit_ptr", "threshold_stride"])
def _exit_gate_kernel(
    h_ptr,
    gate_weight_ptr,
    gate_bias_ptr,
    threshold_ptr,
    norm_weight_ptr,
    score_ptr,
    exit_ptr,
    D,
    eps,
    h_stride,
    threshold_stride,
    HAS_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * h_stride can pass 2**31
    column = tl.arange(0, BLOCK_D)
    kept = column < D
    h = tl.load(h_ptr + row * h_stride + column, mask=kept, other=0.0).to(tl.float32)  # [BLOCK_D]
    if HAS_NORM:
        scale = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / D + eps)
        norm_weight = tl.load(norm_weight_ptr + column, mask=kept, other=0.0).to(tl.float32)
        # not rounded to h's dtype: eager, which has to, errs by 1e-3 in bfloat16, this by 1e-7
        h = h * scale * norm_weight
    gate_weight = tl.load(gate_weight_ptr + column, mask=kept, other=0.0).to(tl.float32)
    z = tl.sum(h * gate_weight, axis=0) + tl.load(gate_bias_ptr).to(tl.float32)
    score = 1.0 / (1.0 + tl.exp(-z))
    tl.store(score_ptr + row, score)
    tl.store(exit_ptr + row, score >= tl.load(threshold_ptr + row * threshold_stride))


def launch_exit_gate(
    h: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    threshold: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    score: Tensor,
    exit: Tensor,
) -> None:
    """h [B, D]; threshold [] or [B], score and exit [B]; last strides 1."""
    B, D = h.shape
    if B == 0:
        return
    # Triton launches on the current device, which need not be the tensor's
    with torch.cuda.device_of(h):
        _exit_gate_kernel[(B,)](
            h,
            gate_weight,
            gate_bias,
            threshold,
            gate_weight if norm_weight is None else norm_weight,
            score,
            exit,
            D,
            eps,
            h.stride(0),
            row_stride(threshold),
            HAS_NORM=norm_weight is not None,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=warps_of_row(D),
            enable_fp_fusion=True,  # not the default from Triton 3.10 on
        )
