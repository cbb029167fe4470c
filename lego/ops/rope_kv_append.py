"""Split a packed QKV projection, rotate its queries and keys, append keys and values to caches."""

# Shape letters: B = rows, T = new tokens, S = cache slots, Q = query heads, K = key/value heads,
# E = head width, P = positions in the tables, A = E / 2 angles.

import torch
from torch import Tensor

from lego.ops.kv_append import kv_append
from lego.ops.rms_norm import rms_norm
from lego.ops.rotary import rotary

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def rope_kv_append(
    q_out_BTQE: Tensor,
    k_cache_BSKE: Tensor,
    v_cache_BSKE: Tensor,
    qkv: Tensor,
    cos_PA: Tensor,
    sin_PA: Tensor,
    position_B: Tensor,
    slot_B: Tensor,
    *,
    q_norm_E: Tensor | None = None,
    k_norm_E: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """Write rotated queries to q_out, rotated keys and plain values to the caches.

    qkv is [B, T, (Q + 2K) * E]: the queries of a token, then its keys, then its values. Token t of
    row b is rotated by row position_B[b] + t of the float32 tables and lands in slot
    slot_B[b] + t; a row whose slot is negative appends nothing, but gets its queries. Position and
    slot are int64 and differ where a cache has holes. With norms, both or neither, each query and
    key head is RMS-normalised first. Without key/value heads (K = 0) queries alone are rotated, for
    layers that are given their keys and values. q_out, caches, qkv and norms are float32, bfloat16,
    float16 or float64, alike; q_out and the caches overlap neither each other nor another argument.
    Raises: ValueError, before anything is written, if a shape, dtype, device or stride is not as
        above, if a position is not in [0, P - T], or if a slot is above S - T.
    """
    norms = (q_norm_E, k_norm_E)
    _validate(q_out_BTQE, k_cache_BSKE, v_cache_BSKE, qkv, cos_PA, sin_PA, position_B, slot_B)
    _validate_norms(qkv, q_out_BTQE.size(3), norms, eps)
    T, Q, K = qkv.size(1), q_out_BTQE.size(2), k_cache_BSKE.size(2)
    _check_range("position", position_B, 0, "P", cos_PA.size(0), T)
    _check_range("slot", slot_B, None, "S", k_cache_BSKE.size(1), T)
    heads = qkv.unflatten(2, (Q + 2 * K, q_out_BTQE.size(3)))
    q_BTQE, k_BTKE, v_BTKE = heads.split((Q, K, K), dim=2)
    if q_norm_E is not None and k_norm_E is not None:
        q_BTQE = rms_norm(q_BTQE, q_norm_E, eps=eps)
        k_BTKE = rms_norm(k_BTKE, k_norm_E, eps=eps)
    position_BT = position_B[:, None] + torch.arange(T, device=qkv.device)
    cos_BTA, sin_BTA = cos_PA[position_BT], sin_PA[position_BT]
    q_out_BTQE.copy_(rotary(q_BTQE, cos_BTA, sin_BTA))
    kv_append(k_cache_BSKE, v_cache_BSKE, rotary(k_BTKE, cos_BTA, sin_BTA), v_BTKE, slot_B)


def _check_range(name: str, x_B: Tensor, first: int | None, letter: str, size: int, T: int) -> None:
    last = size - T
    rule = f"in [0, {letter} - T = {last}]" if first == 0 else f"at most {letter} - T = {last}"
    for row, value in enumerate(x_B.tolist()):
        if value > last or (first is not None and value < first):
            raise ValueError(f"rope_kv_append: {name} must be {rule}, got {value} in row {row}")


def _validate(
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    slot: Tensor,
) -> None:
    for name, x, dim in (("q_out", q_out, 4), ("k_cache", k_cache, 4), ("cos", cos, 2)):
        if x.dim() != dim:
            raise ValueError(
                f"rope_kv_append: {name} must have {dim} dimensions, got {tuple(x.shape)}"
            )
    B, T, Q, E = q_out.shape
    S, K = k_cache.size(1), k_cache.size(2)
    if E == 0 or E % 2 or Q == 0:
        raise ValueError(
            f"rope_kv_append: q_out must have heads, of an even width, got {tuple(q_out.shape)}"
        )
    for name, x, shape, dtype in (
        ("k_cache", k_cache, (B, S, K, E), q_out.dtype),
        ("v_cache", v_cache, (B, S, K, E), q_out.dtype),
        ("qkv", qkv, (B, T, (Q + 2 * K) * E), q_out.dtype),
        ("cos", cos, (cos.size(0), E // 2), torch.float32),
        ("sin", sin, (cos.size(0), E // 2), torch.float32),
        ("position", position, (B,), torch.int64),
        ("slot", slot, (B,), torch.int64),
    ):
        _check(name, x, shape, dtype, q_out)
    for name, x in (("q_out", q_out), ("k_cache", k_cache), ("v_cache", v_cache)):
        if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"rope_kv_append: {name} must have no zero stride, got {x.stride()}")
    if min(cos.size(0), S) < T:
        raise ValueError(
            f"rope_kv_append: qkv must have at most P = {cos.size(0)} and S = {S} tokens, got {T}"
        )


def _validate_norms(qkv: Tensor, E: int, norms: tuple[Tensor | None, ...], eps: float) -> None:
    if qkv.dtype not in DTYPES:
        raise ValueError(f"rope_kv_append: qkv must have one of {DTYPES}, got {qkv.dtype}")
    if not eps >= 0:
        raise ValueError(f"rope_kv_append: eps must be >= 0, got {eps}")
    given = [norm for norm in norms if norm is not None]
    if len(given) == 1:
        raise ValueError("rope_kv_append: q_norm and k_norm must both be given or neither, got one")
    for name, norm in zip(("q_norm", "k_norm"), given, strict=False):
        _check(name, norm, (E,), qkv.dtype, qkv)


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    if x.shape != shape:
        raise ValueError(f"rope_kv_append: {name} must be {shape}, got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"rope_kv_append: {name} must be {dtype}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"rope_kv_append: {name} must be on {like.device}, got {x.device}")
