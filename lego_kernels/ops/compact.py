"""The numbers of the rows that go on, in order, found on the device.

Native: csrc/cpu/compact.cpp, csrc/cuda/compact.cu. Shape letter: B rows.
"""

import torch
from torch import Tensor

from lego_kernels.library import define_op
from lego_kernels.validation import check_tensor


# 1. Kernel: plain torch, for any device without a native one
def _compact_torch(exit: Tensor, alive: Tensor, index: Tensor, count: Tensor) -> None:
    goes_on = alive & ~exit
    # a stable sort and not nonzero, whose result's length the host would have to wait for
    order = torch.argsort(~goes_on, stable=True)
    count.copy_(goes_on.sum())
    index.copy_(torch.where(torch.arange(exit.size(0), device=exit.device) < count, order, -1))


# 2. Launcher: in C++


# 3. Registration: schema, plain torch; the native libraries add theirs
_op = define_op(
    "compact(Tensor exit, Tensor alive, Tensor(a!) index, Tensor(b!) count) -> ()", _compact_torch
)


# 4. Public wrapper: validate, then dispatch
def compact(
    exit: Tensor, alive: Tensor, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Contract of lego.ops.compact, with strides free and without waiting for the device.

    `out` = (index, count) takes the result and nothing is allocated; neither may overlap the other
    or an input. Raises: ValueError also if out has another shape, dtype or device, or index has
    not stride 1.
    """
    if exit.dim() != 1:
        raise ValueError(f"compact: exit must be [B], got {tuple(exit.shape)}")
    for name, x in (("exit", exit), ("alive", alive)):
        if x.shape != exit.shape:
            raise ValueError(f"compact: {name} must be {tuple(exit.shape)}, got {tuple(x.shape)}")
        if x.dtype != torch.bool:
            raise ValueError(f"compact: {name} must be torch.bool, got {x.dtype}")
        if x.device != exit.device:
            raise ValueError(f"compact: {name} must be on {exit.device}, got {x.device}")
    if out is None:
        index = torch.empty(exit.shape, dtype=torch.int64, device=exit.device)
        count = torch.empty((), dtype=torch.int64, device=exit.device)
    else:
        index, count = out
        check_tensor("compact", "index", index, exit.shape, like=exit, dtype=torch.int64)
        check_tensor("compact", "count", count, (), like=exit, dtype=torch.int64)
    _op(exit, alive, index, count)
    return index, count
