"""Split packed QKV, QK-norm, rotate, append to the caches: one launch, no copy of a cache.

Native: csrc/cpu/rope_kv_append.cpp, csrc/cuda/rope_kv_append.cu. Shape letters: B rows, T new
tokens, S cache slots, P positions in the tables, Hq query heads, Hkv key-value heads, E head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lego_kernels.library import define_op, refuse_grad
from lego_kernels.ops.kv_append import _kv_append_torch
from lego_kernels.validation import DTYPES, check_dtype, check_tensor, check_written


# 1. Kernel: plain torch, for any device without a native one
def _rope_kv_append_torch(
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    slot: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> None:
    T, Hq, E, Hkv = qkv.size(1), q_out.size(2), q_out.size(3), k_cache.size(2)
    last_position, last_slot = cos.size(0) - T, k_cache.size(1) - T
    bad_position = (position < 0) | (position > last_position)  # [B]
    # only where the data is on the host: elsewhere looking at it would make the host wait
    if position.is_cpu:
        _refuse_rows("position", position, bad_position, f"in [0, P - T = {last_position}]")
        _refuse_rows("slot", slot, slot > last_slot, f"at most S - T = {last_slot}")
    if qkv.numel() == 0:
        return
    written = ~bad_position & (slot <= last_slot)  # [B]
    q, k, v = qkv.unflatten(2, (Hq + 2 * Hkv, E)).split((Hq, Hkv, Hkv), dim=2)
    if q_norm is not None and k_norm is not None:
        q, k = F.rms_norm(q, (E,), q_norm, eps), F.rms_norm(k, (E,), k_norm, eps)
    row = (position * written)[:, None] + torch.arange(T, device=qkv.device)  # of the tables [B, T]
    cos, sin = cos[row].unsqueeze(2), sin[row].unsqueeze(2)  # [B, T, 1, E / 2]
    q_out.copy_(torch.where(written[:, None, None, None], _rotated(q, cos, sin), q_out))
    _kv_append_torch(k_cache, v_cache, _rotated(k, cos, sin), v, torch.where(written, slot, -1))


def _refuse_rows(name: str, values: Tensor, bad: Tensor, rule: str) -> None:
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"rope_kv_append: {name} must be {rule}, got {values[row]} in row {row}")


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


# 2. Launcher: in C++, since there is nothing to allocate


# 3. Registration: schema, plain torch; the native libraries add theirs
_op = define_op(
    "rope_kv_append(Tensor(a!) q_out, Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor qkv, "
    "Tensor cos, Tensor sin, Tensor position, Tensor slot, Tensor? q_norm, Tensor? k_norm, "
    "float eps) -> ()",
    _rope_kv_append_torch,
)


# 4. Public wrapper: validate, then dispatch
def rope_kv_append(
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    slot: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-5,
) -> None:
    """Contract of lego.ops.rope_kv_append for float32, bfloat16 and float16, with limits.

    Raises: ValueError also if a last stride, other than that of position or slot, is not 1.
        RuntimeError if an input requires grad in grad mode. Off the CPU a position or slot out of
        range is not reported, since reading it would make the host wait: of that row neither the
        queries nor the keys and values are written.
    """
    if not _is_usual(q_out, k_cache, v_cache, qkv, cos, sin, position, slot):
        _validate(q_out, k_cache, v_cache, qkv, cos, sin, position, slot)
    _validate_norms(q_out, q_norm, k_norm, eps)
    norms = () if q_norm is None or k_norm is None else (q_norm, k_norm)
    refuse_grad("rope_kv_append", q_out, k_cache, v_cache, qkv, cos, sin, *norms)
    _op(q_out, k_cache, v_cache, qkv, cos, sin, position, slot, q_norm, k_norm, eps)


def _is_usual(
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    slot: Tensor,
) -> bool:
    """Whether _validate would surely pass: it takes 15 us, more than the rest of a decode call."""
    q_shape, cache_shape, table_shape = q_out.shape, k_cache.shape, cos.shape
    if not (len(q_shape) == len(cache_shape) == 4 and len(table_shape) == 2):
        return False
    (B, T, Hq, E), (P, half), (S, Hkv) = q_shape, table_shape, cache_shape[1:3]
    dtype, device = q_out.dtype, q_out.device
    q_stride, k_stride, v_stride = q_out.stride(), k_cache.stride(), v_cache.stride()
    return (
        E == 2 * half > 0 < Hq
        and T <= P
        and T <= S
        and cache_shape == v_cache.shape == (B, S, Hkv, E)
        and qkv.shape == (B, T, (Hq + 2 * Hkv) * E)
        and sin.shape == table_shape
        and position.shape == slot.shape == (B,)
        and dtype in DTYPES
        and k_cache.dtype == v_cache.dtype == qkv.dtype == dtype
        and cos.dtype == sin.dtype == torch.float32
        and position.dtype == slot.dtype == torch.int64
        and k_cache.device == v_cache.device == qkv.device == device
        and cos.device == sin.device == position.device == slot.device == device
        and q_stride[3] == k_stride[3] == v_stride[3] == qkv.stride()[2] == 1
        and cos.stride()[1] == sin.stride()[1] == 1
        and not (0 in q_stride or 0 in k_stride or 0 in v_stride)
    )


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
    op = "rope_kv_append"
    for name, x, dim in (("q_out", q_out, 4), ("k_cache", k_cache, 4), ("cos", cos, 2)):
        if x.dim() != dim:
            raise ValueError(f"{op}: {name} must have {dim} dimensions, got {tuple(x.shape)}")
    (B, T, Hq, E), (S, Hkv), P = q_out.shape, k_cache.shape[1:3], cos.size(0)
    if E == 0 or E % 2 or Hq == 0:
        raise ValueError(f"{op}: q_out must have heads, of an even width, got {tuple(q_out.shape)}")
    check_dtype(op, "q_out", q_out)
    check_tensor(op, "q_out", q_out, q_out.shape, like=q_out)
    check_tensor(op, "k_cache", k_cache, (B, S, Hkv, E), like=q_out)
    check_tensor(op, "v_cache", v_cache, (B, S, Hkv, E), like=q_out)
    check_tensor(op, "qkv", qkv, (B, T, (Hq + 2 * Hkv) * E), like=q_out)
    for name, x in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, x, (P, E // 2), like=q_out, dtype=torch.float32)
    for name, x in (("position", position), ("slot", slot)):
        if x.shape != (B,):
            raise ValueError(f"{op}: {name} must be {(B,)}, got {tuple(x.shape)}")
        # their stride is free: one number is read at a time
        check_tensor(op, name, x[:1], x[:1].shape, like=q_out, dtype=torch.int64)
    for name, x in (("q_out", q_out), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_written(op, name, x)
    if T > min(P, S):
        raise ValueError(f"{op}: qkv must have at most P = {P} and S = {S} tokens, got {T}")


def _validate_norms(
    q_out: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float
) -> None:
    if not eps >= 0:
        raise ValueError(f"rope_kv_append: eps must be >= 0, got {eps}")
    if q_norm is None and k_norm is None:
        return
    if q_norm is None or k_norm is None:
        raise ValueError("rope_kv_append: q_norm and k_norm must both be given or neither, got one")
    check_tensor("rope_kv_append", "q_norm", q_norm, q_out.shape[3:], like=q_out)
    check_tensor("rope_kv_append", "k_norm", k_norm, q_out.shape[3:], like=q_out)
