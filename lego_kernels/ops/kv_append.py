"""Append keys and values to preallocated caches, in place: one launch, no copy of a cache.

Native: csrc/cpu/kv_append.cpp, csrc/cuda/kv_append.cu. Shape letters: B rows, T new tokens,
S cache slots, H key-value heads, D head width.
"""

import torch
from torch import Tensor

from lego_kernels.library import define_op, refuse_grad
from lego_kernels.validation import DTYPES, check_tensor, check_written

KV_DTYPES = (*DTYPES, torch.float64)


# 1. Kernel: plain torch, for any device without a native one
def _kv_append_torch(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, position: Tensor
) -> None:
    B, T, last = k.size(0), k.size(1), k_cache.size(1) - k.size(1)
    # only where the data is on the host: elsewhere looking at it would make the host wait
    if position.is_cpu and bool((position > last).any()):
        bad = int((position > last).nonzero()[0])
        raise ValueError(
            f"kv_append: position must be at most S - T = {last}, got {position[bad]} in row {bad}"
        )
    written = (position >= 0) & (position <= last)  # [B]
    row = torch.arange(B, device=k.device)[:, None]
    slot = (position * written)[:, None] + torch.arange(T, device=k.device)  # [B, T]
    for cache, fresh in ((k_cache, k), (v_cache, v)):
        # a row that is not written gets back what its first slots hold
        cache[row, slot] = torch.where(written[:, None, None, None], fresh, cache[row, slot])


# 2. Launcher: in C++, since there is nothing to allocate


# 3. Registration: schema, plain torch; the native libraries add theirs
_op = define_op(
    "kv_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor position) -> ()",
    _kv_append_torch,
)


# 4. Public wrapper: validate, then dispatch
def kv_append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
    """Contract of lego.ops.kv_append, with limits of its own.

    The caches overlap neither each other nor k, v or position.
    Raises: ValueError also if the last stride of a cache, k or v is not 1. RuntimeError if an
        input requires grad in grad mode. Off the CPU an out-of-range position is not reported,
        since reading it would make the host wait: that row is not written.
    """
    _validate(k_cache, v_cache, k, v, position)
    refuse_grad("kv_append", k_cache, v_cache, k, v)
    _op(k_cache, v_cache, k, v, position)


def _validate(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
    for name, x in (("k", k), ("k_cache", k_cache)):
        if x.dim() != 4:
            raise ValueError(f"kv_append: {name} must have 4 dimensions, got {tuple(x.shape)}")
    (B, T, H, D), S = k.shape, k_cache.size(1)
    if k.dtype not in KV_DTYPES:
        raise ValueError(f"kv_append: k must have one of the dtypes {KV_DTYPES}, got {k.dtype}")
    check_tensor("kv_append", "k", k, k.shape, like=k)
    check_tensor("kv_append", "v", v, k.shape, like=k)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor("kv_append", name, cache, (B, S, H, D), like=k)
        check_written("kv_append", name, cache)
    if position.shape != (B,):
        raise ValueError(f"kv_append: position must be {(B,)}, got {tuple(position.shape)}")
    # its stride is free: one number is read at a time
    first = position[:1]
    check_tensor("kv_append", "position", first, first.shape, like=k, dtype=torch.int64)
    if T > S:
        raise ValueError(f"kv_append: k must have at most S = {S} tokens, got {T}")
