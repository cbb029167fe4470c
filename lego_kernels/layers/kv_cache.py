"""Preallocated keys and values: appended in place, attended to where they lie."""

# Shape letters: L layers, B rows, T new tokens, S slots, Hq query and Hkv key-value heads, E width.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lego_kernels.ops.decode_attention import decode_attention
from lego_kernels.ops.kv_append import kv_append


@dataclass(frozen=True)
class CachedAttend:
    """Attention of T new tokens over one layer's cache, at slots slot .. slot + T - 1."""

    k_cache: Tensor  # [B, S, Hkv, E]
    v_cache: Tensor
    slot: Tensor  # int64 [B]

    def __call__(self, q: Tensor, kv: tuple[Tensor, Tensor] | None) -> Tensor:
        """q [B, T, Hq, E] to [B, T, Hq, E]; keys and values that come along are appended first."""
        if kv is not None:
            kv_append(self.k_cache, self.v_cache, *kv, self.slot)
        kv_len = self.slot + q.size(1)
        scale = q.size(3) ** -0.5
        return decode_attention(q, self.k_cache, self.v_cache, kv_len, scale=scale)


class KVCache:
    """Keys and values of `num_layers` layers, k and v [L, B, S, Hkv, E]; drop-in for lego's.

    A slot is a place, not a position: keys are rotated before they are stored.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k = k
        self.v = v

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        num_rows: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        like: Tensor,
    ) -> KVCache:
        """A cache of zeros with the dtype and device of `like`."""
        shape = (num_layers, num_rows, num_slots, num_kv_heads, head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape))

    def rows(self, rows: slice) -> KVCache:
        """A view of adjacent rows: what is appended to it lands here."""
        return KVCache(self.k[:, rows], self.v[:, rows])

    def keep(self, rows: Tensor) -> KVCache:
        """A new cache that holds the given rows alone, in that order."""
        return KVCache(self.k[:, rows], self.v[:, rows])

    def append(self, layer: int, kv: tuple[Tensor, Tensor], slot: Tensor) -> None:
        """Write the T tokens of kv, each [B, T, Hkv, E], to slots slot .. slot + T - 1."""
        kv_append(self.k[layer], self.v[layer], *kv, slot)

    def attend(self, layer: int, slot: Tensor) -> CachedAttend:
        """Attention of new tokens at slots from `slot`, int64 [B], over everything up to them."""
        return CachedAttend(self.k[layer], self.v[layer], slot)


def empty_attend(num_heads: int, head_dim: int, *, like: Tensor) -> CachedAttend:
    """An unfilled cache with as many slots as `like` [B, T, ...] has tokens."""
    B, T = like.shape[:2]
    k_cache, v_cache = like.new_empty(2, B, T, num_heads, head_dim)
    return CachedAttend(k_cache, v_cache, torch.zeros(B, dtype=torch.int64, device=like.device))
