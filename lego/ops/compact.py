"""The rows that a later part of the model still has to run for, gathered at the front."""

# Shape letters: B = rows.

import torch
from torch import Tensor


def compact(exit_B: Tensor, alive_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index_B, count): the numbers of the rows that are alive and do not exit.

    exit_B and alive_B are bool. index_B is int64: those numbers ascend in index_B[:count], the
    rest of it is -1, which ops that skip negative positions skip. count is int64 of shape [].
    Raises: ValueError if exit_B and alive_B are not both bool, of one shape [B] and device.
    """
    for name, x in (("exit", exit_B), ("alive", alive_B)):
        if x.dim() != 1 or x.shape != exit_B.shape:
            wanted = "[B]" if name == "exit" else f"{tuple(exit_B.shape)}"
            raise ValueError(f"compact: {name} must be {wanted}, got {tuple(x.shape)}")
        if x.dtype != torch.bool:
            raise ValueError(f"compact: {name} must be torch.bool, got {x.dtype}")
        if x.device != exit_B.device:
            raise ValueError(f"compact: {name} must be on {exit_B.device}, got {x.device}")
    rows = (alive_B & ~exit_B).nonzero().squeeze(1)
    index_B = torch.full(exit_B.shape, -1, dtype=torch.int64, device=exit_B.device)
    index_B[: rows.numel()] = rows
    return index_B, torch.tensor(rows.numel(), device=exit_B.device)
