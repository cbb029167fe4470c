"""Keys and values: of the tokens at hand, or in a preallocated cache."""

# Shape letters: L = layers, B = rows, T = new tokens, S = cache slots, H = query heads,
# K = key/value heads, E = head width.

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from lego.ops.decode_attention import decode_attention
from lego.ops.kv_append import kv_append


class Attend(Protocol):
    """What an attention layer asks for once it has its queries (and perhaps keys and values)."""

    def __call__(self, q_BTHE: Tensor, kv: tuple[Tensor, Tensor] | None) -> Tensor: ...


def attend_within(q_BTHE: Tensor, kv: tuple[Tensor, Tensor] | None) -> Tensor:
    """Causal attention among the T tokens at hand, without a cache: [B, T, H, E]."""
    assert kv is not None, "attend_within needs keys and values"
    k_BTKE, v_BTKE = kv
    out = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BTKE.transpose(1, 2),
        v_BTKE.transpose(1, 2),
        is_causal=True,
        enable_gqa=q_BTHE.size(2) != k_BTKE.size(2),
    )
    return out.transpose(1, 2)


class KVCache:
    """Preallocated keys and values of `num_layers` layers: k and v are [L, B, S, K, E].

    A slot is a place, not a position: keys are rotated before they are stored, so a token keeps
    its absolute position wherever it lies.
    """

    def __init__(self, k_LBSKE: Tensor, v_LBSKE: Tensor) -> None:
        self.k = k_LBSKE
        self.v = v_LBSKE

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

    def keep(self, row_R: Tensor) -> KVCache:
        """A new cache that holds the given rows alone, in that order."""
        return KVCache(self.k[:, row_R], self.v[:, row_R])

    def append(self, layer: int, kv: tuple[Tensor, Tensor], slot_B: Tensor) -> None:
        """Write the T tokens of kv, each [B, T, K, E], to slots slot_B .. slot_B + T - 1."""
        kv_append(self.k[layer], self.v[layer], kv[0], kv[1], slot_B)

    def attend(self, layer: int, slot_B: Tensor) -> Attend:
        """Attention of T new tokens at slots slot_B .. slot_B + T - 1 over everything up to them.

        Keys and values that come with the queries are appended first; without any, the cache
        holds them already.
        """

        def attend(q_BTHE: Tensor, kv: tuple[Tensor, Tensor] | None) -> Tensor:
            if kv is not None:
                self.append(layer, kv, slot_B)
            kv_len_B = slot_B + q_BTHE.size(1)
            scale = q_BTHE.size(3) ** -0.5
            return decode_attention(q_BTHE, self.k[layer], self.v[layer], kv_len_B, scale=scale)

        return attend
