"""SwiGLU on the GPU: one program for each block of a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lego_kernels.triton.rows import row_strides

BLOCK_F = 1024  # 8 values a thread: 16 bytes of a 16-bit dtype, the widest load


# another number of rows may not mean another compilation, in the middle of a capture
@triton.jit(do_not_specialize=["size_1", "size_2"])
def _swiglu_kernel(
    gate_up_ptr,
    out_ptr,
    size_1,
    size_2,
    F,
    gate_up_stride_0,
    gate_up_stride_1,
    gate_up_stride_2,
    out_stride_0,
    out_stride_1,
    out_stride_2,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride can pass 2**31
    i, j, k = row // (size_1 * size_2), row // size_2 % size_1, row % size_2
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    kept = column < F
    gate_row = gate_up_ptr + i * gate_up_stride_0 + j * gate_up_stride_1 + k * gate_up_stride_2
    gate = tl.load(gate_row + column, mask=kept, other=0.0)  # [BLOCK_F]
    up = tl.load(gate_row + F + column, mask=kept, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    out_row = out_ptr + i * out_stride_0 + j * out_stride_1 + k * out_stride_2
    tl.store(out_row + column, (wide / (1.0 + tl.exp(-wide)) * up).to(gate.dtype), mask=kept)


def launch_swiglu(gate_up: Tensor, out: Tensor) -> None:
    """gate_up [..., 2F] and out [..., F] of at most 4 dimensions, last strides 1."""
    if out.numel() == 0:
        return
    rows = (1,) * (4 - out.dim()) + out.shape[:-1]
    F = out.size(-1)
    # Triton launches on the current device, which need not be the tensor's
    with torch.cuda.device_of(out):
        _swiglu_kernel[(out.numel() // F, triton.cdiv(F, BLOCK_F))](
            gate_up,
            out,
            rows[1],
            rows[2],
            F,
            *row_strides(gate_up),
            *row_strides(out),
            BLOCK_F=BLOCK_F,
            num_warps=4,
            enable_fp_fusion=True,  # not the default from Triton 3.10 on
        )
