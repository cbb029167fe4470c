"""The gated activation of the MLP, in one pass over its input.

Native: csrc/cpu/swiglu.cpp; lego_kernels/triton/swiglu.py on CUDA. Shape letter: F hidden width.
"""

import torch.nn.functional as F
from torch import Tensor

from lego_kernels.library import LIB, TRITON_PROBLEM, define_op, refuse_grad
from lego_kernels.validation import check_dtype, check_tensor, check_written


# 1. Kernel: plain torch, for any device without one of its own
def _swiglu_torch(gate_up: Tensor, out: Tensor) -> None:
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


# 2. Launcher: in C++, or in lego_kernels/triton/swiglu.py


# 3. Registration: schema, plain torch, Triton; the native library adds its own
_op = define_op("swiglu(Tensor gate_up, Tensor(a!) out) -> ()", _swiglu_torch)
if not TRITON_PROBLEM:
    from lego_kernels.triton.swiglu import launch_swiglu

    LIB.impl("swiglu", launch_swiglu, "CUDA")


# 4. Public wrapper: validate, then dispatch
def swiglu(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Contract of lego.ops.swiglu for float32, bfloat16 and float16 of 1 to 4 dimensions.

    Computed in float32 and rounded once. `out` [..., F], of gate_up's dtype, takes the result and
    nothing is allocated; it must not overlap gate_up. Raises: ValueError also if a last stride is
    not 1. RuntimeError if gate_up requires grad in grad mode.
    """
    if not 1 <= gate_up.dim() <= 4 or gate_up.size(-1) % 2:
        raise ValueError(
            f"swiglu: gate_up must be [..., 2F] of 1 to 4 dimensions, got {tuple(gate_up.shape)}"
        )
    shape = (*gate_up.shape[:-1], gate_up.size(-1) // 2)
    check_dtype("swiglu", "gate_up", gate_up)
    check_tensor("swiglu", "gate_up", gate_up, gate_up.shape, like=gate_up)
    if out is None:
        out = gate_up.new_empty(shape)
    else:
        check_tensor("swiglu", "out", out, shape, like=gate_up)
        check_written("swiglu", "out", out)
    refuse_grad("swiglu", gate_up)
    _op(gate_up, out)
    return out
