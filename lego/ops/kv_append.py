"""Append the keys and values of new tokens to preallocated caches, in place."""

# Shape letters: B = rows, T = new tokens, S = cache slots, K = key/value heads, E = head width.

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def kv_append(
    k_cache_BSKE: Tensor, v_cache_BSKE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, position_B: Tensor
) -> None:
    """Write token t of row b to slot position_B[b] + t of both caches; other slots stay.

    k and v may be strided views. All four are float32, bfloat16, float16 or float64, alike.
    position_B is int64, at most S - T; a negative position skips its row.
    Raises: ValueError, before anything is written, if a shape, dtype, device, stride or position
        is not as above.
    """
    _validate(k_cache_BSKE, v_cache_BSKE, k_BTKE, v_BTKE, position_B)
    T, S = k_BTKE.size(1), k_cache_BSKE.size(1)
    positions = position_B.tolist()
    for row, position in enumerate(positions):
        if position > S - T:
            raise ValueError(
                f"kv_append: position must be at most S - T = {S - T}, got {position} in row {row}"
            )
    for row, position in enumerate(positions):
        if position >= 0:
            k_cache_BSKE[row, position : position + T] = k_BTKE[row]
            v_cache_BSKE[row, position : position + T] = v_BTKE[row]


def _validate(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
    for name, x in (("k", k), ("k_cache", k_cache)):
        if x.dim() != 4:
            raise ValueError(f"kv_append: {name} must have 4 dimensions, got {tuple(x.shape)}")
    B, T, K, E = k.shape
    S = k_cache.size(1)
    for name, x, shape, dtype in (
        ("v", v, (B, T, K, E), k.dtype),
        ("k_cache", k_cache, (B, S, K, E), k.dtype),
        ("v_cache", v_cache, (B, S, K, E), k.dtype),
        ("position", position, (B,), torch.int64),
    ):
        if x.shape != shape:
            raise ValueError(f"kv_append: {name} must be {shape}, got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise ValueError(f"kv_append: {name} must be {dtype}, got {x.dtype}")
        if x.device != k.device:
            raise ValueError(f"kv_append: {name} must be on {k.device} like k, got {x.device}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if 0 in cache.stride():
            raise ValueError(f"kv_append: {name} must have no zero stride, got {cache.stride()}")
    if T > S:
        raise ValueError(f"kv_append: k must have at most S = {S} tokens, got {T}")
    if k.dtype not in DTYPES:
        raise ValueError(f"kv_append: k must have one of the dtypes {DTYPES}, got {k.dtype}")
