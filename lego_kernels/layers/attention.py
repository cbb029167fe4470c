"""Attention with rotary positions as a layer: cached, one launch from projection to cache."""

# Shape letters: B rows, T new tokens, D model width, Hq query and Hkv key-value heads, E width.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lego_kernels.layers.inference import require_inference
from lego_kernels.layers.kv_cache import CachedAttend, empty_attend
from lego_kernels.layers.linear import Linear
from lego_kernels.layers.rms_norm import RMSNorm
from lego_kernels.ops.rope_kv_append import rope_kv_append

Angles = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, tuple[Tensor, Tensor] | None], Tensor]


class Attention(nn.Module):
    """Grouped-query attention; drop-in for lego's, with its parameters.

    `in_proj` packs queries, keys and values in that order (queries alone with own_kv=False), then
    `o_proj`, and `q_norm` and `k_norm` with qk_norm.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        own_kv: bool = True,
        qk_norm: bool = False,
        bias: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.own_kv, self.qk_norm = head_dim, own_kv, qk_norm
        num_projected = num_heads + (2 * num_kv_heads if own_kv else 0)
        self.in_proj = Linear(dim, num_projected * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, dim, bias=False)
        if qk_norm:
            self.q_norm = RMSNorm(head_dim, eps)
            self.k_norm = RMSNorm(head_dim, eps)

    @classmethod
    def from_stock(cls, stock: Any) -> Attention:
        """Share the weights of an attention layer with the same attributes, as lego's is."""
        with torch.device("meta"):
            attention = cls(
                stock.in_proj.in_features,
                num_heads=stock.num_heads,
                num_kv_heads=stock.num_kv_heads,
                head_dim=stock.head_dim,
                own_kv=stock.own_kv,
                qk_norm=stock.qk_norm,
            )
        attention.in_proj = Linear.from_stock(stock.in_proj)
        attention.o_proj = Linear.from_stock(stock.o_proj)
        if stock.qk_norm:
            attention.q_norm = RMSNorm.from_stock(stock.q_norm)
            attention.k_norm = RMSNorm.from_stock(stock.k_norm)
        return attention.train(stock.training)

    def forward(self, x: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """x [B, T, D] to [B, T, D].

        angles are (cos, sin), float32 [B, T, E / 2] each, or [1, T, E / 2] for all rows alike.
        attend(q, kv) is the attention itself: KVCache.attend, or any function of queries
        [B, T, Hq, E] and keys and values [B, T, Hkv, E] (None with own_kv=False).
        """
        require_inference(self)
        packed = self.in_proj(x)
        if not self.own_kv:
            return self.o_proj(attend(self._rotated(packed, angles, "q_norm"), None).flatten(2))
        if isinstance(attend, CachedAttend):
            q = self._rotated(packed, angles, "q_norm", attend)
            return self.o_proj(attend(q, None).flatten(2))
        fresh = empty_attend(self.num_kv_heads, self.head_dim, like=x)
        q = self._rotated(packed, angles, "q_norm", fresh)
        return self.o_proj(attend(q, (fresh.k_cache, fresh.v_cache)).flatten(2))

    def project_kv(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """The keys and values of x alone, each [B, T, Hkv, E]; only with own_kv."""
        require_inference(self)
        start = self.num_heads * self.head_dim
        bias = None if self.in_proj.bias is None else self.in_proj.bias[start:]
        packed = nn.functional.linear(x, self.in_proj.weight[start:], bias)
        k, v = packed.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)
        return self.rotated_key(k, angles), v

    def rotated_key(self, k: Tensor, angles: Angles) -> Tensor:
        """A projected key [B, T, Hkv, E] as the cache holds it."""
        require_inference(self)
        return self._rotated(k.flatten(2), angles, "k_norm")

    def _rotated(
        self, packed: Tensor, angles: Angles, norm: str, cached: CachedAttend | None = None
    ) -> Tensor:
        """The queries of `packed`, normed and rotated; its keys and values go to the cache.

        Without a cache all of `packed` counts as queries.
        """
        B, T = packed.shape[:2]
        if cached is None:
            cached = empty_attend(0, self.head_dim, like=packed)
        num_kv = 2 * cached.k_cache.size(2)
        q = packed.new_empty(B, T, packed.size(2) // self.head_dim - num_kv, self.head_dim)
        cos, sin = (table.flatten(0, 1) for table in angles)
        # as tables, the angles hold T positions for every row, or T for all rows
        position = torch.arange(B, device=packed.device) * (T if len(cos) == B * T else 0)
        norms = {}
        if self.qk_norm:
            norms = {
                "q_norm": getattr(self, norm).weight,
                "k_norm": self.k_norm.weight,
                "eps": self.k_norm.eps,
            }
        rope_kv_append(
            q, cached.k_cache, cached.v_cache, packed, cos, sin, position, cached.slot, **norms
        )
        return q
