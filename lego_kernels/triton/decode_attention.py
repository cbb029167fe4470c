"""Attention over a cache on the GPU: the slots are split over programs, and what they give merged.

One program takes the query heads of one key and value head, times the new tokens, as the rows of
its matrix products, so that keys and values are read once for all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M = 16  # queries of a program: a tensor core takes no fewer; 32 made float32 spill registers


# a slice of the lengths, or another length of cache, may not mean another compilation in the middle
# of a capture
@triton.jit(do_not_specialize=["kv_len_ptr", "workspace_ptr", "T", "S"])
def _decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    kv_len_ptr,
    out_ptr,
    workspace_ptr,
    scale,
    T,
    S,
    Hkv,
    group,
    E,
    split_slots,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    split = tl.program_id(1)
    num_blocks = tl.cdiv(T * group, BLOCK_M)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)  # row * stride can pass 2**31
    b, kv_head = row // Hkv, row % Hkv
    m = tl.program_id(0) % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    t, head = (m // group).to(tl.int64), kv_head * group + m % group  # [BLOCK_M]
    e = tl.arange(0, BLOCK_E)
    kept_m, kept_e = m[:, None] < T * group, e[None, :] < E
    q_rows = q_ptr + b * q_stride_b + t * q_stride_t + head * q_stride_h
    q = tl.load(q_rows[:, None] + e[None, :], mask=kept_m & kept_e, other=0.0)  # [BLOCK_M, BLOCK_E]

    # a length out of range cannot be reported from here, but must not lead out of the cache
    kv_len = tl.minimum(tl.maximum(tl.load(kv_len_ptr + b), 0), S)
    newest = kv_len - T + t  # [BLOCK_M], the last slot that a query sees
    start = split * split_slots
    stop = tl.minimum(start + split_slots, kv_len).to(tl.int32)
    most = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    k_head = k_ptr + b * k_stride_b + kv_head * k_stride_h
    v_head = v_ptr + b * v_stride_b + kv_head * v_stride_h
    for first in range(start, stop, BLOCK_S):
        slot = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        kept = (slot[:, None] < stop) & kept_e
        k = tl.load(k_head + slot[:, None] * k_stride_s + e[None, :], mask=kept, other=0.0)
        v = tl.load(v_head + slot[:, None] * v_stride_s + e[None, :], mask=kept, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_S]
        score = tl.where(slot[None, :] <= newest[:, None], score, -float("inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        # where every score is -inf, -inf - -inf would be NaN: weights of 0 are right
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weight = tl.exp(score - base[:, None])
        shrink = tl.exp(most - base)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision="ieee")
        most = higher

    if SPLITS == 1:
        # no slot seen, or -inf everywhere: zeros
        value = acc / tl.where(total == 0, 1.0, total)[:, None]
        out_rows = out_ptr + b * out_stride_b + t * out_stride_t + head * out_stride_h
        value = value.to(out_ptr.dtype.element_ty)
        tl.store(out_rows[:, None] + e[None, :], value, mask=kept_m & kept_e)
    elif start < stop:
        query = (b * T + t) * (Hkv * group) + head  # [BLOCK_M]
        partial = workspace_ptr + (query * SPLITS + split) * (E + 2)
        tl.store(partial, most, mask=m < T * group)
        tl.store(partial + 1, total, mask=m < T * group)
        tl.store(partial[:, None] + 2 + e[None, :], acc, mask=kept_m & kept_e)


@triton.jit(do_not_specialize=["kv_len_ptr", "workspace_ptr", "T", "S"])
def _merge_splits_kernel(
    workspace_ptr,
    kv_len_ptr,
    out_ptr,
    T,
    S,
    Hq,
    E,
    split_slots,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)  # query * SPLITS * (E + 2) can pass 2**31
    b, t, head = query // Hq // T, query // Hq % T, query % Hq
    split, e = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_E)
    # a split past the length wrote nothing
    kept = (split < SPLITS) & (split * split_slots < tl.minimum(tl.load(kv_len_ptr + b), S))
    partial = workspace_ptr + (query * SPLITS + split) * (E + 2)
    most = tl.load(partial, mask=kept, other=-float("inf"))  # [BLOCK_SPLITS]
    total = tl.load(partial + 1, mask=kept, other=0.0)
    acc = tl.load(
        partial[:, None] + 2 + e[None, :], mask=kept[:, None] & (e[None, :] < E), other=0.0
    )  # [BLOCK_SPLITS, BLOCK_E]
    base = tl.max(most, axis=0)
    weight = tl.exp(most - tl.where(base == -float("inf"), 0.0, base))
    whole = tl.sum(total * weight, axis=0)
    value = tl.sum(acc * weight[:, None], axis=0) / tl.where(whole == 0, 1.0, whole)
    out_row = out_ptr + b * out_stride_b + t * out_stride_t + head * out_stride_h
    tl.store(out_row + e, value.to(out_ptr.dtype.element_ty), mask=e < E)


def launch_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_len: Tensor,
    scale: float,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    """q, out [B, T, Hq, E], caches [B, S, Hkv, E], workspace [B * T * Hq, splits, E + 2] float32.

    Without a workspace the slots are not split.
    """
    B, T, Hq, E = q.shape
    S, Hkv = k_cache.shape[1:3]
    if E > 256:
        raise ValueError(f"decode_attention: E must be at most 256 on CUDA, got {E}")
    if q.numel() == 0:
        return
    group = Hq // Hkv
    splits = 1 if workspace is None else workspace.size(1)
    block_e = max(16, triton.next_power_of_2(E))
    block_s = min(64, 4096 // block_e)  # 4096 keys stay in registers at the widest too
    split_slots = triton.cdiv(triton.cdiv(S, splits), block_s) * block_s
    sizes = (T, S, Hkv, group, E, split_slots)
    strides = [stride for x in (q, k_cache, v_cache, out) for stride in x.stride()[:3]]
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(q):
        _decode_attention_kernel[(B * Hkv * triton.cdiv(T * group, BLOCK_M), splits)](
            *(q, k_cache, v_cache, kv_len, out, workspace, scale, *sizes, *strides),
            SPLITS=splits,
            BLOCK_M=BLOCK_M,
            BLOCK_S=block_s,
            BLOCK_E=block_e,
        )
        if splits > 1:
            _merge_splits_kernel[(B * T * Hq,)](
                *(workspace, kv_len, out, T, S, Hq, E, split_slots, *strides[-3:]),
                SPLITS=splits,
                BLOCK_SPLITS=triton.next_power_of_2(splits),
                BLOCK_E=block_e,
            )
