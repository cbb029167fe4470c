"""The two blocks of a decoder as a fixed sequence of ops, each writing to memory that it is given.

So a CUDA graph can hold them: nothing is allocated, and nothing read on the host. On the CPU the
bits are those of layers.py. Shape letters: B rows, T new tokens of each, N = B * T, L and U lower
and upper layers, S slots, D width, F hidden, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lego_kernels.decoder.weights import DecoderWeights, LayerWeights
from lego_kernels.ops.decode_attention import decode_attention, decode_attention_workspace
from lego_kernels.ops.linear_small import MAX_ROWS, linear_small
from lego_kernels.ops.rms_norm import rms_norm
from lego_kernels.ops.rope_kv_append import rope_kv_append
from lego_kernels.ops.swiglu import swiglu


class Buffers:
    """What T new tokens of each of B rows pass through; h [N, D] holds their states."""

    def __init__(self, weights: DecoderWeights, B: int, T: int, num_slots: int) -> None:
        like, D, F, N = weights.embedding, weights.dim, weights.hidden_dim, B * T
        H, K, E = weights.num_heads, weights.num_kv_heads, weights.head_dim
        self.shape = (B, T)
        self.h, self.normed, self.out = (like.new_zeros(N, D) for _ in range(3))
        self.heads = like.new_zeros(N, (H + 2 * K) * E)
        self.q, self.attended = (like.new_zeros(B, T, H, E) for _ in range(2))
        self.gate_up, self.inner = like.new_zeros(N, 2 * F), like.new_zeros(N, F)
        self.no_slot = torch.full((B,), -1, dtype=torch.int64, device=like.device)
        self.workspace: Tensor | None = None
        if like.is_cuda:
            cache = like.new_empty(0).expand(B, num_slots, 0)
            self.workspace = decode_attention_workspace(self.q, cache)


class KVBuffers:
    """What `num_states` exit states of each of B rows pass through to the upper caches.

    rope_kv_append takes at least one query head before a layer's keys and values. So `kv` has E
    columns before the K and V of all layers: what lies before a layer's keys passes for its query,
    and the result of that is not read.
    """

    def __init__(self, weights: DecoderWeights, B: int, num_states: int) -> None:
        like, N, E = weights.embedding, B * num_states, weights.head_dim
        self.shape = (B, num_states)
        self.normed = like.new_zeros(N, weights.dim)
        width = len(weights.upper) * 2 * weights.num_kv_heads * E
        self.kv = like.new_zeros(N, E + width)
        self.query = like.new_zeros(B, num_states, 1, E)


class DeviceLayers:
    """Both blocks over caches of their own, [L, B, S, K, E] and [U, B, S, K, E].

    num_slots counts padding too, of caches and rotary tables alike.
    """

    def __init__(self, weights: DecoderWeights, num_rows: int, num_slots: int) -> None:
        self._weights = weights
        shape = (num_rows, num_slots, weights.num_kv_heads, weights.head_dim)
        self._lower_caches, self._upper_caches = (
            [weights.embedding.new_zeros(len(layers), *shape) for _ in "kv"]
            for layers in (weights.lower, weights.upper)
        )
        self._cos, self._sin = (_with_rows(x, num_slots) for x in (weights.cos, weights.sin))
        # rounded as the native layers round it, in float32
        self._scale = float(np.float32(1) / np.sqrt(np.float32(weights.head_dim)))

    def lower(self, buffers: Buffers, rows: slice, position: Tensor, length: Tensor) -> None:
        """Take `h` through the lower block. position, length int64 [B]: of the first new token, and
        of the row with all of them."""
        self._run(self._weights.lower, self._lower_caches, True, buffers, rows, position, length)

    def upper(self, buffers: Buffers, rows: slice, position: Tensor, length: Tensor) -> None:
        """Take `h` through the upper block, over K and V that upper_kv made, if that makes them."""
        own_kv = self._weights.upper_kv is None
        self._run(self._weights.upper, self._upper_caches, own_kv, buffers, rows, position, length)

    def upper_kv(self, buffers: KVBuffers, rows: slice, states: Tensor, position: Tensor) -> None:
        """Append K and V of every upper layer from exit states [N, D], from `position` [B] on."""
        w, E = self._weights, self._weights.head_dim
        assert w.upper_kv is not None
        rms_norm(states, w.upper_kv.norm, eps=w.eps, out=buffers.normed)
        linear(buffers.normed, w.upper_kv.proj, w.upper_kv.bias, out=buffers.kv[:, E:])
        k_caches, v_caches = self._upper_caches
        width = 2 * w.num_kv_heads * E
        for index, layer in enumerate(w.upper):
            heads = buffers.kv[:, index * width : (index + 1) * width + E]
            rope_kv_append(
                buffers.query,
                k_caches[index, rows],
                v_caches[index, rows],
                heads.unflatten(0, buffers.shape),
                self._cos,
                self._sin,
                position,
                position,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                eps=w.eps,
            )

    def _run(
        self,
        layers: Sequence[LayerWeights],
        caches: list[Tensor],
        own_kv: bool,
        buffers: Buffers,
        rows: slice,
        position: Tensor,
        length: Tensor,
    ) -> None:
        b, eps = buffers, self._weights.eps
        for index, layer in enumerate(layers):
            if index == 0:
                rms_norm(b.h, layer.attention_norm, eps=eps, out=b.normed)
            else:
                rms_norm(b.out, layer.attention_norm, eps=eps, residual=b.h, out=b.normed)
            k_cache, v_cache = (cache[index, rows] for cache in caches)
            self._project_heads(b, layer, k_cache, v_cache, position, own_kv)
            decode_attention(
                b.q,
                k_cache,
                v_cache,
                length,
                scale=self._scale,
                out=b.attended,
                workspace=b.workspace,
            )
            linear(b.attended.view(len(b.h), -1), layer.o_proj, None, out=b.out)
            rms_norm(b.out, layer.mlp_norm, eps=eps, residual=b.h, out=b.normed)
            linear(b.normed, layer.gate_up, None, out=b.gate_up)
            swiglu(b.gate_up, out=b.inner)
            linear(b.inner, layer.down, None, out=b.out)
        b.h.add_(b.out)

    def _project_heads(
        self,
        b: Buffers,
        layer: LayerWeights,
        k_cache: Tensor,
        v_cache: Tensor,
        position: Tensor,
        own_kv: bool,
    ) -> None:
        # without K and V of its own the layer fills the columns of the queries alone
        heads = b.heads if own_kv else b.heads[:, : len(layer.in_proj)]
        linear(b.normed, layer.in_proj, layer.in_bias, out=heads)
        rope_kv_append(
            b.q,
            k_cache,
            v_cache,
            b.heads.unflatten(0, b.shape),
            self._cos,
            self._sin,
            position,
            position if own_kv else b.no_slot,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=self._weights.eps,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    """out = x @ weight^T + bias, in the bits of the native layers on the CPU (a bias in float32).

    No addmm: cuBLASLt, which it calls, may take its workspace from the allocator, and a captured
    branch must not allocate.
    """
    if x.is_cpu:
        for start in range(0, len(x), MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            linear_small(x[rows], weight, out=out[rows])
    else:
        torch.mm(x, weight.t(), out=out)
    if bias is not None:
        out.add_(bias)


def _with_rows(table: Tensor, num_rows: int) -> Tensor:
    """The first rows of a table, and zeros where it ends before."""
    padding = max(0, num_rows - table.size(0))
    return torch.cat((table[:num_rows], table.new_zeros(padding, table.size(1))))
