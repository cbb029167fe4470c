"""Attention of new tokens over a preallocated cache of keys and values.

Native: csrc/cpu/decode_attention.cpp; lego_kernels/triton/decode_attention.py on CUDA. Shape
letters: B rows, T new tokens, S cache slots, Hq query heads, Hkv key-value heads, E head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lego_kernels.library import LIB, TRITON_PROBLEM, define_op, refuse_grad
from lego_kernels.validation import DTYPES, check_dtype, check_tensor, check_written

# slots that one GPU program takes at least: writing and merging what fewer of them give would cost
# over a tenth of the time
SPLIT_SLOTS = 128
MAX_SPLITS = 64


# 1. Kernel: plain torch, for any device without one of its own
def _decode_attention_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_len: Tensor,
    scale: float,
    out: Tensor,
    workspace: Tensor | None,
) -> None:
    T, S = q.size(1), k_cache.size(1)
    # only where the data is on the host: elsewhere looking at it would make the host wait
    if kv_len.is_cpu:
        _check_lengths(kv_len, S)
    if q.numel() == 0:
        return
    kv_len = kv_len.clamp(0, S)[:, None]  # [B, 1]
    slot = torch.arange(S, device=q.device)
    # a mask alone lets a NaN through: 0 * NaN is NaN
    unfilled = (slot >= kv_len)[:, :, None, None]
    newest = kv_len - T + torch.arange(T, device=q.device)  # [B, T]
    visible = (slot <= newest[..., None])[:, None]  # [B, 1, T, S]
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_cache.masked_fill(unfilled, 0).transpose(1, 2),
        v_cache.masked_fill(unfilled, 0).transpose(1, 2),
        attn_mask=visible,
        scale=scale,
        enable_gqa=q.size(2) != k_cache.size(2),
    )
    # not every backend gives zeros to a query that sees nothing
    out.copy_(attended.masked_fill(~visible.any(-1, keepdim=True), 0).transpose(1, 2))


def _check_lengths(kv_len: Tensor, S: int) -> None:
    for row, length in enumerate(kv_len.tolist()):
        if not 0 <= length <= S:
            raise ValueError(
                f"decode_attention: kv_len must be in [0, {S}], got {length} in row {row}"
            )


# 2. Launcher: in C++, or in lego_kernels/triton/decode_attention.py


# 3. Registration: schema, plain torch, Triton; the native library adds its own
_op = define_op(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_len, float scale, "
    "Tensor(a!) out, Tensor(b!)? workspace) -> ()",
    _decode_attention_torch,
)
if not TRITON_PROBLEM:
    from lego_kernels.triton.decode_attention import launch_decode_attention

    LIB.impl("decode_attention", launch_decode_attention, "CUDA")


# 4. Public wrapper: validate, then dispatch
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_len: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Contract of lego.ops.decode_attention for float32, bfloat16 and float16, kv_len int64.

    `out`, of q's shape and dtype, takes the result, and `workspace` from
    `decode_attention_workspace` is what the GPU kernel may scribble on: given both, nothing is
    allocated. Neither may overlap an input. A query whose every score is -inf gives zeros.
    Raises: ValueError also if a last stride is not 1, and on CUDA if E > 256. RuntimeError if an
        input requires grad in grad mode. Off the CPU a length out of range is not reported, since
        reading it would make the host wait: it counts as the nearest in [0, S].
    """
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not _fit_at_first_sight(q, k_cache, v_cache, kv_len, out):
        _check_tensors(q, k_cache, v_cache, kv_len, out)
    if workspace is not None:
        _check_workspace(workspace, q)
    elif q.is_cuda:
        workspace = decode_attention_workspace(q, k_cache)
    refuse_grad("decode_attention", q, k_cache, v_cache)
    _op(q, k_cache, v_cache, kv_len, scale, out, workspace)
    return out


def decode_attention_workspace(q: Tensor, k_cache: Tensor) -> Tensor:
    """Return scratch [B * T * Hq, splits, E + 2] float32 for calls with inputs of these shapes.

    Per query and split of the slots: the largest score, the sum of the weights, and the weighted
    values. The splits depend on S alone, so that a row's bits do not depend on B. On the CPU the
    kernel needs no workspace.
    """
    B, T, Hq, E = q.shape
    splits = min(MAX_SPLITS, max(1, -(-k_cache.size(1) // SPLIT_SLOTS)))
    return q.new_empty(B * T * Hq, splits, E + 2, dtype=torch.float32)


def _fit_at_first_sight(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_len: Tensor, out: Tensor
) -> bool:
    """Whether every check would pass, for the layouts that decoding has; false may mean either.

    The checks one by one take 6 us, three times the attention over 128 slots of a small model.
    """
    if not q.dim() == k_cache.dim() == 4:
        return False
    B, _, Hq, E = q.shape
    rows, _, Hkv, width = k_cache.shape
    return (
        (rows, width) == (B, E)
        and Hkv > 0
        and Hq % Hkv == 0
        and v_cache.shape == k_cache.shape
        and out.shape == q.shape
        and q.dtype in DTYPES
        and q.dtype == k_cache.dtype == v_cache.dtype == out.dtype
        and q.device == k_cache.device == v_cache.device == kv_len.device == out.device
        and q.stride(3) == k_cache.stride(3) == v_cache.stride(3) == 1
        and out.is_contiguous()
        and kv_len.dtype == torch.int64
        and kv_len.shape == (B,)
        and kv_len.is_contiguous()
    )


def _check_tensors(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_len: Tensor, out: Tensor
) -> None:
    if q.dim() != 4 or k_cache.dim() != 4:
        raise ValueError(
            "decode_attention: q and k_cache must have 4 dimensions, got "
            f"{tuple(q.shape)}, {tuple(k_cache.shape)}"
        )
    B, _, Hq, E = q.shape
    S, Hkv = k_cache.shape[1:3]
    if Hkv == 0 or Hq % Hkv != 0:
        raise ValueError(
            f"decode_attention: q must have a multiple of k_cache's {Hkv} heads, got {Hq}"
        )
    check_dtype("decode_attention", "q", q)
    check_tensor("decode_attention", "q", q, q.shape, like=q)
    check_tensor("decode_attention", "k_cache", k_cache, (B, S, Hkv, E), like=q)
    check_tensor("decode_attention", "v_cache", v_cache, (B, S, Hkv, E), like=q)
    check_tensor("decode_attention", "kv_len", kv_len, (B,), like=q, dtype=torch.int64)
    check_tensor("decode_attention", "out", out, q.shape, like=q)
    check_written("decode_attention", "out", out)


def _check_workspace(workspace: Tensor, q: Tensor) -> None:
    rows, E = q.shape[:-1].numel(), q.size(-1)
    splits = workspace.size(1) if workspace.dim() == 3 else 1
    shape = (rows, min(max(splits, 1), MAX_SPLITS), E + 2)
    check_tensor("decode_attention", "workspace", workspace, shape, like=q, dtype=torch.float32)
    if not workspace.is_contiguous():
        raise ValueError(
            f"decode_attention: workspace must be contiguous, got strides {workspace.stride()}"
        )
