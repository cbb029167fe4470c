"""The learned exit gate, with the norm before it fused in: a score and a decision for each row.

Native: csrc/cpu/exit_gate.cpp; lego_kernels/triton/exit_gate.py on CUDA. Shape letters: B rows,
D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lego_kernels.library import LIB, TRITON_PROBLEM, define_op, refuse_grad
from lego_kernels.validation import check_dtype, check_tensor, check_threshold


# 1. Kernel: plain torch, for any device without one of its own
def _exit_gate_torch(
    h: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    threshold: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    score: Tensor,
    exit: Tensor,
) -> None:
    # only where the data is on the host: elsewhere looking at it would make the host wait
    if threshold.is_cpu and bool(threshold.isnan().any()):
        raise ValueError("exit_gate: threshold must not be NaN, got nan")
    wide = h.float()
    if norm_weight is not None:
        wide = F.rms_norm(wide, norm_weight.shape, norm_weight.float(), eps)
    # not a matrix product, whose order of addition may change with the number of rows
    z = (wide * gate_weight.float()).sum(dim=-1) + gate_bias.view(())
    score.copy_(z.sigmoid())
    exit.copy_(score >= threshold)


# 2. Launcher: in C++, or in lego_kernels/triton/exit_gate.py


# 3. Registration: schema, plain torch, Triton; the native library adds its own
_op = define_op(
    "exit_gate(Tensor h, Tensor gate_weight, Tensor gate_bias, Tensor threshold, "
    "Tensor? norm_weight, float eps, Tensor(a!) score, Tensor(b!) exit) -> ()",
    _exit_gate_torch,
)
if not TRITON_PROBLEM:
    from lego_kernels.triton.exit_gate import launch_exit_gate

    LIB.impl("exit_gate", launch_exit_gate, "CUDA")


# 4. Public wrapper: validate, then dispatch
def exit_gate(
    h: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    *,
    threshold: float | Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Contract of lego.ops.exit_gate for float32, bfloat16 and float16, with D >= 1.

    gate_bias has h's dtype or float32; a threshold that is a tensor is float32, on h's device. A
    CUDA graph keeps a number for good, but reads a tensor at each replay. `out` is the pair (score,
    exit), float32 and bool [B]; with it, and a tensor as threshold, nothing is allocated. It must
    not overlap an input. Raises: ValueError also if a last stride is not 1; but off the CPU a NaN
    in a threshold is not reported, since reading it would make the host wait: that row does not
    exit. RuntimeError if an input requires grad in grad mode.
    """
    _validate(h, gate_weight, gate_bias, norm_weight, eps)
    threshold = check_threshold("exit_gate", threshold, h.size(0), like=h)
    rows = h.shape[:1]
    if out is None:
        out = h.new_empty(rows, dtype=torch.float32), h.new_empty(rows, dtype=torch.bool)
    else:
        # a last stride of 1 leaves no two elements of one dimension in one place
        check_tensor("exit_gate", "score", out[0], rows, like=h, dtype=torch.float32)
        check_tensor("exit_gate", "exit", out[1], rows, like=h, dtype=torch.bool)
    norm = () if norm_weight is None else (norm_weight,)
    refuse_grad("exit_gate", h, gate_weight, gate_bias, threshold, *norm)
    _op(h, gate_weight, gate_bias, threshold, norm_weight, eps, *out)
    return out


def _validate(
    h: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    norm_weight: Tensor | None,
    eps: float,
) -> None:
    if h.dim() != 2 or h.size(1) == 0:
        raise ValueError(f"exit_gate: h must be [B, D] with D >= 1, got {tuple(h.shape)}")
    if not eps >= 0:
        raise ValueError(f"exit_gate: eps must be >= 0, got {eps}")
    check_dtype("exit_gate", "h", h)
    check_tensor("exit_gate", "h", h, h.shape, like=h)
    check_tensor("exit_gate", "gate_weight", gate_weight, h.shape[1:], like=h)
    if norm_weight is not None:
        check_tensor("exit_gate", "norm_weight", norm_weight, h.shape[1:], like=h)
    if gate_bias.shape not in ((), (1,)):
        raise ValueError(f"exit_gate: gate_bias must be [] or [1], got {tuple(gate_bias.shape)}")
    bias_dtype = torch.float32 if gate_bias.dtype == torch.float32 else h.dtype
    check_tensor("exit_gate", "gate_bias", gate_bias, gate_bias.shape, like=h, dtype=bias_dtype)
