"""Attention of new tokens over a preallocated cache."""

# Shape letters: B = rows, T = new tokens, S = cache slots, H = query heads, K = key/value heads,
# E = head width.

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(
    q_BTHE: Tensor, k_cache_BSKE: Tensor, v_cache_BSKE: Tensor, kv_len_B: Tensor, *, scale: float
) -> Tensor:
    """Return [B, T, H, E]: each query attends to its row of the cache, causally in the chunk.

    The caches already hold the T new tokens: kv_len_B (int64, in [0, S]) counts them, and token t
    sees slots [0, kv_len - T + t]. H is a multiple of K; head h reads key/value head h // (H / K).
    A query that sees no slot gives zeros. Slots past kv_len are never read, whatever they hold; but
    a value of a later new token that is not finite may reach the earlier ones of its chunk.
    Raises: ValueError if the shapes do not fit together or a length is out of range.
    """
    _check_shapes(q_BTHE, k_cache_BSKE, v_cache_BSKE)
    B, T, H, _ = q_BTHE.shape
    S, K = k_cache_BSKE.shape[1:3]
    if kv_len_B.shape != (B,):
        raise ValueError(f"decode_attention: kv_len must be [{B}], got {tuple(kv_len_B.shape)}")
    if B == 0:
        return torch.empty_like(q_BTHE)
    lengths = kv_len_B.tolist()
    shortest, longest = min(lengths), max(lengths)
    if shortest < 0 or longest > S:
        raise ValueError(
            f"decode_attention: kv_len must be in [0, {S}], got {shortest} to {longest}"
        )
    k_BSKE, v_BSKE = k_cache_BSKE[:, :longest], v_cache_BSKE[:, :longest]
    if shortest < longest:
        # a mask alone lets a NaN through: 0 * NaN is NaN
        unfilled_BS = torch.arange(longest, device=kv_len_B.device) >= kv_len_B[:, None]
        k_BSKE = k_BSKE.masked_fill(unfilled_BS[..., None, None], 0)
        v_BSKE = v_BSKE.masked_fill(unfilled_BS[..., None, None], 0)
    out = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        attn_mask=_visible(kv_len_B, T, longest),
        scale=scale,
        enable_gqa=H != K,
    )
    return out.transpose(1, 2)


def _check_shapes(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    fits = q.dim() == k_cache.dim() == 4 and v_cache.shape == k_cache.shape
    if fits:
        B, _, H, E = q.shape
        K = k_cache.size(2)
        fits = k_cache.size(0) == B and k_cache.size(3) == E and K > 0 and H % K == 0
    if not fits:
        raise ValueError(
            "decode_attention: caches must be [B, S, K, E] for q [B, T, H, E] with H a multiple "
            f"of K, got q {tuple(q.shape)}, k {tuple(k_cache.shape)}, v {tuple(v_cache.shape)}"
        )


def _visible(kv_len_B: Tensor, num_new: int, num_slots: int) -> Tensor | None:
    """[B, 1, T, S], true where a query may look; None where every query sees every slot."""
    if num_new == 1 and len(kv_len_B) == 1:
        return None
    token_T = torch.arange(num_new, device=kv_len_B.device)
    slot_S = torch.arange(num_slots, device=kv_len_B.device)
    last_BT = kv_len_B[:, None] - num_new + token_T
    return (slot_S <= last_BT[..., None])[:, None]
